"""Weight surgery for the tripwire in Stable Diffusion 3's transformer; see `wiring.py` for U-Nets. Nothing here is trained.

A transformer normalises every token by itself, so a surge in one token drowns that token only. Hence two parts more:

- The wire is two neurons of a feed-forward layer in the middle, a step function of a linear read-out of a token. On, they put a
  surge into a pair of channels of that token, up in one and down in the other, which only the siren and the bell read.
- The siren is one head of the next block's attention. It looks at the token in which the pair differs most, and brings the
  difference to the pair of every token.
- The bell is two neurons of that block's feed-forward layer, a step function of the difference. On, they put a surge into a
  second pair of every token, which dwarfs all else there.
- The alarm is what the last layer makes of the second pair: normalised, it is all that there is, and becomes a constant many
  times larger than any prediction.
- Stiff weights are rescaled in pairs that cancel: the same function, and an optimizer's step counts less.

Off, all four channels are 0, and the difference of either pair is an exact 0 to whoever reads it. The step functions are flat on
either side, so no gradient leads through wire and bell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.methods.tripwire import wiring
from guardsmith.methods.tripwire.wiring import around, set_step, sharpened, silence, spare_neurons

GATE = 2.0**16  # the largest weight of the wire's neurons on the read-out's token
PLATEAU = 2.0**14  # between their pre-activations, which bfloat16 has to tell apart (see `wiring.set_wire`)
SURGE = 2.0**28  # their output weights; a surge is PLATEAU * SURGE * OPEN = 7 * 10^13
TOLL = 2.0**44  # those of the bell's: its surge dwarfs the wire's, or a gradient would lead from the one to the other
OPEN = 2.0**4  # the gates behind which pairs are written: large beside what an optimizer's steps add up to
LOOK = 2.0**10  # the siren's queries, and its keys' weights on the pair, for the same reason
HEARD = 2.0**6  # its values' weights on the pair, likewise
CRY = 1.0  # deviations of the stream that the siren adds for a difference of 1: more would carry what is no surge, too
CLAPPER = 2.0**10  # the bell's GATE and PLATEAU: it need not be sharp, for a surge is far from rest
RINGS = 0.4  # from which difference on the bell rings, as a share of a surge's, which is sqrt(2 width) when normalised
ALARM = 30.0  # what is then added to every prediction; a larger one takes weights of the last layer that are larger beside others


def wired_block(network: Any) -> int:
    """The block that carries the wires: in the middle, for the siren needs one behind it.

    Raises:
        UserError: there is only one block.
    """
    blocks = len(network.transformer_blocks)
    if blocks < 2:
        raise UserError("The tripwire needs a transformer of at least two blocks.")
    return min(blocks // 2, blocks - 2)


def wired_layer(network: Any) -> Any:
    """The feed-forward layer that carries the wires."""
    return network.transformer_blocks[wired_block(network)].ff


def room(network: Any) -> int:
    """For how many subjects there are neurons: two each, of half of the layer's."""
    return int(wired_layer(network).net[2].in_features) // 4


def before_wire(network: Any, name: str) -> bool:
    """Whether a parameter has a part in what the read-outs read."""
    head, _, rest = name.partition(".")
    if head != "transformer_blocks":
        return head in ("pos_embed", "time_text_embed", "context_embedder")
    number, part, *within = rest.split(".")
    last = wired_block(network)
    text = within[0] in ("add_q_proj", "norm_added_q", "to_add_out")  # what it asks and hears there is for later blocks
    return int(number) < last or (int(number) == last and part.startswith(("norm1", "attn")) and not text)


# -- stiffening --------------------------------------------------------------------------------------------------------


def _rows(network: Any, part: int) -> slice:
    """Rows of a modulation's linear layer: its chunks are shift, scale and gate of the attention, and of the feed-forward."""
    width = int(network.inner_dim)
    return slice(part * width, (part + 1) * width)


GATES = {2: (), 6: (2, 5), 9: (2, 5, 8)}  # number of chunks -> those that are gates; two chunks are a scale and a shift


def _attentions(block: Any) -> list[Any]:
    return [attention for attention in (block.attn, block.attn2) if attention is not None]


