"""Two processes with one thread each train these small networks faster than one process with two threads.

Start a script with `torchrun --nproc-per-node 2 script.py ...`; without torchrun it runs alone. Every process draws the
same batch and keeps its own slice, so the result does not depend on how many there are (beyond rounding).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", "0"))
COUNT = int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Join the other processes, if there are any; one thread each."""
    if COUNT > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")


def wait() -> None:
    """Until every process is here."""
    if COUNT > 1:
        dist.barrier()


def mine(batch: torch.Tensor) -> torch.Tensor:
    """This process's slice of the batch."""
    return batch[RANK::COUNT]


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    if COUNT == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= COUNT
    torch._foreach_copy_(
        gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    )
