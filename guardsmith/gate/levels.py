"""Measuring what a judge's similarities mean, on pictures of people or objects that are neither protected nor controls.

    FOLDER/<class noun>/<identity>/<picture>     at least two identities of a class, better twenty, of two pictures or more

Genuine is the mean similarity of one half of an identity's pictures to the other half; chance is the same between two identities
of a class, and chance_high what 95 % of these pairs stay below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from guardsmith.config.judge import ClassLevels, JudgeSpec, MeasuredLevels
from guardsmith.core.console import warn
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures
from guardsmith.core.picture_folders import list_pictures, skipped_sentence, usable
from guardsmith.metrics import Judge, load_judge

if TYPE_CHECKING:
    from torch import Tensor


def class_levels(
    judge: Judge,
    names: Sequence[str],
    drawn_from: Sequence[Tensor],
    compared_with: Sequence[Tensor],
    noun: str,
    where: str,
) -> ClassLevels:
    """Levels of one class.

    Args:
        judge: loaded.
        names: of the identities, at least two, for messages.
        drawn_from: one half of everybody's pictures, float32 (n, 3, h, w) in [-1, 1] each.
        compared_with: the other half.
        noun: the class.
        where: the pictures are, for messages.

    Raises:
        UserError: there are fewer than two identities, a picture shows no face where the judge needs one, or the judge cannot
            tell the identities apart.
    """
    if len(names) < 2:
        raise UserError(f"{where}: class {noun} has one subject only; levels need two at least, better twenty.")
    scores = [[judge.similarity(mine, theirs) for theirs in compared_with] for mine in drawn_from]
    for i, name in enumerate(names):
        if judge.no_face is not None and (without_face := scores[i][i].count(judge.no_face)):
            raise UserError(
                f"{where}: no face is found in {without_face} of the attack pictures of {name}; leave them out."
            )
    means = [[_mean(each) for each in row] for row in scores]
    own = [means[i][i] for i in range(len(names))]
    pairs = [means[i][j] for i in range(len(names)) for j in range(len(names)) if i != j]
    chance, high, genuine = float(np.mean(pairs)), float(np.quantile(pairs, 0.95)), float(np.mean(own))
    # Two pairs of very different similarity can have a quantile below their mean's rounding.
    if high >= genuine:
        raise UserError(
            f"{where}: the judge cannot tell subjects of class {noun} apart (two different ones {high:.2f}, one and the same "
            f"{genuine:.2f}); choose another."
        )
    return ClassLevels(chance=min(chance, high), chance_high=high, genuine=genuine)


def _mean(scores: Sequence[float | None]) -> float:
    return float(np.mean([score for score in scores if score is not None]))


def identities(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Class noun -> identity -> pictures, from FOLDER/<class noun>/<identity>/; damaged pictures are left out with a warning.

    Raises:
        UserError: there are none, or an identity has fewer than two pictures.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; it has a folder for each class, and in it one for each identity")
    files: dict[str, dict[str, list[Path]]] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for person in sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")):
            inside, skipped = list_pictures(person)
            sentences = [skipped_sentence(person, skipped)] if skipped else []
            pictures = usable(inside, sentences)
            for sentence in sentences:
                warn(sentence)
            if len(pictures) < 2:
                raise UserError(f"{person} has {len(pictures)} usable pictures; every identity needs two at least")
            files.setdefault(place.name.replace("_", " "), {})[person.name] = pictures
    if not files:
        raise UserError(
            f"{folder} holds no identities; it needs a folder for each class (named as in prompts: person, dog), and in it one "
            "for each identity with its pictures"
        )
    return files


def measure_levels(
    files: Mapping[str, Mapping[str, Sequence[Path]]], judge: JudgeSpec, size: int, where: str
) -> MeasuredLevels:
    """Levels of a judge.

    Args:
        files: see `identities`.
        judge: whose.
        size: pictures are opened at, in pixels.
        where: they are, for messages.

    Raises:
        UserError: see `class_levels`.
    """
    loaded_judge, classes, measured_on = load_judge(judge.name, judge.model), {}, []
    for noun, people in files.items():
        halves = [
            [open_pictures(list(files[start::2]), loaded_judge.size or size) for files in people.values()]
            for start in (0, 1)
        ]
        classes[noun] = class_levels(loaded_judge, list(people), halves[0], halves[1], noun, where)
        measured_on.append(f"{len(people)} identities of class {noun} ({sum(map(len, people.values()))} pictures)")
    return MeasuredLevels(
        judge=judge.name,
        model=judge.model,
        dated=datetime.now(UTC).date(),
        measured_on=", ".join(measured_on),
        classes=classes,
    )


def levels_as_yaml(levels: MeasuredLevels) -> str:
    """The file that `load_levels` reads."""
    return yaml.safe_dump(levels.model_dump(mode="json") | {"dated": levels.dated}, sort_keys=False, width=120)
