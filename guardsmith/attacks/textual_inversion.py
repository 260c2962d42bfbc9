"""Textual inversion (Gal et al. 2023; hf.co/papers/2208.01618) as in diffusers' `textual_inversion.py`.

Only the embedding of one new word is trained (or several vectors for it); U-Net and text encoder stay as they are. Every
picture has a neutral prompt of its own around the word, the pictures are mirrored half of the time, and there is no prior
preservation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from guardsmith.attacks.base import Attack, AttackData, OnStep, train
from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import INVERSION_TEMPLATES, PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.runtime.device import outputs_stay
from guardsmith.training.loop import generator, torch_seed


class TextualInversionConfig(BaseModel):
    """Settings of diffusers' script and README, for Stable Diffusion 1.5 at 512 px."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(2e-3, gt=0)
    """AdamW's rate, constant (the README's 5e-4, which `--scale_lr` multiplies by the batch)."""
    steps: int = Field(3000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(4, gt=0)
    """Pictures per step."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW's weight decay."""
    vectors: int = Field(1, gt=0)
    """Vectors of the word (the script's `--num_vectors`); prompts that name the word have them all in a row."""


def prompt_words(identifier: str, class_noun: str) -> tuple[str, str]:
    """Words of the prompts for the personalized model: the new word alone."""
    return f"<{identifier}>", ""


def word_parts(word: str, count: int) -> list[str]:
    """The names of a word's `count` vectors, the first of which is the word's own; `PromptBank` spells the word out so."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def add_words(model: DiffusionModel, words: Mapping[str, str]) -> list[int]:
    """Add words to a model; it gets a tokenizer and a text encoder of its own.

    Args:
        model: changed in place (its parts that others share are not).
        words: new word -> known words whose mean embedding is its first one.

    Returns:
        The new words' token ids.

    Raises:
        RunFailed: the tokenizer has a token of that name.
    """
    known_tokens = [model.tokenizer(word, add_special_tokens=False).input_ids for word in words.values()]
    model.tokenizer, model.text_encoder = copy.deepcopy(model.tokenizer), copy.deepcopy(model.text_encoder)
    for word in words:
        if model.tokenizer.add_tokens(word) != 1:
            raise RunFailed(f"the tokenizer has a token '{word}' already; choose another identifier")
    tokens: list[int] = model.tokenizer.convert_tokens_to_ids(list(words))
    size = max(len(model.tokenizer), model.text_encoder.config.vocab_size)
    with torch_seed(0):  # it fills new rows with random numbers, which the next lines replace
        model.text_encoder.resize_token_embeddings(size, mean_resizing=False)
    table = model.text_encoder.get_input_embeddings().weight.requires_grad_(False)
    for token, start in zip(tokens, known_tokens, strict=True):
        table[token] = table[start].mean(0)
    return tokens


@contextmanager
def with_embedding(model: DiffusionModel, token: int, vector: Tensor) -> Iterator[None]:
    """Inside, the token's embedding is this vector, through which gradients flow.

    The table has no gradient and no optimizer, so no other word can move (the script trains the table, and puts all other
    rows back after every step).
    """

    def replace(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == token).unsqueeze(-1), vector, output)

    handle = model.text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def trained_words(model: DiffusionModel, tokens: Sequence[int]) -> Iterator[list[torch.nn.Parameter]]:
    """Inside, the tokens' embeddings are the parameters given; afterwards the table has the parameters' values."""
    table = model.text_encoder.get_input_embeddings().weight
    vectors = [torch.nn.Parameter(table[token].detach().clone()) for token in tokens]
    with ExitStack() as stack:
        for token, vector in zip(tokens, vectors, strict=True):
            stack.enter_context(with_embedding(model, token, vector))
        yield vectors
    with torch.no_grad():
        for token, vector in zip(tokens, vectors, strict=True):
            table[token] = vector


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: TextualInversionConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Learn the word `<identifier>`, starting from the class noun, on a copy of the model.

    Returns:
        The model with the word, and the loss of every step.

    Raises:
        RunFailed: a loss is not finite; the tokenizer has such a word.
    """
    own = copy.copy(model)
    word, _ = prompt_words(data.identifier, data.class_noun)
    new = add_words(own, dict.fromkeys(word_parts(word, config.vectors), data.class_noun))
    pictures = encode(own, torch.cat([data.images, data.images.flip(-1)]))
    tokens = PromptBank(own).tokens([template.format(word) for template in INVERSION_TEMPLATES])
    timesteps = int(own.scheduler.config.num_train_timesteps)
    # The word is only a name here; without its letters in the seed every identifier would give the same run.
    stream = int.from_bytes(data.identifier.encode()[:7], "big")

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, stream, step)
        prompts = tokens[torch.randint(len(tokens), (config.batch_size,), generator=rng)]
        with outputs_stay():
            context = own.text_encoder(prompts).last_hidden_state
        rows = noise_samples(pictures.draw(config.batch_size, rng), context, rng, steps=timesteps)
        return row_losses(own.unet, own.scheduler, rows).mean()

    with trained_words(own, new) as vectors:
        losses = train(
            own,
            loss_at,
            vectors,
            steps=config.steps,
            learning_rate=config.learning_rate,
            max_grad_norm=None,
            on_step=on_step,
            weight_decay=config.weight_decay,
        )
    return own, losses


ATTACK = Attack(attack, TextualInversionConfig, "hf.co/papers/2208.01618", prompt_words, new_words=True)
