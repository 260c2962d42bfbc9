"""APDM's two losses, the rows that they are taken on, and the frozen reference's errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import (
    NoisedSamples,
    cut,
    dpo_loss,
    dpo_saturation,
    join,
    noise_samples,
    row_losses,
    squared_errors,
)
from guardsmith.diffusion.prompts import PromptBank, class_prompt, instance_prompt
from guardsmith.methods.apdm.config import ApdmConfig
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel

REFERENCE_ROWS = 8
"""Rows of the frozen reference in a batch; without gradients they take less memory than a step's with them."""


@dataclass(frozen=True)
class SubjectLatents:
    """A subject's cached latents and its prompts.

    Attributes:
        negatives: of its own pictures, x-.
        positives: of the pictures that are preferred to them, x+.
        prior: of pictures of its class.
        instance: the identifier prompts as the frozen text encoder has them, (identifiers, tokens, width).
        class_context: the class prompt, likewise, (1, tokens, width).
        instance_tokens: token ids of the identifier prompts, int64 (identifiers, tokens).
        class_tokens: of the class prompt, int64 (1, tokens).
    """

    negatives: LatentStore
    positives: LatentStore
    prior: LatentStore
    instance: Tensor
    class_context: Tensor
    instance_tokens: Tensor
    class_tokens: Tensor


def _nearest(latents: Tensor, others: Tensor) -> Tensor:
    """For each latent (n, c, h, w) the index of the closest of the others (m, c, h, w)."""
    return torch.cdist(latents.flatten(1), others.flatten(1)).argmin(1)


def prepare_subject(
    model: DiffusionModel, bank: PromptBank, subject: SubjectData, config: ApdmConfig
) -> SubjectLatents:
    """Encode a subject's pictures and prompts once.

    Args:
        model: the base.
        bank: its prompts.
        subject: whom to protect.
        config: identifiers, pairing, mirrored pictures.
    """
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
    return SubjectLatents(
        negatives,
        positives,
        prior,
        bank.encode(prompts),
        bank.encode([class_prompt(subject.class_noun)]),
        bank.tokens(prompts),
        bank.tokens([class_prompt(subject.class_noun)]),
    )


def personalization_loss(
    unet: Any, scheduler: Any, instance: NoisedSamples, prior: NoisedSamples, prior_weight: float
) -> Tensor:
    """L_per = L_simple(instance rows) + w L_simple(class rows), in one batch."""
    errors = row_losses(unet, scheduler, join(instance, prior))
    return errors[: len(instance)].mean() + prior_weight * errors[len(instance) :].mean()


def protection_loss(
    unet: Any, scheduler: Any, pairs: NoisedSamples, prior: NoisedSamples, reference: Tensor, config: ApdmConfig
) -> tuple[Tensor, dict[str, float]]:
    """L_protect = L_DPO + w L_ppl at the current point, in one batch.

    Args:
        unet: theta' (gradients flow into its parameters).
        scheduler: training schedule.
        pairs: rows of x+, and behind them those of x- with the same timesteps, noise and context, (2n, ...).
        prior: class rows under the class prompt.
        reference: the frozen phi's squared errors on the pairs, (2n, c, h, w).
        config: beta, reduction, prior weight.

    Returns:
        The loss, and its terms and how far they have come, as numbers.
    """
    count = len(pairs) // 2
    errors = squared_errors(unet, scheduler, join(pairs, prior))
    pair = (errors[:count], errors[count : 2 * count], reference[:count], reference[count:])
    dpo = dpo_loss(*pair, beta=config.beta, reduction=config.reduction)
    prior_loss = errors[2 * count :].mean()
    terms = {
        "dpo": dpo.item(),
        "prior": prior_loss.item(),
        "positive_shift": (pair[0] - pair[2]).mean().item(),
        "negative_shift": (pair[1] - pair[3]).mean().item(),
        "saturation": dpo_saturation(*(e.detach() for e in pair), beta=config.beta, reduction=config.reduction),
    }
    return dpo + config.prior_weight * prior_loss, terms


def draw_pair(
    subject: SubjectLatents, context: Tensor, config: ApdmConfig, rng: torch.Generator, timesteps: int
) -> tuple[NoisedSamples, NoisedSamples]:
    """Rows of (x+, x-) that share timesteps, noise and context."""
    picked = torch.randint(len(subject.negatives), (config.batch_size,), generator=rng)
    partner = picked
    if config.pairing == "random":
        partner = torch.randint(len(subject.positives), (config.batch_size,), generator=rng)
    negative = noise_samples(subject.negatives.sample(picked, rng), context, rng, steps=timesteps)
    latents = subject.positives.sample(partner % len(subject.positives), rng)
    return NoisedSamples(latents, negative.timesteps, negative.noise, negative.context), negative


def draw_step(
    subject: SubjectLatents, words: Tensor, config: ApdmConfig, rng: torch.Generator, timesteps: int
) -> tuple[NoisedSamples, NoisedSamples, NoisedSamples, NoisedSamples]:
    """Everything random of an inner step: instance and class rows of the path; x+ with x-, and class rows, of the protection."""
    instance = noise_samples(subject.negatives.draw(config.batch_size, rng), words, rng, steps=timesteps)
    prior = subject.prior.draw(config.batch_size, rng)
    first = noise_samples(prior, subject.class_context, rng, timesteps=instance.timesteps)
    positive, negative = draw_pair(subject, words, config, rng, timesteps)
    prior = subject.prior.draw(config.batch_size, rng)
    second = noise_samples(prior, subject.class_context, rng, timesteps=positive.timesteps)
    return instance, first, join(positive, negative), second


@torch.no_grad()
def reference_errors(model: DiffusionModel, pairs: Sequence[NoisedSamples]) -> list[Tensor]:
    """The frozen U-Net's squared errors on the pairs of a whole path at once; they do not depend on where the path leads.

    Args:
        model: the base.
        pairs: x+ and x- of every inner step, (2n, ...) each.

    Returns:
        Per inner step float32 (2n, c, h, w).
    """
    errors = [squared_errors(model.unet, model.scheduler, batch) for batch in cut(join(*pairs), REFERENCE_ROWS)]
    return list(torch.cat(errors).split(len(pairs[0])))
