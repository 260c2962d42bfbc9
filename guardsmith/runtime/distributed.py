"""Several processes harden together, one on each accelerator or machine: `accelerate launch -m guardsmith harden ...`.

All of them draw the same rows; each computes the predictions of its part of them, which are gathered again, so that every
process has what a single one would have (`diffusion.losses.predict`). Each backward pass gives the gradient of its own part, and
these are summed before a step (`training.loop.optimizer_step`). So the weights are the same everywhere, whatever a method does
with the predictions, and are those of one process up to rounding. Only the first process draws pictures and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from guardsmith.core.console import first_process, launched
from guardsmith.core.errors import RunFailed

WAIT = timedelta(days=2)  # how long the others wait while the first one draws pictures and simulates attacks
BUCKET = 2**23  # numbers that are summed at a time
_single = False


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, the processes of a launcher work together; without a launcher nothing is different.

    Raises:
        RunFailed: another one of them has ended.
    """
    if launched() == 1:
        yield
        return
    dist.init_process_group(timeout=WAIT)
    try:
        yield
        dist.barrier()
    except RuntimeError as error:
        if "peer" in str(error) or "gloo" in str(error).lower() or "nccl" in str(error).lower():
            raise RunFailed(
                "another process of this run has ended (killed, or out of memory?); run the same command again with --resume."
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes share the rows now; 1 inside of `single_process`."""
    return 1 if _single or not dist.is_initialized() else int(dist.get_world_size())


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process computes all rows itself, and `world_size` is 1."""
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process runs the block while the others wait; then they run it, and read what the first one has written."""
    several = world_size() > 1
    if several and not first_process():
        dist.barrier()
    with single_process():
        yield
    if several and first_process():
        dist.barrier()


def broadcast(value: bool) -> bool:
    """The first process's value, on every process."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value])
    dist.broadcast(tensor, 0)
    return bool(tensor)


def own_rows(count: int) -> Tensor | None:
    """Indices of the rows that this process computes: as many as every other, so that some are computed twice at the end.

    Args:
        count: of all rows.

    Returns:
        int64 (k,), or `None` where there is only one process.
    """
    processes = world_size()
    if processes == 1:
        return None
    size = -(-count // processes)
    return torch.arange(dist.get_rank() * size, (dist.get_rank() + 1) * size) % count


def all_gather(part: Tensor, count: int) -> Tensor:
    """The rows of all processes, on every process. Gradients flow to the process's own rows only.

    Every process has the same loss of all rows, so its own rows get their part of its gradient. `torch.distributed.nn.all_gather`
    would sum the gradients of that loss over the processes, which is too much by a factor of their number.

    Args:
        part: rows of this process, (k, ...), see `own_rows`.
        count: how many rows there are in all.
    """
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    parts[dist.get_rank()] = part
    return torch.cat(parts)[:count]


def all_reduce(gradients: Iterable[Tensor | None]) -> None:
    """Replace gradients, in place, by their sum over the processes; many at a time."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for gradient in (*gradients, None):
        if gradient is not None:
            bucket.append(gradient)
            if sum(part.numel() for part in bucket) < BUCKET:
                continue
        if bucket:
            sums = torch.cat([part.flatten() for part in bucket])
            dist.all_reduce(sums)
            for part, total in zip(bucket, sums.split([part.numel() for part in bucket]), strict=True):
                part.copy_(total.view_as(part))
            bucket = []