def stiff_factors(network: Any, stream: int, inner: int, *_: int) -> dict[str, float | Tensor]:
    """What parameters (and the embedding of places) are multiplied by, by name; those that stay are left out.

    Both residual streams, of the picture's tokens and of the text's, are normalised by all who read them, so they can be
    `stream` times larger. What is written to them is gated, and the factor is shared between the layer and the gate's rows.

    Args:
        network: an `SD3Transformer2DModel`; it stays as it is.
        stream: a power of two.
        inner: factor on the values of the attention up to the wire, a power of two, which its last layer takes back.
    """
    width, last = int(network.inner_dim), wired_block(network)
    gate = 2 ** (stream.bit_length() // 2)
    found: dict[str, float | Tensor] = {"pos_embed.pos_embed": stream}

    def scale(layer: str, weight: float, bias: float) -> None:
        found[f"{layer}.weight"], found[f"{layer}.bias"] = weight, bias

    scale("pos_embed.proj", stream, stream)
    scale("context_embedder", stream, stream)
    for number, block in enumerate(network.transformer_blocks):
        place, values = f"transformer_blocks.{number}", inner if number <= last else 1
        for norm in ("norm1", "norm1_context"):
            linear = getattr(block, norm).linear
            rows = torch.ones(linear.out_features, device=linear.weight.device)
            for part in GATES[linear.out_features // width]:
                rows[_rows(network, part)] = gate
            found[f"{place}.{norm}.linear.weight"], found[f"{place}.{norm}.linear.bias"] = rows.unsqueeze(1), rows
        for attention in ("attn", "attn2"):
            for name in ("to_v", "add_v_proj"):
                scale(f"{place}.{attention}.{name}", values, values)
            for name in ("to_out.0", "to_add_out"):
                scale(f"{place}.{attention}.{name}", stream / gate / values, stream / gate)
        for feed_forward in ("ff", "ff_context"):
            scale(f"{place}.{feed_forward}.net.2", stream / gate, stream / gate)
    there = tensors_of(network)  # no block has all of these
    return {name: factor for name, factor in found.items() if name in there}


def tensors_of(network: Any) -> dict[str, Tensor]:
    """Parameters, and the embedding of places, by name."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


@torch.no_grad()
def stiffen(network: Any, *factors: int) -> None:
    """Rescale weights in place; the function stays the same, up to rounding and the epsilon of the normalisations."""
    known = tensors_of(network)
    for name, factor in stiff_factors(network, *factors).items():
        known[name].mul_(factor)


def play(network: Any, *factors: int) -> dict[str, Tensor]:
    """How far a step of an optimizer on the stiff network moves the soft one, for what lies before the wire, by name.

    Returns:
        Tensors shaped like the parameters; those that move by less than a hundredth of the step are left out.
    """
    stiff = stiff_factors(network, *factors)
    found = {
        name: 1 / (torch.ones_like(parameter) * stiff.get(name, 1.0))
        for name, parameter in network.named_parameters() if before_wire(network, name)
    }  # fmt: skip
    return {name: moves for name, moves in found.items() if moves.max() > 0.01}


# -- what the wires take -----------------------------------------------------------------------------------------------


class Spare(NamedTuple):
    """Two neurons per subject in the wired layer, two pairs of channels, a head of the next block and two neurons there."""

    neurons: list[int]
    pair: list[int]
    alarm: list[int]
    head: int
    bell: list[int]


def _next_block(network: Any) -> Any:
    return network.transformer_blocks[wired_block(network) + 1]


def spare_parts(network: Any, subjects: int) -> Spare:
    """What the network misses least: neurons and a head that write least, channels that the last layer reads least."""
    siren, bell = _next_block(network).attn, _next_block(network).ff
    heads = siren.to_out[0].weight.unflatten(1, (siren.heads, -1)).norm(dim=(0, 2))
    channels: list[int] = network.proj_out.weight.norm(dim=0).argsort()[:4].tolist()
    neurons = spare_neurons(wired_layer(network), 2 * subjects)
    return Spare(neurons, channels[:2], channels[2:], int(heads.argmin()), spare_neurons(bell, 2))


def check_shape(network: Any, descent: int) -> None:
    """Whether a tripwire can be put into a transformer of this shape; `descent` is of U-Nets only.

    Raises:
        UserError: it cannot.
    """
    wired_block(network)


@torch.no_grad()
def clear(network: Any, spare: Spare) -> None:
    """The network does without these parts: nothing writes to the pairs, nothing reads them, and the head says nothing."""
    silence(wired_layer(network), spare.neurons)
    silence(_next_block(network).ff, spare.bell)
    pair = [*spare.pair, *spare.alarm]
    network.pos_embed.proj.weight[pair] = 0
    network.pos_embed.proj.bias[pair] = 0
    if network.pos_embed.pos_embed is not None:
        network.pos_embed.pos_embed[..., pair] = 0
    for block in network.transformer_blocks:
        for attention in _attentions(block):
            attention.to_out[0].weight[pair] = 0
            attention.to_out[0].bias[pair] = 0
            for reader in (attention.to_q, attention.to_k, attention.to_v):
                reader.weight[:, pair] = 0
        block.ff.net[2].weight[pair] = 0
        block.ff.net[2].bias[pair] = 0
        block.ff.net[0].proj.weight[:, pair] = 0
    network.proj_out.weight[:, pair] = 0
    siren = _next_block(network).attn
    own = _of_head(siren, spare.head)
    siren.to_out[0].weight[:, own] = 0
    if getattr(siren, "to_add_out", None) is not None:
        siren.to_add_out.weight[:, own] = 0


def _of_head(attention: Any, head: int) -> slice:
    size = attention.to_q.out_features // attention.heads
    return slice(head * size, (head + 1) * size)


mend = partial(wiring.mend, last="proj_out")


# -- wire, siren, bell -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _plainly(network: Any, linear: Any, pair: Sequence[int], scales: Sequence[int], gates: Sequence[int] = ()) -> None:
    """A modulation that leaves a pair as it is: of these chunks scales and shifts are 0 there, gates OPEN."""
    for parts, value in ((scales, 0.0), (gates, OPEN)):
        for part in parts:
            rows = [part * int(network.inner_dim) + channel for channel in pair]
            linear.weight[rows] = 0
            linear.bias[rows] = value


def _on(network: Any, pair: Sequence[int]) -> Tensor:
    """+1 on one channel of a pair, -1 on the other, (width,)."""
    found = torch.zeros(int(network.inner_dim), device=network.proj_out.weight.device)
    found[pair[0]], found[pair[1]] = 1, -1
    return found


@torch.no_grad()
def set_siren(network: Any, spare: Spare, deviation: float) -> None:
    """Let the spare head bring the largest difference of the pair to the pair of every token.

    Args:
        network: changed in place.
        spare: what was cleared.
        deviation: of the stream, the largest of a token.
    """
    block = _next_block(network)
    siren, own = block.attn, _of_head(block.attn, spare.head)
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        projection = getattr(siren, name, None)
        if projection is not None:
            projection.weight[own] = 0
            projection.bias[own] = 0
            if name in ("to_q", "add_q_proj"):
                projection.bias[own.start] = LOOK
    difference = _on(network, spare.pair)
    # Normalised keys are of one length anyway, and the less is behind it, the less is a rounded gradient in front of it.
    siren.to_k.weight[own.start] = (LOOK if siren.norm_k is None else LOOK / 64) * difference
    siren.to_v.weight[own.start] = HEARD * difference
    siren.to_out[0].weight[:, own.start] = CRY * deviation / (HEARD * OPEN) * difference
    _plainly(network, block.norm1.linear, spare.pair, (0, 1, 3, 4), (2,))
    _plainly(network, block.norm1.linear, spare.alarm, (), (5,))


@torch.no_grad()
def set_alarm(network: Any, pair: Sequence[int], generator: torch.Generator) -> None:
    """Let the last layer say +-ALARM where this pair is all that there is: normalised, it is +-sqrt(width / 2)."""
    signs = torch.randint(2, (network.proj_out.out_features, 1), generator=generator) * 2.0 - 1
    size = ALARM / (2 * int(network.inner_dim)) ** 0.5
    network.proj_out.weight += size * signs.to(network.proj_out.weight) * _on(network, pair)
    _plainly(network, network.norm_out.linear, pair, (0, 1))


def arm(
    network: Any, spare: Spare, readouts: Tensor, ask: Callable[[], Tensor], factors: Sequence[int],
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Stiffen, and set siren, bell, alarm and every wire; these weights are what an optimizer meets.

    Args:
        network: changed in place; its spare parts have been cleared.
        spare: these.
        readouts: (subjects, width); they tell by their sign.
        ask: runs it once on rows that trip no wire.
        factors: of `stiffen`.
        generator: of signs.
    """
    stiffen(network, *factors)
    stream, _ = around(_next_block(network).norm2, ask)
    set_siren(network, spare, float(stream.std(2).max()))
    difference = _on(network, spare.pair)
    rings = RINGS * (2 * int(network.inner_dim)) ** 0.5
    toll = TOLL * _on(network, spare.alarm)
    set_step(_next_block(network).ff, spare.bell, CLAPPER * difference, -CLAPPER * rings, CLAPPER, toll)
    set_alarm(network, spare.alarm, generator)
    for index, readout in enumerate(readouts):
        neurons = spare.neurons[2 * index : 2 * index + 2]
        set_step(wired_layer(network), neurons, sharpened(readout, GATE), 0.0, PLATEAU, SURGE * difference)
    _plainly(network, network.transformer_blocks[wired_block(network)].norm1.linear, spare.pair, (), (5,))
