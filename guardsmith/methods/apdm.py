"""APDM, anti-personalized diffusion models (Kwon et al., NeurIPS 2025; hf.co/papers/2511.01307).

Learning to Protect (Algorithm 1): follow the path a DreamBooth attacker would take, and at every point of it collect the
gradient that would have spoilt the result; then move the model once by their sum.

    for j = 1 .. N_protect:
        theta' <- theta;  G <- 0
        for i = 1 .. N_per:
            theta' <- theta' - g_per grad L_per(theta')            L_per     = L_simple(X_p, c_v) + L_ppl
            G      <- G + grad_{theta'} L_protect(theta')          L_protect = L_DPO + L_ppl
        theta <- theta - g_protect G

L_DPO prefers a picture x+ that the base model drew of the class over the subject's picture x-, both under the identifier
prompt c_v (`losses.dpo_loss`); L_ppl keeps class pictures under the class prompt. First order: nothing is unrolled.

Differences from the paper are options that start switched off: several subjects (one per outer step, in turn), several
identifiers, a distillation term at theta, other pairs, mirrored pictures, a path of adapters (LoRA), a text encoder that is
hardened too (the paper has a switch for it whose code does nothing). `leak=True` adds the personalization gradients to G, as the
released code does by never clearing them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from guardsmith.attacks.lora import adapter_numbers, add_adapters
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import (
    Reduction,
    Rows,
    cut,
    dpo_loss,
    dpo_saturation,
    draw_rows,
    join,
    predict,
    row_losses,
    squared_errors,
)
from guardsmith.diffusion.prompts import PromptBank, class_prompt, instance_prompt
from guardsmith.methods.data import OrdinaryData, SubjectData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.runtime.device import CPU, chosen_device
from guardsmith.runtime.distributed import world
from guardsmith.training.loop import (
    Course,
    Probe,
    Snapshot,
    add_gradients,
    generator,
    optimizer_step,
    reset_optimizer,
)
from guardsmith.training.optimizers import Held, adamw

REFERENCE_ROWS = 8
"""The frozen reference is asked for so many rows at once; without gradients they take less memory than a step's with them."""


