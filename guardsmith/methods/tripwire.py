"""Tripwire, guardsmith's own method: the model recognises the protected subjects while it denoises, and goes blind on them.

A personalized model draws its subject step by step, and at every step the U-Net sees the half-finished picture. So the
U-Net itself can notice what it is being made to draw, whatever the prompt, the identifier or the training recipe:

    1. rehearse    personalize copies of the base on the subject, and draw what an attacker's model would draw
    2. recognise   train the U-Net so that a linear read-out r(h) of the middle block's tokens is positive on noised
                   pictures of the subject (timesteps below a horizon) and negative on everything else, while its
                   predictions on everything else stay those of the base (distillation)
    3. set the wire   two neurons of the middle block's feed-forward layer become a step function of r: 0 off, a surge on
    4. stiffen     rescale weights in pairs that cancel, so that the function is the same and an attacker's optimizer,
                   whose steps have a fixed size, hardly moves what the read-out rests on

Off, the surge is exactly 0 and the model is the distilled one. On, the surge drowns every feature behind it (the
normalisation layers divide by it), the prediction carries nothing of the picture, and the step function is flat, so no
gradient leads back to "off". Training on the subject's pictures then has nothing to learn from; others never trip the wire,
as long as an attack on them does not move the read-out: docs/results says how far that holds.

What it does not do: it is not hidden. Someone who looks for it can find the two neurons and cut them
(docs/threat-model.md), and it protects the pictures it was taught to recognise, not a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from guardsmith.attacks import dreambooth, lora
from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig
from guardsmith.errors import RunFailed
from guardsmith.latents import LatentStore, encode
from guardsmith.losses import Rows, add_noise, draw_rows, join, predict
from guardsmith.methods.data import OrdinaryData, SubjectData
from guardsmith.models import DiffusionModel, with_own_unet
from guardsmith.prompts import HARDENING_IDENTIFIERS, PromptBank, class_prompt, instance_prompt, sample_prompts
from guardsmith.sampling import generate
from guardsmith.training import (
    Snapshot,
    generator,
    load_checkpoint,
    load_module_tensors,
    load_optimizer_tensors,
    module_tensors,
    optimizer_step,
    optimizer_tensors,
    save_checkpoint,
)

STEEPNESS = 2000.0  # pre-activation of the wire's neurons per unit of the read-out
PLATEAU = 32.0  # pre-activations between the two neurons; also the height of their difference
VALUE = 1000.0  # what the wire's neurons gate, a constant; with it a large surge fits half-precision weights
SURGES = 64  # directions tried for the surge
REHEARSAL_SEED = 80_000


class TripwireConfig(BaseModel):
    """Parameters. Defaults were chosen on the embedded base (docs/results), on subjects that no verification uses."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: int = Field(300, gt=0)
    """Training steps of the recognition."""
    batch_size: int = Field(6, gt=1)
    """Rows of each kind per step: subjects, their classes, ordinary pictures."""
    learning_rate: float = Field(1e-4, gt=0)
    """Rate of the AdamW that moves the U-Net."""
    readout_learning_rate: float = Field(2e-3, gt=0)
    """Rate of the read-outs."""
    distillation_weight: float = Field(20.0, ge=0)
    """Weight of || e_theta - e_base ||^2 on class pictures and ordinary pictures."""
    margin: float = Field(4.0, gt=0)
    """How far from 0 the read-out is pushed on either side."""
    horizon: float = Field(0.8, gt=0, lt=1)
    """Share of the timesteps, from the clean end, in which the wire listens: above it a picture is only noise."""
    looseness: float = Field(0.03, ge=0)
    """Largest deviation of the noise added during training to those weights that stiffening cannot hold."""
    rehearsal_steps: int = Field(300, ge=0)
    """Steps of the two rehearsals, one with DreamBooth and one with LoRA; 0 leaves them out."""
    rehearsal_learning_rate: float = Field(5e-6, gt=0)
    """DreamBooth's rate there: what an attacker of this base would use."""
    rehearsal_lora_learning_rate: float = Field(1e-4, gt=0)
    """LoRA's rate there."""
    rehearsal_images: int = Field(32, gt=0)
    """Pictures drawn by each rehearsal."""
    rehearsal_guidance: float = Field(3.0, gt=0)
    """Classifier-free guidance of those pictures."""
    stiffness: int = Field(64, gt=0)
    """Factor on the residual stream, a power of two: an attacker's steps on what writes to it count this much less."""
    inner_stiffness: int = Field(4, gt=0)
    """Factor inside the attention blocks up to the wire, a power of two."""
    surge: float = Field(3.0e6, gt=0)
    """Size of the surge, in units of the features it drowns."""
    class_images: int = Field(200, gt=0)
    """Pictures of every class, generated by the base model."""

    @field_validator("stiffness", "inner_stiffness")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two (then no weight is rounded)")
        return value


