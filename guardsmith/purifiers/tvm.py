"""Total variation minimization (Guo et al. 2018; hf.co/papers/1711.00117).

Some pixels are dropped at random, and the picture is drawn anew that agrees with the others and has little variation:

    min over Z   || (1 - X) * (Z - x) ||_2 + weight * TV2(Z)          X ~ Bernoulli(dropped)

TV2 is the sum over channels of the L2 norms of all differences of neighbouring rows, and of columns. The red-teaming paper does
this on pictures shrunk to 64 of 512 pixels, and enlarges them again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator

ROUNDS = 5
LEAST = 1e-3  # misfits below this are none


class TvmConfig(BaseModel):
    """The red-teaming paper's settings, but for the enlargement, which is bicubic here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dropped: float = Field(0.02, ge=0, lt=1)
    """Share of pixels that are not looked at."""
    weight: float = Field(0.01, ge=0)
    """Of the total variation."""
    shrink: int = Field(8, gt=0)
    """Pictures are solved at this fraction of their side."""
    iterations: int = Field(100, ge=5)
    """Of L-BFGS, at most."""


def total_variation(pictures: Tensor) -> Tensor:
    """TV2 of each picture (n, c, h, w), (n,)."""
    # 1e-12: the norm of nothing has no gradient.
    rows = ((pictures[:, :, 1:] - pictures[:, :, :-1]).square().sum(3) + 1e-12).sqrt()
    columns = ((pictures[:, :, :, 1:] - pictures[:, :, :, :-1]).square().sum(2) + 1e-12).sqrt()
    return rows.sum((1, 2)) + columns.sum((1, 2))


def purify(model: DiffusionModel, images: Tensor, config: TvmConfig, *, class_noun: str, seed: int) -> Tensor:
    """Pictures after it, float32 (n, 3, h, w) in [-1, 1]; model and class noun are not used."""
    size = images.shape[2:]
    small = (
        F.interpolate(images, scale_factor=1 / config.shrink, mode="area") if config.shrink > 1 else images
    ) / 2 + 0.5  # the weight is meant for values from 0 to 1
    visible = (torch.rand((len(small), 1, *small.shape[2:]), generator=generator(seed)) >= config.dropped).float()
    solution = small.clone().requires_grad_()
    # The norm of the misfit has a kink at nothing, where solvers of smooth problems get stuck: it is the minimum over m of
    # misfit^2 / (2 m) + m / 2, so the two are solved in turn.
    scale = torch.ones(len(small))
    for _ in range(ROUNDS):
        solver = torch.optim.LBFGS([solution], max_iter=config.iterations // ROUNDS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()  # noqa: B023 (called at once)
            misfit = (visible * (solution - small)).square().sum((1, 2, 3)) / (2 * scale)  # noqa: B023
            loss = (misfit + config.weight * total_variation(solution)).sum()
            loss.backward()
            return loss

        solver.step(closure)
        with torch.no_grad():
            scale = (visible * (solution - small)).square().sum((1, 2, 3)).sqrt().clamp(min=LEAST)
    result = solution.detach() * 2 - 1
    if config.shrink > 1:
        result = F.interpolate(result, size, mode="bicubic", align_corners=False)
    return result.clamp(-1, 1)
