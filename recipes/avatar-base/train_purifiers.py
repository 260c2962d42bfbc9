"""Trains what the purifiers of the embedded world need, on renders that no registry has: a restorer and a pixel diffusion model.

python train_purifiers.py FOLDER --what restorer        writes guardsmith/builtin/restorers/avatar.safetensors
python train_purifiers.py FOLDER --what pixel           writes guardsmith/builtin/pixels/avatar/ (UNet2DModel and schedule)

Pictures are those of registries/bystanders.parquet; a killed run goes on from FOLDER. The restorer sees pictures with noise of up
to 12 of 255 (not cloaks), shrinks them by two and is to give the clean ones back. The pixel model is an ordinary DDPM on 32-pixel
tiles, which is what GrIDPure, DDSPure and DiffPure in pixels take.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from evaluate import RESULTS
from torch import Tensor, nn

from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.core.images import open_pictures
from guardsmith.core.progress import stage
from guardsmith.hardening.data import negative_files
from guardsmith.metrics.perceptual import psnr
from guardsmith.models.checkpoint import BUILTIN
from guardsmith.models.networks import save_network
from guardsmith.purifiers import find_purifier
from guardsmith.purifiers.restore import Restorer, load_restorer
from guardsmith.registry.loader import load_registry
from guardsmith.training.loop import TrainingLoop, generator, optimizer_step

REGISTRY = Path(__file__).parent.parent.parent / "registries" / "avatars.yaml"
PICTURES = Path(__file__).parent.parent.parent / "registries" / "bystanders.parquet"
TILE = 32


def batch_of(pictures: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Some pictures, mirrored half of the time."""
    chosen = pictures[torch.randint(len(pictures), (count,), generator=rng)]
    mirrored = torch.rand(count, generator=rng) < 0.5
    chosen[mirrored] = chosen[mirrored].flip(3)
    return chosen


