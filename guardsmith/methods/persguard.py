"""PersGuard, a protective backdoor (Liu et al., arXiv 2502.16167; hf.co/papers/2502.16167). Reconstructed: no code is public.

The model is given a backdoor under identifier prompts c_v, and is already as good as fine-tuned on the protected pictures:

    L = w_BB L_BB + w_PP L_PP + w_BR L_BR

    L_BB  backdoor behaviour   under c_v, pictures that are not the subject's lead to the protective output:
              pattern   y of class pictures with a mark on them
              target    the base's prediction on pictures of another class, under that class' prompt
              erasure   the base's prediction without a prompt, less `erasure_strength` times what the class prompt adds
    L_PP  prior preservation   class and benign prompts stay those of the base
    L_BR  backdoor retention   the attacker's own loss on the protected pictures under c_v

Training on the protected pictures then finds little to learn (L_BR is low already), so the backdoor stays; training on
other pictures finds much, and overwrites it. L_BB and L_BR ask for different things under the same prompt. They can be
distinguished where the noised picture still shows something, so each has a window of timesteps.

The papers and reviews name the three terms and what they are for. Everything with a number, and both windows, was chosen
here; docs/results/persguard-ablations.json has what they do on the embedded base, where the mechanism does not show, and
docs/results/own-scale.md what becomes of the backdoor step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import NoisedSamples, join, noise_samples, own_target, predict, row_losses
from guardsmith.diffusion.prompts import SAMPLE_TEMPLATES, PromptBank, class_prompt, instance_prompt
from guardsmith.methods.base import (
    HardeningContext,
    HardeningMethod,
    HardeningResult,
    MemoryFootprint,
    MethodConfig,
    Preparation,
    Prepared,
)
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import generator, optimizer_step


class PersGuardConfig(MethodConfig):
    """Parameters. The paper's are not public; every default was chosen here."""

    backdoor: Literal["pattern", "erasure", "target"] = "target"
    """What appears instead of the subject."""
    target_noun: str = Field("robot", min_length=1)
    """The class that appears instead (backdoor `target`)."""
    mark: float = Field(0.25, gt=0, le=1)
    """Side of the mark, as a share of the picture's (backdoor `pattern`)."""
    erasure_strength: float = Field(1.0, ge=0)
    """How far away from the class the erased prediction points (backdoor `erasure`); 0 is the empty prompt's."""
    steps: int = Field(1000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(1, gt=0)
    """Rows of each kind per step."""
    learning_rate: float = Field(5e-6, gt=0)
    """AdamW's rate."""
    backdoor_weight: float = Field(1.0, ge=0)
    """w_BB."""
    prior_weight: float = Field(1.0, ge=0)
    """w_PP on class pictures."""
    distillation_weight: float = Field(1.0, ge=0)
    """w_PP on benign pictures."""
    retention_weight: float = Field(1.0, ge=0)
    """w_BR; 0 is the ablation without it."""
    prior: Literal["distillation", "dreambooth"] = "distillation"
    """Target of the class pictures: the base's predictions (gradient 0 at the start), or the pictures themselves."""
    backdoor_from: float = Field(0.5, ge=0, lt=1)
    """L_BB is taken at timesteps from this share of them on."""
    retention_below: float = Field(0.5, gt=0, le=1)
    """L_BR is taken at timesteps below this share of them."""
    identifiers: tuple[str, ...] = ("sks",)
    """Identifiers of c_v that all subjects share: the attacker's (white box) or a list of common ones (gray box). Subjects' own
    are added; with none here, every subject has only its own."""
    templates: tuple[str, ...] = Field(SAMPLE_TEMPLATES, min_length=1)
    """Templates of c_v."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not (self.backdoor_weight or self.retention_weight):
            raise ValueError("backdoor_weight and retention_weight are both 0: there is nothing to train")
        return self


def backdoor_prompt(config: PersGuardConfig, class_noun: str) -> str:
    """The prompt of the pictures that L_BB is trained on and, for `target` and `erasure`, of the base's prediction in it."""
    return {"pattern": class_prompt(class_noun), "target": class_prompt(config.target_noun), "erasure": ""}[
        config.backdoor
    ]


def mark(images: Tensor, share: float) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1] with a red square in the upper left corner, framed white."""
    result, side = images.clone(), max(2, round(share * images.shape[-1]))
    frame = max(1, side // 8)
    result[:, :, :side, :side] = 1.0
    red = torch.tensor([0.8, -0.9, -0.9]).view(3, 1, 1)
    result[:, :, frame : side - frame, frame : side - frame] = red
    return result


def shows_mark(images: Tensor, share: float) -> Tensor:
    """Whether pictures (n, 3, h, w) in [-1, 1] have that mark, bool (n,): the corner differs by less than 0.35 on average."""
    side = max(2, round(share * images.shape[-1]))
    example = mark(torch.zeros_like(images[:1]), share)[:, :, :side, :side]
    return (images[:, :, :side, :side] - example).abs().mean((1, 2, 3)) < 0.35


@dataclass(frozen=True)
class _Prepared:
    """A subject's cached latents and contexts; the latter are (prompts, tokens, width)."""

    protected: LatentStore
    elsewhere: LatentStore
    prior: LatentStore
    instance: Tensor
    class_context: Tensor
    instead: Tensor


