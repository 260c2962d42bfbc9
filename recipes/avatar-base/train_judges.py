"""Trains what judges pictures and is never used inside hardening: the identity encoder and the trait classifier.

python train_judges.py DATA WORK          ~ 15 minutes on one core

Identities are disjoint from everything else (sets `judge` and `judge_test` of render.mjs). Half of the training
pictures are softened the way a VAE softens them (smaller and back, noise), so that the judges read generated pictures.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
import world
from optimizers import MuonAndAdamW
from torch import Tensor

from guardsmith.metrics.fidelity import TRAITS, TraitClassifier
from guardsmith.metrics.identity import IdentityEncoder
from guardsmith.training.loop import generator, save_checkpoint

MARGIN, SCALE = 0.2, 30.0  # additive-cosine softmax (CosFace)


def soften(x: Tensor, rng: torch.Generator) -> Tensor:
    """Blur half of the batches by a resize to 20-47 px and back; add up to 10 % noise to all."""
    if torch.rand(1, generator=rng) < 0.5:
        side = int(torch.randint(20, 48, (1,), generator=rng))
        small = F.interpolate(x, side, mode="bilinear", antialias=True)
        x = F.interpolate(small, world.SIZE, mode="bilinear")
    return x + 0.1 * torch.rand(1, generator=rng) * torch.randn(x.shape, generator=rng)


def trait_targets(lines: list[dict[str, object]], data: Path) -> dict[str, Tensor]:
    """Class index per trait; -100 (ignored) where a picture does not have it, e.g. hair under a hat."""
    colours = world.colour_names(data)
    rows: dict[str, list[int]] = {name: [] for name in TRAITS}
    for line in lines:
        true = world.attributes(line, colours)
        for name, values in TRAITS.items():
            value = true.get(name)
            if name == "glasses" and value is not None:
                value = "yes" if value else "no"
            rows[name].append(values.index(value) if value in values else -100)
    return {name: torch.tensor(v) for name, v in rows.items()}


def train(
    model: torch.nn.Module, extra: list[Tensor], loss_of, pixels: Tensor, steps: int, batch: int, stream: int
) -> None:  # type: ignore[no-untyped-def]
    """Muon and AdamW 2e-3 with a cosine end; `loss_of(x, rows)` is the loss on one softened batch."""
    named = [*model.named_parameters(), *((f"embedding.{i}", p) for i, p in enumerate(extra))]
    optimizer = MuonAndAdamW(named, 2e-3, weight_decay=1e-3)
    for step in range(steps):
        rng = generator(stream, step)
        rows = torch.randint(len(pixels), (batch,), generator=rng)
        loss = loss_of(soften(world.to_float(pixels[rows]), rng), rows)
        loss.backward()
        optimizer.step(min(1, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)


def main() -> None:
    """Train both judges and save them in half precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--identity-steps", type=int, default=1500)
    parser.add_argument("--trait-steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pixels, lines = world.load(args.data, "judge")

    if not (args.work / "identity.safetensors").exists():
        torch.manual_seed(0)
        names = sorted({line["identity"] for line in lines})
        identity = torch.tensor([names.index(n) for n in (line["identity"] for line in lines)])
        encoder = IdentityEncoder()
        centres = torch.nn.Parameter(torch.randn(len(names), 128))

        def identity_loss(x: Tensor, rows: Tensor) -> Tensor:
            cosine = encoder(x) @ F.normalize(centres, dim=-1).T
            return F.cross_entropy(SCALE * (cosine - MARGIN * F.one_hot(identity[rows], len(names))), identity[rows])

        train(encoder, [centres], identity_loss, pixels, args.identity_steps, 128, stream=2)
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in encoder.state_dict().items()}
        save_checkpoint(args.work / "identity.safetensors", tensors, {"steps": args.identity_steps})

    if not (args.work / "traits.safetensors").exists():
        torch.manual_seed(0)
        targets = trait_targets(lines, args.data)
        classifier = TraitClassifier()

        def trait_loss(x: Tensor, rows: Tensor) -> Tensor:
            logits = classifier(x)
            return sum((F.cross_entropy(logits[n], targets[n][rows]) for n in TRAITS), torch.zeros(()))

        train(classifier, [], trait_loss, pixels, args.trait_steps, 128, stream=3)
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
        save_checkpoint(args.work / "traits.safetensors", tensors, {"steps": args.trait_steps})


if __name__ == "__main__":
    main()
