"""The recogniser: a small network with the shape of the reserved channels, from the latents to scores.

It sees the noised latents and nothing else: neither the trunk, nor the prompt, nor the timestep. Its layers are those of the
U-Net's way down and middle block, as wide as the reserved channels (at the deepest level less a group, which is for the answer),
without attention; the last resnet of the middle block reads out scores, a map of places for each. A picture trips if a score
is positive at some place (exactly: see `tripping`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guardsmith.methods.tripwire.layout import Layout, down_parts

SHARPEST = 512.0
# Factor on normalised features: the larger, the less a gain or bias changes that training moves by some size.
STEEP = 4.0
LARGEST = 2.0**15  # float16 ends at twice that
REFERENCE = 2.0**5  # size of what the answer is measured against, large beside what a model that is merged in writes
DEAD = 128.0  # how far a step lies above 0: a score of at most 0 is exactly nothing


MAPS = 16  # random features of the latents that a drift is made of


def sharpness(size: int, places: int) -> float:
    """How steep the step function of a normalised score is: a power of two, with room for twice as many places in float16.

    Args:
        size: channels that are normalised together, scores and their negatives among them.
        places: of every channel.
    """
    return min(SHARPEST, 2.0 ** math.floor(math.log2(LARGEST / _highest(size, places))))


def answer_weight(size: int, places: int, scores: int) -> float:
    """Weight of every step in the answer, a power of two: even if every score of a place were on, the sum fits float16."""
    return 2.0 ** math.floor(math.log2(LARGEST / sharpness(size, places) / _highest(size, places) / math.sqrt(scores)))


def _highest(size: int, places: int) -> float:
    """The largest value that a normalised score can have."""
    return math.sqrt(size * places / 2)


class Drift:
    """Moves the stream, and what normalisations make of it, as training moves the reserved channels of a U-Net.

    What the trunk learns to write into them is the same in every picture to one half, since its activations have a mean far from
    zero, and differs from place to place and picture to picture to the other (measured: recipes/tripwire/NOTES.md). So every
    channel is moved by a constant and by a field that is made of random features of the latents. An optimizer whose steps have
    a fixed size moves gains and biases, which are few and small, by more of their size than any other weight.

    Args:
        size: largest deviation of the constants, and of the fields, over the stream's root mean square.
        norms: by how much gains and biases are moved at most.
        latents: noised latents of the rows, float32 (n, c, h, w).
        rng: of everything drawn.
    """

    def __init__(self, size: float, norms: float, latents: Tensor, rng: torch.Generator) -> None:
        self.size, self.norms, self.rng = size, norms, rng
        kernel = self._random(MAPS, latents.shape[1], 3, 3).to(latents) / math.sqrt(9 * latents.shape[1])
        self.maps = F.silu(F.conv2d(latents, kernel, self._random(MAPS).to(latents), padding=1))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng)

    def __call__(self, x: Tensor) -> Tensor:
        """The stream (n, c, h, w), moved by a random share of the size."""
        share = self.size * float(torch.rand((), generator=self.rng))
        maps = F.adaptive_avg_pool2d(self.maps, (x.shape[2], x.shape[3]))
        field = F.conv2d(maps, self._random(x.shape[1], MAPS, 3, 3).to(x), padding=1)
        field = field - field.mean((0, 2, 3), keepdim=True)
        move = self._random(1, x.shape[1], 1, 1).to(x) + field / field.square().mean().sqrt()
        moved: Tensor = x + share * x.detach().square().mean().sqrt() * move
        return moved

    def of_norm(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """What is to be added to a normalisation of the stream (n, c, h, w), as it is in the U-Net (`STEEP` included)."""
        gains, biases = (self.norms * (2 * torch.rand((1, x.shape[1], 1, 1), generator=self.rng) - 1) for _ in range(2))
        return F.group_norm(x, norm.num_groups, eps=norm.eps) * gains.to(x) + biases.to(x)


def activated(norm: nn.GroupNorm, x: Tensor, drift: Drift | None) -> Tensor:
    """A normalisation of features (n, c, h, w) and SiLU, as the U-Net computes it, under a drift or without."""
    y: Tensor = STEEP * norm(x)
    return F.silu(y if drift is None else y + drift.of_norm(norm, x))


class Resnet(nn.Module):
    """A resnet of reserved channels; where the width changes there is no shortcut."""

    def __init__(self, groups: int, groups_out: int, into: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, into, eps), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups_out, out, eps), nn.Conv2d(out, out, 3, padding=1)
        self.adds = into == out

    def between(self, x: Tensor, drift: Drift | None = None) -> Tensor:
        """What the first convolution gives, (n, out, h, w)."""
        y: Tensor = self.conv1(activated(self.norm1, x, drift))
        return y

    def forward(self, x: Tensor, drift: Drift | None = None) -> Tensor:
        """Features, (n, out, h, w)."""
        y: Tensor = self.conv2(activated(self.norm2, self.between(x, drift), drift))
        return x + y if self.adds else y


class Recogniser(nn.Module):
    """See the module.

    Attributes:
        scores: how many score maps it has.
        per_group: how many of them are normalised together.
        sizes: root mean square of the stream behind every part, as `measure` found it.
        largest: largest output of the first convolution of every part that is a resnet, else 0, and of the scores', likewise.
    """

    def __init__(self, unet: Any, layout: Layout, scores: int | None = None) -> None:
        super().__init__()
        eps = unet.config.norm_eps
        deepest = unet.mid_block.resnets[-1].out_channels
        size = deepest // layout.norm_groups
        self.per_group = size // 2
        # The last group is for what the answer is measured against.
        self.slots, self.spare = layout.downward[deepest] - 1, size - 2 * self.per_group
        self.scores = self.slots * self.per_group if scores is None else scores
        self.names, groups = ["conv_in"], layout.downward[unet.conv_in.out_channels]
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
        self.sizes, self.largest = [1.0] * len(parts), [1.0] * (len(parts) + 1)

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Note how large everything is for noised latents (n, c, h, w), as `sizes` and `largest`."""
        x = x.to(self.readout.weight.device)
        for number, part in enumerate(self.body):
            self.largest[number] = float(part.between(x).abs().max()) if isinstance(part, Resnet) else 0.0
            x = part(x)
            self.sizes[number] = float(x.square().mean().sqrt())
        self.largest[-1] = float(self._scores(x).abs().max())

    def forward(self, x: Tensor) -> Tensor:
        """Scores of noised latents (n, c, h, w) on any device at every place, (n, scores, places)."""
        return self._scores(self.body(x.to(self.readout.weight.device)))

    def scores_and_constancy(self, x: Tensor, drift: Drift) -> tuple[Tensor, Tensor]:
        """Scores, and the share of the stream that is the same in all rows, summed over the parts.

        Args:
            x: noised latents, (n, c, h, w).
            drift: that the scores are computed under.
        """
        x, constancy = x.to(self.readout.weight.device), []
        for part in self.body:
            x = part(x, drift) if isinstance(part, Resnet) else part(x)
            constancy.append(x.mean(0).square().mean() / x.square().mean())
            x = drift(x)
        return self._scores(x, drift), torch.stack(constancy).sum()

    def _scores(self, x: Tensor, drift: Drift | None = None) -> Tensor:
        scores: Tensor = self.readout(activated(self.norm, x, drift))
        return scores.flatten(2)

    def tripping(self, scores: Tensor) -> Tensor:
        """How far rows are beyond the step, (n,): the largest normalised score, over what is needed at every place, less 1.

        Args:
            scores: from `forward`.
        """
        every = scores.new_zeros(len(scores), self.slots * self.per_group, scores.shape[2])
        every[:, : self.scores] = scores
        grouped = every.view(len(scores), self.slots, self.per_group, -1)
        square = 2 * grouped.square().sum(2) / (2 * self.per_group + self.spare)
        normal = grouped / (square.mean(2)[:, :, None, None] + self.eps).sqrt()
        size, places = 2 * self.per_group + self.spare, scores.shape[2]
        weight = answer_weight(size, places, self.slots * self.per_group)
        needed = (DEAD + REFERENCE / weight) / sharpness(size, places)
        beyond: Tensor = normal.flatten(1).amax(1) / needed - 1
        return beyond