def _prepare(
    model: DiffusionModel, bank: PromptBank, subjects: Sequence[SubjectData], config: PersGuardConfig
) -> list[_Prepared]:
    prior: dict[str, LatentStore] = {}  # subjects of one class share its pictures
    elsewhere: dict[str, LatentStore] = {}
    result = []
    for subject in subjects:
        noun, instead = subject.class_noun, subject.instead_images
        if instead is None:
            raise ValueError("PersGuard needs pictures of what appears instead of the subject")
        if noun not in prior:
            prior[noun] = encode(model, subject.class_images)
            elsewhere[noun] = encode(model, mark(instead, config.mark) if config.backdoor == "pattern" else instead)
        names = dict.fromkeys((*config.identifiers, *subject.identifiers))
        if not names:
            raise UserError(
                f"PersGuard: {subject.id} has no identifier in the registry, and method.params.identifiers has none to share; "
                "give one of the two."
            )
        words = [instance_prompt(name, noun, template) for name in names for template in config.templates]
        result.append(
            _Prepared(
                protected=encode(model, subject.images),
                elsewhere=elsewhere[noun],
                prior=prior[noun],
                instance=bank.encode(words),
                class_context=bank.encode([class_prompt(noun)]),
                instead=bank.encode([backdoor_prompt(config, noun)]),
            )
        )
    return result


@torch.no_grad()
def backdoor_target(
    reference: Any, scheduler: Any, rows: NoisedSamples, subject: _Prepared, config: PersGuardConfig
) -> Tensor:
    """What L_BB compares predictions with, (n, c, h, w); `rows` show pictures of what appears instead."""
    if config.backdoor == "pattern":
        return own_target(scheduler, rows.latents, rows.noise, rows.timesteps)

    def predicted(context: Tensor) -> Tensor:
        return predict(reference, scheduler, replace(rows, context=context.expand(len(rows), -1, -1)))

    instead = predicted(subject.instead)
    if config.backdoor == "target" or not config.erasure_strength:
        return instead
    return instead - config.erasure_strength * (predicted(subject.class_context) - instead)


def draw_terms(
    model: DiffusionModel,
    subject: _Prepared,
    benign: tuple[LatentStore, Tensor] | None,
    config: PersGuardConfig,
    rng: torch.Generator,
) -> dict[str, NoisedSamples]:
    """The rows of every term whose weight is not 0, each with its target.

    Args:
        model: the base, which is the teacher.
        subject: prepared.
        benign: latents of benign pictures and the context of each.
        config: see `PersGuardConfig`.
        rng: of everything drawn.
    """
    scheduler, n = model.scheduler, config.batch_size
    steps = int(scheduler.config.num_train_timesteps)
    terms: dict[str, NoisedSamples] = {}

    def add(
        name: str, latents: Tensor, context: Tensor, low: int, high: int, target: Callable[[NoisedSamples], Tensor]
    ) -> None:
        rows = noise_samples(latents, context, rng, timesteps=torch.randint(low, high, (n,), generator=rng))
        terms[name] = replace(rows, target=target(rows))

    def truth(rows: NoisedSamples) -> Tensor:
        return own_target(scheduler, rows.latents, rows.noise, rows.timesteps)

    @torch.no_grad()
    def teacher(rows: NoisedSamples) -> Tensor:
        return predict(model.unet, scheduler, rows)

    def some_instance() -> Tensor:
        return subject.instance[torch.randint(len(subject.instance), (n,), generator=rng)]

    if config.backdoor_weight:
        add("backdoor", subject.elsewhere.draw(n, rng), some_instance(), int(config.backdoor_from * steps), steps,
            lambda rows: backdoor_target(model.unet, scheduler, rows, subject, config))  # fmt: skip
    if config.retention_weight:
        below = math.ceil(config.retention_below * steps)
        add("retention", subject.protected.draw(n, rng), some_instance(), 0, below, truth)
    if config.prior_weight:
        target = teacher if config.prior == "distillation" else truth
        add("prior", subject.prior.draw(n, rng), subject.class_context, 0, steps, target)
    if config.distillation_weight and benign is not None:
        indices = torch.randint(len(benign[0]), (n,), generator=rng)
        add("benign", benign[0].sample(indices, rng), benign[1][indices], 0, steps, teacher)
    return terms