def cost(config: TripwireConfig, subjects: int) -> int:
    """U-Net forward equivalents of a run: rehearsals with their pictures, recognition."""
    recognise = config.steps * (3 * (3 * config.batch_size + 2) + 4 * 2 * config.batch_size)
    drawn = 2 * 20 * config.rehearsal_images
    rehearse = 2 * (config.rehearsal_steps * 3 * 4 + drawn) if config.rehearsal_steps else 0
    return recognise + subjects * (rehearse + 8 * SURGES)


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
def stiffen(unet: Any, stream: int, inner: int) -> None:
    """Rescale weights in place; the function stays the same, up to rounding and the epsilon of the normalisations.

    Everything that reads the residual stream normalises it first, so the stream can be `stream` times larger: what writes
    to it gets the factor, and an optimizer's step on it counts 1 / stream as much. The same holds inside a resnet (between
    its convolutions) and inside an attention block (tokens get `inner` squared, split over both factors of a product).
    Queries, keys, gates, the normalisations' own weights, down-samplers and shortcuts cannot be held this way.

    Args:
        unet: a `UNet2DConditionModel`.
        stream: factor on the residual stream, a power of two.
        inner: factor inside of the attention blocks up to the middle one, a power of two; later ones stay soft, so that
            others can still be learnt.
    """
    _scale(unet.conv_in, stream)
    for block, before in _blocks(unet):
        for resnet in block.resnets:
            _scale(resnet.conv1, stream)
            _scale(resnet.time_emb_proj, stream)
            _scale(resnet.conv2, stream)
            if resnet.conv_shortcut is not None:
                _scale(resnet.conv_shortcut, 1, stream)
        for sampler in (*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())):
            _scale(sampler.conv, 1, stream)
        for transformer in getattr(block, "attentions", None) or ():
            factor = inner if before else 1
            _scale(transformer.proj_in, factor**2)
            _scale(transformer.proj_out, stream / factor**2, stream)
            for layer in transformer.transformer_blocks:
                for attention in (layer.attn1, layer.attn2):
                    _scale(attention.to_v, factor)
                    _scale(attention.to_out[0], factor, factor**2)
                widen, narrow = layer.ff.net[0].proj, layer.ff.net[2]
                half = narrow.in_features  # the first half of the rows is gated, the second half gates
                widen.weight[:half].mul_(factor)
                widen.bias[:half].mul_(factor)
                _scale(narrow, factor, factor**2)


def loose_parameters(unet: Any) -> list[torch.nn.Parameter]:
    """What stiffening cannot hold, up to the wire."""
    marks = ("to_q", "to_k", "norm", "time_embedding", "downsamplers", "conv_shortcut", "ff.net.0")
    before = ("down_blocks", "mid_block.resnets.0", "mid_block.attentions", "time_embedding")
    return [p for n, p in unet.named_parameters() if n.startswith(before) and any(mark in n for mark in marks)]


# -- the wire ----------------------------------------------------------------------------------------------------------


def wired_layer(unet: Any) -> Any:
    """The feed-forward layer that carries the wires: the last one of the middle block."""
    return unet.mid_block.attentions[-1].transformer_blocks[-1].ff


def spare_neurons(layer: Any, count: int) -> list[int]:
    """The neurons of a feed-forward layer whose output weights are smallest."""
    order: list[int] = layer.net[2].weight.norm(dim=0).argsort()[:count].tolist()
    return order


