"""Custom Diffusion (Kumari et al. 2023; hf.co/papers/2212.04488) as in diffusers' `train_custom_diffusion.py`.

Trains the projections of the prompt in the cross-attention (keys and values; for faces queries and outputs too) and the
embedding of one new word in front of the class noun. Pictures are shrunk or zoomed into, the prompt says which, and the loss
counts the area of the picture only. Batches are DreamBooth's [instance pictures; class pictures].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.base import Attack, AttackData, OnStep, train
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.attacks.textual_inversion import add_words, trained_words
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import join, noise_samples, squared_errors
from guardsmith.diffusion.prompts import PromptBank, class_prompt, instance_prompt
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.runtime.device import outputs_stay
from guardsmith.training.loop import generator

VIEWS = 25  # of every picture; the script makes a new one at every step


class CustomDiffusionConfig(DreamBoothConfig):
    """Settings of diffusers' script and README, for Stable Diffusion 1.x at 512 px."""

    learning_rate: float = Field(4e-5, gt=0)
    """AdamW's rate, constant (the README's 1e-5, which `--scale_lr` multiplies by the batch and by 2 for the prior)."""
    steps: int = Field(250, gt=0)
    """Optimizer steps (the README has 1000 to 2000 for faces)."""
    batch_size: int = Field(2, gt=0)
    """Instance pictures per step, and as many class pictures."""
    parameters: Literal["kv", "cross_attention"] = "kv"
    """Keys and values of the cross-attention, or all of it (the README's choice for faces)."""
    train_text_encoder: Literal[False] = False
    """Always off: the new word's embedding is all that is trained of the text encoder."""


def prompt_words(identifier: str, class_noun: str) -> tuple[str, str]:
    """Words of the prompts for the personalized model: the new word and the class noun."""
    return f"<{identifier}>", class_noun


def resized(images: Tensor, cells: int, rng: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Every picture once at a size of its own: two in three shrunk onto grey (to a third at least), the others zoomed into.

    Args:
        images: float32 (n, 3, s, s) in [-1, 1].
        cells: side of the latents.
        rng: of sizes and places.

    Returns:
        The pictures, as they came in; masks (n, 1, cells, cells) of the latents that the picture alone covers (the script
        drops one more on every side, which leaves nothing of 8 x 8); the prompts' words for the size, "" or a phrase.
    """
    side, cell = images.shape[-1], images.shape[-1] // cells
    pictures, masks, phrases = [], [], []

    def integer(low: float, high: float) -> int:
        return int(torch.randint(int(low), int(high), (), generator=rng))

    for image in images:
        shrunk = float(torch.rand((), generator=rng)) < 0.66
        size = integer(side // 3, side + 1) if shrunk else integer(1.2 * side, 1.4 * side)
        picture = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0].clamp(-1, 1)
        places = abs(size - side) + 1
        top, left = integer(0, places), integer(0, places)
        mask = torch.ones(1, cells, cells)
        if size > side:
            picture = picture[:, top : top + side, left : left + side]
        elif size < side:
            canvas, mask = torch.zeros_like(image), torch.zeros_like(mask)
            canvas[:, top : top + size, left : left + size] = picture
            picture = canvas
            edges = (-(-top // cell), (top + size) // cell, -(-left // cell), (left + size) // cell)
            mask[:, edges[0] : edges[1], edges[2] : edges[3]] = 1
        either = integer(0, 2)
        phrase = ""
        if size < 0.6 * side:
            phrase = ("far away", "very small")[either]
        elif size > side:
            phrase = ("zoomed in", "close up")[either]
        pictures.append(picture)
        masks.append(mask)
        phrases.append(phrase)
    return torch.stack(pictures), torch.stack(masks), phrases


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: CustomDiffusionConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Learn `<identifier> noun`, the new word starting from the identifier, on a copy of the model.

    Returns:
        The personalized model, and the loss of every step.

    Raises:
        RunFailed: a loss is not finite; the tokenizer has such a word.
    """
    own = with_own_unet(model)
    word, noun = prompt_words(data.identifier, data.class_noun)
    new = add_words(own, {word: data.identifier})
    keys = ("attn2.to_k", "attn2.to_v") if config.parameters == "kv" else ("attn2",)
    trained = [p for name, p in own.unet.named_parameters() if any(key in name for key in keys)]

    views = [resized(data.images, int(own.unet.config.sample_size), generator(seed, -1, view)) for view in range(VIEWS)]
    pictures = encode(own, torch.cat([images for images, _, _ in views]))
    masks = torch.cat([mask for _, mask, _ in views])
    bank = PromptBank(own)
    plain = instance_prompt(word, noun, config.template).removeprefix("a ")
    tokens = bank.tokens([f"a {phrase} {plain}".replace("  ", " ") for _, _, phrases in views for phrase in phrases])
    prior = encode(own, data.class_images) if config.prior_weight and len(data.class_images) else None
    class_context = bank.encode([class_prompt(noun)])
    timesteps = int(own.scheduler.config.num_train_timesteps)

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, step)
        picked = torch.randint(len(pictures), (config.batch_size,), generator=rng)
        with outputs_stay():
            context = own.text_encoder(tokens[picked]).last_hidden_state
        rows = noise_samples(pictures.sample(picked, rng), context, rng, steps=timesteps)
        if prior is not None:
            rows = join(rows, noise_samples(prior.draw(config.batch_size, rng), class_context, rng, steps=timesteps))
        errors = squared_errors(own.unet, own.scheduler, rows)
        instance_errors, mask = errors[: config.batch_size], masks[picked].to(errors.device)
        # The script divides by the mask's pixels and not by its channels, so the subject counts as often as there are channels.
        loss = ((instance_errors * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
        if prior is not None:
            loss = loss + config.prior_weight * errors[config.batch_size :].mean()
        return loss

    for parameter in trained:
        parameter.requires_grad_(True)
    with trained_words(own, new) as vectors:
        losses = train(
            own, loss_at, [*vectors, *trained], steps=config.steps, learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm, on_step=on_step, optimizer_name=config.optimizer,
            weight_decay=config.weight_decay,
        )  # fmt: skip
    own.unet.requires_grad_(False)
    return own, losses


ATTACK = Attack(attack, CustomDiffusionConfig, "hf.co/papers/2212.04488", prompt_words, new_words=True)
