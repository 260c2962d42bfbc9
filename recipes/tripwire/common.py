"""What the experiments here share: subjects of rendered sets, strangers, prompts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "avatar-base"))
import world

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SPLITS = {"harden": slice(0, 4), "attack": slice(4, 8), "reference": slice(8, 16)}


def pixels(file: Any) -> Tensor:
    picture = np.asarray(Image.open(file).convert("RGB").resize((64, 64))).copy()
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1


def bystanders() -> Tensor:
    column = pq.read_table(ROOT / "registries" / "bystanders.parquet").column("image").to_pylist()
    return torch.stack([pixels(io.BytesIO(row["bytes"])) for row in column])


def rendered(data: Path, name: str) -> tuple[Tensor, list[dict[str, Any]]]:
    tensor, lines = world.load(data, name)
    return world.to_float(tensor), lines


def people(data: Path, name: str) -> dict[str, tuple[Tensor, str]]:
    """Everyone of a set with several views: id -> (pictures, class noun)."""
    tensor, lines = rendered(data, name)
    rows: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        rows.setdefault(f"{line['style'].lower()}-{line['identity'].rpartition('-')[2]}", []).append(row)
    return {who: (tensor[found], lines[found[0]]["class_noun"]) for who, found in rows.items()}


def registered() -> dict[str, dict[str, Tensor]]:
    """The subjects of registries/avatars.yaml: id -> split -> pictures."""
    found: dict[str, dict[str, Tensor]] = {}
    for folder in sorted((ROOT / "registries" / "avatars").iterdir()):
        found[folder.name] = {
            split.name: torch.stack([pixels(f) for f in sorted(split.glob("*.png"))])
            for split in sorted(folder.iterdir())
        }
    return found


def write(name: str, record: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
