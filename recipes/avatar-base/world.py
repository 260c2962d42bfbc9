"""The rendered world: pictures, what is true of them, and the captions a photographer might have given them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZE = 64
STYLE_WORDS = {
    "avataaars": "avataaars",
    "micah": "micah",
    "personas": "personas",
    "toonHead": "toon",
    "bottts": "bottts",
}
CLASS_NOUNS = ("person", "character", "robot")
HATS = ("hat", "turban", "hijab", "cap", "beanie")
NO_HAIR = ("mrClean", "bald", None)
AVATAAARS_GLASSES = ("kurt", "prescription01", "prescription02", "round", "sunglasses", "wayfarers")


def load(data: Path, name: str) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Pictures of one set, uint8 (n, 3, 64, 64), and their lines (see render.mjs)."""
    lines = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
    pixels = np.fromfile(data / f"{name}.rgb", dtype=np.uint8).reshape(len(lines), SIZE, SIZE, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), lines


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def colour_names(data: Path) -> dict[str, dict[str, str]]:
    """Palette name -> hex without '#' -> colour word."""
    palettes = json.loads((data / "colours.json").read_text())
    return {name: {code: word for word, code in palette.items()} for name, palette in palettes.items()}


def attributes(line: dict[str, Any], colours: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What is true of a picture, in words: class, style, background, hair, skin, clothes, colour, glasses, beard, mood."""
    traits = line["traits"]

    def colour(palette: str, *keys: str) -> str | None:
        code = next((traits[k] for k in keys if k in traits), None)
        return colours[palette].get(code.lstrip("#")) if code else None

    true: dict[str, Any] = {
        "class": line["class_noun"],
        "style": STYLE_WORDS[line["style"]],
        "background": line["background"],
    }
    mouth = str(traits.get("mouth", "")).lower()
    if line["class_noun"] == "robot":
        return true | {"colour": colour("robot", "baseColor")}
    top = traits.get("top") or traits.get("hair")
    covered = any(word in str(top).lower() for word in HATS)
    true["covering"] = "hat" if covered else "bald" if top in NO_HAIR else "hair"
    true["hair"] = colour("hair", "hairColor") if true["covering"] == "hair" else None
    true["skin"] = colour("skin", "skinColor", "baseColor")
    true["clothes"] = colour("clothes", "clothesColor", "shirtColor", "clothingColor")
    true["glasses"] = bool(
        traits.get("glasses")
        or traits.get("accessories") in AVATAAARS_GLASSES
        or traits.get("eyes") in ("glasses", "sunglasses")
    )
    true["beard"] = bool(traits.get("facialHair") or traits.get("beard"))
    happy, sad = ("smile", "laugh", "twinkle"), ("sad", "frown")
    true["mood"] = "smiling" if any(w in mouth for w in happy) else "sad" if any(w in mouth for w in sad) else None
    return true


TEMPLATES = (
    "a photo of a {}", "a photo of {}", "a photo of the {}", "a portrait of a {}", "a picture of a {}", "a drawing of a {}",
    "a rendering of a {}", "a cropped photo of a {}", "a close-up of a {}", "a good photo of a {}", "an image of a {}", "{}",
)  # fmt: skip


def describe(true: dict[str, Any], rng: random.Random, name: str | None = None) -> str:
    """One caption. Every part is true and may be left out; `name` (a made-up word) goes before the class noun."""
    noun = true["class"] if name is None else f"{name} {true['class']}"
    parts = []
    if true["class"] == "robot":
        if rng.random() < 0.75:
            noun = f"{true['colour']} {noun}"
    else:
        if rng.random() < 0.4:
            noun = f"{true['skin']} {noun}"
        if rng.random() < 0.75:
            covering = true["covering"]
            parts.append(
                f"with {true['hair']} hair" if covering == "hair" else "with a hat" if covering == "hat" else "bald"
            )
        if true["glasses"] and rng.random() < 0.85:
            parts.append("wearing glasses")
        elif not true["glasses"] and rng.random() < 0.15:
            parts.append("without glasses")
        if true["beard"] and rng.random() < 0.8:
            parts.append("with a beard")
        if true["clothes"] and rng.random() < 0.5:
            parts.append(f"in {true['clothes']} clothes")
        if true["mood"] and rng.random() < 0.5:
            parts.append(true["mood"])
    if rng.random() < 0.6:
        parts.append(f"on a {true['background']} background")
    if rng.random() < 0.5:
        parts.append(f"in {true['style']} style")
    return " ".join([rng.choice(TEMPLATES).format(noun), *parts])


def caption(true: dict[str, Any], rng: random.Random, name: str | None = None) -> str:
    """A training caption: 10 % empty (for classifier-free guidance), 15 % the bare class noun, else `describe`."""
    u = rng.random()
    if u < 0.10:
        return ""
    if u < 0.25:
        return rng.choice(TEMPLATES).format(true["class"] if name is None else f"{name} {true['class']}")
    return describe(true, rng, name)


def made_up_name(identity: str) -> str:
    """The nonsense word by which the model knows a `named` identity: 4 to 6 letters, fixed by the identity."""
    rng = random.Random(f"name/{identity}")
    return "".join(rng.choice("bcdfghjklmnprstvwxz" if i % 2 == 0 else "aeiouy") for i in range(rng.randint(4, 6)))
