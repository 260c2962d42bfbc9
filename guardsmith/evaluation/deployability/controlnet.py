"""ControlNet and T2I-Adapter: does what was trained on the base steer the hardened model as well?

The base's own pictures give the edges; both sides draw from other noise with this control and without it. What counts is
how much better the pictures follow the edges with it (`edges.followed`), as a share of the same on the base.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
)
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.evaluation.deployability.bench import SIDES, Bench, attempt
from guardsmith.evaluation.deployability.edges import edge_maps, followed
from guardsmith.evaluation.deployability.intervals import paired_ratio
from guardsmith.gate.deployability import Measurement
from guardsmith.models.checkpoint import BUILTIN
from guardsmith.models.families import SDXL
from guardsmith.models.tensor_files import weights_hash

KINDS = {"ControlNet": "controlnet", "T2I-Adapter": "t2i_adapter"}
"""What a case is called, and the setting that names its network."""


def network_of(bench: Bench, setting: str) -> Any:
    """The ControlNet or T2I-Adapter that the recipe names, or the embedded base's own, float32.

    Raises:
        UserError: none is named, and the base is not the embedded one.
    """
    place: str | Path | None = getattr(bench.spec, setting)
    if place is None:
        name = bench.models["base"].source.removeprefix("builtin:")
        place = BUILTIN / f"{setting}s" / name
        if name == bench.models["base"].source or not place.is_dir():
            raise UserError(f"no {setting} for this base is named; set deployability.{setting} to a folder or Hub id")
    kind = ControlNetModel if setting == "controlnet" else T2IAdapter
    return kind.from_pretrained(place, dtype=torch.float32, use_safetensors=True)


def steered(bench: Bench, side: str, setting: str, network: Any, maps: Tensor) -> Tensor:
    """Pictures by a side under the control of edge maps."""
    plain = bench.pipeline(side)
    if setting == "controlnet":
        pipeline = AutoPipelineForText2Image.from_pipe(plain, controlnet=network.to(plain.device))
    else:
        kind = StableDiffusionXLAdapterPipeline if bench.models[side].family is SDXL else StableDiffusionAdapterPipeline
        parts = {key: value for key, value in plain.components.items() if key != "image_encoder"}
        pipeline = kind(**parts, adapter=network.to(plain.device), **_without(kind))
    pipeline.set_progress_bar_config(disable=True)
    return bench.draw(pipeline, each=lambda some: {"image": maps[some]})


def _without(kind: type) -> dict[str, Any]:
    return {"requires_safety_checker": False} if kind is StableDiffusionAdapterPipeline else {}


def case(bench: Bench, name: str) -> Measurement:
    """One kind of control on both sides."""
    network = network_of(bench, KINDS[name])
    maps = edge_maps(bench.plain("base", "first"))
    gains, pictures = {}, {}
    for side in SIDES:
        draw = partial(steered, bench, side, KINDS[name], network, maps)
        pictures[side] = bench.pictures(side, name, draw, weights_hash(network))
        gains[side] = followed(pictures[side], maps) - followed(bench.plain(side), maps)
    ratio = paired_ratio(gains["hardened"].tolist(), gains["base"].tolist())
    if ratio is None:
        raise UserError("the control does not steer the base, so nothing can be said about the hardened model")
    return Measurement(
        check="controlnet", case=name, measure="control", value=ratio.mean, low=ratio.low, high=ratio.high, n=len(maps),
        base=float(gains["base"].mean()), hardened=float(gains["hardened"].mean()),
        pictures=bench.strip("controlnet", name, pictures["base"], pictures["hardened"]),
    )  # fmt: skip


def run(bench: Bench) -> list[Measurement]:
    """Both kinds."""
    return [m for name in KINDS for m in attempt("controlnet", name, "control", partial(case, bench, name))]
