"""Puts the trained parts together: guardsmith/builtin/avatar (a Stable Diffusion folder) and guardsmith/builtin/judges.

python assemble.py WORK TARGET            TARGET is guardsmith/builtin of the checkout
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from train_unet import build_scheduler, build_text_encoder, build_unet, load_vae
from transformers import CLIPTokenizer

from guardsmith.training.loop import load_checkpoint


def main() -> None:
    """Write everything in half precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    stage = "decoder" if (args.work / "vae-decoder.safetensors").exists() else "joint"
    vae = load_vae(args.work, stage)
    vae.register_to_config(scaling_factor=load_checkpoint(args.work / "latents.safetensors")[1]["scaling_factor"])
    unet, text_encoder = build_unet(vae.config.latent_channels), build_text_encoder(tokenizer)
    tensors, info = load_checkpoint(args.work / "unet.safetensors")
    for part, prefix in ((unet, "ema.unet."), (text_encoder, "ema.text.")):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(own[name])
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.float16)  # fmt: skip
    folder = args.target / "avatar"
    credits = (folder / "LICENSE.md").read_text() if (folder / "LICENSE.md").exists() else None
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(args.work / "tokenizer" / file, folder / "tokenizer" / file)
    if credits is not None:
        (folder / "LICENSE.md").write_text(credits)
    judges = args.target / "judges"
    judges.mkdir(parents=True, exist_ok=True)
    for name in ("identity", "traits"):
        shutil.copy(args.work / f"{name}.safetensors", judges / f"{name}.safetensors")
    size = sum(f.stat().st_size for f in args.target.rglob("*") if f.is_file()) / 2**20
    print(f"VAE stage {stage}, U-Net at step {info['step']}, {size:.1f} MiB in all")


if __name__ == "__main__":
    main()
