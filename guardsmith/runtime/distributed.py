"""Several processes harden together, one on each accelerator or machine: `accelerate launch -m guardsmith harden ...`.

All of them draw the same rows; each sends its share of them through the network, and the predictions are put together again, so
every process sees what a single one would (`losses.predict`). Each backward pass gives the gradient of its own share, and these
are added up before a step (`training.optimizer_step`). So the weights stay the same everywhere, whatever a method does with the
predictions, and are those of one process up to rounding. The first process alone draws pictures, reads the clock and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from guardsmith.core.console import first_process, launched
from guardsmith.core.errors import RunFailed

PATIENCE = timedelta(days=2)  # how long the others wait while the first one draws and rehearses
BUCKET = 2**23  # numbers that are added up at a time
_alone = False


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes of a launcher work together; without a launcher nothing is different.

    Raises:
        RunFailed: another one of them has ended.
    """
    if launched() == 1:
        yield
        return
    dist.init_process_group(timeout=PATIENCE)
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


def world() -> int:
    """How many processes share the rows now."""
    return 1 if _alone or not dist.is_initialized() else int(dist.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process does all rows itself: for what only one of them does."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block by itself; then the others do, and find what it has written."""
    together_now = world() > 1
    if together_now and not first_process():
        dist.barrier()
    with alone():
        yield
    if together_now and first_process():
        dist.barrier()


def agreed(value: bool) -> bool:
    """What the first process says."""
    if world() == 1:
        return value
    said = torch.tensor([value])
    dist.broadcast(said, 0)
    return bool(said)


class _Whole(torch.autograd.Function):
    """Shares of all processes, one after the other; the gradient of a share is its part of the whole's, which all have."""

    @staticmethod
    def forward(context: Any, part: Tensor) -> Tensor:
        context.size = len(part)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        begin = dist.get_rank() * context.size
        return gradients[0][begin : begin + context.size]


def own_rows(count: int) -> Tensor | None:
    """Numbers of the rows of this process, as many as every other has (some twice where they do not come out even).

    Returns:
        int64 (k,), or `None` where there is only one process.
    """
    processes = world()
    if processes == 1:
        return None
    size = -(-count // processes)
    return torch.arange(dist.get_rank() * size, (dist.get_rank() + 1) * size) % count


def whole(part: Tensor, count: int) -> Tensor:
    """All rows, on every process, of which each has computed its own; gradients flow to these."""
    if world() == 1:
        return part
    rows: Tensor = _Whole.apply(part)  # type: ignore[no-untyped-call]
    return rows[:count]


def add_up(gradients: Iterable[Tensor | None]) -> None:
    """Replace gradients of a process's own rows, in place, by their sum over the processes; many at a time."""
    if world() == 1:
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
            for part, summed in zip(bucket, sums.split([part.numel() for part in bucket]), strict=True):
                part.copy_(summed.view_as(part))
            bucket = []
