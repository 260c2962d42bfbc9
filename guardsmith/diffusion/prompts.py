"""The prompt bank: identifiers x templates x class nouns -> token ids and embeddings, encoded once.

Training, attack and sampling prompts come from here, so that a train/sample mismatch (spaces turned to underscores, quotes
left in; see docs/explanation/methods.md on APDM's run script) cannot happen unnoticed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.families import SD, packed_contexts, token_ids

INSTANCE_TEMPLATE = "a photo of {identifier} {class_noun}"
CLASS_TEMPLATE = "a photo of {class_noun}"

# Rare words people use as identifiers. Hardening draws from the first list; verification also from the second.
HARDENING_IDENTIFIERS = ("sks", "ohwx", "hta", "nulo", "pqv")
UNSEEN_IDENTIFIERS = ("zwx", "t@t", "xjy", "bhj", "olis")

# What people ask a personalized model for afterwards (the words of textual inversion's and DreamBooth's templates).
SAMPLE_TEMPLATES = (
    "a photo of {identifier} {class_noun}",
    "a portrait of {identifier} {class_noun}",
    "a picture of {identifier} {class_noun}",
    "a close-up of {identifier} {class_noun}",
)

# What is put around a word that textual inversion learns; all of it neutral, so that the word has to carry the subject.
INVERSION_TEMPLATES = (
    "a photo of {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of {}",
    "a picture of one {}",
    "a close-up of {}",
    "a portrait of {}",
    "a cropped photo of {}",
    "a clean photo of {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a good photo of a {}",
    "an image of {}",
    "a drawing of {}",
)


def instance_prompt(identifier: str, class_noun: str, template: str = INSTANCE_TEMPLATE) -> str:
    """The identifier prompt, e.g. "a photo of sks person" (or "a photo of sks", where the class noun is empty)."""
    return template.format(identifier=identifier, class_noun=class_noun).rstrip()


def class_prompt(class_noun: str, template: str = CLASS_TEMPLATE) -> str:
    """The class prompt, e.g. "a photo of person"."""
    return template.format(class_noun=class_noun)


def sample_prompts(identifier: str, class_noun: str, count: int) -> list[str]:
    """`count` prompts for a personalized model, the sample templates in turn."""
    return [instance_prompt(identifier, class_noun, SAMPLE_TEMPLATES[i % len(SAMPLE_TEMPLATES)]) for i in range(count)]


def _spelt_out(prompt: str, tokenizer: Any) -> str:
    vocabulary = tokenizer.get_added_vocab()
    for word in [word for word in vocabulary if f"{word}_1" in vocabulary and word in prompt]:
        parts, number = [word], 1
        while f"{word}_{number}" in vocabulary:
            parts.append(f"{word}_{number}")
            number += 1
        prompt = prompt.replace(word, " ".join(parts))
    return prompt


class PromptBank:
    """Embeddings of prompts under one frozen text encoder, each computed once.

    Args:
        model: gives the tokenizer and the text encoder (which must not be training).
    """

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self._known: dict[str, Tensor] = {}

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, int64 (n, model_max_length): padded to the full length, truncated, no attention mask.

        A trained word with several vectors ("<sks>" with "<sks>_1" ...) is spelt out, as diffusers' pipelines do.
        """
        tokenizer = self.model.tokenizer
        return token_ids(tokenizer, [_spelt_out(prompt, tokenizer) for prompt in prompts])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Contexts, float32 (n, tokens, width): the text encoder's last hidden state, or `families.packed_contexts`."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if new:
            if self.model.family is SD:
                states = self.model.text_encoder(self.tokens(new)).last_hidden_state
            else:
                states = packed_contexts(self.model, new)
            self._known.update(zip(new, states, strict=True))
        return torch.stack([self._known[p] for p in prompts])


def lost_words(model: DiffusionModel, words: Iterable[str]) -> list[str]:
    """The words that this model's tokenizer turns into nothing (an identifier that would never reach the model)."""
    tokenizer = model.tokenizer
    return [w for w in words if not [t for t in tokenizer(w).input_ids if t not in tokenizer.all_special_ids]]


@dataclass(frozen=True)
class BenignPrompt:
    """A prompt of everyday use, without an identifier.

    Attributes:
        text: the prompt.
        traits: what it asks for, trait -> value (class, style, background, hair, glasses); empty where they cannot be checked.
    """

    text: str
    traits: dict[str, str]


# Where `{}` is the thing drawn. Verification uses words that the hardening's own prompts do not.
HARDENING_TEMPLATES = ("a photo of a {}", "a drawing of a {}", "an image of a {}")
VERIFICATION_TEMPLATES = ("a picture of a {}", "a portrait of a {}", "a good photo of a {}")

_AVATARS = {
    "person": ("avataaars", "micah", "personas"),
    "character": ("toon",),
    "robot": ("bottts",),
}
_HAIR = ("black", "brown", "blonde", "red", "pink", "white", "blue")
_SKIN = ("pale", "tan", "brown", "dark")
_BACKGROUNDS = ("blue", "purple", "pink", "orange", "green", "yellow", "gray", "white")
_ROBOT_COLOURS = ("yellow", "blue", "gray", "brown", "green", "purple", "red", "orange")
_SCENES = (
    "",
    " on a table",
    " in the snow",
    " on the beach",
    " at night",
    " in a garden",
    ", oil painting",
    ", studio light",
)
_THINGS = (
    "cat",
    "dog",
    "house",
    "car",
    "tree",
    "bowl of fruit",
    "woman",
    "man",
    "child",
    "bicycle",
    "street",
    "mountain",
)


def benign_prompts(model: DiffusionModel, templates: Sequence[str], count: int, seed: int) -> list[BenignPrompt]:
    """`count` prompts of everyday use, the same for the same arguments.

    For the embedded base they describe avatars, with the traits they ask for (class, style, background, hair, glasses),
    so that prompt fidelity can be read; for any other base they name common things in common scenes.
    """
    rng = random.Random(f"{seed}/{'/'.join(templates)}")
    prompts = []
    for _ in range(count):
        template = rng.choice(list(templates))
        if model.source.startswith("builtin:"):
            traits = {"class": rng.choice(list(_AVATARS)), "background": rng.choice(_BACKGROUNDS)}
            traits["style"] = rng.choice(_AVATARS[traits["class"]])
            if traits["class"] == "robot":
                words = template.format(f"{rng.choice(_ROBOT_COLOURS)} robot")
            else:
                traits["hair"] = rng.choice(_HAIR)
                words = template.format(f"{rng.choice(_SKIN)} {traits['class']}") + f" with {traits['hair']} hair"
                if traits["class"] == "person":  # the toon characters never wear any
                    traits["glasses"] = rng.choice(("yes", "no"))
                    words += " wearing glasses" if traits["glasses"] == "yes" else " without glasses"
            words += f" on a {traits['background']} background in {traits['style']} style"
            prompts.append(BenignPrompt(words, traits))
        else:
            prompts.append(BenignPrompt(template.format(rng.choice(_THINGS)) + rng.choice(_SCENES), {}))
    return prompts
