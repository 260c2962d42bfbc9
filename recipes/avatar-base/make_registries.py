"""Writes registries/avatars.yaml, registries/demo.yaml and their pictures from the rendered set `registry`.

python make_registries.py DATA
python make_registries.py DATA --bystanders 300       registries/bystanders.parquet: the first so many of every style of the
                                                      set `corpus`, which the base was trained on; no subject is among them
python make_registries.py DATA --set testing --protected 20 --controls 10 --folder FOLDER    for experiments, anywhere else

Identities and views are taken in the order they were rendered, style by style; none is picked by its result. The controls of
experiments are taken from the end, so that they are the same ones for any number of protected subjects.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import world
from PIL import Image

import guardsmith
from guardsmith.core.images import fingerprint, near_duplicates

REGISTRIES = Path(guardsmith.__file__).parent.parent / "registries"
STYLES = ("avataaars", "micah", "personas", "bottts", "toonHead")
People = dict[str, tuple[str, int]]  # id -> style, number of the identity
PROTECTED: People = {"mira": ("avataaars", 0), "otto": ("avataaars", 1), "lena": ("micah", 0), "ravi": ("personas", 0),
             "tock": ("bottts", 0), "pip": ("toonHead", 0)}  # fmt: skip
CONTROLS: People = {"nora": ("avataaars", 2), "hugo": ("avataaars", 3), "sven": ("micah", 1), "ines": ("personas", 1),
            "bolt": ("bottts", 1), "fay": ("toonHead", 1)}  # fmt: skip
DEMO = (["mira"], ["nora"])
KINDS = {"person": "person", "character": "character", "robot": "object"}
SPLITS = {"harden": 4, "attack": 4, "reference": 8}
VIEWS = 16  # of every subject


def deal(looks: list[np.ndarray], splits: dict[str, int]) -> dict[str, list[int]]:
    """Numbers of the views of each split: the next ones in turn, without those that show nearly the same as another split's."""
    same = {pair for i, j, _ in near_duplicates(looks) for pair in ((i, j), (j, i))}
    dealt: dict[str, list[int]] = {}
    left = list(range(len(looks)))
    for split, count in splits.items():
        taken = {view for views in dealt.values() for view in views}
        fresh = [view for view in left if not any((view, other) in same for other in taken)]
        dealt[split] = fresh[:count]
        left = [view for view in left if view not in dealt[split]]
    return dealt


def entry(
    folder: Path, name: str, lines: list[dict[str, object]], pixels: np.ndarray, first: int, splits: dict[str, int]
) -> list[str]:
    """Save one subject's pictures and return its YAML lines."""
    noun = str(lines[first]["class_noun"])
    text = [f"  - id: {name}", f"    kind: {KINDS[noun]}", f"    class_noun: {noun}"]
    text.append("    consent: {basis: invented, reference: recipes/avatar-base, granted_on: 2026-01-01}")
    text.append("    images:")
    views = [Image.fromarray(pixels[first + number]) for number in range(VIEWS)]
    for split, dealt in deal([fingerprint(view) for view in views], splits).items():
        place = folder / "avatars" / name / split
        place.mkdir(parents=True, exist_ok=True)
        for number, view in enumerate(dealt):
            file = place / f"{number}.png"
            views[view].save(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            text.append(f"      - {{path: {file.relative_to(folder).as_posix()}, sha256: {digest}, split: {split}}}")
    return text


def write(
    folder: Path, lines: list[dict[str, object]], pixels: np.ndarray, protected: People, controls: People,
    files: dict[str, tuple[list[str], list[str]]],
) -> None:  # fmt: skip
    """Save the pictures of everyone, and registries (file name -> ids of the protected ones and of the controls)."""
    first: dict[object, int] = {}
    for row, line in enumerate(lines):
        first.setdefault(line["identity"], row)
    shutil.rmtree(folder / "avatars", ignore_errors=True)
    entries: dict[str, list[str]] = {}
    for name, (style, number) in protected.items():
        entries[name] = entry(folder, name, lines, pixels, first[f"{style}-{number}"], SPLITS)
    without = {k: v for k, v in SPLITS.items() if k != "harden"}
    for name, (style, number) in controls.items():
        entries[name] = entry(folder, name, lines, pixels, first[f"{style}-{number}"], without)
    for file, (named, spared) in files.items():
        text = ["# Invented subjects, drawn by recipes/avatar-base (credits: docs/credits.md)."]
        if folder == REGISTRIES:
            text.insert(0, "# yaml-language-server: $schema=schema.json")
        text += ["version: 1", "subjects: # protected", *(line for name in named for line in entries[name])]
        text += [
            "controls: # never protected: must stay learnable",
            *(line for name in spared for line in entries[name]),
        ]
        (folder / file).write_text("\n".join(text) + "\n")


def write_bystanders(data: Path, count: int) -> None:
    """A table of pictures, one column `image`."""
    tensor, lines = world.load(data, "corpus")
    pixels = tensor.permute(0, 2, 3, 1).numpy()
    files = []
    for style in STYLES:
        for row in [row for row, line in enumerate(lines) if line["style"] == style][:count]:
            file = io.BytesIO()
            Image.fromarray(pixels[row]).save(file, "WEBP", lossless=True, quality=100, method=6)
            files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": files}, features=features).to_parquet(REGISTRIES / "bystanders.parquet")


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--bystanders", type=int, help="write these instead")
    parser.add_argument("--set", default="registry", help="rendered set")
    parser.add_argument("--protected", type=int, default=5)
    parser.add_argument("--controls", type=int, default=5)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=STYLES, help="of the protected subjects")
    parser.add_argument("--folder", type=Path, help="of an experiment")
    args = parser.parse_args()
    if args.bystanders is not None:
        write_bystanders(args.data, args.bystanders)
        return
    tensor, lines = world.load(args.data, args.set)
    pixels = tensor.permute(0, 2, 3, 1).numpy()
    protected, controls, folder = PROTECTED, CONTROLS, REGISTRIES
    files = {"avatars.yaml": (list(PROTECTED), list(CONTROLS)), "demo.yaml": DEMO}
    if args.folder is not None:
        people = dict.fromkeys((line["style"], int(line["identity"].rpartition("-")[2])) for line in lines)
        in_turn = sorted(people, key=lambda person: (person[1], STYLES.index(person[0])))
        wanted = [person for person in in_turn if person[0] in args.styles][: args.protected]
        protected = {f"{style.lower()}-{number}": (style, number) for style, number in wanted}
        controls = {
            f"{style.lower()}-{number}": (style, number) for style, number in in_turn[len(in_turn) - args.controls :]
        }
        if protected.keys() & controls.keys():
            parser.error(f"{args.set} has {len(in_turn)} subjects, fewer than are asked for")
        folder, files = args.folder.resolve(), {"registry.yaml": (list(protected), list(controls))}
    write(folder, lines, pixels, protected, controls, files)
    print(json.dumps({"protected": list(protected), "controls": list(controls)}))


if __name__ == "__main__":
    main()