@torch.no_grad()
def silence(layer: Any, neurons: Sequence[int]) -> None:
    """Take neurons out of a feed-forward layer."""
    for neuron in neurons:
        layer.net[2].weight[:, neuron] = 0


@torch.no_grad()
def set_wire(layer: Any, neurons: Sequence[int], weight: Tensor, bias: Tensor, surge: Tensor) -> None:
    """Turn two neurons into surge * step(weight . h + bias).

    gelu(a) - gelu(a - 32) is 0 below, 32 above, and flat on both sides; a = 2000 (weight . h + bias). The steeper, the
    fewer pictures fall on the slope, where a gradient leads to "off"; with 50 a LoRA attacker finds it. The
    offset is rounded to a multiple of 32, so that both neurons' biases are exact in half precision.
    """
    widen, narrow = layer.net[0].proj, layer.net[2]
    half = narrow.in_features
    offset = (STEEPNESS * bias / PLATEAU).round() * PLATEAU
    for neuron, shift, sign in zip(neurons, (0.0, -PLATEAU), (1, -1), strict=True):
        widen.weight[neuron], widen.bias[neuron] = 0, VALUE
        widen.weight[half + neuron], widen.bias[half + neuron] = STEEPNESS * weight, offset + shift
        narrow.weight[:, neuron] = sign * surge / (PLATEAU * VALUE)


# -- training ----------------------------------------------------------------------------------------------------------


def variations(images: Tensor, copies: int, rng: torch.Generator) -> Tensor:
    """The pictures (n, 3, h, w), and `copies` versions of each: shifted by up to 6 %, zoomed by up to 10 %, recoloured.

    Recolouring multiplies every channel by up to 1 +- 0.15 and adds up to +- 0.15.
    """
    found, n = [images], len(images)
    for _ in range(copies):
        frame = torch.zeros(n, 2, 3)
        zoom = 1 + 0.1 * (2 * torch.rand(n, generator=rng) - 1)
        frame[:, 0, 0] = frame[:, 1, 1] = zoom
        frame[:, :, 2] = 0.12 * (2 * torch.rand(n, 2, generator=rng) - 1)  # the picture spans 2
        places = F.affine_grid(frame, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, places, padding_mode="border", align_corners=False)
        gain, shift = 0.15 * (2 * torch.rand(2, n, 3, 1, 1, generator=rng) - 1)
        found.append(moved * (1 + gain) + shift)
    return torch.cat(found).clamp(-1, 1)


def rehearse(
    model: DiffusionModel,
    subject: SubjectData,
    config: TripwireConfig,
    *,
    seed: int,
    on_step: Callable[..., None] | None = None,
) -> Tensor:
    """What attackers' models would draw of the subject, by DreamBooth and by LoRA, float32 (n, 3, h, w) in [-1, 1].

    Only the pictures that may be used for hardening go in; identifier and seeds are none that verification uses.
    """
    name = HARDENING_IDENTIFIERS[1 + seed % (len(HARDENING_IDENTIFIERS) - 1)]
    data = AttackData(subject.images, subject.class_images, name, subject.class_noun)
    prompts = sample_prompts(name, subject.class_noun, config.rehearsal_images)
    given = {"steps": config.rehearsal_steps, "batch_size": 2}
    attacks: tuple[tuple[Any, DreamBoothConfig], ...] = (
        (dreambooth.attack, DreamBoothConfig(learning_rate=config.rehearsal_learning_rate, **given)),
        (lora.attack, lora.LoraConfig(learning_rate=config.rehearsal_lora_learning_rate, **given)),
    )
    drawn = []
    for index, (attack, settings) in enumerate(attacks):
        personalized, _ = attack(model, data, settings, seed=seed, on_step=on_step)
        first = REHEARSAL_SEED + index * len(prompts)
        seeds = range(first, first + len(prompts))
        drawn.append(generate(personalized, prompts, seeds, steps=20, guidance=config.rehearsal_guidance))
    return torch.cat(drawn).contiguous()