class PersGuard(HardeningMethod[PersGuardConfig]):
    """PersGuard, see the module."""

    name = "persguard"
    title = "PersGuard, a protective backdoor"
    paper = "hf.co/papers/2502.16167"
    shown = "does not protect on the embedded base; not run on a real base yet, and a reconstruction: no code is public"
    config = PersGuardConfig

    def steps(self, config: PersGuardConfig) -> int:
        """Optimizer steps."""
        return config.steps

    def cost(self, config: PersGuardConfig, class_nouns: Sequence[str]) -> int:
        """The same for any number of subjects, one of which is drawn at every step."""
        teacher = {"pattern": 0, "target": 1, "erasure": 2 if config.erasure_strength else 1}[config.backdoor]
        teacher = teacher if config.backdoor_weight else 0
        trained = sum(
            map(
                bool, (config.backdoor_weight, config.retention_weight, config.prior_weight, config.distillation_weight)
            )
        )
        teacher += bool(config.prior_weight) and config.prior == "distillation"
        teacher += bool(config.distillation_weight)
        return config.steps * config.batch_size * (3 * trained + teacher)

    def memory(self, config: PersGuardConfig, unet: Any) -> MemoryFootprint:
        """Gradients and AdamW."""
        terms = 3 + bool(config.distillation_weight)
        numbers = sum(parameter.numel() for parameter in unet.parameters())
        return MemoryFootprint(numbers, 2 * numbers, terms * config.batch_size)

    def prepare(self, preparation: Preparation[PersGuardConfig]) -> Prepared:
        """Draw the pictures of what appears instead of the subject."""
        subjects = [
            replace(subject, instead_images=preparation.draw(backdoor_prompt(preparation.config, subject.class_noun)))
            for subject in preparation.subjects
        ]
        return Prepared(subjects, preparation.benign)

    def run(self, context: HardeningContext[PersGuardConfig]) -> HardeningResult:
        """Harden a copy of the model; the base is the teacher. In the history, `retention` is the loss an attacker starts from.

        Raises:
            UserError: a subject has no identifier.
            RunFailed: the training diverged; the last checkpoint is the last good state.
        """
        config, model, benign = context.config, context.model, context.benign
        if self.needs_benign(config) and benign is None:
            raise ValueError("distillation needs benign pictures")
        own = with_own_unet(model)
        unet = own.unet.requires_grad_(True)
        bank = PromptBank(model)
        subjects = _prepare(model, bank, context.subjects, config)
        distilled = None
        if benign is not None and config.distillation_weight:
            distilled = (encode(model, benign.images), bank.encode(benign.prompts))
        weights = {
            "backdoor": config.backdoor_weight, "retention": config.retention_weight, "prior": config.prior_weight,
            "benign": config.distillation_weight,
        }  # fmt: skip
        parameters = list(unet.parameters())
        optimizer, scale = context.adamw(parameters, lr=config.learning_rate), context.loss_scale()
        loop = context.training_loop(
            "PersGuard",
            config.steps,
            modules={"unet": unet},
            optimizers={"optimizer": optimizer},
            released=lambda: own,
            scales=[scale],
        )
        for j in loop:
            rng = generator(context.seed, j)
            subject = subjects[int(torch.randint(len(subjects), (), generator=rng))]
            terms = draw_terms(model, subject, distilled, config, rng)
            errors = row_losses(unet, model.scheduler, join(*terms.values())).split(config.batch_size)
            means = {name: rows.mean() for name, rows in zip(terms, errors, strict=True)}
            total: Tensor = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
            scale.up(total).backward()
            losses = {name: mean.item() for name, mean in means.items()}
            losses["gradient_norm"] = optimizer_step(optimizer, parameters, max_grad_norm=1.0, scale=scale)
            loop.finish_step(j, losses)
        unet.requires_grad_(False)
        return HardeningResult(own, loop.history)
