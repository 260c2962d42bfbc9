"""Writes registries/avatars.yaml, registries/demo.yaml and their pictures from the rendered set `registry`.

python make_registries.py DATA

Identities and views are taken in the order they were rendered, none is picked by its result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import world
from PIL import Image

import guardsmith

REGISTRIES = Path(guardsmith.__file__).parent.parent / "registries"
# id -> (style, number of the identity)
PROTECTED = {"mira": ("avataaars", 0), "otto": ("avataaars", 1), "lena": ("micah", 0), "ravi": ("personas", 0),
             "tock": ("bottts", 0), "pip": ("toonHead", 0)}  # fmt: skip
CONTROLS = {"nora": ("avataaars", 2), "hugo": ("avataaars", 3), "sven": ("micah", 1), "ines": ("personas", 1),
            "bolt": ("bottts", 1), "fay": ("toonHead", 1)}  # fmt: skip
DEMO = (["mira"], ["nora"])
KINDS = {"person": "person", "character": "character", "robot": "object"}
SPLITS = {"harden": 4, "attack": 4, "reference": 8}


def entry(
    name: str, lines: list[dict[str, object]], pixels: np.ndarray, first: int, splits: dict[str, int]
) -> list[str]:
    """Save one subject's pictures and return its YAML lines."""
    noun = str(lines[first]["class_noun"])
    text = [f"  - id: {name}", f"    kind: {KINDS[noun]}", f"    class_noun: {noun}"]
    text.append("    consent: {basis: invented, reference: recipes/avatar-base, granted_on: 2026-01-01}")
    text.append("    images:")
    view = first
    for split, count in splits.items():
        folder = REGISTRIES / "avatars" / name / split
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            file = folder / f"{number}.png"
            Image.fromarray(pixels[view]).save(file)
            view += 1
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            text.append(
                f"      - {{path: {file.relative_to(REGISTRIES).as_posix()}, sha256: {digest}, split: {split}}}"
            )
    return text


def main() -> None:
    """Write both registries."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    tensor, lines = world.load(args.data, "registry")
    pixels = tensor.permute(0, 2, 3, 1).numpy()
    first = {}
    for row, line in enumerate(lines):
        first.setdefault(line["identity"], row)
    shutil.rmtree(REGISTRIES / "avatars", ignore_errors=True)
    entries: dict[str, list[str]] = {}
    for name, (style, number) in PROTECTED.items():
        entries[name] = entry(name, lines, pixels, first[f"{style}-{number}"], SPLITS)
    for name, (style, number) in CONTROLS.items():
        without = {k: v for k, v in SPLITS.items() if k != "harden"}
        entries[name] = entry(name, lines, pixels, first[f"{style}-{number}"], without)
    for file, (protected, controls) in {
        "avatars.yaml": (list(PROTECTED), list(CONTROLS)),
        "demo.yaml": DEMO,
    }.items():
        text = [
            "# yaml-language-server: $schema=schema.json",
            "# Invented subjects, drawn by recipes/avatar-base (credits: docs/credits.md).",
        ]
        text += ["version: 1", "subjects: # protected", *(line for name in protected for line in entries[name])]
        text += [
            "controls: # never protected: must stay learnable",
            *(line for name in controls for line in entries[name]),
        ]
        (REGISTRIES / file).write_text("\n".join(text) + "\n")
    print(json.dumps({"protected": list(PROTECTED), "controls": list(CONTROLS)}))


if __name__ == "__main__":
    main()
