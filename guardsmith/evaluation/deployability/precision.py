"""Precision: pictures in float16 and bfloat16 against the model's own in float32, and what is stored in the files."""

from __future__ import annotations

from functools import partial

import torch
from safetensors import safe_open
from torch import Tensor

from guardsmith.evaluation.deployability.bench import (
    SIDES,
    Bench,
    attempt,
    broken,
    compared_difference,
    compared_faults,
    differences,
)
from guardsmith.evaluation.deployability.half import as_half
from guardsmith.gate.deployability import Measurement
from guardsmith.models.checkpoint import DiffusionModel, stored_dtype
from guardsmith.models.contents import weight_files
from guardsmith.runtime.device import chosen_device

EMULATED = "emulated: float32 with every result rounded to float16 (no float16 on this CPU in reasonable time)"
PLAIN = "float32: black or NaN pictures"
STORED = "stored values beyond float16"
FILES = "parts stored in another precision"
LARGEST = torch.finfo(torch.float16).max


def in_precision(bench: Bench, side: str, dtype: torch.dtype) -> Tensor:
    """Benign pictures by a side in another precision; float16 is emulated on CPUs."""
    if dtype == torch.float16 and chosen_device().type == "cpu":
        pipeline = bench.load(side)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                as_half(part)
        return bench.draw(pipeline)
    return bench.draw(bench.load(side, dtype))


def beyond_half(model: DiffusionModel) -> tuple[int, int]:
    """How many stored weights are not finite in float16, and how many there are; the files' own, read one tensor at a time."""
    wrong = count = 0
    for part in model.networks:
        for file in weight_files(model.folder / part):
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 (not a dict)
                    value = weights.get_tensor(key)
                    if value.is_floating_point():
                        wrong += int((~(value.float().abs() <= LARGEST)).sum())
                        count += value.numel()
    return wrong, count


def drawn_case(bench: Bench, name: str) -> list[Measurement]:
    """Difference and faults of one precision."""
    dtype, how = getattr(torch, name), ""
    if dtype == torch.float16 and chosen_device().type == "cpu":
        how = EMULATED
    pictures = {side: bench.pictures(side, name, partial(in_precision, bench, side, dtype), how) for side in SIDES}
    strip = bench.strip("precision", name, pictures["base"], pictures["hardened"])
    away = {side: differences(images, bench.plain(side)) for side, images in pictures.items()}
    faults = {side: int(broken(images).sum()) for side, images in pictures.items()}
    return [
        compared_difference("precision", name, away["base"], away["hardened"], how=how, pictures=strip),
        compared_faults(
            "precision",
            f"{name}: black or NaN pictures",
            faults["base"],
            faults["hardened"],
            bench.spec.images,
            how=how,
        ),
    ]


def plain_case(bench: Bench) -> Measurement:
    """Faults of float32."""
    faults = {side: int(broken(bench.plain(side)).sum()) for side in SIDES}
    strip = bench.strip("precision", "float32", bench.plain("base"), bench.plain("hardened"))
    return compared_faults(
        "precision", PLAIN, faults["base"], faults["hardened"], bench.spec.images, pictures=strip
    )  # fmt: skip


def stored_case(bench: Bench) -> Measurement:
    """Values in the files that float16 cannot hold."""
    (base, _), (hardened, count) = (beyond_half(bench.models[side]) for side in SIDES)
    return compared_faults("precision", STORED, base, hardened, count)


def files_case(bench: Bench) -> Measurement:
    """Parts whose files are in another precision than the base's."""
    base, hardened = (bench.models[side] for side in SIDES)
    other = [part for part in base.networks
             if stored_dtype(base.folder, part) != stored_dtype(hardened.folder, part)]  # fmt: skip
    difference = ", ".join(f"{part} in {_name(hardened, part)} instead of {_name(base, part)}" for part in other)
    return compared_faults("precision", FILES, 0, len(other), len(base.networks), how=difference)


def run(bench: Bench) -> list[Measurement]:
    """Every precision, then the files."""
    measurements = []
    for name in ("float16", "bfloat16"):
        measurements += attempt("precision", name, "difference", partial(drawn_case, bench, name))
    measurements += attempt("precision", PLAIN, "faults", partial(plain_case, bench))
    measurements += attempt("precision", STORED, "faults", partial(stored_case, bench))
    return measurements + attempt("precision", FILES, "faults", partial(files_case, bench))


def _name(model: DiffusionModel, part: str) -> str:
    return str(stored_dtype(model.folder, part)).removeprefix("torch.")
