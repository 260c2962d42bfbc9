"""Loss scaling for float16, where small gradients would be 0: what `torch.amp.GradScaler` does in diffusers' scripts.

The loss is multiplied by a large power of two, the gradients are divided by it before the step. Where one overflowed the step is
left out and the scale halved; after many steps without that it is doubled. `GradScaler` itself does not serve: it takes gradients
from an optimizer, whereas APDM sums them over a path first, and offloaded and sharded optimizers do not hold them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from guardsmith.core.errors import RunFailed

FIRST, GROWTH, BACKOFF, EVERY = 2.0**16, 2.0, 0.5, 2000  # GradScaler's defaults
LEAST = 2.0**-24  # below it gradients of usual losses are no numbers of float16 any more


class LossScale:
    """The scale of one optimizer's gradients.

    Args:
        enabled: whether the network computes in float16; without it nothing is scaled or left out.

    Attributes:
        state: scale, and steps since it last changed; float64 (2,) on the CPU, changed in place, to be saved with a training.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.state = torch.tensor([FIRST if enabled else 1.0, 0.0], dtype=torch.float64)

    @property
    def value(self) -> float:
        """What losses are multiplied by."""
        return float(self.state[0])

    def up(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.value if self.enabled else loss

    @torch.no_grad()
    def down(self, gradients: Iterable[Tensor | None]) -> None:
        """Divide gradients of scaled losses, in place."""
        if self.enabled:
            torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], 1 / self.value)

    def takes(self, norm: float) -> bool:
        """Whether a step is taken with gradients of this norm; adjusts the scale.

        Raises:
            RunFailed: gradients overflow however small the scale is.
        """
        if not self.enabled:
            return True
        fine = math.isfinite(norm)
        self.state[1] = self.state[1] + 1 if fine else 0
        if not fine:
            self.state[0] *= BACKOFF
        elif self.state[1] == EVERY:
            self.state[0] *= GROWTH
            self.state[1] = 0
        if self.value < LEAST:
            raise RunFailed("gradients are not finite in float16 at any scale; compute in bfloat16 or float32.")
        return fine
