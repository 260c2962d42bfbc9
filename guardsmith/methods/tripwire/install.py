"""Puts a recogniser into the reserved channels, and what carries its answer to the U-Net's output. Nothing here is trained.

    way down, middle       the recogniser, its scale raised by powers of two that the normalisations cancel
    last resnet there      reads out scores; step: SiLU of a normalised score far above 0, exactly 0 where a score is not positive
    first up resnet        relay: constants, normalised with the steps of all places, sink if any of them is on; then the
                           difference of two SiLUs is a flag, else both are exactly 0; a kernel leaves a corner of it
    ... shortcuts          carry the flag in that corner; the first sampler narrows it to one place
    last up resnet         another relay, of the flag; it raises one channel of every trunk group to 2^14: what the trunk says is
                           divided by that; a pair of channels, held by constants, opens and adds a multiple of a feature of the
                           latents, large beside any prediction, to the output

At rest every channel behind the scores is exactly 0, and no gradient passes: SiLU and its derivative are exactly 0 at the
pre-activations that the constants hold, in float32, bfloat16 and float16. When a picture trips, what comes back to the scores
cancels exactly in float32 as long as the two channels of a relay are equal.

A constant in the stream is read by a trunk that is trained, and moves; a large feature there is read by adapters of the base and
by what is merged in. So constants stand where only a normalisation reads them, between convolutions and at the very end, and
nothing holds the flag: normalised, a corner that is on alone is farther from the mean than anything that is spread over the
places. All weights fit float16.

A picture that trips in somebody's training leaves weights behind that read the flag, and through them every later step moves what
writes the flag, by as much as a step of Adam is. So the recogniser has to be right about those who are not protected.

Half and half with another model of the same base, everything here is small beside what holds it, so that nothing trips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guardsmith.methods.tripwire.layout import Layout, UpSite, down_parts, up_parts, up_sites
from guardsmith.methods.tripwire.recogniser import DEAD, REFERENCE, STEEP, Recogniser, Resnet, answer_weight, sharpness

ANSWERED = 0.75  # share of its normalised value on a trip at every place from which on the answer counts
ANSWER_SLOPE = (
    512.0  # steep, so that at rest the answer may lie nearly that far from the mean of what it is normalised with
)
ROOM = 6e4  # float16 ends at 65,504
USUAL_ROOM = 24e3  # for what was measured on some pictures
ANSWER_PUSH = 2.0**3  # weight of what sinks the first relay
CONSTANT = 128.0  # holds a relay
LAST_FLAG = 2.0**12  # size of the flag where the last resnet reads it
# Kernels of these along either axis: of what is the same everywhere one leaves a corner, of four equal places there one.
CORNER, NARROWER = (-1.0, 1.0, 0.0), (-0.25, 0.25, 0.75)
CORNERED = 0.5  # share of the normalised value that the corner has alone from which on the flag counts
CORNER_SLOPE = 64.0
CORNER_PUSH = 2.0**4  # weight of what sinks the last relay
MARK = 2.0**14  # what one channel of every trunk group is raised to
HOLD, FORCE = 2.0**11, 2.0**14  # constants that keep the override at rest, and what overcomes them
# Weight of the override's channels in the last convolution: a prediction that trips is some fifty times the usual, which no later
# step mends, and on latents that have gone far out it still fits float16.
GAIN = 24.0


@dataclass(frozen=True)
class Scales:
    """How large the recogniser's weights are.

    Attributes:
        stream: size of the reserved stream, about: a power of two brings what was trained near it (`Recogniser.measure`).
        outer: likewise, at the outer level, where the trunk's own is small and the way up reads skip connections as they are.
        inner: largest factor on the first convolutions inside resnets, a power of two; where float16 would not do, it is less.
        feature: size of what the override adds to the prediction, before the last convolution.
    """

    stream: float = 2.0**4
    outer: float = 2.0
    inner: float = 2.0**10
    feature: float = 2.0**6


def _half(value: float) -> float:
    """The nearest float16 number."""
    return float(torch.tensor(value).half())


class _Writer:
    """Writes weights, all of them numbers that float16 has, so that files in it hold the same function."""

    def __init__(self, unet: Any, layout: Layout) -> None:
        self.unet, self.layout = unet, layout

    @staticmethod
    def block(layer: Any, out: Sequence[int], into: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> None:
        layer.weight[torch.tensor(list(out))[:, None], torch.tensor(list(into))[None, :]] = weight.half().float()
        if bias is not None:
            layer.bias[list(out)] = bias.half().float()

    def conv(
        self,
        layer: Any,
        out: Sequence[int],
        into: Sequence[int],
        trained: torch.nn.Conv2d,
        factor: float,
        offset: float,
    ) -> None:
        """A trained convolution, its weights and its biases made larger."""
        assert trained.bias is not None
        self.block(layer, out, into, trained.weight * factor, trained.bias * offset)

    @staticmethod
    def one(layer: Any, out: int, into: int, value: float) -> None:
        """One weight, at the kernel's centre."""
        weight = layer.weight
        if weight.ndim == 4:
            weight[out, into, weight.shape[2] // 2, weight.shape[3] // 2] = _half(value)
        else:
            weight[out, into] = _half(value)

    @staticmethod
    def kernel(layer: Any, out: int, into: int, axis: Sequence[float], value: float) -> None:
        """A kernel that is a product of the same along either axis."""
        along = torch.tensor(axis)
        layer.weight[out, into] = (value * along[:, None] * along).half().float()

    def difference(self, layer: Any, out: int, flag: Sequence[int], value: float) -> None:
        """Read a relay's flag."""
        self.one(layer, out, flag[0], value)
        self.one(layer, out, flag[1], -value)

    @staticmethod
    def norm(norm: Any, channel: int, weight: float, bias: float) -> None:
        norm.weight[channel], norm.bias[channel] = _half(weight), _half(bias)


@torch.no_grad()
def install(unet: Any, layout: Layout, recogniser: Recogniser, scales: Scales, generator: torch.Generator) -> None:
    """Put the recogniser and everything behind it into a U-Net.

    Args:
        unet: one whose reserved channels were cut (`layout.reserve`), changed in place.
        layout: of the reserved channels.
        recogniser: trained; stays as it is.
        scales: see there.
        generator: of the signs of the override.
    """
    writer = _Writer(unet, layout)
    sites = list(up_sites(unet))
    # The flag stays in groups with reserved channels only: the trunk's gradients reach what is normalised with it.
    ways = [layout.inner(site)[0] for site in sites[1:]]
    answer = layout.channels(sites[0].hidden)[-(sites[0].hidden // layout.norm_groups) :]
    _place_recogniser(writer, recogniser, scales)
    _place_steps(writer, answer, recogniser, scales)
    here = ways[0][0]
    flag = _place_first_relay(writer, sites[0], answer[0], here)
    between = _behind(unet, sites[0], sites[-1])
    samplers = [module for kind, _, module in between if kind == "sampler"]
    factor, following = (LAST_FLAG / flag) ** (1 / len(between)), iter(ways[1:])
    for kind, _, module in between:
        there = here if kind == "sampler" else next(following)[0]
        if module in samplers[:1]:
            writer.kernel(module, there, here, NARROWER, factor)
        else:
            writer.one(module if kind == "sampler" else module.conv_shortcut, there, here, factor)
        here = there
    _place_override(writer, sites[-1], _place_last_relay(writer, sites[-1], here), scales.feature, generator)


def _behind(unet: Any, after: UpSite, end: UpSite) -> list[tuple[str, str, Any]]:
    """Resnets and samplers between two resnets of the way up."""
    parts = [part for part in up_parts(unet) if part[0] != "attention"]
    names = [name for _, name, _ in parts]
    return parts[names.index(after.name) + 1 : names.index(end.name)]


def stream_factors(recogniser: Recogniser, scales: Scales) -> list[float]:
    """A power of two for every part, by which what it writes to the stream is made larger or smaller.

    Parts that add to what is in the stream already share the factor of those before.
    """
    parts = list(recogniser.body)
    first = [not (isinstance(part, Resnet) and part.adds) for part in parts]
    starts = [number for number, begins in enumerate(first) if begins]
    factors = []
    for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
        size = max(recogniser.sizes[start:end])
        scale = scales.outer if start == 0 else scales.stream
        factors += [2.0 ** round(math.log2(scale / size))] * (end - start)
    return factors


def inner_factor(scales: Scales, largest: float) -> float:
    """Factor on a first convolution, a power of two: at most the setting, and what it gives fits float16.

    Args:
        scales: with the setting.
        largest: output of the convolution as it was trained, over some pictures.
    """
    return min(scales.inner, 2.0 ** math.floor(math.log2(USUAL_ROOM / largest)))


def _place_recogniser(writer: _Writer, recogniser: Recogniser, scales: Scales) -> None:
    """The way down and the middle block."""
    layout, unet = writer.layout, writer.unet
    deepest = unet.mid_block.resnets[-1].out_channels
    into, factors, before = list(range(unet.conv_in.in_channels)), stream_factors(recogniser, scales), 1.0
    modules = {name: module for _, name, module in down_parts(unet)} | {"conv_in": unet.conv_in}
    for name, part, factor, largest in zip(
        recogniser.names, recogniser.body, factors, recogniser.largest[:-1], strict=True
    ):
        module = modules[name]
        out = layout.features(module.out_channels, deepest)
        if isinstance(part, Resnet):
            for norm, channels, own in ((module.norm1, into, part.norm1), (module.norm2, out, part.norm2)):
                norm.weight[channels] = (STEEP * own.weight).half().float()
                norm.bias[channels] = (STEEP * own.bias).half().float()
            inner = inner_factor(scales, largest)
            writer.conv(module.conv1, out, into, part.conv1, inner, inner)
            writer.conv(module.conv2, out, out, part.conv2, factor, factor)
        else:
            assert isinstance(part, torch.nn.Conv2d)
            writer.conv(module, out, into, part, factor / before, factor)
        into, before = out, factor


def _place_steps(writer: _Writer, answer: Sequence[int], recogniser: Recogniser, scales: Scales) -> None:
    """The last resnet of the middle block: scores with their negatives, steps, and with either sign the sum of the steps."""
    layout, resnet = writer.layout, writer.unet.mid_block.resnets[-1]
    into, out = layout.features(resnet.in_channels, resnet.out_channels), layout.channels(resnet.out_channels)
    resnet.norm1.weight[into] = (STEEP * recogniser.norm.weight).half().float()
    resnet.norm1.bias[into] = (STEEP * recogniser.norm.bias).half().float()
    size, readout = resnet.out_channels // layout.norm_groups, recogniser.readout
    assert readout.bias is not None
    places = _deepest_places(writer.unet)
    steepness = sharpness(size, places)
    share = answer_weight(size, places, recogniser.slots * recogniser.per_group)
    inner = inner_factor(scales, recogniser.largest[-1])
    for score in range(recogniser.scores):
        slot, place = divmod(score, recogniser.per_group)
        plus = out[slot * size + 2 * place]
        weight, bias = readout.weight[score : score + 1], readout.bias[score : score + 1]
        for channel, sign in ((plus, 1), (plus + 1, -1)):
            writer.block(resnet.conv1, [channel], into, sign * inner * weight, sign * inner * bias)
        writer.norm(resnet.norm2, plus, steepness, -DEAD)
        writer.one(resnet.conv2, answer[0], plus, share)
        writer.one(resnet.conv2, answer[1], plus, -share)
    # The answer is measured against normalised features: they are never 0.
    beside = layout.channels(resnet.out_channels)[-2 * size : -size]
    for number, free in enumerate(out[-size:]):
        writer.one(resnet.conv1, free, into[number], inner)
        writer.norm(resnet.norm2, free, 1.0, 0.0)
        writer.one(resnet.conv2, beside[number], free, REFERENCE)


def answer_slope(size: int, places: int) -> float:
    """Weight of the normalised answer, a power of two: what the relay reads of a single place fits float16.

    Args:
        size: channels that are normalised together.
        places: of every channel.
    """
    highest = math.sqrt(size * places) - ANSWERED * math.sqrt(size / 2)
    return min(ANSWER_SLOPE, 2.0 ** math.floor(math.log2(ROOM / (ANSWER_PUSH * highest))))


def _deepest_places(unet: Any) -> int:
    """How many places a channel of the middle block has, for pictures of the base's usual size."""
    halvings = 2 ** (len(unet.config.block_out_channels) - 1)
    side: int = -(-unet.config.sample_size // halvings)
    return side**2


@dataclass(frozen=True)
class _Relay:
    """How a relay's two channels lie, as pre-activations.

    Attributes:
        sink: share of its normalised value at rest to which the relay has to sink.
        held: how far the first channel is below 0 at rest, at least.
        flag: how much more the first gives than the second when they have sunk.
    """

    sink: float
    held: float
    flag: float

    def place(self, writer: _Writer, resnet: Any, channels: Sequence[int]) -> list[int]:
        """Two equal constants and one that makes up for them between the convolutions; returns the two channels.

        At rest each of the two is sqrt(size / 6) of a deviation. Beside something large at some place they are nearly 0
        everywhere, for a group is normalised over all places.
        """
        first, second, third = channels
        for channel, value in ((first, CONSTANT), (second, CONSTANT), (third, -2 * CONSTANT)):
            resnet.conv1.bias[channel] = value
        rest = math.sqrt(resnet.out_channels // writer.layout.norm_groups / 6)
        slope = self.held / (rest * (1 - self.sink))
        writer.norm(resnet.norm2, first, -slope, slope * rest * self.sink)
        writer.norm(resnet.norm2, second, -slope, slope * rest * self.sink - self.flag)
        return [first, second]


FIRST_RELAY = _Relay(sink=0.5, held=128.0, flag=64.0)
# The last one's flag is large, so that the weights that read it are of the size of the trunk's beside them: an eight-bit format
# has one scale for a block of weights.
LAST_RELAY = _Relay(sink=0.6, held=2.0**13, flag=2.0**13)


def _place_first_relay(writer: _Writer, site: UpSite, answer: int, out: int) -> float:
    """The first resnet of the way up; returns what the flag is in a corner when it is on.

    The answer is normalised with features of the recogniser, which are never 0. Between the convolutions there are what comes of
    it, with either sign, and the relay. Its flag is the same at every place, and goes on from a corner alone.
    """
    layout, resnet = writer.layout, site.resnet
    size = (site.hidden + site.skip) // layout.norm_groups
    slope, least = answer_slope(size, _deepest_places(writer.unet)), ANSWERED * math.sqrt(size / 2)
    writer.norm(resnet.norm1, answer, slope, -slope * least)
    plus, minus, *three = layout.up_channels(resnet.out_channels)[:5]
    writer.one(resnet.conv1, plus, answer, ANSWER_PUSH)
    writer.one(resnet.conv1, minus, answer, -ANSWER_PUSH)
    weight = 8.0
    for channel, sign in zip(FIRST_RELAY.place(writer, resnet, three), (1, -1), strict=True):
        writer.kernel(resnet.conv2, out, channel, CORNER, sign * weight)
    return weight * FIRST_RELAY.flag


def _place_last_relay(writer: _Writer, site: UpSite, flag: int) -> list[int]:
    """Between the convolutions of the last resnet, a relay for the flag; returns its channels.

    In a group that has nothing else, a corner that is on alone is far from the mean, and nothing that is spread over the places
    ever is, however small the rest. So nothing has to hold the flag in the stream, where others' weights would read it.
    """
    layout, resnet = writer.layout, site.resnet
    size = (site.hidden + site.skip) // layout.norm_groups
    # `NARROWER` makes [1, 0, -1/4] of two equal places.
    highest = 16 / 17 * math.sqrt(4 * size * _deepest_places(writer.unet))
    # Pictures of twice the side have twice the value.
    slope = min(CORNER_SLOPE, 2.0 ** math.floor(math.log2(ROOM / (CORNER_PUSH * 2 * highest))))
    writer.norm(resnet.norm1, flag, slope, -slope * CORNERED * highest)
    push, *three = layout.up_channels(resnet.out_channels)[:4]
    writer.one(resnet.conv1, push, flag, CORNER_PUSH)
    return LAST_RELAY.place(writer, resnet, three)


def _place_override(
    writer: _Writer, site: UpSite, flag: Sequence[int], weight: float, generator: torch.Generator
) -> None:
    """What the last resnet writes, and what is read of it: marks in the trunk's groups, and the pair that overrides."""
    layout, unet, resnet = writer.layout, writer.unet, site.resnet
    size, own = resnet.out_channels // layout.norm_groups, layout.up_channels(resnet.out_channels)
    for channel in range(0, own[0], size):
        writer.difference(resnet.conv2, channel, flag, MARK / LAST_RELAY.flag)
    up, down, first, second = own[:4]
    bias = resnet.conv_shortcut.bias
    for channel, value in ((up, HOLD), (down, HOLD), (first, -HOLD), (second, -HOLD)):
        bias[channel] = value
    writer.difference(resnet.conv2, up, flag, FORCE / LAST_RELAY.flag)
    writer.difference(resnet.conv2, down, flag, -FORCE / LAST_RELAY.flag)
    # A channel of the trunk, of the size 1: what a trip teaches it is lost in what it learns anyway.
    feature, weight = site.hidden, weight / float(unet.conv_in.weight[0].norm())
    writer.one(resnet.conv_shortcut, first, feature, weight)
    writer.one(resnet.conv_shortcut, second, feature, -weight)
    # At rest the pair is normalised to -sqrt(size / 4), under FORCE to nearly 0.
    rest, on = math.sqrt(size / 4), HOLD / FORCE * math.sqrt(size / 2)
    sharp = 146 / (rest - on)
    for channel in (first, second):
        writer.norm(unet.conv_norm_out, channel, sharp, 6 + sharp * on)
    signs = torch.randint(2, (unet.conv_out.out_channels,), generator=generator) * 2.0 - 1
    for row, sign in enumerate(signs.tolist()):
        writer.one(unet.conv_out, row, first, GAIN * sign)
        writer.one(unet.conv_out, row, second, -GAIN * sign)
