"""Levels of `guardsmith screen` in the embedded world, and how it does on avatars that they were not measured on.

python screening.py DATA --levels    writes guardsmith/builtin/judges/screening.json: strangers are every other picture of
                                     registries/bystanders.parquet, subjects the set `judge_test`
python screening.py DATA             writes docs/results/screening.json: protected are registries/avatars.yaml and the first
                                     identities of the set `testing`, strangers the other pictures and the set `tuning`

DATA is the folder that render.mjs filled (judge_test, testing, tuning). Of a protected subject the index has the pictures that
are not its attacker's. The attacker's four are one upload, as they are and after every transformation of `attacks.evasion` but
the adversarial noise, which is made against a model and not against the judge.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import world
from evaluate import RESULTS
from PIL import Image
from torch import Tensor

from guardsmith.attacks.evasion import EVASIONS, EvasionContext, transformed
from guardsmith.core.atomic_io import write_json
from guardsmith.core.images import open_pictures, to_tensor
from guardsmith.gate.statistics import share_interval
from guardsmith.registry.loader import load_registry
from guardsmith.screening.encoders import load_encoder
from guardsmith.screening.index import Index, every_variant
from guardsmith.screening.levels import FILE, best_scores, measured_levels, shipped_levels
from guardsmith.screening.pipeline import Screening, ScreeningSettings, decide
from guardsmith.screening.variants import LEVELS

REGISTRIES = Path(__file__).parents[2] / "registries"
UPLOAD = 4  # pictures of an upload
TESTED = 2  # identities of every style of the set `testing`
ENCODER = load_encoder("avatar")


def bystanders() -> Tensor:
    """The pictures of registries/bystanders.parquet, float32 (4000, 3, 64, 64)."""
    rows = pq.read_table(REGISTRIES / "bystanders.parquet")["image"].to_pylist()
    return to_tensor([Image.open(io.BytesIO(row["bytes"])) for row in rows])


def identities(data: Path, name: str) -> list[tuple[str, str, Tensor]]:
    """(style, class noun, pictures) of every identity of a set."""
    pixels, lines = world.load(data, name)
    rows: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        rows.setdefault(f"{line['style']} {line['identity']}", []).append(row)
    return [
        (lines[which[0]]["style"], lines[which[0]]["class_noun"], world.to_float(pixels[which]))
        for which in rows.values()
    ]


def mean_vector(pictures: Tensor) -> Tensor:
    """What the index has of a subject, (width,)."""
    return F.normalize(ENCODER.embed(pictures).mean(dim=0), dim=0)


def embedded(pictures: Tensor, undo: str) -> Tensor:
    """Unit vectors of all variants, (variants, n, width)."""
    return torch.cat([every_variant(ENCODER, part, LEVELS[undo]) for part in pictures.split(200)], dim=1)


def write_levels(data: Path) -> None:
    """See the module."""
    strangers, people = bystanders()[::2], identities(data, "judge_test")
    vectors = torch.stack([mean_vector(pictures) for _, _, pictures in people])
    nouns = [noun for _, noun, _ in people]
    everything = embedded(strangers, "usual")
    levels = {
        undo: measured_levels(everything[: len(names)], vectors, nouns) for undo, names in LEVELS.items()
    }  # the first variant is the picture as it is
    measured_on = (
        f"{len(strangers)} pictures of bystanders.parquet against {len(people)} subjects of the set judge_test"
    )
    write_json(FILE, {"measured_on": measured_on, "levels": levels})


def verdicts(screening: Screening, uploads: Sequence[Tensor]) -> dict[str, Any]:
    """Counts of the verdicts on uploads, and the share of each with its 95 % interval."""
    counts = dict.fromkeys(("clear", "undecided", "seen"), 0)
    for vectors in uploads:
        counts[decide(screening, vectors, [str(i) for i in range(vectors.shape[1])], [])["verdict"]] += 1
    found = {verdict: share_interval(count, len(uploads)) for verdict, count in counts.items()}
    shares = {verdict: [round(v, 4) for v in (each.mean, each.low, each.high)] for verdict, each in found.items()}
    return {"uploads": len(uploads), "counts": counts, "share_and_interval": shares}


def measure(data: Path) -> dict[str, Any]:
    """See the module."""
    registry = load_registry(REGISTRIES / "avatars.yaml")
    protected, attackers = [], []
    for subject in (*registry.subjects, *registry.controls):
        splits = ("harden", "reference")
        known = [image.path for split in splits for image in subject.images_of(split)]
        protected.append((subject.id, subject.class_noun, mean_vector(open_pictures(known, 64))))
        attackers.append(open_pictures([image.path for image in subject.images_of("attack")], 64)[:UPLOAD])
    taken: dict[str, int] = {}
    for style, noun, pictures in identities(data, "testing"):
        taken[style] = taken.get(style, 0) + 1
        if taken[style] <= TESTED:
            protected.append((f"{style}-{taken[style]}", noun, mean_vector(pictures[UPLOAD:])))
            attackers.append(pictures[:UPLOAD])
    index = Index(
        tuple(who for who, _, _ in protected), tuple(noun for _, noun, _ in protected),
        torch.stack([vector for _, _, vector in protected]), "measured",
    )  # fmt: skip
    others = bystanders()[1::4][:500]
    people = [pictures for _, _, pictures in identities(data, "tuning")]
    result: dict[str, Any] = {"protected": len(protected), "pictures_of_an_upload": UPLOAD, "undo": {}}
    for undo in LEVELS:
        screening = Screening(index, ENCODER, shipped_levels()[undo], ScreeningSettings(undo=undo))
        began = time.process_time()
        singles = embedded(others, undo)
        seconds = time.process_time() - began
        found: dict[str, Any] = {
            "rate": screening.settings.rate, "review_rate": screening.settings.review,
            "uploads_of_4_pictures_per_second_of_one_core": round(len(others) / UPLOAD / seconds, 1),
            "strangers_one_picture": verdicts(screening, list(singles.split(1, dim=1))),
            "strangers_four_pictures": verdicts(
                screening, [embedded(part, undo) for each in people for part in each.split(UPLOAD)[:2]]
            ),
            "recall": {},
        }  # fmt: skip
        own = torch.arange(len(attackers)).repeat_interleave(UPLOAD)
        for name in ("as they are", *(name for name in EVASIONS if name != "adversarial_noise")):
            context = EvasionContext(7, None, others[:UPLOAD])
            pictures = torch.cat(attackers)
            shown = pictures if name == "as they are" else transformed(pictures, [name], context)
            vectors = embedded(shown, undo)
            best, _ = best_scores(vectors, index.vectors)
            similarity = best[torch.arange(len(own)), own]
            found["recall"][name] = verdicts(screening, list(vectors.split(UPLOAD, dim=1))) | {
                "median_similarity": round(float(similarity.median()), 3)
            }
        result["undo"][undo] = found
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--levels", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.levels:
        write_levels(given.data)
    else:
        command = "python recipes/avatar-base/screening.py DATA"
        write_json(RESULTS / "screening.json", measure(given.data) | {"command": command})