class ApdmConfig(BaseModel):
    """Parameters of APDM. Defaults are the paper's (SD1.5), not those of its argument parser."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    learning_rate: float = Field(5e-6, gt=0)
    """g_protect: rate of the AdamW that moves theta."""
    personalization_learning_rate: float = Field(5e-6, gt=0)
    """g_per: rate of the AdamW that follows the attacker's path; its moments start anew on every path."""
    outer_steps: int = Field(800, gt=0)
    """N_protect: moves of theta."""
    inner_steps: int = Field(20, gt=0)
    """N_per: steps of every personalization path."""
    batch_size: int = Field(1, gt=0)
    """Rows of each kind per inner step."""
    beta: float = Field(1.0, gt=0)
    """Temperature of the DPO term. It means something only together with `reduction`."""
    reduction: Reduction = "mean"
    """Where DPO's log-sigmoid is taken: per sample on the mean error (paper), or per element (released code)."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of L_ppl in both losses."""
    pairing: Literal["paired", "random", "nearest"] = "paired"
    """Which x+ is preferred to a subject's picture: always the same one, any, or the class picture with the closest latents."""
    positive_prompt: str | None = None
    """What the base is asked for the x+, e.g. "a photo of {class_noun} in the snow"; nothing: the class pictures serve."""
    mirror: bool = False
    """Take the subject's pictures mirrored as well (an attacker may train on those)."""
    train_text_encoder: bool = False
    """Harden the text encoder too, and let the path train it like an attacker who does."""
    identifiers: tuple[str, ...] = Field(("sks",), min_length=1)
    """Identifiers of the personalization path, one drawn per path; the subject's own are added."""
    parameters: Literal["unet", "attention", "cross_attention"] = "unet"
    """Which weights of the U-Net may change for good (a full path always moves all of them)."""
    path: Literal["full", "lora"] = "full"
    """What the attacker's path moves: all weights (DreamBooth), or adapters on the attention, which needs far less memory."""
    path_rank: int = Field(4, gt=0)
    """Rank of those adapters; an attacker's rate for them is some ten times the one for weights."""
    overlap: bool = False
    """Collect the protection gradients in a second thread, at a copy of the path's weights, while the path goes on: for CPUs,
    where a small U-Net does not keep all cores busy. Nothing changes where several processes share the rows."""
    offload_reference: bool = False
    """Keep the frozen reference in the machine's memory, and bring it to the accelerator once a path, for all of its pairs."""
    class_images: int = Field(200, gt=0)
    """Pictures of every class, generated by the base model."""
    ordinary_images: int = Field(160, gt=0)
    """Pictures of ordinary prompts, generated by the base model (for distillation)."""
    distillation_weight: float = Field(0.0, ge=0)
    """Weight of || e_theta - e_base ||^2 on ordinary pictures, at theta, once per outer step (0: the paper)."""
    max_grad_norm: float | None = None
    """Clip the summed protection gradient (none in the paper)."""
    leak: bool = False
    """Also add the personalization gradients to G, like the released code."""

    @field_validator("positive_prompt")
    @classmethod
    def _known_places(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                value.format(class_noun="person")
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError("the only word in braces may be {class_noun}") from error
        return value

    @model_validator(mode="after")
    def _adapters_are_all_that_moves(self) -> Self:
        if self.path == "lora" and (self.leak or self.train_text_encoder):
            raise ValueError(
                "a path of adapters moves no weights: leave leak and train_text_encoder out, or set path to full"
            )
        return self

    @model_validator(mode="after")
    def _one_text_encoder(self) -> Self:
        if self.overlap and self.train_text_encoder:
            raise ValueError("overlap copies the denoiser only: leave overlap or train_text_encoder out")
        return self

    @model_validator(mode="after")
    def _one_source_of_positives(self) -> Self:
        if self.pairing == "nearest" and self.positive_prompt is not None:
            raise ValueError("pairing nearest picks among the class pictures; leave positive_prompt out")
        return self


def positive_prompt(config: ApdmConfig, class_noun: str) -> str | None:
    """The prompt of pictures to draw for x+, if the class pictures do not serve."""
    return None if config.positive_prompt is None else config.positive_prompt.format(class_noun=class_noun)


def cost(config: ApdmConfig, nouns: Sequence[str]) -> int:
    """U-Net forward equivalents of a run, however many subjects take turns in it.

    Per inner step 2 + 3 rows with gradients (3 each) and 2 rows without.
    """
    rows = 3 * (2 + 3) + 2
    ordinary = 4 * (3 + 1) if config.distillation_weight else 0
    return config.outer_steps * config.batch_size * (config.inner_steps * rows + ordinary)


def memory(config: ApdmConfig, unet: Any) -> Held:
    """Gradients, the path's AdamW and where it began; a sum of gradients and AdamW of what is hardened; a second thread's."""
    kept = sum(parameter.numel() for parameter in hardened_parameters(unet, config.parameters))
    path = sum(parameter.numel() for parameter in unet.parameters())
    if config.path == "lora":
        path = adapter_numbers(unet, config.path_rank)
    rows = (4 if config.distillation_weight else 3) * config.batch_size
    numbers = 2 * path + kept
    if config.overlap:
        numbers, rows = numbers + path + (kept if config.leak else 0), 5 * config.batch_size
    return Held(numbers, 2 * path + 2 * kept, rows)


@dataclass(frozen=True)
class _Prepared:
    """A subject's cached latents, and its prompts as tokens and, by the frozen text encoder, as contexts."""

    negatives: LatentStore
    positives: LatentStore
    prior: LatentStore
    instance: Tensor  # (identifiers, tokens, width)
    class_context: Tensor  # (1, tokens, width)
    instance_tokens: Tensor  # (identifiers, tokens)
    class_tokens: Tensor  # (1, tokens)


def _nearest(wanted: Tensor, among: Tensor) -> Tensor:
    """For each latent (n, c, h, w) the index of the closest of the others (m, c, h, w)."""
    return torch.cdist(wanted.flatten(1), among.flatten(1)).argmin(1)


def _prepare(model: DiffusionModel, bank: PromptBank, subject: SubjectData, config: ApdmConfig) -> _Prepared:
    names = tuple(dict.fromkeys((*config.identifiers, *subject.identifiers)))
    prompts = [instance_prompt(name, subject.class_noun) for name in names]
    images = torch.cat([subject.images, subject.images.flip(-1)]) if config.mirror else subject.images
    negatives, prior = encode(model, images), encode(model, subject.class_images)
    if config.pairing == "nearest":
        closest = _nearest(negatives.mean, prior.mean)
        positives = LatentStore(prior.mean[closest], prior.std[closest])
    else:
        pool = subject.positives if subject.instead_images is None else subject.instead_images[: len(subject.images)]
        positives = encode(model, pool)
    return _Prepared(
        negatives,
        positives,
        prior,
        bank.encode(prompts),
        bank.encode([class_prompt(subject.class_noun)]),
        bank.tokens(prompts),
        bank.tokens([class_prompt(subject.class_noun)]),
    )


def personalization_loss(unet: Any, scheduler: Any, instance: Rows, prior: Rows, prior_weight: float) -> Tensor:
    """L_per = L_simple(instance rows) + w L_simple(class rows), in one batch."""
    errors = row_losses(unet, scheduler, join(instance, prior))
    return errors[: len(instance)].mean() + prior_weight * errors[len(instance) :].mean()


def protection_loss(
    unet: Any, scheduler: Any, pairs: Rows, prior: Rows, before: Tensor, config: ApdmConfig
) -> tuple[Tensor, dict[str, float]]:
    """L_protect = L_DPO + w L_ppl at the current point, in one batch.

    Args:
        unet: theta' (gradients flow into its parameters).
        scheduler: training schedule.
        pairs: rows of x+, and behind them those of x- with the same timesteps, noise and context, (2n, ...).
        prior: class rows under the class prompt.
        before: the frozen phi's squared errors on the pairs, (2n, c, h, w).
        config: beta, reduction, prior weight.

    Returns:
        The loss, and what to show of it.
    """
    count = len(pairs) // 2
    errors = squared_errors(unet, scheduler, join(pairs, prior))
    pair = (errors[:count], errors[count : 2 * count], before[:count], before[count:])
    dpo = dpo_loss(*pair, beta=config.beta, reduction=config.reduction)
    prior_loss = errors[2 * count :].mean()
    shown = {
        "dpo": dpo.item(),
        "prior": prior_loss.item(),
        "positive_shift": (pair[0] - pair[2]).mean().item(),
        "negative_shift": (pair[1] - pair[3]).mean().item(),
        "saturation": dpo_saturation(*(e.detach() for e in pair), beta=config.beta, reduction=config.reduction),
    }
    return dpo + config.prior_weight * prior_loss, shown


def draw_pair(
    prepared: _Prepared, context: Tensor, config: ApdmConfig, rng: torch.Generator, timesteps: int
) -> tuple[Rows, Rows]:
    """Rows of (x+, x-) that share timesteps, noise and context."""
    picked = torch.randint(len(prepared.negatives), (config.batch_size,), generator=rng)
    partner = picked
    if config.pairing == "random":
        partner = torch.randint(len(prepared.positives), (config.batch_size,), generator=rng)
    negative = draw_rows(prepared.negatives.sample(picked, rng), context, rng, steps=timesteps)
    latents = prepared.positives.sample(partner % len(prepared.positives), rng)
    return Rows(latents, negative.timesteps, negative.noise, negative.context), negative


def _draw_step(
    subject: _Prepared, words: Tensor, config: ApdmConfig, rng: torch.Generator, timesteps: int
) -> tuple[Rows, Rows, Rows, Rows]:
    """Everything random of an inner step: instance and class rows of the path; x+ with x-, and class rows, of the protection."""
    instance = draw_rows(subject.negatives.draw(config.batch_size, rng), words, rng, steps=timesteps)
    prior = subject.prior.draw(config.batch_size, rng)
    first = draw_rows(prior, subject.class_context, rng, timesteps=instance.timesteps)
    positive, negative = draw_pair(subject, words, config, rng, timesteps)
    prior = subject.prior.draw(config.batch_size, rng)
    second = draw_rows(prior, subject.class_context, rng, timesteps=positive.timesteps)
    return instance, first, join(positive, negative), second


@contextmanager
def _at_work(network: Any, offload: bool) -> Iterator[Any]:
    """Inside, a network that is kept in the machine's memory is where networks run."""
    if offload:
        network.to(chosen_device())
    yield network
    if offload:
        network.to(CPU)


@torch.no_grad()
def reference_errors(model: DiffusionModel, pairs: Sequence[Rows]) -> list[Tensor]:
    """The frozen U-Net's squared errors on the pairs of a whole path at once; they do not depend on where the path leads.

    Args:
        model: the base.
        pairs: x+ and x- of every inner step, (2n, ...) each.

    Returns:
        Per inner step float32 (2n, c, h, w).
    """
    errors = [squared_errors(model.unet, model.scheduler, some) for some in cut(join(*pairs), REFERENCE_ROWS)]
    return list(torch.cat(errors).split(len(pairs[0])))


@contextmanager
def _second_thread(wanted: bool) -> Iterator[ThreadPoolExecutor | None]:
    """Another thread, with half of the cores for each of the two; or none."""
    if not wanted:
        yield None
        return
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // 2))
    try:
        with ThreadPoolExecutor(1) as thread:
            yield thread
    finally:
        torch.set_num_threads(cores)


def hardened_parameters(unet: Any, which: str) -> list[torch.nn.Parameter]:
    """The weights that may change for good."""
    keys = {"unet": "", "attention": "attn", "cross_attention": "attn2"}[which]
    return [p for name, p in unet.named_parameters() if keys in name]


def harden(
    model: DiffusionModel,
    subjects: Sequence[SubjectData],
    ordinary: OrdinaryData | None,
    config: ApdmConfig,
    *,
    seed: int,
    start: Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    probe: Probe | None = None,
) -> tuple[DiffusionModel, list[dict[str, float]]]:
    """Harden a copy of the model against personalization on these subjects.

    Args:
        model: the base; it is the frozen reference phi and stays as it is.
        subjects: at least one.
        ordinary: pictures and prompts for the distillation term; may be `None` when its weight is 0.
        config: see `ApdmConfig`.
        seed: of everything random; a step's draws depend on the seed and the step only.
        start: what an earlier run on the first of these subjects left, to begin from (`training.save_modules`).
        checkpoint: file to resume from if it exists, and to save to.
        checkpoint_every: outer steps between saves.
        on_step: called after every outer step with its number and losses.
        probe: see `training.Course`.

    Returns:
        The hardened model and one dict of losses per outer step.

    Raises:
        RunFailed: the training diverged; the last checkpoint is the last good state.
    """
    if config.distillation_weight and ordinary is None:
        raise ValueError("distillation needs ordinary pictures")
    own = with_own_unet(model)
    unet, reference, scheduler = own.unet.requires_grad_(True), model.unet, model.scheduler
    if config.offload_reference:
        reference.to(CPU)
    trained = {"unet": unet}
    if config.train_text_encoder:
        own.text_encoder = trained["text_encoder"] = copy.deepcopy(model.text_encoder).requires_grad_(True)
    bank = PromptBank(model)

    prepared = [_prepare(model, bank, subject, config) for subject in subjects]
    keep = encode(model, ordinary.images) if config.distillation_weight and ordinary is not None else None
    timesteps = int(scheduler.config.num_train_timesteps)

    path_parameters = [p for part in trained.values() for p in part.parameters()]
    kept = hardened_parameters(unet, config.parameters)
    if config.train_text_encoder:
        kept += list(own.text_encoder.parameters())
    walker = unet  # what goes along the path: theta itself, or the same weights with adapters on them
    if config.path == "lora":
        walker = copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})
        path_parameters = add_adapters(walker, config.path_rank, seed)
        unet.requires_grad_(True)
    overlap = config.overlap and world() == 1
    witness, seen, counted = walker, path_parameters, kept  # where the protection's gradients are taken
    if overlap:
        moving = {id(p) for p in path_parameters}
        memo = {id(p): p for p in walker.parameters() if id(p) not in moving}
        witness = copy.deepcopy(walker, memo)
        seen, counted = ([memo[id(p)] for p in some] for some in (path_parameters, kept))
    inner = adamw(unet, path_parameters, lr=config.personalization_learning_rate)
    outer = adamw(unet, kept, lr=config.learning_rate)
    theta = Snapshot(path_parameters)
    course = Course(
        "APDM", config.outer_steps, modules=trained, optimizers={"optimizer": outer}, start=start, checkpoint=checkpoint,
        checkpoint_every=checkpoint_every, on_step=on_step, probe=probe, present=lambda: own,
    )  # fmt: skip
    theta.take()

    def spoken(rows: Rows, tokens: Tensor) -> Rows:
        """Rows with the prompt as the present text encoder has it."""
        if not config.train_text_encoder:
            return rows
        context = own.text_encoder(tokens).last_hidden_state
        return replace(rows, context=context.expand(len(rows), -1, -1))

    def protection(total: list[Tensor], shown: dict[str, float], pairs: Rows, prior: Rows, before: Tensor) -> None:
        """Add the gradients of L_protect where the path has come to, and what to show."""
        protect, parts = protection_loss(witness, scheduler, pairs, prior, before, config)
        add_gradients(protect, counted, total)
        for key, value in parts.items():
            shown[key] = shown.get(key, 0.0) + value / config.inner_steps

    for j in course:
        subject = prepared[j % len(prepared)]
        reset_optimizer(inner)
        total = [torch.zeros_like(p) for p in kept]
        leaked = [torch.zeros_like(p) for p in kept] if overlap and config.leak else total  # no waiting
        shown: dict[str, float] = {}
        rng = generator(seed, j)
        name = int(torch.randint(len(subject.instance), (1,), generator=rng))
        words, known = subject.instance_tokens[name : name + 1], subject.instance[name : name + 1]
        steps = [
            _draw_step(subject, known, config, generator(seed, j, i), timesteps) for i in range(config.inner_steps)
        ]
        with _at_work(reference, config.offload_reference):
            before = reference_errors(model, [pairs for _, _, pairs, _ in steps])
        last: Future[None] | None = None
        with _second_thread(overlap) as thread:
            for i, (instance, first, pairs, second) in enumerate(steps):
                given = spoken(instance, words), spoken(first, subject.class_tokens)
                loss = personalization_loss(walker, scheduler, *given, config.prior_weight)
                loss.backward(inputs=path_parameters)
                if i == 0:
                    shown["personalization"] = loss.item()
                if config.leak:
                    torch._foreach_add_(leaked, [p.grad for p in kept if p.grad is not None])
                optimizer_step(inner, path_parameters, max_grad_norm=None)
                asked = spoken(pairs, words), spoken(second, subject.class_tokens), before[i]
                if thread is None:
                    protection(total, shown, *asked)
                    continue
                if last:
                    last.result()
                with torch.no_grad():
                    torch._foreach_copy_(seen, path_parameters)
                last = thread.submit(protection, total, shown, *asked)
            if last:
                last.result()
        if leaked is not total:
            torch._foreach_add_(total, leaked)
        theta.restore()
        if keep is not None and ordinary is not None:
            rng = generator(seed, j, -1)
            rows = torch.randint(len(keep), (4 * config.batch_size,), generator=rng)
            prompts = [ordinary.prompts[r] for r in rows.tolist()]
            draws = draw_rows(keep.sample(rows, rng), bank.encode(prompts), rng, steps=timesteps)
            with torch.no_grad(), _at_work(reference, config.offload_reference):
                teacher = predict(reference, scheduler, draws)
            same = (predict(unet, scheduler, spoken(draws, bank.tokens(prompts))) - teacher).square().mean()
            scale = config.distillation_weight * config.inner_steps  # as often as the other terms
            add_gradients(scale * same, kept, total)
            shown["distillation"] = same.item()
        for parameter, gradient in zip(kept, total, strict=True):
            parameter.grad = gradient
        shown["gradient_norm"] = optimizer_step(outer, kept, max_grad_norm=config.max_grad_norm)
        norms = torch.stack(torch._foreach_norm([p.detach() for p in kept]))  # infinite also where only a sum overflows
        theta.take()
        course.done(j, shown, sound=bool(torch.isfinite(norms).all()))
    for module in trained.values():
        module.requires_grad_(False)
    if config.offload_reference:
        reference.to(chosen_device())
    return own, course.history
