"""Registries of up to ten thousand rendered subjects, for `registry_size.py`.

A subject has seven pictures in the registry (three to harden on, two for the attacker, two for the judge) and one that nobody has
seen, which is uploaded to be screened. Identities are taken in the order they were rendered, style by style in turn; left out
are those of whom two pictures look nearly the same, or one nearly as somebody's before, because `guardsmith check` refuses them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from guardsmith.core.images import fingerprint, near_duplicates

SET, SIZE, VIEWS = "crowd", 64, 8
SPLITS = {"harden": 3, "attack": 2, "reference": 2}
CONTROLS = 30
STRANGERS = 50  # uploads of one picture of people who are in no registry
OTHERS = CONTROLS + STRANGERS
KINDS = {"person": "person", "character": "character", "robot": "object"}


class Person(NamedTuple):
    """An identity.

    Attributes:
        id: in registries.
        noun: class noun.
        first: row of the first of its views.
    """

    id: str
    noun: str
    first: int


class World(NamedTuple):
    """What was rendered.

    Attributes:
        pixels: uint8 (n, 64, 64, 3).
        people: who can be in one registry together.
        left_out: identities that look too much like themselves or like others.
    """

    pixels: Any
    people: list[Person]
    left_out: int


def load_world(data: Path, count: int) -> World:
    """The set `crowd` of render.mjs in DATA, as many people as a registry of `count` needs; the last ones are in no registry."""
    with (data / f"{SET}.jsonl").open() as file:
        lines = [(line["style"], line["identity"], line["class_noun"]) for line in map(json.loads, file)]
    pixels = np.memmap(data / f"{SET}.rgb", np.uint8, "r", shape=(len(lines), SIZE, SIZE, 3))
    styles = list(dict.fromkeys(style for style, _, _ in lines))
    everyone = [Person(lines[row][1].lower(), lines[row][2], row) for row in range(0, len(lines), VIEWS)]
    everyone.sort(key=lambda person: (int(person.id.rpartition("-")[2]), styles.index(lines[person.first][0])))
    spare = count // 50 + 20  # in the place of those that are left out
    everyone = everyone[: count + spare] + everyone[max(count + spare, len(everyone) - OTHERS - spare) :]
    prints = [fingerprint(Image.fromarray(pixels[person.first + view])) for person in everyone for view in range(VIEWS)]
    out = {later // VIEWS for _, later, _ in near_duplicates(prints)}
    return World(pixels, [person for number, person in enumerate(everyone) if number not in out], len(out))


def write_registry(world: World, folder: Path, count: int) -> Path:
    """The registry of the first `count` people, with the last ones as controls; pictures are shared between registries."""
    text = ["version: 1", "subjects:"]
    for person in world.people[:count]:
        text += _entry(world, folder, person, SPLITS)
    text.append("controls:")
    without = {split: number for split, number in SPLITS.items() if split != "harden"}
    for person in world.people[-OTHERS:-STRANGERS]:
        text += _entry(world, folder, person, without)
    file = folder / f"registry-{count}.yaml"
    file.write_text("\n".join(text) + "\n")
    return file


def write_uploads(world: World, folder: Path, people: Sequence[Person]) -> Path:
    """A folder with an upload for each person, of the picture that is in no registry."""
    for person in people:
        place = folder / person.id
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(world.pixels[person.first + VIEWS - 1]).save(place / "0.png")
    return folder


def _entry(world: World, folder: Path, person: Person, splits: dict[str, int]) -> list[str]:
    text = [
        f"  - id: {person.id}", f"    kind: {KINDS[person.noun]}", f"    class_noun: {person.noun}",
        "    consent: {basis: invented, reference: recipes/avatar-base, granted_on: 2026-01-01}", "    images:",
    ]  # fmt: skip
    view = person.first
    for split, number in splits.items():
        place = folder / "pictures" / person.id / split
        place.mkdir(parents=True, exist_ok=True)
        for name in range(number):
            file = place / f"{name}.png"
            if not file.exists():
                Image.fromarray(world.pixels[view]).save(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            text.append(f"      - {{path: {file.relative_to(folder).as_posix()}, sha256: {digest}, split: {split}}}")
            view += 1
    return text
