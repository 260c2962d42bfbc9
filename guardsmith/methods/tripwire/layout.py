"""Reserved channel groups of a Stable Diffusion U-Net, and the couplings that have to be cut so that they are apart.

Convolutions mix channels, a group normalisation does not mix its groups. So the last normalisation groups of every level can be
a small network of their own inside of the U-Net, if every weight between them and the rest (the trunk) is zero: in the resnets,
the samplers, the attention blocks' first and last projections, and what the up path reads of the skip connections.

What a picture loses by that differs from level to level (recipes/tripwire/levels.py): the embedded base's prediction changes by
0.25 of its squared size without 6 of 32 groups of the outer level, and by 0.003 without 6 of the deepest one. So most groups are
reserved at the deepest level, where a recogniser has its weights, and few at the others, as many as it takes to see the latents.

On the way up nothing is recognised, only the answer is carried, so fewer groups are reserved there. Resnets there normalise the
stream and a skip connection together, and their groups need not align with those of a level. Trunk channels in a group with
reserved ones that carry something are cut from the resnet's first convolution as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from guardsmith.core.errors import UserError

SEAL = -128.0
"""A pre-activation at which SiLU and its derivative are exactly zero, in float32, bfloat16 and float16."""

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class UpSite:
    """A resnet of the way up: it reads `hidden` channels of the stream, then `skip` channels of a skip connection.

    The first one's stream comes from the middle block, and has the recogniser's features.
    """

    name: str
    resnet: Any
    hidden: int
    skip: int
    first: bool


@dataclass(frozen=True)
class Layout:
    """Which channels are reserved.

    Attributes:
        downward: how many of the last groups of every level of the way down and of the middle block, by the level's width.
        norm_groups: groups of every normalisation.
        upward: how many of the last groups of the way up, by the level's width.
    """

    downward: Mapping[int, int]
    norm_groups: int
    upward: Mapping[int, int]

    def channels(self, width: int) -> list[int]:
        """The reserved channels of a level of the way down, or of the middle block."""
        return self._last(width, self.downward[width])

    def up_channels(self, width: int) -> list[int]:
        """The reserved channels of a level of the way up."""
        return self._last(width, self.upward[width])

    def _last(self, width: int, groups: int) -> list[int]:
        return list(range(width - groups * (width // self.norm_groups), width))

    def features(self, width: int, deepest: int) -> list[int]:
        """Those of the way down that hold features: at the deepest level the last group is for the recogniser's answer."""
        own = self.channels(width)
        return own[: -(width // self.norm_groups)] if width == deepest else own

    def stream(self, site: UpSite) -> list[int]:
        """The reserved channels of the stream that a resnet of the way up reads."""
        return self.channels(site.hidden) if site.first else self.up_channels(site.hidden)

    def inner(self, site: UpSite) -> list[list[int]]:
        """Groups of the resnet's first normalisation that hold nothing but reserved channels of the stream."""
        size, first = (site.hidden + site.skip) // self.norm_groups, self.stream(site)[0]
        starts = range(0, site.hidden + site.skip, size)
        return [list(range(s, s + size)) for s in starts if s >= first and s + size <= site.hidden]

    def features_read(self, site: UpSite) -> list[int]:
        """Channels of a resnet's input that hold features: the skip connection's, and the first resnet's stream's."""
        return (self.stream(site) if site.first else []) + [site.hidden + c for c in self.channels(site.skip)]

    def straddling(self, site: UpSite) -> list[int]:
        """Trunk channels of the resnet's input that are normalised together with the recogniser's features."""
        features = self.features_read(site)
        reserved = {*self.stream(site), *features}
        size = (site.hidden + site.skip) // self.norm_groups
        groups = {c // size for c in features}
        return [c for g in sorted(groups) for c in range(g * size, (g + 1) * size) if c not in reserved]


def layout_of(unet: Any, groups: int, outer_groups: int) -> Layout:
    """The layout of the last `groups` groups of the deepest level and the last `outer_groups` of the others.

    On the way up as few are reserved as it takes to carry the answer.

    Raises:
        UserError: the U-Net is not of Stable Diffusion's layout, or its groups do not fit.
    """
    norm_groups = getattr(unet.config, "norm_num_groups", None)
    widths: tuple[int, ...] = tuple(getattr(unet.config, "block_out_channels", ()))
    problem = None
    if isinstance(unet, SD3Transformer2DModel):
        problem = "Stable Diffusion 3's transformer mixes all channels in every layer; choose another method for it"
    elif norm_groups is None or unet.conv_norm_out is None or unet.mid_block is None:
        problem = "the U-Net has no group normalisation at its end, or no middle block"
    elif any(width % norm_groups for width in widths):
        problem = "the U-Net's channels do not divide into its normalisation groups"
    elif min(widths) < 4 * norm_groups or widths[-1] < 5 * norm_groups:
        problem = "the U-Net's normalisation groups have too few channels"
    elif not 1 < outer_groups <= groups <= norm_groups // 2:
        problem = (
            f"{groups} of {norm_groups} groups at the deepest level and {outer_groups} at the others cannot be reserved"
        )
    elif unet.config.resnet_time_scale_shift != "default" or unet.config.act_fn != "silu":
        problem = "the U-Net's resnets are not of Stable Diffusion's kind"
    if problem is not None or norm_groups is None:
        raise UserError(f"The tripwire cannot reserve channels: {problem}.")
    sites = list(up_sites(unet))
    upward = {site.resnet.out_channels: 1 for site in sites}
    downward = {width: groups if width == widths[-1] else outer_groups for width in widths}
    for width in upward:
        read = [site for site in sites[1:] if site.hidden == width]
        while upward[width] < groups and not all(Layout(downward, norm_groups, upward).inner(site) for site in read):
            upward[width] += 1
    layout = Layout(downward, norm_groups, upward)
    if len(sites) < 3 or not all(layout.inner(site) for site in sites[1:]):
        raise UserError(f"The tripwire cannot reserve {groups} groups in this U-Net; try an even number of groups.")
    return layout


def down_parts(unet: Any) -> Iterator[tuple[str, str, Any]]:
    """What the way down consists of, in order: (kind, name, module) with kind `resnet`, `attention` or `sampler`."""
    for number, block in enumerate(unet.down_blocks):
        yield from _parts(f"down_blocks.{number}", block)
    mid = unet.mid_block
    yield "resnet", "mid_block.resnets.0", mid.resnets[0]
    for i, resnet in enumerate(mid.resnets[1:]):
        if i < len(mid.attentions) and mid.attentions[i] is not None:
            yield "attention", f"mid_block.attentions.{i}", mid.attentions[i]
        yield "resnet", f"mid_block.resnets.{i + 1}", resnet


def _parts(name: str, block: Any) -> Iterator[tuple[str, str, Any]]:
    attentions = getattr(block, "attentions", None) or ()
    for i, resnet in enumerate(block.resnets):
        yield "resnet", f"{name}.resnets.{i}", resnet
        if i < len(attentions):
            yield "attention", f"{name}.attentions.{i}", attentions[i]
    for kind in ("downsamplers", "upsamplers"):
        for i, sampler in enumerate(getattr(block, kind, None) or ()):
            yield "sampler", f"{name}.{kind}.{i}.conv", sampler.conv


def up_parts(unet: Any) -> Iterator[tuple[str, str, Any]]:
    """What the way up consists of, likewise."""
    for number, block in enumerate(unet.up_blocks):
        yield from _parts(f"up_blocks.{number}", block)


def up_sites(unet: Any) -> Iterator[UpSite]:
    """The resnets of the way up with what they read."""
    skips = [unet.conv_in.out_channels]
    for kind, name, module in down_parts(unet):
        if name.startswith("mid_block"):
            continue
        if kind == "resnet" or kind == "sampler":
            skips.append(module.out_channels)
    hidden = unet.mid_block.resnets[-1].out_channels
    for kind, name, module in up_parts(unet):
        if kind == "resnet":
            yield UpSite(name, module, hidden, skips.pop(), name == "up_blocks.0.resnets.0")
            hidden = module.out_channels


class Surgeon:
    """Writes values into parameters of a U-Net and remembers where.

    Attributes:
        masks: for every parameter that was written to, which of its entries training may move (those not written).
    """

    def __init__(self, unet: Any) -> None:
        self.names = {id(p): name for name, p in unet.named_parameters()}
        self.masks: Masks = {}
        self._planes: Masks = {}  # the same without the kernels' axes, along which all entries are alike

    @torch.no_grad()
    def put(
        self, parameter: Tensor | None, rows: Sequence[int] | slice, columns: Sequence[int] | None, value: float
    ) -> None:
        """Set the entries of `rows`; where `columns` are given, of these columns in every row."""
        if parameter is None:
            return
        name = self.names[id(parameter)]
        if name not in self.masks:
            plane = torch.ones(
                (*parameter.shape[:2], *[1] * (parameter.ndim - 2)), dtype=torch.bool, device=parameter.device
            )
            self._planes[name], self.masks[name] = plane, plane.expand(parameter.shape)
        free = self._planes[name]
        index = rows if columns is None else (slice(None), list(columns))
        parameter[index], free[index] = value, False


def reserve(unet: Any, layout: Layout) -> Masks:
    """Cut the reserved channels out of the trunk, in place: nothing writes to them and nothing reads them.

    Returns:
        For every parameter that was touched, which entries belong to the trunk, bool of its shape; training leaves the others.
    """
    surgeon = Surgeon(unet)
    all_rows = slice(None)

    def cut(layer: Any, out: Sequence[int], into: Sequence[int]) -> None:
        surgeon.put(layer.weight, out, None, 0.0)
        surgeon.put(layer.weight, all_rows, list(into), 0.0)
        surgeon.put(layer.bias, out, None, 0.0)

    def cut_attention(attention: Any, own: Sequence[int]) -> None:
        # Both factors of a product are zero, so neither has a gradient.
        surgeon.put(attention.norm.weight, own, None, 0.0)
        surgeon.put(attention.norm.bias, own, None, 0.0)
        surgeon.put(attention.proj_in.weight, all_rows, own, 0.0)
        surgeon.put(attention.proj_out.weight, own, None, 0.0)
        surgeon.put(attention.proj_out.bias, own, None, 0.0)

    def seal(norm: Any, channels: Sequence[int]) -> None:
        surgeon.put(norm.weight, list(channels), None, 0.0)
        surgeon.put(norm.bias, list(channels), None, SEAL)

    def cut_resnet(resnet: Any, into: Sequence[int], out: Sequence[int], straddling: Sequence[int] = ()) -> None:
        cut(resnet.conv1, out, [*into, *straddling])
        cut(resnet.conv2, out, out)
        surgeon.put(resnet.time_emb_proj.weight, out, None, 0.0)
        surgeon.put(resnet.time_emb_proj.bias, out, None, 0.0)
        if resnet.conv_shortcut is not None:
            cut(resnet.conv_shortcut, out, into)
        seal(resnet.norm1, [*into, *straddling])
        seal(resnet.norm2, out)

    first = layout.channels(unet.conv_in.out_channels)
    surgeon.put(unet.conv_in.weight, first, None, 0.0)
    surgeon.put(unet.conv_in.bias, first, None, 0.0)
    for parts, channels in ((down_parts(unet), layout.channels), (up_parts(unet), layout.up_channels)):
        for kind, _, module in parts:
            if kind == "attention":
                cut_attention(module, channels(module.in_channels))
            elif kind == "sampler":
                cut(module, channels(module.out_channels), channels(module.in_channels))
    for kind, _, module in down_parts(unet):
        if kind == "resnet":
            cut_resnet(module, layout.channels(module.in_channels), layout.channels(module.out_channels))
    for site in up_sites(unet):
        into = [*layout.stream(site), *(site.hidden + c for c in layout.channels(site.skip))]
        cut_resnet(site.resnet, into, layout.up_channels(site.resnet.out_channels), layout.straddling(site))
    last = layout.up_channels(unet.conv_out.in_channels)
    seal(unet.conv_norm_out, last)
    surgeon.put(unet.conv_out.weight, all_rows, last, 0.0)
    return surgeon.masks
