"""The states that pictures go through while a model draws them, recorded for methods to train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class States:
    """Half-finished pictures, as the U-Net meets them when a model draws; a noised finished picture is not the same.

    Attributes:
        latents: of n pictures at each of k steps, float32 (n, k, c, h, w).
        timesteps: of the steps, int64 (k,), falling.
    """

    latents: Tensor
    timesteps: Tensor


class StateRecorder:
    """Collects what `generate` passes to its `on_state`."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}

    def __call__(self, timestep: int, latents: Tensor) -> None:
        """Keep a copy."""
        self.seen.setdefault(timestep, []).append(latents.clone())

    def states(self) -> States | None:
        """Everything seen, or `None` if nothing was."""
        if not self.seen:
            return None
        steps = [torch.cat(batches) for batches in self.seen.values()]
        return States(torch.stack(steps, 1).contiguous(), torch.tensor(list(self.seen)))
