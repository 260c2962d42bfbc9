"""Prompt fidelity in the embedded world: does a generated avatar show the traits in its prompt?

A classifier of true traits (class, style, background, hair colour, glasses), trained on renders by
`recipes/avatar-base/train_judges.py`. It judges only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from guardsmith.metrics.embedded import JUDGES
from guardsmith.metrics.identity import SIZE, convolutional_trunk

TRAITS: dict[str, tuple[str, ...]] = {
    "class": ("person", "character", "robot"),
    "style": ("avataaars", "micah", "personas", "toon", "bottts"),
    "background": ("blue", "purple", "pink", "orange", "green", "yellow", "gray", "white"),
    "hair": ("black", "brown", "blonde", "red", "pink", "white", "blue"),
    "glasses": ("no", "yes"),
}


class TraitClassifier(nn.Module):
    """Avatar picture -> one row of logits per trait."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = convolutional_trunk()
        self.hidden = nn.Linear(192 * 16, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in TRAITS.items()})

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, 64, 64) float in [-1, 1] -> (n, 128) features; also what KID is measured on."""
        return F.relu(self.hidden(self.trunk(images)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, 64, 64) float in [-1, 1] -> {trait: (n, values) logits}."""
        hidden = self.features(images)
        return {name: head(hidden) for name, head in self.heads.items()}


@cache
def load_classifier() -> TraitClassifier:
    """The embedded classifier, in eval mode, float32."""
    classifier = TraitClassifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(JUDGES / "traits.safetensors").items()})
    return classifier.eval().requires_grad_(False)


def _fit(images: Tensor) -> Tensor:
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    return images.float()


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """Features for KID: (n, 3, h, w) float in [-1, 1] -> (n, 128), each of length sqrt(128) so that the kernel is in [0, 8]."""
    hidden = torch.cat([load_classifier().features(_fit(chunk)) for chunk in images.split(256)])
    scaled: Tensor = F.normalize(hidden, dim=-1) * math.sqrt(hidden.shape[-1])
    return scaled


@torch.no_grad()
def read_traits(images: Tensor) -> list[dict[str, str]]:
    """The most likely value of every trait, one dict per picture."""
    logits: dict[str, list[Tensor]] = {name: [] for name in TRAITS}
    for chunk in images.split(256):
        for name, rows in load_classifier()(_fit(chunk)).items():
            logits[name].append(rows)
    best = {name: torch.cat(rows).argmax(dim=1).tolist() for name, rows in logits.items()}
    return [{name: TRAITS[name][best[name][i]] for name in TRAITS} for i in range(len(images))]


def fidelity(images: Tensor, traits: Sequence[Mapping[str, str]]) -> list[float | None]:
    """Share of the traits in its prompt that each picture shows, in [0, 1].

    Args:
        images: (n, 3, h, w) float in [-1, 1].
        traits: of the prompts, one mapping per picture, trait name -> value, e.g. `{"class": "person", "hair": "red"}`.

    Returns:
        One value per picture; `None` where the prompt has none or the picture is not finite.
    """
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    labels = read_traits(torch.nan_to_num(images))
    return [
        sum(have[k] == v for k, v in want.items()) / len(want) if ok and want else None
        for have, want, ok in zip(labels, traits, finite, strict=True)
    ]
