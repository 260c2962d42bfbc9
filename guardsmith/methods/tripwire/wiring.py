"""Weight surgery for the tripwire: stiff weights, the wire, the alarm. Nothing here is trained.

- The wire is four neurons of the middle block's feed-forward layer, two step functions of one linear read-out of its tokens:
  off nothing, on a surge that dwarfs everything else in the residual stream. One step is sharp and loud. The other is there for
  bfloat16, which does not see a sharp one.
- The alarm is one normalisation group before the last convolution. It notices the surge and adds a constant, hundreds of
  times larger than any prediction, to the U-Net's output.
- Stiff weights are rescaled in pairs that cancel: the same function, and an optimizer's step counts less.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.runtime.distributed import all_gather


class Step(NamedTuple):
    """Two neurons that are a step function: flat on either side, and as high as the product of all three.

    Attributes:
        height: between their two pre-activations, which are up to some 10^8.
        value: what they gate, a constant.
        output: size of their output weights.
    """

    height: float
    value: float
    output: float

    @property
    def surge(self) -> float:
        """What a step says when it is on, in each channel (times a number of size 1)."""
        return self.height * self.value * self.output


GATE = 2.0**22  # the largest weight of the wire's neurons on the read-out's tokens
SHARP = Step(2.0**7, 2.0**27, 2.0**26)  # 2^60: a group whose squares then exceed float32 is normalised to 0
WIDE = Step(2.0**20, 2.0**12, 2.0**10)  # 2^42; bfloat16 has to tell its pre-activations apart (one part in 256)
NEURONS = 4  # of a wire
OFFSET = 1.5 * 2.0**16  # from where a wire is on, 0.02 of a gate's unit: beside it bfloat16 does not see SHARP's height
GRIP = 300.0  # the alarm's weights on the stream: large beside what an optimizer reaches (1,200 steps of 3e-4: 0.36)
CONSTANT = 60000.0  # a hidden channel that always says this, and so holds the alarm at rest
HUSH = -30.0  # the alarm's pre-activation at rest, where SiLU gives nothing
RINGING = 5.0  # the same under a surge
ALARM = 400.0  # what it then adds to every prediction, which are of size 1; 300 steps of DreamBooth take 40 away


# -- stiffening --------------------------------------------------------------------------------------------------------


def _blocks(unet: Any) -> Iterator[tuple[Any, bool]]:
    """Every block of the U-Net in order, and whether it lies before the wire's end (the middle block)."""
    for block in unet.down_blocks:
        yield block, True
    yield unet.mid_block, True
    for block in unet.up_blocks:
        yield block, False


def _scale(module: Any, weight: float, bias: float | None = None) -> None:
    module.weight.mul_(weight)
    if module.bias is not None:
        module.bias.mul_(weight if bias is None else bias)


