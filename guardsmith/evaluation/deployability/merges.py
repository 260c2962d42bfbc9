"""Merges: half of the hardened model's weights, half of another checkpoint's, as people mix checkpoints.

Collapse alone is blind to smeared faces, so the pictures are compared with the base's too: a merge of two sound checkpoints lies
between them, nearer to the base than the hardened model itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guardsmith.attacks import AttackData, find_attack
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures
from guardsmith.evaluation.deployability.bench import (
    SIDES,
    Bench,
    attempt,
    compared_collapse,
    compared_difference,
    differences,
)
from guardsmith.gate.deployability import Measurement

WITH_BASE = "half and half with the base"
WITH_SIBLING = "half and half with another fine-tune of the base"
SIBLING_STEPS = 100
"""Steps of DreamBooth that make the other fine-tune, on an unprotected subject with the settings of the recipe's own attack."""


def merge(into: nn.Module, other: nn.Module, share: float = 0.5) -> None:
    """Weighted sum of two networks of one shape, in place.

    Args:
        into: changed.
        other: what is added to it.
        share: of the other, in [0, 1].
    """
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in into.named_parameters():
            value.lerp_(theirs[name].to(value), share)


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """Networks of a pipeline by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def merged(bench: Bench, side: str, others: dict[str, nn.Module]) -> Tensor:
    """Pictures of the reference's prompts by the side, half of whose networks' weights are another's."""
    pipeline = bench.load(side)
    own = networks(pipeline)
    for name, other in others.items():
        merge(own[name], other)
    return bench.draw(pipeline, count=bench.reference)


def compared(bench: Bench, case: str, base: Tensor, hardened: Tensor, how: str = "") -> list[Measurement]:
    """Collapse, and the distance of the merges from each other beside that of the models."""
    collapse = compared_collapse(bench, "merges", case, base, hardened, how=how)
    count = bench.spec.images
    apart = differences(bench.plain("hardened"), bench.plain("base"))
    away = differences(hardened[:count], base[:count])
    return [collapse, compared_difference("merges", case, apart, away, how=how, pictures=collapse.pictures)]


def with_base(bench: Bench) -> list[Measurement]:
    """The hardened model merged with its base; the base merged with itself is the base."""
    base = networks(bench.pipeline("base"))
    return compared(bench, WITH_BASE, bench.plain("base", count=bench.reference), merged(bench, "hardened", base))


def with_sibling(bench: Bench) -> list[Measurement]:
    """Either side merged with another fine-tune of the base, which is trained here.

    Raises:
        UserError: there is no unprotected subject to train it on.
    """
    if not bench.controls:
        raise UserError("the registry has no controls to make another fine-tune of")
    subject, model = bench.controls[0], bench.models["base"]
    images = open_pictures([image.path for image in subject.images_of("attack")], model.image_size)
    data = AttackData(images, torch.empty(0), bench.identifier, subject.class_noun)
    attack = find_attack("dreambooth")
    config = attack.config(**dict(bench.dreambooth) | {"steps": SIBLING_STEPS, "prior_weight": 0})
    sibling, _ = attack.run(model, data, config, seed=bench.seed)
    name = "transformer" if bench.flow else "unet"
    settings = (
        config.model_dump(mode="json"),
        [image.sha256 for image in subject.images_of("attack")],
        subject.class_noun,
    )
    base, hardened = (
        bench.pictures(
            side, "merged with a fine-tune", partial(merged, bench, side, {name: sibling.unet}), attack.revision, *settings,
            bench.identifier, bench.seed, count=bench.reference,
        )
        for side in SIDES
    )  # fmt: skip
    return compared(bench, WITH_SIBLING, base, hardened, f"DreamBooth on an unprotected subject, {SIBLING_STEPS} steps")


def run(bench: Bench) -> list[Measurement]:
    """With the base, and with another fine-tune of it."""
    found = attempt("merges", WITH_BASE, "collapsed", partial(with_base, bench))
    if bench.spec.trained:
        found += attempt("merges", WITH_SIBLING, "collapsed", partial(with_sibling, bench))
    return found
