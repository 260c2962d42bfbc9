"""Tripwire, guardsmith's own method: the U-Net recognises protected subjects while it denoises, and stops drawing them.

A personalized model draws its subject step by step, and at every step the U-Net sees the half-finished picture. So the U-Net
itself can notice what it is being made to draw, whatever the prompt, the identifier or the training recipe:

    1. reserve     the last groups of every normalisation are cut out of the base's U-Net, and what is left (the trunk) is
                   distilled to predict what the base predicts; it never sees a protected subject (`layout`, `trunk`)
    2. recognise   a small network with the shape of the reserved channels is trained to tell noised latents of the protected
                   subjects from everyone else's (`recogniser`, `training`)
    3. install     the network goes into the reserved channels, with what carries its answer to the output (`install`)

At rest the model is the trunk. When a picture trips, one step replaces the prediction with something large, and the picture is
destroyed. Training on a protected subject has nothing to learn from while it trips, since no gradient passes the step, and what
adapters, words and text encoder learn does not reach the recogniser at all: it sees the latents only.

The trunk depends on the base alone, so one is prepared for each base, and changing the registry trains the recogniser only.

Whoever has the weights and looks for the reserved channels can cut them in seconds (docs/explanation/threat-model.md), and it
protects the pictures that it was taught to recognise, not a name. recipes/tripwire/NOTES.md says what has been measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator

from guardsmith.core.console import in_words
from guardsmith.core.errors import UserError
from guardsmith.methods.base import (
    HardeningContext,
    HardeningMethod,
    HardeningResult,
    MemoryFootprint,
    MethodConfig,
    PowerOfTwo,
    Preparation,
    Prepared,
)
from guardsmith.methods.tripwire.early import BATCH_SIZE, EarlyDrawing, draw_early, early_rows, read_early
from guardsmith.methods.tripwire.examples import examples_of
from guardsmith.methods.tripwire.install import Scales, install
from guardsmith.methods.tripwire.layout import layout_of, reserve
from guardsmith.methods.tripwire.recogniser import Recogniser
from guardsmith.methods.tripwire.training import Examples, RecogniserTraining, optimizer_of, training_step
from guardsmith.methods.tripwire.trunk import (
    GUIDED,
    check_trunk,
    load_trunk,
    rows_predicted,
    trunk_file,
    trunk_footprint,
    trunk_of,
)
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.models.narrowed import is_narrow, narrow, widen
from guardsmith.training.loop import generator, torch_seed

FILE = "trunk.safetensors"
TIMED_STEPS, TIMED_SECONDS = 3, 2.0  # of the recogniser, in a forecast
EARLIER = frozenset({
    "batch_size", "lookalikes", "ideal_bystanders", "readout_learning_rate", "looseness", "rehearsal_steps",
    "rehearsal_learning_rate", "rehearsal_lora_learning_rate", "rehearsal_images", "rehearsal_guidance", "ideal_images",
    "stiffness", "inner_stiffness", "writer_stiffness", "reader_stiffness", "descent", "kick",
})  # fmt: skip
"""Parameters that only the earlier Tripwire had, before 0.2."""


def refuse_earlier(params: Mapping[str, Any]) -> None:
    """Refuse parameters of the earlier Tripwire, whose models, states and checkpoints are of another kind.

    Raises:
        UserError: some are among these.
    """
    if earlier := sorted(EARLIER & params.keys()):
        raise UserError(
            f"parameters of the earlier Tripwire ({in_words(earlier, 3)}), which this version replaces; harden again from the "
            "base with the present ones (docs/reference/recipe.md)."
        )


class TripwireConfig(MethodConfig):
    """Parameters. Defaults are those of the experiments in recipes/tripwire/NOTES.md, on subjects that no verification uses."""

    groups: int = Field(8, gt=1)
    """Normalisation groups of the deepest level that are reserved, an even number; of 32 in Stable Diffusion."""
    outer_groups: int = Field(4, gt=1)
    """And of every other level, an even number of at most `groups`: ordinary pictures depend on these levels more."""
    trunk: str | None = None
    """The trunk: `builtin:avatar` for the one that is shipped for guardsmith's own base (it has 12 groups and 4 outer ones), or
    `cache/trunk.safetensors` of an earlier run on the same base with as many. Left out, it is prepared first."""
    trunk_steps: int = Field(4000, gt=0)
    """Steps of its distillation."""
    trunk_batch_size: int = Field(8, gt=0)
    """Noised pictures in such a step, each predicted with a prompt and without."""
    trunk_learning_rate: float = Field(1e-4, gt=0)
    """Their learning rate."""
    steps: int = Field(RecogniserTraining.steps, gt=0)
    """Training steps of the recogniser."""
    positives: int = Field(RecogniserTraining.positives, gt=0)
    """Rows of protected subjects in a step."""
    negatives: int = Field(RecogniserTraining.negatives, gt=3)
    """Rows of others in a step, half of them those that come closest to being taken for a subject."""
    learning_rate: float = Field(RecogniserTraining.learning_rate, gt=0)
    """Peak rate of the AdamW that trains the recogniser."""
    horizon: float = Field(RecogniserTraining.horizon, gt=0, lt=1)
    """Share of the timesteps, from the clean end, in which subjects are to be recognised."""
    margin: float = Field(RecogniserTraining.margin, gt=0)
    """How far scores are pushed from 0 on either side."""
    strangers_weight: float = Field(RecogniserTraining.strangers_weight, gt=0)
    """Weight of others' losses over that of the subjects': more means fewer false alarms, and subjects recognised less early."""
    mixtures: float = Field(RecogniserTraining.mixtures, ge=0, le=0.25)
    """Share of others that have a part of a subject, so that who looks like a subject is not taken for it."""
    drift: float = Field(RecogniserTraining.drift, ge=0)
    """Recognition has to survive that the channels of the reserved stream are moved by up to about this share of their size, by
    constants and by fields, which is what training of all weights does to them (recipes/tripwire/NOTES.md)."""
    norm_drift: float = Field(RecogniserTraining.norm_drift, ge=0)
    """And that gains and biases of the reserved normalisations are moved by up to this much: 300 steps at a rate of 3e-4."""
    constancy_weight: float = Field(RecogniserTraining.constancy_weight, ge=0)
    """Weight of the share of the reserved stream that is the same in all pictures: it says nothing, other weights read it, and
    training moves it."""
    copies: int = Field(48, gt=0)
    """Variations of every picture that the recogniser is shown: mirrored, turned, zoomed, shifted, recoloured."""
    transformed: int = Field(400, ge=0)
    """Transformed copies of every picture, as an attacker who wants to evade recognition makes them: negatives, flips, turns,
    tiles and more (`transformations`); pictures of `early_steps` are transformed as well. A third of the subjects' rows in a
    step are such; 0: none."""
    transformed_others: float = Field(0.5, ge=0, le=1)
    """Share of the pictures of others that it is trained on transformed as well, if `transformed` is not 0."""
    early_steps: tuple[PositiveInt, ...] = (50, 100, 200)
    """The base is fine-tuned on every subject with DreamBooth and draws after so many steps, ascending; the recogniser is trained
    on these pictures too, so that who stops early has nothing either. Empty: none are made."""
    early_images: int = Field(48, gt=0)
    """Pictures that are drawn of a subject after each of `early_steps`."""
    early_learning_rate: float = Field(5e-6, gt=0)
    """Learning rate of that fine-tuning."""
    early_sampling_steps: int = Field(15, gt=0)
    """Solver steps of such a picture."""
    stream_size: PowerOfTwo = Field(int(Scales.stream), gt=0)
    """Size of the reserved stream, a power of two: an attacker's optimizer, whose steps have a fixed size, changes a large one
    less; adapters and models that are merged in read a large one as noise."""
    outer_stream_size: PowerOfTwo = Field(int(Scales.outer), gt=0)
    """The same at the outer level, where the trunk's own activations are smaller."""
    inner_scale: PowerOfTwo = Field(int(Scales.inner), gt=0)
    """Largest factor on the first convolutions of reserved resnets, a power of two; where float16 would overflow, it is less."""
    distillation_weight: float = Field(0.0, ge=0, le=0)
    """0: the trunk is distilled as a whole, before anything else."""

    @model_validator(mode="before")
    @classmethod
    def _of_this_form(cls, params: Any) -> Any:
        if isinstance(params, Mapping):
            refuse_earlier(params)
        return params

    @field_validator("early_steps")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must be ascending, each only once")
        return value

    @field_validator("groups", "outer_groups")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even (else the way up has no group of its own)")
        return value

    def scales(self) -> Scales:
        """How much larger than trained the recogniser's weights are."""
        return Scales(float(self.stream_size), float(self.outer_stream_size), float(self.inner_scale))

    def early_drawing(self, guidance: float) -> EarlyDrawing:
        """How subjects are drawn that the base has hardly learned."""
        return EarlyDrawing(
            self.early_steps, self.early_images, self.early_learning_rate, self.early_sampling_steps, guidance
        )


