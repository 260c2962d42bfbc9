"""Screen uploads against a registry: embed, compare, decide; a report that a platform can keep.

An upload is `seen` if a picture reaches the threshold of a protected subject, `undecided` if one reaches the lower level for
review, or if it could not be looked at as a whole, and `clear` otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardsmith import __version__
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.images import open_image, square, to_tensor
from guardsmith.core.progress import stage
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.registry.loader import Registry
from guardsmith.screening.encoders import Encoder
from guardsmith.screening.index import Index, every_variant
from guardsmith.screening.levels import Tables, Threshold, best_scores, table_of, threshold
from guardsmith.screening.uploads import Upload, drawn_pictures, read_upload, trigger_words, uploaded_model
from guardsmith.screening.variants import LEVELS

EXIT_CODES = {"clear": 0, "seen": 1, "undecided": 3}
AT_ONCE = 64  # pictures that are embedded together
MOST_SHOWN = 5  # subjects named for an upload


@dataclass(frozen=True)
class ScreeningSettings:
    """How uploads are screened.

    Attributes:
        rate: stated false-alarm rate for each upload.
        review: the same for a review by a person; larger.
        undo: which transformations are undone, a key of `variants.LEVELS`.
        triggers: words that adapters and checkpoints are asked for; without any, those that the adapter names.
        pictures: drawn for each word and class noun.
        sampling: arguments of `generate`.
    """

    rate: float = 0.001
    review: float = 0.01
    undo: str = "usual"
    triggers: tuple[str, ...] = ()
    pictures: int = 8
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Screening:
    """Everything that is the same for all uploads of a run.

    Attributes:
        index: of the registry.
        encoder: of the judge.
        tables: levels for what is undone, by class noun.
        settings: see there.
        base: the model that adapters are loaded onto; `None` where only pictures are screened.
    """

    index: Index
    encoder: Encoder
    tables: Tables
    settings: ScreeningSettings
    base: DiffusionModel | None = None


def check_settings(settings: ScreeningSettings) -> None:
    """Refuse settings that mean nothing.

    Raises:
        UserError: a rate is out of range, or what is undone is unknown.
    """
    if not 0 < settings.rate <= settings.review < 1:
        raise UserError("the false-alarm rate has to be above 0 and at most the review rate, which is below 1")
    if settings.undo not in LEVELS:
        raise UserError(f"--undo {settings.undo}: choose {', '.join(LEVELS)}")


def thresholds(screening: Screening, pictures: int, rate: float) -> list[Threshold]:
    """The threshold of every subject for an upload of so many pictures."""
    nouns = screening.index.nouns
    comparisons = max(1, pictures) * len(nouns)
    of_class = {noun: threshold(table_of(screening.tables, noun), rate, comparisons) for noun in dict.fromkeys(nouns)}
    return [of_class[noun] for noun in nouns]


def decide(screening: Screening, embeddings: Tensor, names: Sequence[str], reasons: Sequence[str]) -> dict[str, Any]:
    """The verdict on one upload.

    Args:
        screening: what it is compared with.
        embeddings: unit vectors of every variant of its pictures, (variants, n, width).
        names: of the pictures.
        reasons: why it could not be looked at as a whole; none if it could.

    Returns:
        verdict, subjects (those that reached the level for review, most similar first), reasons, the stated rates.
    """
    settings, index = screening.settings, screening.index
    alarm, review = (thresholds(screening, len(names), rate) for rate in (settings.rate, settings.review))
    matches: list[dict[str, Any]] = []
    if names:
        best, which = best_scores(embeddings, index.vectors)
        top = best.max(dim=0)
        similarities, pictures = top.values.tolist(), top.indices.tolist()
        for i, subject in enumerate(index.subjects):
            similarity, picture = similarities[i], pictures[i]
            if similarity >= review[i].level:
                variant = LEVELS[settings.undo][int(which[picture, i])]
                matches.append(
                    {
                        "subject": subject,
                        "similarity": round(similarity, 4),
                        "threshold": round(alarm[i].level, 4),
                        "review_level": round(review[i].level, 4),
                        "seen": similarity >= alarm[i].level,
                        "picture": names[picture],
                        "variant": variant,
                    }
                )
    matches.sort(key=lambda match: (-match["seen"], -match["similarity"]))
    is_seen = any(match["seen"] for match in matches)
    verdict = "seen" if is_seen else "undecided" if matches or reasons else "clear"
    return {
        "verdict": verdict,
        "subjects": matches[:MOST_SHOWN],
        "pictures": len(names),
        "reasons": list(reasons),
        "false_alarm_rate": max(each.rate for each in alarm),
        "review_rate": max(each.rate for each in review),
    }


def _open(upload: Upload, size: int) -> tuple[list[Tensor], list[str], list[str]]:
    """Pictures, their names, and why others could not be read."""
    images, names, reasons = [], [], []
    for file in upload.files:
        try:
            images.append(to_tensor(square(open_image(file), size)))
            names.append(str(file))
        except UserError as error:
            reasons.append(str(error))
    return images, names, reasons


def _drawn(screening: Screening, upload: Upload) -> tuple[list[Tensor], list[str], list[str]]:
    """What an adapter or checkpoint draws for its trigger words, and why that may not be all."""
    settings, reasons = screening.settings, []
    if screening.base is None:
        raise UserError("adapters and checkpoints need a base: name it with --base")
    triggers = list(settings.triggers) or trigger_words(upload.files[0])
    if not triggers:
        reasons.append("no trigger words are known: name them with --trigger; only the class nouns were asked for")
    model = uploaded_model(upload, screening.base)
    nouns = list(dict.fromkeys(screening.index.nouns))
    images = drawn_pictures(model, triggers, nouns, settings.pictures, settings.sampling)
    sound = [bool(torch.isfinite(image).all()) for image in images]
    if not all(sound):
        reasons.append(f"{sound.count(False)} of {len(sound)} drawn pictures are not finite")
    usable = [image for image, ok in zip(images, sound, strict=True) if ok]
    return usable, [f"drawn {number}" for number, ok in enumerate(sound) if ok], reasons


def _embedded(screening: Screening, images: Sequence[Tensor]) -> Tensor:
    names = LEVELS[screening.settings.undo]
    if not images:
        return torch.empty(len(names), 0, screening.index.vectors.shape[1])
    parts = [
        every_variant(screening.encoder, torch.stack(list(images[start : start + AT_ONCE])), names)
        for start in range(0, len(images), AT_ONCE)
    ]
    return torch.cat(parts, dim=1)


def screen_upload(screening: Screening, paths: Sequence[Path]) -> dict[str, Any]:
    """The record of one upload: name, kind and what `decide` gives.

    Raises:
        UserError: there is nothing that can be screened.
        RunFailed: a model cannot be loaded or draws nothing.
    """
    upload = read_upload(paths)
    size = screening.encoder.size
    images, names, reasons = _open(upload, size) if upload.kind == "pictures" else _drawn(screening, upload)
    record = decide(screening, _embedded(screening, images), names, reasons)
    return {"upload": upload.name, "kind": upload.kind, **record}


def screen_batch(screening: Screening, entries: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of many uploads, in order; one that cannot be looked at is undecided and says why."""
    records = []
    with stage("uploads", len(entries)) as bar:
        for entry in entries:
            try:
                records.append(screen_upload(screening, [entry]))
            except (UserError, RunFailed) as error:
                records.append(
                    {"upload": str(entry), "kind": None, "verdict": "undecided", "subjects": [], "pictures": 0,
                     "reasons": [str(error)], "false_alarm_rate": None, "review_rate": None}
                )  # fmt: skip
            bar()
    return records


def screening_report(
    screening: Screening, registry: Registry, records: Sequence[dict[str, Any]], began: float
) -> dict[str, Any]:
    """What is printed as JSON: the records, counts, settings, and the command's exit code.

    Args:
        screening: what was used.
        registry: whose subjects were looked for.
        records: of all uploads.
        began: `time.perf_counter()` when they were started.
    """
    counts = {verdict: sum(record["verdict"] == verdict for record in records) for verdict in EXIT_CODES}
    worst = "seen" if counts["seen"] else "undecided" if counts["undecided"] else "clear"
    settings = screening.settings
    return {
        "schema": 1,
        "guardsmith": __version__,
        "registry_digest": registry.digest,
        "index_digest": screening.index.digest,
        "protected": len(screening.index.subjects),
        "judge": screening.encoder.name,
        "false_alarm_rate": settings.rate,
        "review_rate": settings.review,
        "undo": settings.undo,
        "uploads": list(records),
        "counts": counts,
        "seconds": round(time.perf_counter() - began, 3),
        "verdict": worst,
        "exit_code": EXIT_CODES[worst],
    }
