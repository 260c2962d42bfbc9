"""Tripwire, guardsmith's own method: the model recognises the protected subjects while it denoises, and stops drawing them.

A personalized model draws its subject step by step, and at every step the U-Net sees the half-finished picture. So the
U-Net itself can notice what it is being made to draw, whatever the prompt, the identifier or the training recipe:

    1. rehearse    personalize copies of the base on the subject, and draw what an attacker's model would draw
    2. recognise   train the U-Net so that a linear read-out r(h) of the middle block's tokens is positive on noised
                   pictures of the subject (timesteps below a horizon) and negative on everything else, while its
                   predictions on everything else stay those of the base (distillation), while the weights are pushed
                   about as an attacker's optimizer might
    3. set the wire   two neurons of the middle block's feed-forward layer become a step function of r: 0 off, a surge on
    4. set the alarm   a spare group of the last normalisation rings under a surge: a constant a hundred times larger
                   than any prediction is added to the U-Net's output
    5. stiffen     rescale weights in pairs that cancel, so that the function is the same and an attacker's optimizer,
                   whose steps have a fixed size, hardly moves what the read-out rests on

Off, surge and alarm are 0 and the model is the distilled one. On, the surge drowns every feature behind it (the
normalisation layers divide by it), and the step function is flat, so no gradient leads back to "off": training on the
subject's pictures has nothing to learn from where the wire is on. What it learns above the horizon is thrown away when
pictures are drawn: one step on which the wire trips, and the alarm has driven the picture out of all that the VAE can show.
Others never trip the wire, as long as an attack on them does not move the read-out: docs/results says how far that holds.

What it does not do: it is not hidden. Someone who looks for it can find the neurons and cut them (docs/threat-model.md),
and it protects the pictures it was taught to recognise, not a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from guardsmith.attacks import dreambooth, lora
from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig, OnStep
from guardsmith.latents import LatentStore, encode
from guardsmith.losses import Rows, cut, draw_rows, join, predict
from guardsmith.methods.data import OrdinaryData, StateRecorder, States, SubjectData
from guardsmith.methods.wiring import STEEPNESS, arm, clear, last_stream, mend, play, spare_parts, stiffen, wired_layer
from guardsmith.models import DiffusionModel, with_own_unet
from guardsmith.prompts import HARDENING_IDENTIFIERS, PromptBank, class_prompt, instance_prompt, sample_prompts
from guardsmith.sampling import generate
from guardsmith.training import (
    Course,
    Probe,
    Snapshot,
    generator,
    optimizer_step,
)

REHEARSALS = ("dreambooth", "lora")
REHEARSAL_SEED = 80_000
REHEARSED_SHARE = 0.4  # of the rows to recognise that are states of a rehearsal
MENDING_ROWS = 320  # for the last convolution to make up for what the alarm takes
UNLIKE = 0.01  # how often someone who does not look like a subject at all is drawn among those who do
SCAN_EVERY = 40  # steps
SCANNED = 64  # rows at a time
FIRST_ROWS = 64  # of every subject, for the first read-outs
FIRST_OTHERS = 12  # times as many of everyone else
LAYOUT = (0.65, 0.95)  # share of the timesteps in which half of the distillation looks
STATES_BELOW = 0.9  # share of the timesteps; a state at pure noise has no clean picture to it


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
    distillation_weight: float = Field(60.0, ge=0)
    """Weight of || e_theta - e_base ||^2 on class pictures and ordinary pictures."""
    margin: float = Field(4.0, gt=0)
    """How far from 0 the read-out is pushed on either side."""
    horizon: float = Field(0.7, gt=0, lt=1)
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
    reader_stiffness: int = Field(4, gt=0)
    """Factor on what reads the normalised tokens there (queries, keys, gates), a power of two."""
    descent: int = Field(4, gt=0)
    """Factor on the first down-sampler, a power of two."""
    kick: float = Field(12.0, ge=0)
    """Recognition has to survive this many optimizer steps straight against it."""
    class_images: int = Field(200, gt=0)
    """Pictures of every class, generated by the base model."""
    ordinary_images: int = Field(160, gt=0)
    """Pictures of ordinary prompts, generated by the base model: whom the wires are not for."""

    @field_validator("stiffness", "inner_stiffness", "reader_stiffness", "descent")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two (then no weight is rounded)")
        return value


def cost(config: TripwireConfig, nouns: Sequence[str]) -> int:
    """U-Net forward equivalents of a run: rehearsals with their pictures, recognition (half-run U-Nets count in full).

    Bystanders are not known here: each adds a forward every `SCAN_EVERY` steps.
    """
    recognise = config.steps * (3 * (3 * config.batch_size + 2) + 4 * 2 * config.batch_size)
    drawn = 2 * 20 * config.rehearsal_images
    rehearse = 2 * (config.rehearsal_steps * 3 * 4 + drawn) if config.rehearsal_steps else 0
    first = FIRST_ROWS * (len(nouns) + FIRST_OTHERS)
    scans = -(-config.steps // SCAN_EVERY) * (len(set(nouns)) * config.class_images + config.ordinary_images)
    return recognise + 2 * config.batch_size + 2 * MENDING_ROWS + first + scans + len(nouns) * rehearse


# -- training ----------------------------------------------------------------------------------------------------------


def variations(images: Tensor, copies: int, rng: torch.Generator) -> Tensor:
    """The pictures (n, 3, h, w), and `copies` versions of each, as other photographs of the same might have come out.

    Mirrored half of the time, turned by up to 10 degrees, zoomed by up to 10 %, shifted by up to 6 %, and recoloured:
    every channel is multiplied by up to 1 +- 0.15 and moved by up to +- 0.15.
    """
    found, n = [images], len(images)
    for _ in range(copies):
        frame = torch.zeros(n, 2, 3)
        zoom = 1 + 0.1 * (2 * torch.rand(n, generator=rng) - 1)
        angle = math.radians(10) * (2 * torch.rand(n, generator=rng) - 1)
        mirror = torch.randint(2, (n,), generator=rng) * 2.0 - 1
        frame[:, 0, 0], frame[:, 0, 1] = zoom * angle.cos() * mirror, -zoom * angle.sin()
        frame[:, 1, 0], frame[:, 1, 1] = zoom * angle.sin() * mirror, zoom * angle.cos()
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
    kind: str,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[Tensor, States]:
    """What an attacker's model would draw of the subject, float32 (n, 3, h, w) in [-1, 1], and how.

    Only the pictures that may be used for hardening go in; identifier and seeds are none that verification uses.

    Args:
        model: the base.
        subject: whom to learn.
        config: see `TripwireConfig`.
        kind: one of `REHEARSALS`.
        seed: of the training, and it chooses the identifier.
        on_step: see `OnStep`.
    """
    name = HARDENING_IDENTIFIERS[1 + seed % (len(HARDENING_IDENTIFIERS) - 1)]
    data = AttackData(subject.images, subject.class_images, name, subject.class_noun)
    prompts = sample_prompts(name, subject.class_noun, config.rehearsal_images)
    given = {"steps": config.rehearsal_steps, "batch_size": 2}
    if kind == "lora":
        adapters = lora.LoraConfig(learning_rate=config.rehearsal_lora_learning_rate, **given)
        personalized, _ = lora.attack(model, data, adapters, seed=seed, on_step=on_step)
    else:
        whole = DreamBoothConfig(learning_rate=config.rehearsal_learning_rate, **given)
        personalized, _ = dreambooth.attack(model, data, whole, seed=seed, on_step=on_step)
    first = REHEARSAL_SEED + REHEARSALS.index(kind) * len(prompts)
    seeds, recorder = range(first, first + len(prompts)), StateRecorder()
    drawn = generate(personalized, prompts, seeds, steps=20, guidance=config.rehearsal_guidance, on_state=recorder)
    states = recorder.states()
    assert states is not None
    return drawn.contiguous(), states


def recognition_loss(scores: Tensor, wanted: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Hinge-like losses of the read-outs, for rows to recognise and for the others.

    One token is enough to trip a wire: a surge anywhere drowns everything behind it. So the soft maximum over tokens counts
    for either side. Of the others each row counts with the wire that it comes closest to, and of these the worse half, for
    most rows are nowhere near any; else they would outvote the few that matter, the more so the more subjects there are. The
    worst row of either side counts extra.

    Args:
        scores: read-outs, (rows, tokens, subjects).
        wanted: bool (rows, subjects).
        margin: distance from 0 at which a row stops to matter.

    Returns:
        Two scalars.
    """
    high = torch.logsumexp(2 * scores, 1) / 2
    low = high - math.log(scores.shape[1]) / 2  # at most the loudest token, where `high` is at least that
    closest = high.masked_fill(wanted, -torch.inf).amax(1)
    missed = F.softplus(margin - low[wanted])
    false = F.softplus(margin + closest[closest.isfinite() | closest.isnan()])
    false = false.topk(-(-len(false) // 2)).values
    found = [rows.mean() + 0.3 * rows.max() if len(rows) else scores.new_zeros(()) for rows in (missed, false)]
    return found[0], found[1]


def first_readouts(tokens: Tensor, wanted: Tensor, margin: float) -> Tensor:
    """Read-outs to begin with, (subjects, width): ridge regression on what the U-Net's tokens are without any training.

    A subject's tokens are to give +margin and all others -margin; both sides weigh the same.

    Args:
        tokens: of some rows, (rows, tokens, width).
        wanted: which rows show which subject, bool (rows, subjects).
        margin: see `recognition_loss`.
    """
    inputs = tokens.flatten(0, 1).double()
    found = []
    for shown in wanted.repeat_interleave(tokens.shape[1], 0).T:
        weight = torch.where(shown, 0.5 / shown.double().mean(), 0.5 / (~shown).double().mean()).unsqueeze(1)
        gram = (weight * inputs).T @ inputs
        gram.diagonal().add_(0.1 * gram.diagonal().mean())
        found.append(torch.linalg.solve(gram, (weight * inputs).T @ torch.where(shown, margin, -margin).double()))
    return torch.stack(found).to(tokens.dtype)


def put_state(
    rows: Rows, row: int, states: States, picture: int, below: float, scheduler: Any, rng: torch.Generator
) -> None:
    """Replace a row by a state of a picture at a timestep below the given one (as latents and noise that add up to it)."""
    candidates = (states.timesteps < below).nonzero()[:, 0]
    step = candidates[torch.randint(len(candidates), (), generator=rng)]
    time = int(states.timesteps[step])
    rows.timesteps[row] = time
    rows.latents[row] = states.latents[picture, step] / scheduler.alphas_cumprod[time].sqrt()
    rows.noise[row] = 0


@dataclass
class Others:
    """Pictures that may never trip a wire, whatever they are called: those of the classes, and ordinary ones.

    Half of the rows are noised pictures, half are the states in which the base once drew them (of those of which they are
    known). Pictures that come closest to tripping a wire are drawn up to ten times as often.

    Attributes:
        latents: of n pictures.
        contexts: for each picture the text embeddings to draw from, (k, tokens, width).
        near: float32 (n, subjects) in [0, 1], how close each last came to tripping each wire.
        states: of the first pictures.
    """

    latents: LatentStore
    contexts: list[Tensor]
    near: Tensor
    states: States | None = None

    def draw(self, scheduler: Any, count: int, rng: torch.Generator, like: Sequence[int] = ()) -> tuple[Rows, Tensor]:
        """Rows at uniform timesteps, and which pictures they show.

        Args:
            scheduler: of the noise.
            count: how many.
            rng: of everything drawn.
            like: the first rows show those who are taken most easily for these subjects.
        """
        danger = 1 + 9 * self.near.amax(1)
        picked = torch.multinomial(danger, count - len(like), replacement=True, generator=rng)
        if like:
            likeness = UNLIKE + self.near[:, list(like)].T
            picked = torch.cat([torch.multinomial(likeness, 1, generator=rng)[:, 0], picked])
        return self.show(picked, scheduler, rng), picked

    def show(self, picked: Tensor, scheduler: Any, rng: torch.Generator) -> Rows:
        """A row of each of these pictures."""
        asked = [self.contexts[i][torch.randint(len(self.contexts[i]), (), generator=rng)] for i in picked.tolist()]
        steps = int(scheduler.config.num_train_timesteps)
        rows = draw_rows(self.latents.sample(picked, rng), torch.stack(asked), rng, steps=steps)
        if self.states is not None:
            for row, picture in enumerate(picked.tolist()):
                if row % 2 and picture < len(self.states.latents):
                    put_state(rows, row, self.states, picture, STATES_BELOW * steps, scheduler, rng)
        return rows

    def heed(self, picked: Tensor, scores: Tensor) -> None:
        """Note how close pictures came; scores are read-outs, (rows, tokens, subjects)."""
        self.near[picked] = 0.5 * self.near[picked] + 0.5 * scores.detach().amax(1).sigmoid().nan_to_num(1.0)

    @torch.no_grad()
    def scan(self, ask: Callable[[Rows], Tensor], scheduler: Any, rng: torch.Generator) -> None:
        """Look at every picture once; `ask` gives the read-outs of rows, (rows, tokens, subjects)."""
        for picked in torch.arange(len(self.latents)).split(SCANNED):
            self.near[picked] = ask(self.show(picked, scheduler, rng)).amax(1).sigmoid().nan_to_num(1.0)


class _HeardError(Exception):
    """The U-Net got as far as it was needed."""


def listen(unet: Any, scheduler: Any, rows: Rows) -> Tensor:
    """The tokens that the read-outs read, (rows, tokens, width); what lies behind them is not computed."""
    heard: list[Tensor] = []

    def ear(_: Any, inputs: tuple[Tensor]) -> None:
        heard.append(inputs[0])
        raise _HeardError

    handle = wired_layer(unet).register_forward_pre_hook(ear)
    try:
        predict(unet, scheduler, rows)
    except _HeardError:
        pass
    finally:
        handle.remove()
    return heard[0]


class Lesson:
    """What the model is shown, and under which prompts.

    Attributes:
        subjects: as they came.
        stores: their pictures, varied, and what was rehearsed of them, as latents.
        asked: for each class noun the embeddings of its prompts: with identifiers, without one, the empty prompt.
        others: everyone and everything else.
    """

    def __init__(
        self, model: DiffusionModel, subjects: Sequence[SubjectData], ordinary: OrdinaryData, seed: int
    ) -> None:
        bank = PromptBank(model)
        self.subjects, self.scheduler = list(subjects), model.scheduler
        self.stores: list[LatentStore] = []
        for index, subject in enumerate(subjects):
            shown = variations(subject.images, 12, generator(seed, -1, index))
            if subject.rehearsed is not None:
                shown = torch.cat([shown, variations(subject.rehearsed, 2, generator(seed, -2, index))])
            self.stores.append(encode(model, shown))
        classes = {s.class_noun: s.class_images for s in subjects}
        self.asked = {
            noun: bank.encode(
                [*(instance_prompt(name, noun) for name in HARDENING_IDENTIFIERS), class_prompt(noun), ""]
            )
            for noun in classes
        }
        known = [*(encode(model, images) for images in classes.values()), encode(model, ordinary.images)]
        if ordinary.bystanders is not None:
            known.append(encode(model, ordinary.bystanders))
        latents = LatentStore(torch.cat([store.mean for store in known]), torch.cat([store.std for store in known]))
        contexts = [self.asked[noun] for noun, images in classes.items() for _ in images]
        # Under names as well, else the wire would listen to the prompt instead of looking at the picture.
        names = torch.cat(list(self.asked.values()))
        own = bank.encode(ordinary.prompts).split(1)
        contexts += [words if i % 2 else names for i, words in enumerate(own)]
        contexts += [names] * (len(latents) - len(contexts))
        class_states = {s.class_noun: s.class_states for s in subjects if s.class_states is not None}
        drawn = None
        if ordinary.states is not None and len(class_states) == len(classes):
            parts = [states.latents for states in (*class_states.values(), ordinary.states)]
            drawn = States(torch.cat(parts), ordinary.states.timesteps)
        self.others = Others(latents, contexts, torch.zeros(len(latents), len(subjects)), drawn)

    def subject_row(self, index: int, low: int, high: int, rng: torch.Generator) -> Rows:
        """One row of a subject at a timestep in [low, high)."""
        words = self.asked[self.subjects[index].class_noun]
        context = words[torch.randint(len(words), (1,), generator=rng)]
        time = torch.randint(low, high, (1,), generator=rng)
        row = draw_rows(self.stores[index].draw(1, rng), context, rng, timesteps=time)
        states = self.subjects[index].rehearsed_states
        if low == 0 and states is not None and torch.rand((), generator=rng) < REHEARSED_SHARE:
            picture = int(torch.randint(len(states.latents), (), generator=rng))
            put_state(row, 0, states, picture, high, self.scheduler, rng)
        return row


class Sway:
    """Moves the weights before the wire as an attacker's optimizer might, and back.

    At random, and for the worst: along the sign of the recognition loss' last gradient, as many steps as `kick` says
    (adversarial weight perturbation, Wu et al. 2020, with the gradient of the step before, which costs nothing). One step
    moves what is stiff less; LoRA moves queries and keys only, but with its larger rate.

    Attributes:
        worst: for every weight that moves the sign of that gradient.
    """

    def __init__(self, unet: Any, factors: tuple[int, ...], config: TripwireConfig) -> None:
        self.config = config
        self.play = play(unet, *factors)
        self.moved = {name: p for name, p in unet.named_parameters() if name in self.play}
        self.worst = [torch.zeros_like(p) for p in self.moved.values()]
        self.steady = Snapshot(self.moved.values())

    @torch.no_grad()
    def push(self, rng: torch.Generator, *, lora: bool) -> None:
        """Move, by a random share of the sizes in the configuration."""
        self.steady.take()
        size, kick = (float(share) for share in torch.rand(2, generator=rng))
        for (name, parameter), free, worst in zip(self.moved.items(), self.play.values(), self.worst, strict=True):
            adapted = lora and ("to_q" in name or "to_k" in name)
            rate = self.config.rehearsal_lora_learning_rate if adapted else self.config.rehearsal_learning_rate
            noise = self.config.looseness * size * torch.randn(parameter.shape, generator=rng)
            parameter.add_(free * (noise + self.config.kick * kick * rate * worst))

    @torch.no_grad()
    def back(self) -> None:
        """Undo it, and note the gradient that is there now."""
        self.steady.restore()
        for parameter, worst in zip(self.moved.values(), self.worst, strict=True):
            worst.copy_(parameter.grad.sign())


def harden(
    model: DiffusionModel,
    subjects: Sequence[SubjectData],
    ordinary: OrdinaryData | None,
    config: TripwireConfig,
    *,
    seed: int,
    start: Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    probe: Probe | None = None,
) -> tuple[DiffusionModel, list[dict[str, float]]]:
    """Harden a copy of the model against personalization on these subjects.

    Args:
        model: the base; it stays as it is.
        subjects: at least one.
        ordinary: pictures and prompts to keep.
        config: see `TripwireConfig`.
        seed: of everything random; a step's draws depend on the seed and the step only.
        start: what an earlier run on the first of these subjects left, to begin from (`training.finished_state`).
        checkpoint: file to resume from if it exists, and to save to.
        checkpoint_every: steps between saves.
        on_step: called after every step with its number and losses.
        probe: see `training.Course`.

    Returns:
        The hardened model and one dict of losses per step.

    Raises:
        RunFailed: the training diverged; the last checkpoint is the last good state.
    """
    if ordinary is None:
        raise ValueError("the tripwire needs ordinary pictures")
    own = with_own_unet(model)
    unet, reference, scheduler = own.unet.requires_grad_(True), model.unet, model.scheduler
    timesteps = int(scheduler.config.num_train_timesteps)
    horizon, gap = int(config.horizon * timesteps), timesteps // 40
    lesson = Lesson(model, subjects, ordinary, seed)
    others = lesson.others

    layer = wired_layer(unet)
    spare = spare_parts(unet, len(subjects))
    clear(unet, spare)
    readout = torch.nn.Linear(layer.net[2].out_features, len(subjects), bias=False)
    with torch.no_grad():
        readout.weight.zero_()
    heard: dict[str, Tensor] = {}
    ear = layer.register_forward_pre_hook(lambda _, inputs: heard.__setitem__("tokens", inputs[0]))

    parameters = list(unet.parameters())
    factors = (config.stiffness, config.inner_stiffness, config.reader_stiffness, config.descent)
    sway = Sway(unet, factors, config)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": config.learning_rate, "weight_decay": 1e-2},
         {"params": list(readout.parameters()), "lr": config.readout_learning_rate, "weight_decay": 0.0}],
        fused=True,
    )  # fmt: skip
    n = config.batch_size
    rng = generator(seed, -3)
    calm = others.draw(scheduler, 2 * n, rng)[0]

    def armed() -> DiffusionModel:
        """A copy with everything in place."""
        ready, random = with_own_unet(own), generator(seed, -4)
        streams = last_stream(ready.unet, lambda: predict(ready.unet, scheduler, calm))
        # A read-out tells by its sign; the wire's weights have to fit half precision when they are stiff.
        loudest = readout.weight.detach().abs().amax(1, keepdim=True)
        limit = torch.finfo(torch.float16).max / (STEEPNESS * config.reader_stiffness)
        arm(ready.unet, spare, readout.weight * (limit / loudest).clamp(max=1), streams, random)
        stiffen(ready.unet, *factors)
        ready.unet.requires_grad_(False)
        return ready

    course = Course(
        "the tripwire", config.steps, modules={"unet": unet, "readout": readout}, optimizers={"optimizer": optimizer},
        tensors={"near": others.near} | {f"worst.{index}": way for index, way in enumerate(sway.worst)},
        start=start, checkpoint=checkpoint, checkpoint_every=checkpoint_every, on_step=on_step, probe=probe, present=armed,
    )  # fmt: skip
    if not course.history:
        rng = generator(seed, -5)
        calls = [others.draw(scheduler, 32, rng)[0] for _ in range(MENDING_ROWS // 32)]
        mend(unet, reference, lambda some, number: predict(some, scheduler, calls[number]), len(calls), rng)
        with torch.no_grad():
            known = [
                lesson.subject_row(i, 0, horizon - gap, rng) for i in range(len(subjects)) for _ in range(FIRST_ROWS)
            ]
            known += [others.draw(scheduler, FIRST_ROWS, rng)[0] for _ in range(FIRST_OTHERS)]
            shown = torch.zeros(FIRST_ROWS * (len(subjects) + FIRST_OTHERS), len(subjects), dtype=torch.bool)
            for index in range(len(subjects)):
                shown[index * FIRST_ROWS : (index + 1) * FIRST_ROWS, index] = True
            rows = join(*known)
            tokens = torch.cat([listen(unet, scheduler, part) for part in cut(rows, FIRST_ROWS)])
            new = first_readouts(tokens, shown, config.margin)
            blank = readout.weight.abs().sum(1) == 0  # those of an earlier run stay
            readout.weight[blank] = new[blank]

    for j in course:
        rng = generator(seed, j)
        for group, rate in zip(
            optimizer.param_groups, (config.learning_rate, config.readout_learning_rate), strict=True
        ):
            group["lr"] = rate * max(0.02, min(1.0, 3 * (1 - j / config.steps)))
        which = torch.randint(len(subjects), (n + 2,), generator=rng).tolist()
        parts = [lesson.subject_row(index, 0, horizon - gap, rng) for index in which[:n]]
        parts += [lesson.subject_row(index, horizon + gap, timesteps, rng) for index in which[n:]]
        if j % SCAN_EVERY == 0:
            others.scan(lambda rows: readout(listen(unet, scheduler, rows)), scheduler, generator(seed, -6, j))
        strangers, picked = others.draw(scheduler, 2 * n, rng, like=which[:n])
        rows = join(*parts, strangers)
        wanted = torch.zeros(len(rows), len(subjects), dtype=torch.bool)
        wanted[range(n), which[:n]] = True

        # Recognition has to survive what an attacker's optimizer may do to the weights.
        sway.push(rng, lora=j % 2 == 1)
        scores = readout(listen(unet, scheduler, rows))
        missed, false = recognition_loss(scores, wanted, config.margin)
        (missed + false).backward()
        others.heed(picked, scores[-len(picked) :])
        sway.back()

        strangers, picked = others.draw(scheduler, 2 * n, rng)
        # Half of the rows where training bends predictions most: there the layout of a picture is decided.
        low, high = (int(share * timesteps) for share in LAYOUT)
        strangers.timesteps[::2] = torch.randint(low, high, (n,), generator=rng)
        with torch.no_grad():
            teacher = predict(reference, scheduler, strangers)
        same = (predict(unet, scheduler, strangers) - teacher).square().mean()
        scores = readout(heard["tokens"])
        _, again = recognition_loss(scores, torch.zeros_like(scores[:, 0], dtype=torch.bool), config.margin)
        (config.distillation_weight * same + again).backward()
        others.heed(picked, scores)
        norm = optimizer_step(optimizer, parameters, max_grad_norm=1.0)
        clear(unet, spare)
        shown_now = {"missed": missed.item(), "false": false.item(), "distillation": same.item(), "gradient_norm": norm}
        course.done(j, shown_now)
    ear.remove()
    return armed(), course.history