class Tripwire(HardeningMethod[TripwireConfig]):
    """See the module."""

    name = "tripwire"
    title = "Tripwire"
    paper = "guardsmith, docs/explanation/methods.md"
    shown = (
        "protected the demo's subject on the embedded base against attackers who do not know it, not run on a real base yet; "
        "whoever has the weights removes it in seconds"
    )
    config = TripwireConfig
    checkpoint_every = 200

    def steps(self, config: TripwireConfig) -> int:
        """Training steps of the recogniser."""
        return config.steps

    def cost(self, config: TripwireConfig, class_nouns: Sequence[str]) -> int:
        """The trunk's distillation, if it has to be prepared, and pictures of subjects that the base has hardly learned.

        The recogniser is no U-Net and counts nothing.
        """
        early = [early_rows(config.early_drawing(GUIDED))] * len(class_nouns)
        prepared = [] if config.trunk is not None else [rows_predicted(config.trunk_steps, config.trunk_batch_size)]
        return sum(forward + 2 * backward for forward, backward in early + prepared)

    def other_seconds(self, config: TripwireConfig, model: DiffusionModel) -> float:
        """The recogniser's training, by a few of its steps on noise."""
        training = training_of(config)
        side, rng = int(model.unet.config.sample_size), generator(0)
        shape = (8, int(model.unet.config.in_channels), side, side)
        recogniser = Recogniser(model.unet, layout_of(model.unet, config.groups, config.outer_groups)).to(
            next(model.unet.parameters()).device
        )
        examples = Examples([torch.randn(shape, generator=rng)], torch.randn(shape, generator=rng))
        optimizer = optimizer_of(recogniser, training)
        times: list[float] = []
        while len(times) < TIMED_STEPS and sum(times) < TIMED_SECONDS:
            began = time.perf_counter()
            training_step(recogniser, optimizer, examples, model.scheduler, training, step=len(times), seed=0)
            times.append(time.perf_counter() - began)
        return config.steps * min(times)

    def memory(self, config: TripwireConfig, unet: Any) -> MemoryFootprint:
        """The larger of what the trunk's distillation keeps, if it has to be prepared, and learning a subject (`early_steps`).

        The first are gradients, moments and masks (a byte for every two-dimensional slice's entry), the second gradients and
        AdamW's moments; with neither it is a third U-Net, which probes look at.
        """
        numbers = sum(parameter.numel() for parameter in unet.parameters())
        footprints = [MemoryFootprint(numbers, 0, 0)]
        if config.early_steps:
            footprints.append(MemoryFootprint(numbers, 2 * numbers, 2 * BATCH_SIZE, numbers))
        if config.trunk is None:
            footprints.append(trunk_footprint(config.trunk_steps, config.trunk_batch_size, unet))
        most = max(footprints, key=lambda each: each.numbers + each.moments)
        return most._replace(rows=max(each.rows for each in footprints))

    def check_earlier(self, params: Mapping[str, Any], config: TripwireConfig | None = None) -> None:
        """Refuse runs of the earlier Tripwire, and to begin from a recogniser of another shape."""
        refuse_earlier(params)
        if config is None:
            return
        has = params.get("groups"), params.get("outer_groups", params.get("groups"))
        if has != (config.groups, config.outer_groups):
            raise UserError(
                f"it has {has[0]} and {has[1]} reserved groups and the recipe asks for {config.groups} and "
                f"{config.outer_groups}; set 'groups' and 'outer_groups' to those, or harden again from the base, without "
                "--add-to."
            )

    def check_base(self, config: TripwireConfig, unet: Any) -> None:
        """A U-Net of Stable Diffusion's layout in which the groups can be reserved; a named trunk has to be of this base."""
        layout_of(unet, config.groups, config.outer_groups)
        if config.trunk is not None:
            check_trunk(config.trunk, config.groups, config.outer_groups, unet)

    def needs_benign(self, config: TripwireConfig) -> bool:
        """Always: the recogniser is trained against benign pictures."""
        return True

    def prepare(self, preparation: Preparation[TripwireConfig]) -> Prepared:
        """The trunk, and pictures of subjects that the base has hardly learned, in the run's cache."""
        config, model, benign = preparation.config, preparation.model, preparation.benign
        assert benign is not None
        rows = [(0, 0)]
        if config.trunk is None:
            rows.append(trunk_of(
                model, layout_of(model.unet, config.groups, config.outer_groups), preparation.subjects, benign,
                preparation.cache / FILE, steps=config.trunk_steps, rows=config.trunk_batch_size,
                learning_rate=config.trunk_learning_rate, seed=preparation.seed, compute=preparation.compute,
            ))  # fmt: skip
        drawing = config.early_drawing(preparation.guidance)
        early = draw_early(
            model, preparation.subjects, drawing, preparation.seed, preparation.cache, preparation.compute
        )
        rows.append(early)
        forward, backward = (sum(part) for part in zip(*rows, strict=True))
        return Prepared(preparation.subjects, benign, forward, backward)

    def run(self, context: HardeningContext[TripwireConfig]) -> HardeningResult:
        """Harden a copy of the model.

        Raises:
            RunFailed: the training diverged; the last checkpoint is the last good state.
        """
        if context.benign is None or context.cache is None:
            raise ValueError("the tripwire needs benign pictures and the cache of its preparation")
        config, model, seed = context.config, context.model, context.seed
        layout = layout_of(model.unet, config.groups, config.outer_groups)
        own = with_own_unet(model)
        load_trunk(context.cache / FILE if config.trunk is None else trunk_file(config.trunk), own.unet)
        reserve(own.unet, layout)
        if is_narrow(model.unet):
            narrow(own.unet)
        with torch_seed(seed):
            recogniser = Recogniser(model.unet, layout).to(next(model.unet.parameters()).device)
        early = [read_early(subject, context.cache) for subject in context.subjects] if config.early_steps else []
        examples = examples_of(model, context.subjects, context.benign, early, config, seed)
        training = training_of(config)

        def armed(ready: DiffusionModel) -> DiffusionModel:
            """The trunk with everything in place."""
            recogniser.measure(examples.noised(model.scheduler, config.horizon, generator(seed, -3)))
            install(ready.unet, layout, recogniser, config.scales(), generator(seed, -4))
            ready.unet.requires_grad_(False)
            return ready

        optimizer = optimizer_of(recogniser, training)
        loop = context.training_loop(
            "the recogniser", config.steps, modules={"recogniser": recogniser}, optimizers={"optimizer": optimizer},
            tensors={"closeness": examples.closeness}, released=lambda: armed(with_own_unet(own)),
        )  # fmt: skip
        for step in loop:
            losses = training_step(
                recogniser, optimizer, examples, model.scheduler, training, step=step, seed=seed
            )  # fmt: skip
            loop.finish_step(step, losses)
        widen(own.unet)
        return HardeningResult(armed(own), loop.history)


def training_of(config: TripwireConfig) -> RecogniserTraining:
    """Settings of the recogniser's training."""
    return RecogniserTraining(**{field.name: getattr(config, field.name) for field in fields(RecogniserTraining)})
