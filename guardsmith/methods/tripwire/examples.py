"""What a recogniser is trained on: variations of subjects' pictures and what evades recognition, against everyone else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guardsmith.diffusion.latents import encode
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.methods.transformations import transformed_at_random
from guardsmith.methods.tripwire.training import Examples
from guardsmith.methods.variations import variations
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator

if TYPE_CHECKING:
    from guardsmith.methods.tripwire.method import TripwireConfig

EARLY_COPIES = 3
"""Variations of every picture that the base draws while it learns a subject."""
EARLY_TRANSFORMED = 8
"""Transformed copies of every such picture."""


def positives_of(
    model: DiffusionModel,
    images: Tensor,
    early: Tensor | None,
    others: Tensor,
    config: TripwireConfig,
    seed: int,
    number: int,
) -> list[Tensor]:
    """What a recogniser is trained on of one subject, as latents: variations of pictures, and transformed ones.

    Args:
        model: the base.
        images: of the subject, float32 (n, 3, h, h) in [-1, 1].
        early: what the base draws while it learns the subject (`early_pictures`), likewise (m, 3, h, h).
        others: pictures of others, likewise.
        config: how many of each.
        seed: of these.
        number: of the subject.
    """
    rows = [encode(model, variations(images, config.copies, generator(seed, -1, number))).mean]
    if early is not None:
        rows.append(encode(model, variations(early, EARLY_COPIES, generator(seed, -8, number))).mean)
    if config.transformed:
        # Who trains on transformed pictures and stops early has half-learned transformed ones.
        evading: list[Tensor] = []
        for pictures, copies, stream in ((images, config.transformed, -5), (early, EARLY_TRANSFORMED, -9)):
            if pictures is not None:
                parts = transformed_at_random(pictures, copies, others, generator(seed, stream, number))
                evading += [encode(model, part).mean for part in parts]
        rows.append(torch.cat(evading))
    return rows


def examples_of(
    model: DiffusionModel,
    subjects: Sequence[SubjectData],
    benign: BenignData,
    early: Sequence[Tensor],
    config: TripwireConfig,
    seed: int,
) -> Examples:
    """What a recogniser is trained on.

    Args:
        model: the base.
        subjects: protected ones.
        benign: everyone and everything else, beside the subjects' class pictures.
        early: what the base draws of every subject while it learns it (`early_pictures`); may be empty.
        config: how many variations and transformed copies.
        seed: of these.
    """
    classes = {subject.class_noun: subject.class_images for subject in subjects}
    others = torch.cat([*classes.values(), benign.images, *([] if benign.negatives is None else [benign.negatives])])
    positives = [
        rows
        for number, subject in enumerate(subjects)
        for rows in positives_of(model, subject.images, early[number] if early else None, others, config, seed, number)
    ]
    negatives = [encode(model, others).mean]
    if config.transformed:
        rng = generator(seed, -6)
        some = others[torch.randperm(len(others), generator=rng)[: int(config.transformed_others * len(others))]]
        negatives += [encode(model, part).mean for part in transformed_at_random(some, 1, others, rng)]
    drawn = {subject.class_noun: subject.class_states for subject in subjects}.values()
    half_finished = [states.latents.flatten(0, 1) for states in (*drawn, benign.states) if states is not None]
    return Examples(positives, torch.cat(negatives), torch.cat(half_finished) if half_finished else None)
