"""A step of a trunk's distillation at Stable Diffusion 1.5's full size with little memory, on the CPU.

python recipes/benchmark/lean_trunk.py       writes docs/results/lean-trunk.json; some minutes of one core, 8 GiB

The base is the one of full_size.py (random weights, float16). The step is the second of a preparation with gradient checkpointing
and moments in 8 bits: with an adapter on both U-Nets and steered pictures, and with moments of all matrices from the beginning,
as in every later step. It is a process of its own, whose peak memory is measured and estimated as `--dry-run` does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import make_base
from peak import peak_rss

from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.diffusion.latents import LatentStore
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.hardening.memory import GIB, estimate
from guardsmith.methods import METHODS
from guardsmith.methods.tripwire import trunk
from guardsmith.methods.tripwire.layout import layout_of
from guardsmith.methods.tripwire.trunk_training import LeanTraining
from guardsmith.models.checkpoint import load_model
from guardsmith.models.narrowed import narrow
from guardsmith.training.at_once import Blocks
from guardsmith.training.compute import ComputeConfig, configure_denoiser
from guardsmith.training.loop import generator

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "lean-trunk.json"
COMPUTE = ComputeConfig(gradient_checkpointing=True, optimizer="adamw8bit")
LIMIT = 8  # GiB


class Started(LeanTraining):
    """A training whose first step has been taken: every matrix has a momentum."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.momenta = [Blocks(torch.zeros_like(view)) for view in self.views]

    def load(self, file: Path) -> int:
        """Go on with the second step."""
        return 1


def step(base: Path) -> dict[str, Any]:
    """Take the step in this process."""
    params = {"trunk_steps": 2, "trunk_batch_size": 1, "early_steps": ()}
    recipe = Recipe(base=str(base), method={"name": "tripwire", "params": params}, compute=COMPUTE)
    method = METHODS["tripwire"]
    config = method.config(**params)
    planned = estimate(recipe, method, config)
    model = load_model(str(base))
    configure_denoiser(model.unet, COMPUTE)
    narrow(model.unet)
    loaded = peak_rss()
    side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
    mean = torch.randn((4, channels, side, side), generator=generator(0))
    bank = PromptBank(model)
    vars(trunk)["LeanTraining"] = Started
    began, cpu = time.monotonic(), time.process_time()
    losses: list[float] = []
    trunk.prepare(
        model, layout_of(model.unet, config.groups, config.outer_groups), LatentStore(mean, torch.zeros_like(mean)),
        bank.encode(["a person", "a robot"]), bank.encode([""]), steps=2, rows=1,
        learning_rate=config.trunk_learning_rate, seed=0, checkpoint=base / "model_index.json",
        on_step=lambda _, loss, __: losses.append(loss), compute=COMPUTE,
    )  # fmt: skip
    return {
        "weights": sum(p.numel() for p in model.unet.parameters()), "latent_size": side, "loss": losses[0],
        "seconds": round(time.monotonic() - began, 1), "processor_seconds": round(time.process_time() - cpu, 1),
        "estimated_gib": planned, "peak_gib_loaded": loaded / GIB, "peak_gib": peak_rss() / GIB,
    }  # fmt: skip


def run(width: int, size: int, folder: Path | None = None) -> dict[str, Any]:
    """Make the base and take the step, each in a process of its own.

    Args:
        width: channels of the U-Net's first block; 320 for the real one.
        size: side of the latents; 64 for the real one.
        folder: of a base that is there already.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        if not (place / "base").is_dir():
            make_base(place, width, size)
        done = subprocess.run(
            [sys.executable, __file__, "--stage", "--folder", str(place)], stdout=subprocess.PIPE, text=True, check=True
        )
    measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "command": "python recipes/benchmark/lean_trunk.py", "width": width, "limit_gib": LIMIT,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.machine(),
                    "torch": torch.__version__},
        "ratio": measured["estimated_gib"]["together"] / measured["peak_gib"], **measured,
    }  # fmt: skip


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320, help="channels of the U-Net's first block")
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--folder", type=Path, help="with the base of an earlier run of full_size.py")
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(step(args.folder / "base")))
        return
    result = run(args.width, args.size, args.folder)
    print(json.dumps(result, indent=1))
    if (args.width, args.size) == (320, 64):
        write_json(RESULTS, result)


if __name__ == "__main__":
    main()