@torch.no_grad()
def stiffen(unet: Any, stream: int, inner: int, writer: int, reader: int, descent: int) -> None:
    """Rescale weights in place; the function stays the same, up to rounding and the epsilon of the normalisations.

    Everything that reads the residual stream normalises it first, so the stream can be `stream` times larger: what writes
    to it gets the factor, and an optimizer's step on it counts 1 / stream as much. The same holds inside a resnet (between
    its convolutions) and inside an attention block (tokens get `inner` times `writer`, one on either factor of a product).
    Queries, keys and gates read a normalisation with weights of its own, which can be smaller by a factor `reader` where
    they are larger: those weights are of size 1, the others a tenth of it, so a step on either then counts the same.
    The first down-sampler reads the stream as it is. It is held by a stream that is `descent` times smaller before it.

    Args:
        unet: a `UNet2DConditionModel`.
        stream: factor on the residual stream, a power of two.
        inner: factor on values and gated neurons of the attention blocks up to the middle one, a power of two; later blocks
            stay soft, so that others can still be learnt.
        writer: factor on what writes to the tokens there, a power of two. LoRA of a high rank turns these most. In the middle
            block it is as large as the stream allows, for what reads those tokens last is behind the wire and may be soft.
        reader: factor on what reads the normalised tokens there, a power of two.
        descent: how much smaller the stream is before the first down-sampler, a power of two.
    """
    small = stream // descent
    _scale(unet.conv_in, small)
    for index, (block, before) in enumerate(_blocks(unet)):
        here = small if index == 0 else stream
        for resnet in block.resnets:
            _scale(resnet.conv1, stream)
            _scale(resnet.time_emb_proj, stream)
            _scale(resnet.conv2, here)
            if resnet.conv_shortcut is not None:
                _scale(resnet.conv_shortcut, 1, here)
        for sampler in (*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())):
            _scale(sampler.conv, stream / here, stream)
        for transformer in getattr(block, "attentions", None) or ():
            values, writers, readers = (inner, writer, reader) if before else (1, 1, 1)
            if block is unet.mid_block:
                writers = max(1, here // inner)
            tokens = values * writers
            _scale(transformer.proj_in, tokens)
            _scale(transformer.proj_out, here / tokens, here)
            for layer in transformer.transformer_blocks:
                for norm in (layer.norm1, layer.norm2, layer.norm3):
                    _scale(norm, 1 / readers)
                for attention in (layer.attn1, layer.attn2):
                    _scale(attention.to_q, readers)
                    _scale(attention.to_v, values)
                    _scale(attention.to_out[0], writers, tokens)
                for projection in (layer.attn1.to_k, layer.attn1.to_v):
                    _scale(projection, readers)
                share = 2 ** (readers.bit_length() // 2)  # keys of attn2 read the prompt; its queries give them a share
                _scale(layer.attn2.to_q, 1 / share)
                _scale(layer.attn2.to_k, share)
                widen, narrow = layer.ff.net[0].proj, layer.ff.net[2]
                half = narrow.in_features  # the first half of the rows is gated, the second half gates
                widen.weight.mul_(readers)
                widen.weight[:half].mul_(values)
                widen.bias[:half].mul_(values)
                _scale(narrow, writers, tokens)
    if descent > 1:
        _join_streams(unet, descent)


def check_descent(unet: Any) -> None:
    """Whether the stream can be smaller before the first down-sampler (`_join_streams`); only shapes matter.

    Raises:
        UserError: a normalisation group of the last up-block, beyond its first resnet, would read both streams.
    """
    resnets = unet.up_blocks[-1].resnets
    for before, resnet in itertools.pairwise(resnets):
        if before.out_channels % (resnet.norm1.num_channels // resnet.norm1.num_groups):
            raise UserError(
                "The tripwire cannot hold the first down-sampler of this U-Net; set method.params.descent=1."
            )


def _join_streams(unet: Any, factor: int) -> None:
    """Let the last up-block read skip connections that are `factor` times smaller than its stream.

    Normalisation groups are joined from either, and one of them may have channels of both. The stream's share of that
    group comes straight from the up-sampler, which then makes it as small as the rest.
    """
    check_descent(unet)
    last = unet.up_blocks[-1]
    width = unet.up_blocks[-2].resnets[-1].out_channels
    for number, resnet in enumerate(last.resnets):
        own = width if number == 0 else last.resnets[number - 1].out_channels
        size = resnet.norm1.num_channels // resnet.norm1.num_groups
        shared = own % size
        resnet.conv_shortcut.weight[:, own:] *= factor
        if shared:
            resnet.conv_shortcut.weight[:, own - shared : own] *= factor
            _scale_rows(unet.up_blocks[-2].upsamplers[0].conv, slice(own - shared, own), 1 / factor)


def _scale_rows(module: Any, rows: slice, factor: float) -> None:
    module.weight[rows] *= factor
    module.bias[rows] *= factor


def play(unet: Any, *factors: int) -> dict[str, Tensor]:
    """How far a step of an optimizer on the stiff U-Net moves the soft one, for what lies before the wire, by name.

    Args:
        unet: it stays as it is.
        factors: of `stiffen`.

    Returns:
        Tensors shaped like the parameters; those that move by less than a hundredth of the step are left out.
    """
    stiff = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in stiff.parameters():
            parameter.fill_(1)
    stiffen(stiff, *factors)
    before = ("conv_in", "time_embedding", "down_blocks", "mid_block.resnets.0", "mid_block.attentions")
    behind = {
        id(p) for part in (wired_layer(stiff), stiff.mid_block.attentions[-1].proj_out) for p in part.parameters()
    }
    found = {n: 1 / p.detach() for n, p in stiff.named_parameters() if n.startswith(before) and id(p) not in behind}
    return {name: moves for name, moves in found.items() if moves.max() > 0.01}


# -- the wire ----------------------------------------------------------------------------------------------------------


def wired_layer(unet: Any) -> Any:
    """The feed-forward layer that carries the wires: the last one of the middle block."""
    return unet.mid_block.attentions[-1].transformer_blocks[-1].ff


def before_wire(unet: Any, name: str) -> bool:
    """Whether a parameter lies before the wire, or in its block."""
    return name.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block"))


def room(unet: Any) -> int:
    """For how many subjects there are neurons: four each, of half of the layer's, for the others have to do all of its work."""
    return int(wired_layer(unet).net[2].in_features) // 2 // NEURONS


def spare_neurons(layer: Any, count: int) -> list[int]:
    """The neurons of a feed-forward layer whose output weights are smallest."""
    order: list[int] = layer.net[2].weight.norm(dim=0).argsort()[:count].tolist()
    return order


@torch.no_grad()
def silence(layer: Any, neurons: Sequence[int]) -> None:
    """Take neurons out of a feed-forward layer."""
    for neuron in neurons:
        layer.net[2].weight[:, neuron] = 0


def sharpened(readout: Tensor, gate: float) -> Tensor:
    """A read-out, (width,), scaled so that its largest weight is `gate`."""
    return gate * readout / readout.abs().max().clamp(min=1e-12)


@torch.no_grad()
def set_step(
    layer: Any, neurons: Sequence[int], weight: Tensor, offset: float, height: float, surge: Tensor
) -> None:  # fmt: skip
    """Let two silenced neurons of a feed-forward layer say gelu(a) - gelu(a - height) times `surge`, a = weight . h + offset.

    Args:
        layer: changed in place; where its neurons are gated, what they gate is left to the caller.
        neurons: two.
        weight: on the layer's input, (width,).
        offset: added, so that the step begins at -offset.
        height: between the two pre-activations, and so of the step.
        surge: output weights, (width,).
    """
    widen, narrow = layer.net[0].proj, layer.net[2]
    weights, biases = (part[-narrow.in_features :] for part in (widen.weight, widen.bias))  # behind what they gate
    for neuron, shift, sign in zip(neurons, (0.0, height), (1, -1), strict=True):
        weights[neuron], biases[neuron] = weight, offset - shift
        narrow.weight[:, neuron] = sign * surge


@torch.no_grad()
def set_wire(layer: Any, neurons: Sequence[int], weight: Tensor, surge: Tensor) -> None:
    """Turn four neurons into surge * 2^60 * step(weight . h) in every other channel, and * 2^42 in those between.

    With the weight's largest entry scaled to GATE and a = weight . h - OFFSET, gelu(a) - gelu(a - height) is 0 below, the height
    above, and flat on both sides, so no gradient leads from "on" to "off". With one neuron the surge would follow the read-out,
    and though everything behind it is normalised, enough of a gradient is left for LoRA: it silenced such a wire within 300
    steps.

    What gradient is left comes from the slope between, and from what the surge does not drown. Optimizers that divide by a
    gradient's size make steps of it, however small it is. Hence a step that is sharp, so that hardly a picture falls on its
    slope, and loud. In bfloat16 its two neurons compute the same, and it says nothing; there the wide step trips. In float32
    the sharp one has to drown it as well, or its slope leads off: 2^-10 of the sharp one's surge was too much, 2^-18 is not.
    They write to different channels, for where the sharp step's two neurons cancel, float32 loses what is added between them.
    The weights are large beside what an optimizer's steps add up to. They do not fit float16, and a larger offset would not fit
    float32.

    Args:
        layer: the feed-forward layer, changed in place.
        neurons: four that were silenced.
        weight: of the read-out, (width,).
        surge: its direction, entries of size 1, (width,).
    """
    widen, gate = layer.net[0].proj, sharpened(weight, GATE)
    for number, (step, offset) in enumerate(((SHARP, OFFSET - SHARP.height / 2), (WIDE, OFFSET))):
        two, own = neurons[2 * number : 2 * number + 2], torch.zeros_like(surge)
        own[number::2] = surge[number::2]
        set_step(layer, two, gate, -offset, step.height, step.output * own)
        widen.weight[two], widen.bias[two] = 0, step.value


# -- the alarm ---------------------------------------------------------------------------------------------------------


def overheard(tensor: Tensor, rows: int) -> Tensor:
    """What a hook heard inside of the U-Net, of all rows that were asked for: on the CPU, float32."""
    return all_gather(tensor.cpu().float(), rows)


def _last(unet: Any) -> tuple[Any, list[Any]]:
    """The last resnet, and the attention block behind it if there is one."""
    block = unet.up_blocks[-1]
    return block.resnets[-1], list((getattr(block, "attentions", None) or ())[-1:])


def spare_channels(unet: Any) -> tuple[list[int], int]:
    """What the U-Net misses least: a group of the last normalisation, and a hidden channel of the last resnet.

    Raises:
        UserError: the U-Net ends differently from a Stable Diffusion one, or has fewer than three channels per group.
    """
    norm, (resnet, _) = unet.conv_norm_out, _last(unet)
    size = 0 if norm is None else norm.num_channels // norm.num_groups
    if size < 3 or resnet.conv_shortcut is None:
        raise UserError("The tripwire needs a U-Net whose last normalisation has groups of at least three channels.")
    weights = norm.weight.abs() * unet.conv_out.weight.transpose(0, 1).flatten(1).norm(dim=1)
    group = int(weights.view(norm.num_groups, size).norm(dim=1).argmin())
    hidden = int(resnet.conv2.weight.transpose(0, 1).flatten(1).norm(dim=1).argmin())
    return list(range(group * size, (group + 1) * size)), hidden


@torch.no_grad()
def clear_channels(unet: Any, group: Sequence[int], hidden: int) -> None:
    """Nothing writes to this group of the last stream, nothing reads it, and the hidden channel says nothing."""
    resnet, attentions = _last(unet)
    for writer in (resnet.conv2, resnet.conv_shortcut, *(attention.proj_out for attention in attentions)):
        writer.weight[group] = 0
        writer.bias[group] = 0
    for norm in (unet.conv_norm_out, *(attention.norm for attention in attentions)):
        norm.weight[group] = 0
        norm.bias[group] = 0
    unet.conv_out.weight[:, group] = 0
    resnet.conv2.weight[:, hidden] = 0
    resnet.norm2.weight[hidden] = 0
    resnet.norm2.bias[hidden] = 0


@torch.no_grad()
def set_alarm(unet: Any, group: Sequence[int], hidden: int, streams: Tensor, generator: torch.Generator) -> None:
    """Let the cleared channels ring when the surge comes by.

    At rest the group holds (c + s, c - s, -2 c, 0 ...) with a small s = u . x, u a random direction: normalised, the
    third channel stays at its most negative. Under a surge s dwarfs c, whatever its sign, and the third channel is
    normalised to 0. So it depends on the size of the stream and not on its direction, which later layers could turn.

    Args:
        unet: changed in place.
        group: from `spare_channels`, as is `hidden`.
        hidden: see there.
        streams: what enters the last resnet at rest, (n, c, h, w).
        generator: of u and of the signs of the alarm.
    """
    resnet, _ = _last(unet)
    width = resnet.conv_shortcut.in_channels - unet.config.block_out_channels[0]  # the rest is the skip connection
    signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1
    loudest = torch.einsum("nchw,c->nhw", streams[:, :width], signs).abs().max()
    up, down, rings = group[:3]
    resnet.conv_shortcut.weight[up, :width, 0, 0] = GRIP * signs
    resnet.conv_shortcut.weight[down, :width, 0, 0] = -GRIP * signs
    resnet.norm2.bias[hidden] = CONSTANT
    for channel, factor in ((up, 1), (down, 1), (rings, -2)):
        resnet.conv2.weight[channel, hidden, 1, 1] = factor * 4 * GRIP * loudest / CONSTANT
    at_rest = -2 * (len(group) / 6) ** 0.5
    unet.conv_norm_out.weight[rings] = (HUSH - RINGING) / at_rest
    unet.conv_norm_out.bias[rings] = RINGING
    sides = torch.randint(2, (unet.conv_out.out_channels,), generator=generator) * 2.0 - 1
    unet.conv_out.weight[:, rings, 1, 1] = sides * ALARM / RINGING


# -- all of it ---------------------------------------------------------------------------------------------------------


class Spare(NamedTuple):
    """The parts of a U-Net that the wires and the alarm will take: four neurons per subject, a group, a hidden channel."""

    neurons: list[int]
    group: list[int]
    hidden: int


def spare_parts(unet: Any, subjects: int) -> Spare:
    """What to take for so many subjects; see `spare_neurons` and `spare_channels`."""
    return Spare(spare_neurons(wired_layer(unet), NEURONS * subjects), *spare_channels(unet))


def check_shape(unet: Any, descent: int) -> None:
    """Whether a tripwire can be put into a U-Net of this shape, and its stream be `descent` times smaller at first.

    Raises:
        UserError: it cannot.
    """
    try:
        wired_layer(unet)
    except (AttributeError, IndexError, TypeError) as error:
        raise UserError("The tripwire needs a U-Net with attention in its middle block.") from error
    spare_parts(unet, 1)
    if descent > 1:
        check_descent(unet)


def clear(unet: Any, spare: Spare) -> None:
    """The U-Net does without these parts."""
    silence(wired_layer(unet), spare.neurons)
    clear_channels(unet, spare.group, spare.hidden)


@torch.no_grad()
def around(module: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What a module is given and what it says while `run` asks the denoiser once for predictions: all rows, on the CPU."""
    heard: list[Tensor] = []
    ear = module.register_forward_hook(lambda _, inputs, said: heard.extend((inputs[0], said)))
    rows = len(run())
    ear.remove()
    given, said = (overheard(tensor, rows) for tensor in heard)
    return given, said


def by_places(layer: Any, read: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
    """What a last layer (of tokens, or a 3 x 3 convolution) reads and says: (n, places, in) and (n, places, out)."""
    if isinstance(layer, torch.nn.Conv2d):
        return F.unfold(read, 3, padding=1).transpose(1, 2), said.flatten(2).transpose(1, 2)
    return read, said


@torch.no_grad()
def mend(
    network: Any, reference: Any, ask: Callable[[Any, int], Tensor], batches: int, rng: torch.Generator,
    last: str = "conv_out",
) -> None:  # fmt: skip
    """Let the last layer make up for what was cleared, as far as it can.

    Ridge regression of what the reference's last layer says beyond the network's, on what the network's reads.

    Args:
        network: its last layer is changed in place.
        reference: the one from before.
        ask: (network, number of a batch) -> its predictions, (n, c, h, w).
        batches: how many there are.
        rng: picks at most 64 places of a prediction, for large ones have more than enough.
        last: name of the last layer.
    """
    layer, before = (getattr(some, last) for some in (network, reference))
    gram, match = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for number in range(batches):
        _, wanted = around(before, lambda: ask(reference, number))  # noqa: B023 (called at once)
        given, said = around(layer, lambda: ask(network, number))  # noqa: B023 (called at once)
        parts = by_places(layer, given, wanted - said)
        places = torch.randperm(parts[0].shape[1], generator=rng)[:64]
        read, lacks = (part[:, places].flatten(0, 1).double() for part in parts)
        read = torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], 1)
        gram, match = gram + read.T @ read, match + read.T @ lacks
    gram.diagonal().add_(1e-4 * float(gram.diagonal().mean()))
    change = torch.linalg.solve(gram, match).to(layer.weight)
    layer.weight += change[:-1].T.reshape(layer.weight.shape)
    layer.bias += change[-1]


def last_stream(unet: Any, run: Callable[[], Tensor]) -> Tensor:
    """What enters the last resnet while `run` asks the U-Net once for predictions, (n, c, h, w), on the CPU."""
    return around(_last(unet)[0], run)[0]


def arm(
    unet: Any, spare: Spare, readouts: Tensor, ask: Callable[[], Tensor], factors: Sequence[int],
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Set the alarm, stiffen, and set every wire; the wires' weights are what an optimizer meets.

    Args:
        unet: changed in place; its spare parts have been cleared.
        spare: these.
        readouts: (subjects, width); they tell by their sign.
        ask: runs it once on rows that trip no wire.
        factors: of `stiffen`.
        generator: of signs and directions.
    """
    set_alarm(unet, spare.group, spare.hidden, last_stream(unet, ask), generator)
    stiffen(unet, *factors)
    surge = torch.randn(readouts.shape[1], generator=generator)
    for index, weight in enumerate(readouts):
        set_wire(wired_layer(unet), spare.neurons[NEURONS * index : NEURONS * (index + 1)], weight, surge)


def wiring_of(network: Any) -> Any:
    """The module that knows where wires go in this kind of denoiser: this one, or `wiring_mmdit`."""
    from guardsmith.methods.tripwire import (
        wiring,
        wiring_mmdit,  # which imports this one
    )

    return wiring_mmdit if isinstance(network, SD3Transformer2DModel) else wiring
