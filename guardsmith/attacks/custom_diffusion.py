"""Custom Diffusion (Kumari et al. 2023; hf.co/papers/2212.04488) as in diffusers' `train_custom_diffusion.py`.

Trains what the cross-attention makes of the prompt (keys and values; for faces queries and outputs too) and the embedding of
one new word in front of the class noun. Pictures are shown smaller or larger, the prompt says so, and only what shows the
picture counts. Batches are DreamBooth's [instance rows; class rows].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig, OnStep, descend
from guardsmith.attacks.textual_inversion import add_words, trained_words
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import draw_rows, join, squared_errors
from guardsmith.diffusion.prompts import PromptBank, class_prompt, instance_prompt
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import generator

VIEWS = 25  # of every picture; the script makes a new one at every step


class CustomDiffusionConfig(DreamBoothConfig):
    """Settings of diffusers' script and README, for Stable Diffusion 1.x at 512 px."""

    learning_rate: float = Field(4e-5, gt=0)
    """AdamW's rate, constant (the README's 1e-5, which `--scale_lr` multiplies by the batch and by 2 for the prior)."""
    steps: int = Field(250, gt=0)
    """Optimizer steps (the README has 1000 to 2000 for faces)."""
    batch_size: int = Field(2, gt=0)
    """Instance rows per step, and as many class rows."""
    parameters: Literal["kv", "cross_attention"] = "kv"
    """Keys and values of the cross-attention, or all of it (the README's choice for faces)."""
    train_text_encoder: Literal[False] = False
    """Not here: the new word is all that is learnt of the text."""


def called(identifier: str, class_noun: str) -> tuple[str, str]:
    """What the attacker asks for afterwards: the new word and the class noun."""
    return f"<{identifier}>", class_noun


def resized(images: Tensor, cells: int, rng: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Every picture once at a size of its own: two in three shrunk onto grey (to a third at least), the others zoomed into.

    Args:
        images: float32 (n, 3, s, s) in [-1, 1].
        cells: side of the latents.
        rng: of sizes and places.

    Returns:
        The pictures, as they came in; masks (n, 1, cells, cells) of the latents that show nothing but the picture (the script
        drops one more on every side, which leaves nothing of 8 x 8); what the prompt says about the size, "" or a phrase.
    """
    side, cell = images.shape[-1], images.shape[-1] // cells
    shown, masks, said = [], [], []

    def whole(low: float, high: float) -> int:
        return int(torch.randint(int(low), int(high), (), generator=rng))

    for image in images:
        shrunk = float(torch.rand((), generator=rng)) < 0.66
        size = whole(side // 3, side + 1) if shrunk else whole(1.2 * side, 1.4 * side)
        picture = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0].clamp(-1, 1)
        room = abs(size - side) + 1
        top, left = whole(0, room), whole(0, room)
        mask = torch.ones(1, cells, cells)
        if size > side:
            picture = picture[:, top : top + side, left : left + side]
        elif size < side:
            canvas, mask = torch.zeros_like(image), torch.zeros_like(mask)
            canvas[:, top : top + size, left : left + size] = picture
            picture = canvas
            edges = (-(-top // cell), (top + size) // cell, -(-left // cell), (left + size) // cell)
            mask[:, edges[0] : edges[1], edges[2] : edges[3]] = 1
        either = whole(0, 2)
        phrase = ""
        if size < 0.6 * side:
            phrase = ("far away", "very small")[either]
        elif size > side:
            phrase = ("zoomed in", "close up")[either]
        shown.append(picture)
        masks.append(mask)
        said.append(phrase)
    return torch.stack(shown), torch.stack(masks), said


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
        RunFailed: the loss is not finite any more; the tokenizer has such a word.
    """
    own = with_own_unet(model)
    word, noun = called(data.identifier, data.class_noun)
    new = add_words(own, {word: data.identifier})
    keys = ("attn2.to_k", "attn2.to_v") if config.parameters == "kv" else ("attn2",)
    trained = [p for name, p in own.unet.named_parameters() if any(key in name for key in keys)]

    views = [resized(data.images, int(own.unet.config.sample_size), generator(seed, -1, view)) for view in range(VIEWS)]
    pictures = encode(own, torch.cat([images for images, _, _ in views]))
    masks = torch.cat([mask for _, mask, _ in views])
    bank = PromptBank(own)
    plain = instance_prompt(word, noun, config.template).removeprefix("a ")
    tokens = bank.tokens([f"a {phrase} {plain}".replace("  ", " ") for _, _, said in views for phrase in said])
    prior = encode(own, data.class_images) if config.prior_weight and len(data.class_images) else None
    class_context = bank.encode([class_prompt(noun)])
    timesteps = int(own.scheduler.config.num_train_timesteps)

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, step)
        picked = torch.randint(len(pictures), (config.batch_size,), generator=rng)
        context = own.text_encoder(tokens[picked]).last_hidden_state
        rows = draw_rows(pictures.sample(picked, rng), context, rng, steps=timesteps)
        if prior is not None:
            rows = join(rows, draw_rows(prior.draw(config.batch_size, rng), class_context, rng, steps=timesteps))
        errors = squared_errors(own.unet, own.scheduler, rows)
        shown, mask = errors[: config.batch_size], masks[picked]
        # The script divides by the mask's pixels and not by its channels, so the subject counts as often as there are channels.
        loss = ((shown * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
        if prior is not None:
            loss = loss + config.prior_weight * errors[config.batch_size :].mean()
        return loss

    for parameter in trained:
        parameter.requires_grad_(True)
    with trained_words(own, new) as vectors:
        losses = descend(
            own, loss_at, [*vectors, *trained], steps=config.steps, learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm, on_step=on_step,
        )  # fmt: skip
    own.unet.requires_grad_(False)
    return own, losses
