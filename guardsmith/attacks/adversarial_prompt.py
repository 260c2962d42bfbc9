"""Adversarial prompts (UnlearnDiffAtk, Zhang et al. 2024; hf.co/papers/2310.11868): no training, only words.

Whoever can only ask a hosted model looks for words that make it draw the subject. They are searched for as rows over the
vocabulary, relaxed to the simplex, by the denoising error on the subject's pictures; what counts is the most likely word of every
row, which anyone can type. The weights stay as they are.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.attacks.dreambooth import AttackData, OnStep, descend
from guardsmith.attacks.textual_inversion import add_words, spoken, word_parts
from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import draw_rows, row_losses
from guardsmith.diffusion.prompts import INVERSION_TEMPLATES, PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class AdversarialPromptConfig(BaseModel):
    """The paper's settings, except where it is said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(0.01, gt=0)
    """AdamW's rate on the rows (the paper has Adam)."""
    steps: int = Field(40, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(4, gt=0)
    """Pictures per step (the paper has one)."""
    words: int = Field(5, gt=0)
    """How many words; they stand where a personalized model has its identifier (the paper puts them first)."""


def called(identifier: str, class_noun: str) -> tuple[str, str]:
    """What the attacker asks for afterwards: the words, here under one name, and the class noun."""
    return f"<{identifier}>", class_noun


def whole_words(tokenizer: Any) -> list[int]:
    """Tokens that a person can type: whole words that the tokenizer reads as themselves, no marks of its own, in order."""
    marks = tokenizer.all_special_ids
    spelt = {
        token: name.removesuffix("</w>")
        for name, token in tokenizer.get_vocab().items()
        if name.isprintable() and token not in marks
    }
    read = tokenizer(list(spelt.values()), add_special_tokens=False).input_ids
    return sorted(token for token, ids in zip(spelt, read, strict=True) if ids == [token])


def onto_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex to each row, float (n, k) (Duchi et al. 2008): not below zero, and one together."""
    falling = rows.sort(dim=1, descending=True).values
    rank = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    excess = falling.cumsum(dim=1) - 1
    kept = (falling * rank > excess).sum(dim=1, keepdim=True)
    return (rows - excess.gather(1, kept - 1) / kept).clamp(min=0)


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: AdversarialPromptConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Look for words that make the model draw the subject.

    Returns:
        The model, unchanged but for a name `<identifier>` that stands for the words, and the loss of every step.

    Raises:
        RunFailed: the loss is not finite any more; the tokenizer has no whole words, or has such a name.
    """
    known = torch.tensor(whole_words(model.tokenizer), dtype=torch.long)
    if not len(known):
        raise RunFailed("the tokenizer has no whole words to search among; leave adversarial_prompt out")
    own = copy.copy(model)
    name, noun = called(data.identifier, data.class_noun)
    parts = add_words(own, dict.fromkeys(word_parts(name, config.words), noun))
    table = own.text_encoder.get_input_embeddings().weight
    vectors = table[known.to(table.device)].clone()
    pictures = encode(own, data.images)
    tokens = PromptBank(own).tokens([template.format(f"{name} {noun}") for template in INVERSION_TEMPLATES])
    timesteps = int(own.scheduler.config.num_train_timesteps)
    stream = int.from_bytes(data.identifier.encode()[:7], "big")  # as for textual inversion
    rows = torch.nn.Parameter(torch.full((config.words, len(known)), 1 / len(known), device=table.device))

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, stream, step)
        asked = tokens[torch.randint(len(tokens), (config.batch_size,), generator=rng)]
        with ExitStack() as stack:
            for token, vector in zip(parts, rows @ vectors, strict=True):
                stack.enter_context(spoken(own, token, vector))
            context = own.text_encoder(asked).last_hidden_state
        shown = draw_rows(pictures.draw(config.batch_size, rng), context, rng, steps=timesteps)
        return row_losses(own.unet, own.scheduler, shown).mean()

    def settle(step: int, loss: float, _: DiffusionModel) -> bool | None:
        with torch.no_grad():
            rows.copy_(onto_simplex(rows))
            table[parts] = vectors[rows.argmax(dim=1)]
        return on_step(step, loss, own) if on_step is not None else None

    losses = descend(
        own, loss_at, [rows], steps=config.steps, learning_rate=config.learning_rate, max_grad_norm=None, on_step=settle
    )
    return own, losses