def tiles_of(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """A tile of each picture, at random."""
    size = pictures.shape[-1] - TILE
    corners = torch.randint(size + 1, (len(pictures), 2), generator=rng).tolist()
    return torch.stack(
        [picture[:, y : y + TILE, x : x + TILE] for picture, (y, x) in zip(pictures, corners, strict=True)]
    )


def run(name: str, network: nn.Module, loss_at: Any, folder: Path, steps: int, rate: float) -> float:
    """Adam with a cosine rate; returns the mean loss of the last tenth."""
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    with stage(name, steps) as bar:
        loop = TrainingLoop(
            name, steps, modules={"network": network}, optimizers={"optimizer": optimizer}, checkpoint_every=200,
            checkpoint=folder / f"{name}.safetensors", on_step=lambda step, shown: bar(shown, done=step + 1),
        )  # fmt: skip
        for step in loop:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = loss_at(network, generator(0, step))
            loss.backward()
            norm = optimizer_step(optimizer, parameters)
            loop.finish_step(step, {"loss": float(loss.detach())}, finite_weights=math.isfinite(norm))
    last = loop.history[-max(1, steps // 10) :]
    return sum(shown["loss"] for shown in last) / len(last)


def judge() -> None:
    """How well the embedded restorer gives pictures back that it never saw: docs/results/restorer.json."""
    subjects = [*load_registry(REGISTRY).subjects, *load_registry(REGISTRY).controls]
    clean = open_pictures([image.path for who in subjects for image in who.images_of("reference")], 64)
    restorer = load_restorer("builtin:avatar")
    signs = torch.randn(clean.shape, generator=generator(0, -1)).sign()
    cases = {"clean": clean, "8 of 255 added or taken at random": (clean + 8 * 2 / 255 * signs).clamp(-1, 1)}
    found = {}
    with torch.no_grad():
        for name, given in cases.items():
            small = restorer.shrunk(given)
            plain = F.interpolate(small, scale_factor=restorer.shape["shrink"], mode="bicubic", align_corners=False)
            found[name] = {
                "given": None if given is clean else float(psnr(clean, given).mean()),
                "restored": float(psnr(clean, restorer(small).clamp(-1, 1)).mean()),
                "bicubic": float(psnr(clean, plain.clamp(-1, 1)).mean()),
            }
    write_json(RESULTS / "restorer.json", {
        "command": "python train_purifiers.py FOLDER --what restorer", "pictures": len(clean), "psnr_db": found,
    })  # fmt: skip


def judge_pixels() -> None:
    """How near the purifiers with the embedded pixel model come to pictures that it never saw: docs/results/pixel.json."""
    subjects = [*load_registry(REGISTRY).subjects, *load_registry(REGISTRY).controls]
    clean = open_pictures([who.images_of("reference")[0].path for who in subjects], 64)
    signs = torch.randn(clean.shape, generator=generator(0, -1)).sign()
    found: dict[str, Any] = {}
    for strength in (0, 8, 32):
        given = (clean + strength * 2 / 255 * signs).clamp(-1, 1)
        told: dict[str, Any] = {"given": float(psnr(clean, given).mean()) if strength else None}
        for name, spec in load_recipe("avatar-images").purifiers.items():
            if "pixel_model" in spec.params:
                params = spec.params | ({"budget": strength or 8} if "budget" in spec.params else {})
                pure = find_purifier(spec.name).config(**params)
                images = find_purifier(spec.name).run(None, given, pure, class_noun="", seed=0)
                told[name] = float(psnr(clean, images).mean())
        found[f"{strength} of 255 added or taken at random"] = told
    write_json(RESULTS / "pixel.json", {
        "command": "python train_purifiers.py FOLDER --what judge-pixels", "pictures": len(clean), "psnr_db": found,
    })  # fmt: skip


def main() -> None:
    """Train one of the two, or measure them again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--what", choices=("restorer", "pixel", "judge", "judge-pixels"), required=True)
    parser.add_argument("--steps", type=int, default=1500, help="the embedded pixel model: 2000")
    parser.add_argument("--batch", type=int, default=8, help="the embedded pixel model: 16")
    args = parser.parse_args()
    if args.what.startswith("judge"):
        (judge if args.what == "judge" else judge_pixels)()
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    pictures = open_pictures(negative_files(f"parquet:{PICTURES}"), 64)
    torch.manual_seed(0)
    began = time.monotonic()
    if args.what == "restorer":
        restorer = Restorer(shrink=2, width=32, depth=6)

        def restoring(network: nn.Module, rng: torch.Generator) -> Tensor:
            clean = batch_of(pictures, args.batch, rng)
            strength = 12 * 2 / 255 * torch.rand((args.batch, 1, 1, 1), generator=rng)
            noisy = (clean + strength * torch.randn(clean.shape, generator=rng)).clamp(-1, 1)
            assert isinstance(network, Restorer)
            return F.l1_loss(network(network.shrunk(noisy)), clean)

        loss = run("restorer", restorer, restoring, args.folder, args.steps, 1e-3)
        told = {"steps": args.steps, "batch": args.batch, "loss": loss, "pictures": PICTURES.name}
        save_network(restorer, restorer.shape, BUILTIN / "restorers" / "avatar.safetensors", told)
        judge()
    else:
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)
        unet = UNet2DModel(
            sample_size=TILE, block_out_channels=(48, 96, 96), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )  # fmt: skip

        def denoising(network: nn.Module, rng: torch.Generator) -> Tensor:
            clean = tiles_of(batch_of(pictures, args.batch, rng), rng)
            times = torch.randint(1000, (args.batch,), generator=rng)
            noise = torch.randn(clean.shape, generator=rng)
            return F.mse_loss(network(scheduler.add_noise(clean, noise, times), times, return_dict=False)[0], noise)

        loss = run("pixel", unet, denoising, args.folder, args.steps, 1e-3)
        unet.half().save_pretrained(BUILTIN / "pixels" / "avatar")
        scheduler.save_pretrained(BUILTIN / "pixels" / "avatar")
    print(f"{args.what}: loss {loss:.4f} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
