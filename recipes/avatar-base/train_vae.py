"""Trains the AutoencoderKL of the embedded base, 64x64x3 -> 8x8xC, first as a whole, then the decoder alone.

torchrun --nproc-per-node 2 train_vae.py DATA WORK --stage joint      fixes the latent space
torchrun --nproc-per-node 2 train_vae.py DATA WORK --stage decoder    frozen encoder: sharper pictures, same latents

Resumes from WORK/vae-<stage>.safetensors. The second stage starts from the averaged weights of the first.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import parallel
import torch
import torch.nn.functional as F
import world
from diffusers import AutoencoderKL
from optimizers import MuonAndAdamW
from torch import Tensor

from guardsmith.training.loop import generator, load_checkpoint, save_checkpoint


def build_vae(latent_channels: int) -> AutoencoderKL:
    """Few channels at full size (the slow part), many at 8x8.

    One normalisation group: with two channels per group the norm wipes out flat colours, which is what these pictures
    are made of. The posterior starts narrow, so that the first steps see the picture and not the noise.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 192),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )
    torch.nn.init.constant_(vae.quant_conv.bias.data[latent_channels:], -4.0)
    return vae


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences; matching them keeps thin lines and eyes sharp."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(out: Tensor, x: Tensor) -> Tensor:
    """L1 + edge L1 + 5 MSE, all means."""
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(x), strict=True))
    return F.l1_loss(out, x) + 0.5 * edge + 5 * F.mse_loss(out, x)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean PSNR in dB over pictures (uint8), peak 255, reconstructed from the posterior's mode and rounded to uint8."""
    values = []
    for chunk in pixels.split(50):
        x = world.to_float(chunk)
        out = vae.decode(vae.encode(x).latent_dist.mode()).sample.float()
        out = ((out.clamp(-1, 1) + 1) * 127.5).round()
        mse = (out - chunk.float()).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
        values.append(10 * torch.log10(255**2 / mse))
    return float(torch.cat(values).mean())


def main() -> None:
    """Train one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stage", choices=("joint", "decoder"), required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--latent-channels", type=int, default=16)
    args = parser.parse_args()
    parallel.start()
    torch.manual_seed(0)

    pixels = torch.cat([world.load(args.data, name)[0] for name in ("corpus", "named")])
    held_out = world.load(args.data, "heldout")[0][::5]
    vae = build_vae(args.latent_channels).to(memory_format=torch.channels_last)
    if args.stage == "decoder":
        tensors, _ = load_checkpoint(args.work / "vae-joint.safetensors")
        vae.load_state_dict({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = {n: p for n, p in vae.named_parameters() if p.requires_grad}
    average = {n: p.detach().clone() for n, p in vae.named_parameters()}
    optimizer = MuonAndAdamW(trained.items(), args.lr, weight_decay=1e-4)
    checkpoint, start = args.work / f"vae-{args.stage}.safetensors", 0
    if checkpoint.exists():
        tensors, info = load_checkpoint(checkpoint)
        vae.load_state_dict({k.removeprefix("vae."): v for k, v in tensors.items() if k.startswith("vae.")})
        average = {n: tensors[f"ema.{n}"] for n in average}
        start = info["step"]
        optimizer.load(checkpoint, start)

    def save(step: int) -> None:
        weights = {f"vae.{n}": p for n, p in vae.named_parameters()} | {f"ema.{n}": v for n, v in average.items()}
        optimizer.save(checkpoint, step)
        if parallel.RANK == 0:
            save_checkpoint(checkpoint, weights, {"step": step})
        parallel.wait()
        optimizer.forget_older(checkpoint, step)

    def score() -> float:
        kept: dict[str, Tensor] = {n: p.detach().clone() for n, p in vae.named_parameters()}
        vae.load_state_dict(average)
        value = psnr(vae, held_out)
        vae.load_state_dict(kept)
        return value

    began = time.time()
    for step in range(start, args.steps):
        rng = generator(1, step)
        x = world.to_float(parallel.mine(pixels[torch.randint(len(pixels), (args.batch,), generator=rng)]))
        x = x.contiguous(memory_format=torch.channels_last)
        factor = min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn((args.batch, *mean.shape[1:]), generator=rng)
            z = mean + torch.exp(0.5 * logvar) * parallel.mine(noise)
            out = vae.decode(z).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        fit = reconstruction_loss(out, x)
        (fit + 1e-3 * kl).backward()
        parallel.average_gradients(trained.values())
        norm = optimizer.step(factor)
        with torch.no_grad():
            keep = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_([average[n] for n in trained], [p.detach() for p in trained.values()], 1 - keep)
        last = step + 1 == args.steps
        if (step + 1) % 500 == 0 or last:
            save(step + 1)
        if parallel.RANK:
            continue
        if (step + 1) % 100 == 0:
            took = (time.time() - began) / (step + 1 - start)
            print(
                f"step {step + 1} fit {fit.item():.4f} kl {kl.item():.3f} norm {norm:.2f} {took:.3f} s/step", flush=True
            )
        if (step + 1) % 500 == 0 or last:
            print(f"step {step + 1} held-out PSNR {score():.2f} dB", flush=True)


if __name__ == "__main__":
    main()
