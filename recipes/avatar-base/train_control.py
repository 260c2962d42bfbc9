"""Trains what steers the embedded base by edges: a ControlNet and a T2I-Adapter, for the check of deployability.

python train_control.py FOLDER --what controlnet       writes guardsmith/builtin/controlnets/avatar/
python train_control.py FOLDER --what t2i_adapter      writes guardsmith/builtin/t2i_adapters/avatar/

Both are diffusers' own classes in its own layout, half precision. The pictures are those of registries/bystanders.parquet (the
last 64 are left out, and measured on); a killed run goes on from FOLDER. The ControlNet has the base's convolutions on the way
down and no attention, which keeps it under 5 MB.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, T2IAdapter
from evaluate import RESULTS
from torch import Tensor, nn
from train_purifiers import PICTURES, run

from guardsmith.core.atomic_io import write_json
from guardsmith.core.images import open_pictures
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.evaluation.deployability.edges import edge_maps
from guardsmith.hardening.pipeline import negative_files
from guardsmith.metrics.fidelity import read_traits
from guardsmith.models.checkpoint import BUILTIN, DiffusionModel, load_model

UNSEEN = 64
EMPTY = 0.2  # share of rows without a prompt


def build_controlnet(unet: Any) -> ControlNetModel:
    """The base's way down without its attention, with zero convolutions."""
    config = unet.config
    network = ControlNetModel(
        in_channels=config.in_channels, block_out_channels=tuple(config.block_out_channels),
        down_block_types=("DownBlock2D",) * len(config.block_out_channels), mid_block_type="UNetMidBlock2D",
        layers_per_block=config.layers_per_block, cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim, conditioning_embedding_out_channels=(16, 32, 64, 96),
    )  # fmt: skip
    own, base = network.state_dict(), unet.state_dict()
    network.load_state_dict(own | {name: base[name] for name, value in own.items()
                                   if name in base and base[name].shape == value.shape})  # fmt: skip
    return network


def build_adapter(unet: Any) -> T2IAdapter:
    """A full adapter of one residual block a level, with features as wide as the U-Net's levels."""
    return T2IAdapter(
        in_channels=3, channels=list(unet.config.block_out_channels), num_res_blocks=1, downscale_factor=8,
        adapter_type="full_adapter",
    )  # fmt: skip


def steered(
    model: DiffusionModel, network: nn.Module, noisy: Tensor, times: Tensor, context: Tensor, maps: Tensor
) -> Tensor:
    """The base's prediction under the network's control, (n, c, h, w)."""
    if isinstance(network, T2IAdapter):
        told: dict[str, Any] = {"down_intrablock_additional_residuals": [f.to(noisy.dtype) for f in network(maps)]}
    else:
        down, middle = network(noisy, times, context, maps, return_dict=False)
        told = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    out: Tensor = model.unet(noisy, times, context, return_dict=False, **told)[0]
    return out


def main() -> None:
    """Train one of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--what", choices=("controlnet", "t2i_adapter"), required=True)
    parser.add_argument("--steps", type=int, default=1200, help="the embedded T2I-Adapter: 600")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = load_model("builtin:avatar")
    pictures = open_pictures(negative_files(f"parquet:{PICTURES}"), 64)
    traits = read_traits(pictures)
    captions = ["", *dict.fromkeys(f"a photo of a {t['class']}" for t in traits)]
    captions += list(dict.fromkeys(described(t) for t in traits))
    rows = {caption: number for number, caption in enumerate(captions)}
    plain = torch.tensor([rows[f"a photo of a {t['class']}"] for t in traits])
    full = torch.tensor([rows[described(t)] for t in traits])
    contexts = PromptBank(model).encode(captions)
    latents, maps = encode(model, pictures), edge_maps(pictures)
    network = build_controlnet(model.unet) if args.what == "controlnet" else build_adapter(model.unet)
    scheduler, shown = model.scheduler, len(pictures) - UNSEEN

    def loss_of(rows: Tensor, rng: torch.Generator, controlled: bool = True) -> Tensor:
        clean, times = latents.sample(rows, rng), torch.randint(1000, (len(rows),), generator=rng)
        noise, words = torch.randn(clean.shape, generator=rng), torch.rand(len(rows), generator=rng)
        asked = torch.where(words < EMPTY, 0, torch.where(words < 0.6, plain[rows], full[rows]))
        noisy, wanted = scheduler.add_noise(clean, noise, times), scheduler.get_velocity(clean, noise, times)
        with torch.autocast("cpu", torch.bfloat16):
            if controlled:
                out = steered(model, network, noisy, times, contexts[asked], maps[rows])
            else:
                out = model.unet(noisy, times, contexts[asked], return_dict=False)[0]
        return F.mse_loss(out.float(), wanted)

    def loss_at(_: nn.Module, rng: torch.Generator) -> Tensor:
        return loss_of(torch.randint(shown, (args.batch,), generator=rng), rng)

    began = time.monotonic()
    loss = run(args.what, network, loss_at, args.folder, args.steps, 1e-3)
    seconds = time.monotonic() - began
    unseen = torch.arange(shown, len(pictures)).repeat(4)
    with torch.no_grad():
        errors = [float(loss_of(unseen, torch.Generator().manual_seed(1), controlled)) for controlled in (True, False)]
    network.half().save_pretrained(BUILTIN / f"{args.what}s" / "avatar", safe_serialization=True)
    write_json(RESULTS / f"{args.what}.json", {
        "command": f"python train_control.py FOLDER --what {args.what} --steps {args.steps} --batch {args.batch}",
        "seconds": round(seconds), "loss": loss, "parameters": sum(p.numel() for p in network.parameters()),
        "unseen_loss_controlled": errors[0], "unseen_loss_uncontrolled": errors[1],
    })  # fmt: skip
    print(
        f"{args.what}: loss {loss:.4f} after {seconds:.0f} s; unseen {errors[0]:.4f}, without control {errors[1]:.4f}"
    )


def described(traits: dict[str, str]) -> str:
    """A caption of what the judge of traits sees."""
    hair = f" with {traits['hair']} hair" if traits["class"] != "robot" else ""
    return f"a picture of a {traits['class']}{hair} on a {traits['background']} background in {traits['style']} style"


if __name__ == "__main__":
    main()
