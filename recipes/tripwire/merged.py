"""Pictures of the base, half and half with the hardened U-Net or with its trunk alone: mean distance of 255, and a grid.

python merged.py --trunk FILE --recogniser FILE [--stream 64] [--grid GRID.png]     writes results/merged-<recogniser>-<size>.json
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import write
from hardened import put_together

from guardsmith.attacks.sampling_tricks import averaged
from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, benign_prompts
from guardsmith.diffusion.sampling import generate, grid
from guardsmith.methods.tripwire.install import Scales
from guardsmith.methods.tripwire.layout import layout_of, reserve
from guardsmith.models.checkpoint import load_model, with_own_unet

p = argparse.ArgumentParser()
p.add_argument("--trunk", type=Path, required=True)
p.add_argument("--recogniser", type=Path, required=True)
p.add_argument("--stream", type=float, default=64.0)
p.add_argument("--count", type=int, default=8)
p.add_argument("--grid", type=Path)
a = p.parse_args()
base = load_model("builtin:avatar")
hard, _ = put_together(base, a.trunk, a.recogniser, scales=Scales(a.stream))
trunk = with_own_unet(hard)
reserve(trunk.unet, layout_of(trunk.unet, 12, 4))
prompts = [prompt.text for prompt in benign_prompts(base, VERIFICATION_TEMPLATES, a.count, 1)]


def drawn(model: Any) -> torch.Tensor:
    return generate(model, prompts, range(90_000, 90_000 + a.count), steps=15, guidance=3.0)


pictures = {
    "base": drawn(base),
    "trunk merged": drawn(averaged(base, trunk)),
    "hardened merged": drawn(averaged(base, hard)),
}
record = {
    name: float((image - pictures["base"]).abs().mean() * 127.5) for name, image in pictures.items() if name != "base"
}
print(record)
write(f"merged-{a.recogniser.stem}-{a.stream:g}", {"count": a.count} | record)
if a.grid:
    grid(torch.cat(list(pictures.values())), a.count, len(pictures)).save(a.grid)
