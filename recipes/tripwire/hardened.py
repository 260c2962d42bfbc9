"""The base with a trunk, a recogniser and what carries its answer, rounded to float16 as its files would be."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from guardsmith.methods.tripwire.install import Scales, install
from guardsmith.methods.tripwire.layout import layout_of, reserve
from guardsmith.methods.tripwire.recogniser import Recogniser
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


def put_together(
    base: DiffusionModel, trunk: Path, recogniser: Path, groups: tuple[int, int] = (12, 4), scales: Scales | None = None
) -> tuple[DiffusionModel, Recogniser]:
    layout, hard, tensors = layout_of(base.unet, *groups), with_own_unet(base), load_file(trunk)
    prefix = "unet." if any(k.startswith("unet.") for k in tensors) else ""
    own = {
        k.removeprefix(prefix): v.float()
        for k, v in tensors.items()
        if k.startswith(prefix) and not k.startswith(("optimizer", "muon"))
    }
    hard.unet.load_state_dict(own)
    reserve(hard.unet, layout)
    weights = load_file(recogniser)
    found = Recogniser(base.unet, layout, scores=len(weights["readout.bias"]))
    found.load_state_dict(weights)
    found.measure(torch.randn((64, base.unet.config.in_channels, 8, 8), generator=torch.Generator().manual_seed(0)))
    install(hard.unet, layout, found, scales or Scales(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in hard.unet.parameters():
            parameter.copy_(parameter.half().float())
    return hard, found
