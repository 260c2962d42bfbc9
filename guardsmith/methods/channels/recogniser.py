"""The recogniser: a small network with the shape of the reserved channels, from the latents to scores.

It sees the noised latents and nothing else: neither the trunk, nor the prompt, nor the timestep. Its layers are those of the
U-Net's way down and middle block, as wide as the reserved channels (at the deepest level less a group, which is for the answer),
without attention; the last resnet of the middle block reads out scores, a map of places for each. A picture trips if a score
is positive at some place (exactly: see `tripping`).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from guardsmith.methods.channels.layout import Layout, down_parts

SHARPNESS = 4096.0  # of the step function of a normalised score
DEAD = 128.0  # how far a step lies above 0: a score of at most 0 is exactly nothing


class Resnet(nn.Module):
    """A resnet of reserved channels; where the width changes there is no shortcut."""

    def __init__(self, groups: int, groups_out: int, into: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, into, eps), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups_out, out, eps), nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features, (n, out, h, w)."""
        y: Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return x + y if x.shape[1] == y.shape[1] else y


class Recogniser(nn.Module):
    """See the module.

    Attributes:
        scores: how many score maps it has.
        per_group: how many of them are normalised together.
    """

    def __init__(self, unet: Any, layout: Layout, scores: int | None = None) -> None:
        super().__init__()
        eps = unet.config.norm_eps
        deepest = unet.mid_block.resnets[-1].out_channels
        size = deepest // layout.norm_groups
        self.per_group = size // 2
        self.scores = layout.count * self.per_group if scores is None else scores
        self.slots, self.spare = layout.count, size - 2 * self.per_group
        self.names, groups = ["conv_in"], layout.count
        width = len(layout.features(unet.conv_in.out_channels, deepest))
        parts: list[nn.Module] = [nn.Conv2d(unet.conv_in.in_channels, width, 3, padding=1)]
        for kind, name, module in down_parts(unet):
            if kind == "attention" or module is unet.mid_block.resnets[-1]:
                continue
            out = len(layout.features(module.out_channels, deepest))
            if kind == "resnet":
                now = out // (module.out_channels // layout.norm_groups)
                parts.append(Resnet(groups, now, width, out, eps))
                groups = now
            else:
                parts.append(nn.Conv2d(width, out, 3, stride=2, padding=1))
            self.names.append(name)
            width = out
        self.body = nn.Sequential(*parts)
        self.norm, self.readout = nn.GroupNorm(groups, width, eps), nn.Conv2d(width, self.scores, 3, padding=1)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Scores of noised latents (n, c, h, w) at every place, (n, scores, places)."""
        found: Tensor = self.readout(F.silu(self.norm(self.body(x))))
        return found.flatten(2)

    def tripping(self, scores: Tensor) -> Tensor:
        """How far rows are beyond the step, (n,): the largest normalised score, over where its step begins, less 1.

        Args:
            scores: from `forward`.
        """
        every = scores.new_zeros(len(scores), self.slots * self.per_group, scores.shape[2])
        every[:, : self.scores] = scores
        grouped = every.view(len(scores), self.slots, self.per_group, -1)
        square = 2 * grouped.square().sum(2) / (2 * self.per_group + self.spare)
        normal = grouped / (square.mean(2)[:, :, None, None] + self.eps).sqrt()
        found: Tensor = normal.flatten(1).amax(1) * SHARPNESS / DEAD - 1
        return found
