"""What ordinary tools do with the hardened U-Net, in relation to the base: precision, residuals of a ControlNet's size, merges.

python usable.py --trunk UNET --recogniser FILE     writes results/usable-<trunk>.json
"""

import argparse
import copy
from pathlib import Path

import torch
from common import write
from hardened import put_together

from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, PromptBank, benign_prompts
from guardsmith.diffusion.sampling import first_noise, solver_for
from guardsmith.methods.tripwire.install import Scales
from guardsmith.models.checkpoint import load_model

p = argparse.ArgumentParser()
p.add_argument("--trunk", type=Path, required=True)
p.add_argument("--recogniser", type=Path, required=True)
p.add_argument("--count", type=int, default=12)
p.add_argument("--stream", type=float, default=64.0)
a = p.parse_args()
base = load_model("builtin:avatar")
hard, _ = put_together(base, a.trunk, a.recogniser, scales=Scales(a.stream))
prompts = [x.text for x in benign_prompts(base, VERIFICATION_TEMPLATES, a.count, 1)]
bank = PromptBank(base)
context, empty = bank.encode(prompts), bank.encode([""]).expand(a.count, -1, -1)


@torch.no_grad()
def draw(unet, dtype=torch.float32):
    unet = copy.deepcopy(unet).to(dtype)
    solver = solver_for(base, 15)
    latents = first_noise(base, range(90_000, 90_000 + a.count))
    for t in solver.timesteps:
        out = unet(
            torch.cat([latents, latents]).to(dtype), t, torch.cat([empty, context]).to(dtype), return_dict=False
        )[0].float()
        without, asked = out.chunk(2)
        latents = solver.step(without + 3 * (asked - without), t, latents, return_dict=False)[0]
    return base.decode(latents).clamp(-1, 1) * 127.5


@torch.no_grad()
def residual_effect(unet):
    rng = torch.Generator().manual_seed(5)
    noisy, times = torch.randn((8, 16, 8, 8), generator=rng), torch.randint(1000, (8,), generator=rng)
    plain = unet(noisy, times, context[:8], return_dict=False)[0]
    skips = [
        torch.randn(s, generator=rng) * 0.5 for s in ((8, 128, 8, 8), (8, 128, 8, 8), (8, 128, 4, 4), (8, 160, 4, 4))
    ]
    moved = unet(
        noisy,
        times,
        context[:8],
        return_dict=False,
        down_block_additional_residuals=skips,
        mid_block_additional_residual=torch.randn((8, 160, 4, 4), generator=rng) * 0.5,
    )[0]
    return float((moved - plain).norm() / plain.norm())


pictures = {name: draw(m.unet) for name, m in (("base", base), ("hardened", hard))}
record = {"trunk": a.trunk.stem, "hardened_from_base": float((pictures["hardened"] - pictures["base"]).abs().mean())}
for dtype in (torch.float16, torch.bfloat16):
    record[str(dtype).removeprefix("torch.")] = {
        name: float((draw(m.unet, dtype) - pictures[name]).abs().mean())
        for name, m in (("base", base), ("hardened", hard))
    }
record["residuals"] = {name: residual_effect(m.unet) for name, m in (("base", base), ("hardened", hard))}
half = copy.deepcopy(base.unet)
with torch.no_grad():
    for one, other in zip(half.parameters(), hard.unet.parameters(), strict=False):
        one.copy_((one + other) / 2)
record["merged_half_from_base"] = float((draw(half) - pictures["base"]).abs().mean())
record["largest_weight"] = max(float(w.abs().max()) for w in hard.unet.parameters())
print(record)
write(f"usable-{a.trunk.parent.name}-{a.recogniser.stem}-{a.stream:g}", record)
