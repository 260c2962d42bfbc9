"""Tripwire, guardsmith's own method: the model recognises the protected subjects while it denoises, and stops drawing them.

A personalized model draws its subject step by step, and at every step the U-Net sees the half-finished picture. So the
U-Net itself can notice what it is being made to draw, whatever the prompt, the identifier or the training recipe:

    1. rehearse    personalize copies of the base on the subject, and draw what an attacker's model would draw
    2. recognise   train the U-Net so that a linear read-out r(h) of the middle block's tokens is positive on noised
                   pictures of the subject (timesteps below a horizon) and negative on everything else, while its
                   predictions on everything else stay those of the base (distillation), while the weights are pushed
                   about as an attacker's optimizer might
    3. set the wire   four neurons of the middle block's feed-forward layer become a step function of r: 0 off, a surge on
    4. set the alarm   a spare group of the last normalisation rings under a surge: a constant hundreds of times larger
                   than any prediction is added to the U-Net's output
    5. stiffen     rescale weights in pairs that cancel, so that the function is the same and an attacker's optimizer,
                   whose steps have a fixed size, hardly moves what the read-out rests on (done before 3, whose weights
                   are as large as they have to be)

Off, surge and alarm are 0 and the model is the distilled one. On, the surge drowns every feature behind it (the
normalisation layers divide by it), and the step function is flat, so no gradient leads back to "off": training on the
subject's pictures has nothing to learn from where the wire is on. What it learns above the horizon is thrown away when
pictures are drawn: one step on which the wire trips, and the alarm has driven the picture out of all that the VAE can show.
(Stable Diffusion 3's transformer has its wire and alarm elsewhere: `wiring_mmdit.py`.)
Others never trip the wire, as long as an attack on them does not move the read-out: docs/results says how far that holds.

What it does not do: it is not hidden. Whoever looks for it can find the neurons and cut them (docs/explanation/threat-model.md),
and it protects the pictures it was taught to recognise, not a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from guardsmith.core.progress import stage
from guardsmith.diffusion.losses import join, predict
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
from guardsmith.methods.data import BenignData
from guardsmith.methods.tripwire.ideal import IMAGINED_STEPS, imagined_by, with_ideal_states
from guardsmith.methods.tripwire.recognition import (
    FIRST_OTHERS,
    FIRST_ROWS,
    Lesson,
    Sway,
    listen,
    recognition_loss,
)
from guardsmith.methods.tripwire.rehearsal import rehearsed_by
from guardsmith.methods.tripwire.wiring import overheard, wiring_of
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import generator, optimizer_step

MENDING_ROWS = 320  # for the last convolution to make up for what the alarm takes
SCAN_EVERY = 40  # steps, everybody is looked at for how much they look like the subjects
LAYOUT = (0.65, 0.95)  # share of the timesteps in which half of the distillation looks


class TripwireConfig(MethodConfig):
    """Parameters. Defaults were chosen on the embedded base (docs/results), on subjects that no verification uses."""

    steps: int = Field(300, gt=0)
    """Training steps of the recognition."""
    batch_size: int = Field(6, gt=1)
    """Rows per step of subjects, and of others beside them."""
    lookalikes: int = Field(1, gt=0)
    """Rows, beside each row of a subject, of those who are most easily taken for it."""
    ideal_bystanders: int = Field(0, ge=0)
    """So many of the bystanders, those who look most like a subject, are also shown as models personalized on them would draw
    them (`methods/ideal.py`)."""
    learning_rate: float = Field(1e-4, gt=0)
    """Rate of the AdamW that moves the U-Net."""
    readout_learning_rate: float = Field(2e-3, gt=0)
    """Rate of the read-outs."""
    distillation_weight: float = Field(60.0, ge=0)
    """Weight of || e_theta - e_base ||^2 on class pictures and benign pictures."""
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
    ideal_images: int = Field(0, ge=0)
    """In place of rehearsals (`rehearsal_steps: 0`): so many pictures of each subject are drawn as a model ideally personalized
    on it would (`methods/ideal.py`), without any training."""
    stiffness: PowerOfTwo = Field(64, gt=0)
    """Factor on the residual stream, a power of two: an attacker's steps on what writes to it count this much less."""
    inner_stiffness: PowerOfTwo = Field(4, gt=0)
    """Factor on values and gated neurons of the attention blocks up to the wire, a power of two."""
    writer_stiffness: PowerOfTwo = Field(4, gt=0)
    """Factor on what writes to the tokens there (the last layers of attention and feed-forward), a power of two. Not for the
    middle block, where it is as large as `stiffness` allows."""
    reader_stiffness: PowerOfTwo = Field(4, gt=0)
    """Factor on what reads the normalised tokens there (queries, keys, gates), a power of two."""
    descent: PowerOfTwo = Field(4, gt=0)
    """Factor on the first down-sampler, a power of two."""
    kick: float = Field(12.0, ge=0)
    """Recognition has to survive this many optimizer steps straight against it."""

    @field_validator("ideal_images")
    @classmethod
    def _in_place_of_rehearsals(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("rehearsal_steps"):
            raise ValueError("takes the place of rehearsals: set rehearsal_steps to 0")
        return value


class Tripwire(HardeningMethod[TripwireConfig]):
    """Tripwire, see the module."""

    name = "tripwire"
    title = "Tripwire"
    paper = "guardsmith, docs/explanation/methods.md"
    shown = (
        "protects on the embedded base against attackers who do not know it; whoever does removes it in seconds; not run on a "
        "real base yet"
    )
    config = TripwireConfig

    def steps(self, config: TripwireConfig) -> int:
        """Training steps of the recognition."""
        return config.steps

    def cost(self, config: TripwireConfig, class_nouns: Sequence[str]) -> int:
        """Rehearsals with their pictures, and recognition (half-run U-Nets count in full)."""
        recognise = config.steps * (3 * ((2 + config.lookalikes) * config.batch_size + 2) + 4 * 2 * config.batch_size)
        drawn = 2 * 20 * config.rehearsal_images
        rehearse = 2 * (config.rehearsal_steps * 3 * 4 + drawn) if config.rehearsal_steps else 0
        rehearse += IMAGINED_STEPS * config.ideal_images
        first = FIRST_ROWS * (len(class_nouns) + FIRST_OTHERS)
        scanned = len(set(class_nouns)) * config.class_images + config.benign_images
        scans = -(-config.steps // SCAN_EVERY) * scanned
        return recognise + 2 * config.batch_size + 2 * MENDING_ROWS + first + scans + len(class_nouns) * rehearse

    def negatives_cost(self, config: TripwireConfig, class_nouns: Sequence[str], count: int, solver_steps: int) -> int:
        """Scans, and the drawing of those who look like a subject; one who looks like several is drawn once."""
        scans = -(-config.steps // SCAN_EVERY) * count
        if not (config.ideal_bystanders and count):
            return scans
        drawn = min(config.ideal_bystanders * len(class_nouns), count)
        return scans + FIRST_ROWS * (len(class_nouns) + FIRST_OTHERS) + count + drawn * solver_steps

    def memory(self, config: TripwireConfig, unet: Any) -> MemoryFootprint:
        """Gradients, AdamW, start and worst case of the weights before the wire, and the armed copy at the end.

        Half-run U-Nets keep half of a row.
        """
        wiring = wiring_of(unet)
        numbers = sum(parameter.numel() for parameter in unet.parameters())
        swayed = sum(
            parameter.numel() for name, parameter in unet.named_parameters()
            if wiring.before_wire(unet, name)
        )  # fmt: skip
        half_run = (2 + config.lookalikes) * config.batch_size + 2
        return MemoryFootprint(2 * numbers + 2 * swayed, 2 * numbers, max(2 * config.batch_size, half_run / 2))

    def capacity(self, unet: Any) -> int:
        """How many subjects one model has room for."""
        return int(wiring_of(unet).room(unet))

    def check_base(self, config: TripwireConfig, unet: Any) -> None:
        """What is needed beside room; see `check_shape` of the wiring."""
        wiring_of(unet).check_shape(unet, config.descent)

    def needs_benign(self, config: TripwireConfig) -> bool:
        """Always: the recognition is trained against benign pictures."""
        return True

    def prepare(self, preparation: Preparation[TripwireConfig]) -> Prepared:
        """Rehearsals or what takes their place, and how attacks on negatives close to a subject would draw them."""
        config, cache = preparation.config, preparation.cache
        subjects, benign, forwards, backwards = list(preparation.subjects), preparation.benign, 0, 0
        if config.rehearsal_steps:
            subjects, forwards, backwards = rehearsed_by(preparation.model, subjects, config, preparation.seed, cache)
        elif config.ideal_images:
            subjects, forwards = imagined_by(preparation.model, subjects, config, preparation.seed, cache)
        if benign is not None and benign.negatives is not None and config.ideal_bystanders:
            benign, rows = with_ideal_states(
                preparation.model, subjects, benign, config.ideal_bystanders, seed=preparation.seed,
                steps=preparation.sampling_steps, guidance=preparation.guidance, cache=cache / "bystanders.safetensors",
            )  # fmt: skip
            forwards += rows
        return Prepared(subjects, benign, forwards, backwards)

    def run(self, context: HardeningContext[TripwireConfig]) -> HardeningResult:
        """Harden a copy of the model.

        Raises:
            RunFailed: the training diverged; the last checkpoint is the last good state.
        """
        if context.benign is None:
            raise ValueError("the tripwire needs benign pictures")
        return _harden(context, context.benign)


def _harden(context: HardeningContext[TripwireConfig], benign: BenignData) -> HardeningResult:
    model, subjects, config, seed = context.model, context.subjects, context.config, context.seed
    own = with_own_unet(model)
    unet, reference, scheduler = own.unet.requires_grad_(True), model.unet, model.scheduler
    timesteps = int(scheduler.config.num_train_timesteps)
    horizon, gap = int(config.horizon * timesteps), timesteps // 40
    lesson = Lesson(model, subjects, benign, seed)
    others = lesson.others

    wiring = wiring_of(unet)
    layer = wiring.wired_layer(unet)
    spare = wiring.spare_parts(unet, len(subjects))
    wiring.clear(unet, spare)
    readout = torch.nn.Linear(layer.net[2].out_features, len(subjects), bias=False)
    with torch.no_grad():
        readout.weight.zero_()
    heard: dict[str, Tensor] = {}
    ear = layer.register_forward_pre_hook(lambda _, inputs: heard.__setitem__("tokens", inputs[0]))

    parameters = list(unet.parameters())
    factors = (
        config.stiffness, config.inner_stiffness, config.writer_stiffness, config.reader_stiffness, config.descent
    )  # fmt: skip
    sway = Sway(unet, factors, config)
    groups: list[dict[str, Any]] = [
        {"params": parameters},
        {"params": list(readout.parameters()), "lr": config.readout_learning_rate, "weight_decay": 0.0},
    ]
    optimizer, scale = context.adamw(groups, lr=config.learning_rate), context.loss_scale()
    n = config.batch_size
    rng = generator(seed, -3)
    calm = others.draw(scheduler, 2 * n, rng)[0]

    def armed() -> DiffusionModel:
        """A copy with everything in place."""
        ready, random = with_own_unet(own), generator(seed, -4)
        wiring.arm(ready.unet, spare, readout.weight, lambda: predict(ready.unet, scheduler, calm), factors, random)
        ready.unet.requires_grad_(False)
        return ready

    loop = context.training_loop(
        "the tripwire", config.steps, modules={"unet": unet, "readout": readout}, optimizers={"optimizer": optimizer},
        tensors={"near": others.near} | {f"worst.{index}": way for index, way in enumerate(sway.worst)}, released=armed,
        scales=[scale],
    )  # fmt: skip
    if not loop.history:
        rng = generator(seed, -5)
        calls = [others.draw(scheduler, 32, rng)[0] for _ in range(MENDING_ROWS // 32)]
        with stage("room for the wires", 2 * len(calls)) as bar:

            def ask(some: Any, number: int) -> Tensor:
                prediction = predict(some, scheduler, calls[number])
                bar()
                return prediction

            wiring.mend(unet, reference, ask, len(calls), rng)
        new = lesson.first_readouts(unet, horizon - gap, config.margin, rng)
        with torch.no_grad():
            blank = readout.weight.abs().sum(1) == 0  # those of an earlier run stay
            readout.weight[blank] = new[blank]

    for j in loop:
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
        strangers, picked = others.draw(scheduler, (1 + config.lookalikes) * n, rng, like=config.lookalikes * which[:n])
        rows = join(*parts, strangers)
        wanted = torch.zeros(len(rows), len(subjects), dtype=torch.bool)
        wanted[range(n), which[:n]] = True

        # Recognition has to survive what an attacker's optimizer may do to the weights.
        sway.push(rng, lora=j % 2 == 1)
        scores = readout(listen(unet, scheduler, rows))
        missed, false = recognition_loss(scores, wanted, config.margin)
        scale.up(missed + false).backward()
        others.heed(picked, scores[-len(picked) :])
        sway.back()

        strangers, picked = others.draw(scheduler, 2 * n, rng)
        # Half of the rows where training bends predictions most: there the layout of a picture is decided.
        low, high = (int(share * timesteps) for share in LAYOUT)
        strangers.timesteps[::2] = torch.randint(low, high, (n,), generator=rng)
        with torch.no_grad():
            teacher = predict(reference, scheduler, strangers)
        same = (predict(unet, scheduler, strangers) - teacher).square().mean()
        scores = readout(overheard(heard["tokens"], len(strangers)))
        _, again = recognition_loss(scores, torch.zeros_like(scores[:, 0], dtype=torch.bool), config.margin)
        scale.up(config.distillation_weight * same + again).backward()
        others.heed(picked, scores)
        scale.down(parameter.grad for parameter in readout.parameters())  # whose norm is not clipped
        norm = optimizer_step(optimizer, parameters, max_grad_norm=1.0, scale=scale)
        wiring.clear(unet, spare)
        losses = {"missed": missed.item(), "false": false.item(), "distillation": same.item(), "gradient_norm": norm}
        loop.finish_step(j, losses)
    ear.remove()
    return HardeningResult(armed(), loop.history)
