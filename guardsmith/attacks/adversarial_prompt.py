"""Adversarial prompts (UnlearnDiffAtk, Zhang et al. 2024; hf.co/papers/2310.11868): a search for words, without training.

An attacker of a hosted model, who can only type prompts, searches for words that make it generate the subject. Each word is a
distribution over the vocabulary, projected onto the simplex, optimized by the denoising error on the subject's pictures; the most
likely word of every distribution, which anyone can type, is the result. The weights stay as they are.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.attacks.base import Attack, AttackData, OnStep, train
from guardsmith.attacks.textual_inversion import add_words, with_embedding, word_parts
from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import INVERSION_TEMPLATES, PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class AdversarialPromptConfig(BaseModel):
    """The paper's settings, except where a field says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(0.01, gt=0)
    """AdamW's rate on the distributions (the paper has Adam)."""
    steps: int = Field(40, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(4, gt=0)
    """Pictures per step (the paper has one)."""
    words: int = Field(5, gt=0)
    """How many words; they stand where a personalized model has its identifier (the paper puts them first)."""


def prompt_words(identifier: str, class_noun: str) -> tuple[str, str]:
    """Words of the prompts for the model: the words of the search, here under one name, and the class noun."""
    return f"<{identifier}>", class_noun


def whole_words(tokenizer: Any) -> list[int]:
    """Ids of the tokens that a person can type, ascending: words that the tokenizer reads as themselves; no special ones."""
    special = tokenizer.all_special_ids
    words = {
        token: name.removesuffix("</w>")
        for name, token in tokenizer.get_vocab().items()
        if name.isprintable() and token not in special
    }
    ids_of_words = tokenizer(list(words.values()), add_special_tokens=False).input_ids
    return sorted(token for token, ids in zip(words, ids_of_words, strict=True) if ids == [token])


def project_onto_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex to each row, float (n, k) (Duchi et al. 2008): entries at least 0 that sum to 1."""
    descending = rows.sort(dim=1, descending=True).values
    rank = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    excess = descending.cumsum(dim=1) - 1
    count = (descending * rank > excess).sum(dim=1, keepdim=True)
    return (rows - excess.gather(1, count - 1) / count).clamp(min=0)


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: AdversarialPromptConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Search for words that make the model generate the subject.

    Returns:
        The model, unchanged but for a name `<identifier>` that stands for the words, and the loss of every step.

    Raises:
        RunFailed: a loss is not finite; the tokenizer has no whole words, or has such a name.
    """
    word_tokens = torch.tensor(whole_words(model.tokenizer), dtype=torch.long)
    if not len(word_tokens):
        raise RunFailed("the tokenizer has no whole words to search among; leave adversarial_prompt out")
    own = copy.copy(model)
    name, noun = prompt_words(data.identifier, data.class_noun)
    parts = add_words(own, dict.fromkeys(word_parts(name, config.words), noun))
    table = own.text_encoder.get_input_embeddings().weight
    vectors = table[word_tokens.to(table.device)].clone()
    pictures = encode(own, data.images)
    tokens = PromptBank(own).tokens([template.format(f"{name} {noun}") for template in INVERSION_TEMPLATES])
    timesteps = int(own.scheduler.config.num_train_timesteps)
    stream = int.from_bytes(data.identifier.encode()[:7], "big")  # as for textual inversion
    rows = torch.nn.Parameter(torch.full((config.words, len(word_tokens)), 1 / len(word_tokens), device=table.device))

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, stream, step)
        prompts = tokens[torch.randint(len(tokens), (config.batch_size,), generator=rng)]
        with ExitStack() as stack:
            for token, vector in zip(parts, rows @ vectors, strict=True):
                stack.enter_context(with_embedding(own, token, vector))
            context = own.text_encoder(prompts).last_hidden_state
        samples = noise_samples(pictures.draw(config.batch_size, rng), context, rng, steps=timesteps)
        return row_losses(own.unet, own.scheduler, samples).mean()

    def project(step: int, loss: float, _: DiffusionModel) -> bool | None:
        with torch.no_grad():
            rows.copy_(project_onto_simplex(rows))
            table[parts] = vectors[rows.argmax(dim=1)]
        return on_step(step, loss, own) if on_step is not None else None

    losses = train(
        own,
        loss_at,
        [rows],
        steps=config.steps,
        learning_rate=config.learning_rate,
        max_grad_norm=None,
        on_step=project,
    )
    return own, losses


ATTACK = Attack(attack, AdversarialPromptConfig, "hf.co/papers/2310.11868", prompt_words, new_words=True, trains=False)