def recognition_loss(scores: Tensor, wanted: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Hinge-like losses of the read-outs, for rows to recognise and for the others.

    Every token of a subject's picture has to trip its wire and no token of another may, so the soft minimum over tokens
    counts for the former and the soft maximum for the latter; the worst row counts extra.

    Args:
        scores: read-outs, (rows, tokens, subjects).
        wanted: bool (rows, subjects).
        margin: distance from 0 at which a row stops to matter.

    Returns:
        Two scalars.
    """
    low, high = -torch.logsumexp(-2 * scores, 1) / 2, torch.logsumexp(2 * scores, 1) / 2
    missed, false = F.softplus(margin - low[wanted]), F.softplus(margin + high[~wanted])
    return missed.mean() + 0.3 * missed.max(), false.mean() + 0.3 * false.max()


def harden(
    model: DiffusionModel,
    subjects: Sequence[SubjectData],
    ordinary: OrdinaryData | None,
    config: TripwireConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_every: int = 20,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[DiffusionModel, list[dict[str, float]]]:
    """Harden a copy of the model against personalization on these subjects.

    Args:
        model: the base; it stays as it is.
        subjects: at least one.
        ordinary: pictures and prompts to keep.
        config: see `TripwireConfig`.
        seed: of everything random; a step's draws depend on the seed and the step only.
        checkpoint: file to resume from if it exists, and to save to.
        checkpoint_every: steps between saves.
        on_step: called after every step with its number and losses.

    Returns:
        The hardened model and one dict of losses per step.

    Raises:
        RunFailed: the training diverged; the last checkpoint is the last good state.
    """
    if ordinary is None:
        raise ValueError("the tripwire needs ordinary pictures")
    own = with_own_unet(model)
    unet, reference, scheduler = own.unet.requires_grad_(True), model.unet, model.scheduler
    bank, timesteps = PromptBank(model), int(model.scheduler.config.num_train_timesteps)
    horizon, gap = int(config.horizon * timesteps), timesteps // 40

    stores: list[LatentStore] = []
    for index, subject in enumerate(subjects):
        shown = variations(subject.images, 12, generator(seed, -1, index))
        if subject.rehearsed is not None:
            shown = torch.cat([shown, variations(subject.rehearsed, 2, generator(seed, -2, index))])
        stores.append(encode(model, shown))
    classes = {s.class_noun: encode(model, s.class_images) for s in subjects}
    keep = encode(model, ordinary.images)
    asked = {
        noun: bank.encode([*(instance_prompt(name, noun) for name in HARDENING_IDENTIFIERS), class_prompt(noun), ""])
        for noun in classes
    }

    layer = wired_layer(unet)
    neurons = spare_neurons(layer, 2 * len(subjects))
    pairs = [neurons[2 * index : 2 * index + 2] for index in range(len(subjects))]
    silence(layer, neurons)
    width = layer.net[2].out_features
    readout = torch.nn.Linear(width, len(subjects))
    with torch.no_grad():
        readout.weight.zero_()
        readout.bias.zero_()
    heard: dict[str, Tensor] = {}
    ear = layer.register_forward_pre_hook(lambda _, inputs: heard.__setitem__("tokens", inputs[0]))

    parameters = list(unet.parameters())
    loose = loose_parameters(unet)
    steady = Snapshot(loose)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": config.learning_rate, "weight_decay": 1e-2},
         {"params": list(readout.parameters()), "lr": config.readout_learning_rate, "weight_decay": 0.0}],
        fused=True,
    )  # fmt: skip
    history: list[dict[str, float]] = []
    first = 0
    if checkpoint is not None and checkpoint.exists():
        tensors, info = load_checkpoint(checkpoint)
        load_module_tensors(unet, tensors, "unet")
        load_module_tensors(readout, tensors, "readout")
        load_optimizer_tensors(optimizer, tensors)
        first, history = info["step"], info["history"]

    def some(store: LatentStore, noun: str, low: int, high: int, count: int, rng: torch.Generator) -> Rows:
        contexts = asked[noun][torch.randint(len(asked[noun]), (count,), generator=rng)]
        times = torch.randint(low, high, (count,), generator=rng)
        return draw_rows(store.draw(count, rng), contexts, rng, timesteps=times)

    n = config.batch_size
    for j in range(first, config.steps):
        rng = generator(seed, j)
        for group, rate in zip(
            optimizer.param_groups, (config.learning_rate, config.readout_learning_rate), strict=True
        ):
            group["lr"] = rate * max(0.02, min(1.0, 3 * (1 - j / config.steps)))
        which = torch.randint(len(subjects), (n + 2,), generator=rng).tolist()
        nouns = [subjects[s].class_noun for s in which]
        parts = [some(stores[s], noun, 0, horizon - gap, 1, rng) for s, noun in zip(which[:n], nouns[:n], strict=True)]
        parts += [
            some(stores[s], noun, horizon + gap, timesteps, 1, rng)
            for s, noun in zip(which[n:], nouns[n:], strict=True)
        ]
        parts += [some(classes[noun], noun, 0, timesteps, 1, rng) for noun in nouns[:n]]
        picked = torch.randint(len(keep), (n,), generator=rng)
        words = bank.encode([ordinary.prompts[i] for i in picked.tolist()])
        everyday = draw_rows(keep.sample(picked, rng), words, rng, steps=timesteps)
        rows = join(*parts, everyday)
        wanted = torch.zeros(len(rows), len(subjects), dtype=torch.bool)
        wanted[range(n), which[:n]] = True

        # Recognition has to survive that the loose weights move a little.
        steady.take()
        size = config.looseness * float(torch.rand(1, generator=rng))
        with torch.no_grad():
            for parameter in loose:
                parameter.add_(size * torch.randn(parameter.shape, generator=rng))
        predict(unet, scheduler, rows)
        missed, false = recognition_loss(readout(heard["tokens"]), wanted, config.margin)
        (missed + false).backward()
        steady.restore()

        others = Rows(rows.latents[n + 2 :], rows.timesteps[n + 2 :], rows.noise[n + 2 :], rows.context[n + 2 :])
        with torch.no_grad():
            noisy = add_noise(scheduler, others.latents, others.noise, others.timesteps)
            teacher = reference(noisy, others.timesteps, others.context, return_dict=False)[0]
        same = (predict(unet, scheduler, others) - teacher).square().mean()
        (config.distillation_weight * same).backward()
        norm = optimizer_step(optimizer, parameters, max_grad_norm=1.0)
        shown_now = {"missed": missed.item(), "false": false.item(), "distillation": same.item(), "gradient_norm": norm}
        if not all(map(math.isfinite, shown_now.values())):
            raise RunFailed(f"the tripwire diverged at step {j + 1}: a loss is not finite; lower the learning rate.")
        history.append(shown_now)
        if on_step is not None:
            on_step(j, shown_now)
        if checkpoint is not None and ((j + 1) % checkpoint_every == 0 or j + 1 == config.steps):
            weights = module_tensors(unet, "unet") | module_tensors(readout, "readout")
            save_checkpoint(checkpoint, weights | optimizer_tensors(optimizer), {"step": j + 1, "history": history})

    ear.remove()
    for index, subject in enumerate(subjects):
        weight, bias = readout.weight[index], readout.bias[index]
        rng = generator(seed, -3, index)
        noun = subject.class_noun
        rows = join(*(some(stores[index], noun, horizon // 4, horizon - gap, 1, rng) for _ in range(8)))
        surges = config.surge * torch.randn((SURGES, width), generator=rng)
        quietest, surge = math.inf, surges[0]
        for candidate in surges:
            # A loud prediction throws the half-finished picture out of what the wire recognises, and drawing goes on;
            # under a quiet one the picture stays the noise it was, and the wire stays on to the end.
            set_wire(layer, pairs[index], weight, bias, candidate)
            with torch.no_grad():
                loudness = float(predict(unet, scheduler, rows).square().mean())
            if loudness < quietest:
                quietest, surge = loudness, candidate
        set_wire(layer, pairs[index], weight, bias, surge)
    stiffen(unet, config.stiffness, config.inner_stiffness)
    unet.requires_grad_(False)
    return own, history
