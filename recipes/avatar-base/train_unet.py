"""Trains the U-Net and the text encoder of the embedded base, from nothing, on cached latents.

torchrun --nproc-per-node 2 train_unet.py DATA WORK            resumes from WORK/unet.safetensors

v-prediction with the squared-cosine schedule: on an 8x8 latent SD1.x's schedule leaves the colours of the initial noise
visible at the last timestep, and a model trained on it cannot repaint a subject's colours (see README.md here).
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import parallel
import torch
import torch.nn.functional as F
import world
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from optimizers import MuonAndAdamW
from torch import Tensor
from train_vae import build_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from guardsmith.training.loop import generator, load_checkpoint, save_checkpoint

TEXT_WIDTH = 128


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """Two levels (8x8, 4x4), cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(128, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text tower, trained together with the U-Net."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def build_scheduler() -> DDPMScheduler:
    """The training schedule that also ships with the model."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def load_vae(work: Path, stage: str = "joint") -> AutoencoderKL:
    """The averaged VAE of a stage, with its latent channels read off the file."""
    tensors, _ = load_checkpoint(work / f"vae-{stage}.safetensors")
    weights = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    vae = build_vae(weights["post_quant_conv.weight"].shape[0])
    vae.load_state_dict(weights)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Posterior means and deviations (n, c, 8, 8) in half precision, and the scaling factor 1 / std of a sample."""
    means, deviations = [], []
    for chunk in pixels.split(100):
        posterior = vae.encode(world.to_float(chunk)).latent_dist
        means.append(posterior.mean.half())
        deviations.append(posterior.std.half())
    mean, std = torch.cat(means), torch.cat(deviations)
    scale = 1 / float((mean.float() + std.float() * torch.randn(mean.shape, generator=generator(4))).std())
    return mean, std, scale


def main() -> None:
    """Train, averaging the weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    parallel.start()
    torch.manual_seed(0)

    latents_file = args.work / "latents.safetensors"
    if not latents_file.exists() and parallel.RANK == 0:
        pixels = torch.cat([world.load(args.data, name)[0] for name in ("corpus", "named")])
        mean, std, scale = encode_all(load_vae(args.work), pixels)
        save_checkpoint(latents_file, {"mean": mean, "std": std}, {"scaling_factor": scale})
    parallel.wait()
    latents, info = load_checkpoint(latents_file)
    mean, std, scale = latents["mean"], latents["std"], info["scaling_factor"]
    colours = world.colour_names(args.data)
    lines = [line for name in ("corpus", "named") for line in world.load(args.data, name)[1]]
    true = [world.attributes(line, colours) for line in lines]
    names = [world.made_up_name(line["identity"]) if line["set"] == "named" else None for line in lines]

    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    text_encoder, unet, scheduler = build_text_encoder(tokenizer), build_unet(mean.shape[1]), build_scheduler()
    unet.set_attn_processor(AttnProcessor())  # at this size plain attention trains twice as fast as the fused one
    parameters = {f"unet.{n}": p for n, p in unet.named_parameters()}
    parameters |= {f"text.{n}": p for n, p in text_encoder.named_parameters()}
    average = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = MuonAndAdamW(parameters.items(), args.lr, weight_decay=1e-2)
    checkpoint, start = args.work / "unet.safetensors", 0
    if checkpoint.exists():
        tensors, info = load_checkpoint(checkpoint)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
                average[name] = tensors[f"ema.{name}"]
        start = info["step"]
        optimizer.load(checkpoint, start)

    began, losses = time.time(), []
    for step in range(start, args.steps):
        rng = generator(5, step)
        words = random.Random(int(torch.randint(2**31, (1,), generator=rng)))
        rows = torch.randint(len(mean), (args.batch,), generator=rng)
        # a named identity is called by its name in half of its captions
        captions = [world.caption(true[i], words, names[i] if words.random() < 0.5 else None) for i in rows.tolist()]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        z = (mean[rows].float() + std[rows].float() * torch.randn(mean[rows].shape, generator=rng)) * scale
        noise = torch.randn(z.shape, generator=rng)
        # one timestep per stratum of the batch: the same uniform distribution with less variance
        spread = (torch.arange(args.batch) + torch.rand(args.batch, generator=rng)) / args.batch
        t = (spread * scheduler.config.num_train_timesteps).long().clamp_max(999)
        factor = min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        z, noise, t, tokens = map(parallel.mine, (z, noise, t, tokens))
        with torch.autocast("cpu", torch.bfloat16):
            context = text_encoder(tokens).last_hidden_state
            out = unet(scheduler.add_noise(z, noise, t), t, context).sample
        loss = F.mse_loss(out.float(), scheduler.get_velocity(z, noise, t))
        loss.backward()
        parallel.average_gradients(parameters.values())
        norm = optimizer.step(factor)
        losses.append(loss.item())
        with torch.no_grad():
            keep = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - keep)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            optimizer.save(checkpoint, step + 1)
            if parallel.RANK == 0:
                weights = {n: p.detach() for n, p in parameters.items()} | {f"ema.{n}": v for n, v in average.items()}
                save_checkpoint(checkpoint, weights, {"step": step + 1})
            parallel.wait()
            optimizer.forget_older(checkpoint, step + 1)
        if (step + 1) % 100 == 0 and parallel.RANK == 0:
            took = (time.time() - began) / (step + 1 - start)
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step + 1} loss {recent:.4f} norm {norm:.2f} {took:.3f} s/step", flush=True)


if __name__ == "__main__":
    main()
