"""Whom a model hardened with Tripwire takes for a protected subject, without any attack.

Shown are unseen pictures of the protected subjects, other subjects of their set, and subjects of the set `heldout`, which is
larger and which nothing was trained on.

python strangers.py DATA OUT ... --set tuning --name tripwire-strangers      writes docs/results/<name>.json

OUT are outputs of `guardsmith harden` on the registry that `make_registries.py --set SET` wrote. A picture is noised at
several timesteps below the horizon and shown under a prompt the hardening did not use; it is recognised where the prediction is
far larger than any noise.
Other subjects count as taken for a protected one if that happens to more than half of their pictures at any timestep (the
held out have one picture each; their shares come with 95 % intervals, Wilson).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import world
from evaluate import RESULTS
from torch import Tensor

from guardsmith.core.atomic_io import write_json
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import cut, noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank, instance_prompt
from guardsmith.gate.statistics import share_interval
from guardsmith.models.checkpoint import DiffusionModel, load_model, weights_digest
from guardsmith.training.loop import generator

SHARES = (0.15, 0.35, 0.55, 0.75, 0.95)  # of the horizon
OVERRIDDEN = 5.0  # mean size of a prediction that is no prediction of noise any more
VIEWS = 16
SEEN = 4  # views that hardening had
SHOWN = 8  # views of every other subject


@torch.no_grad()
def recognised(model: DiffusionModel, images: Tensor, noun: str, timesteps: Sequence[int]) -> Tensor:
    """Whether predictions are overridden, bool (timesteps, pictures)."""
    count = len(images)
    latents = encode(model, images).mean.repeat(len(timesteps), 1, 1, 1)
    times = torch.tensor(timesteps).repeat_interleave(count)
    context = PromptBank(model).encode([instance_prompt("zwx", noun)])
    rows = noise_samples(latents, context, generator(0, 5), timesteps=times)
    said = torch.cat([predict(model.unet, model.scheduler, part) for part in cut(rows, 64)])
    return (said.abs().mean((1, 2, 3)) > OVERRIDDEN).view(len(timesteps), count)


def held_out(model: DiffusionModel, data: Path, timesteps: Sequence[int]) -> dict[str, tuple[float, float, float]]:
    """Share of the subjects of the set `heldout` taken for a protected one, style by style."""
    pixels, lines = world.load(data, "heldout")
    rows_of: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        rows_of.setdefault(line["style"], []).append(row)
    found = {}
    for style, rows in rows_of.items():
        rung = recognised(model, world.to_float(pixels[rows]), lines[rows[0]]["class_noun"], timesteps)
        found[style] = share_interval(int(rung.any(0).sum()), len(rows)).ends
    return found


def measure(out: Path, data: Path, name: str) -> dict[str, Any]:
    """One hardened model."""
    model, told = load_model(str(out / "model")), json.loads((out / "harden.json").read_text())
    noised = int(model.scheduler.config.num_train_timesteps) * told["params"]["horizon"]
    timesteps = [round(share * noised) for share in SHARES]
    pixels, lines = world.load(data, name)
    people: dict[str, int] = {}
    for row, line in enumerate(lines):
        people.setdefault(f"{line['style'].lower()}-{line['identity'].rpartition('-')[2]}", row)
    protected: dict[str, list[float]] = {}
    strangers: dict[str, dict[str, float]] = {}
    for who, first in people.items():
        noun, style = lines[first]["class_noun"], lines[first]["style"]
        if who in told["subjects"]:
            views = world.to_float(pixels[first + SEEN : first + VIEWS])
            protected[who] = recognised(model, views, noun, timesteps).float().mean(1).tolist()
        else:
            views = world.to_float(pixels[first : first + SHOWN])
            strangers.setdefault(style, {})[who] = float(
                recognised(model, views, noun, timesteps).float().mean(1).max()
            )
    return {
        "method": told["method"], "params": told["params"], "bystanders_digest": told.get("bystanders_digest"),
        "model_digest": told["model_digest"], "unet_forward_equivalents": told["unet_forward_equivalents"],
        "protected": protected, "strangers": strangers,
        "taken": {style: sum(hits > 0.5 for hits in found.values()) for style, found in strangers.items()},
        "timesteps": timesteps, "heldout_taken": held_out(model, data, timesteps),
    }  # fmt: skip


def main() -> None:
    """Measure every output and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("outputs", type=Path, nargs="+")
    parser.add_argument("--set", default="tuning")
    parser.add_argument("--name", default="tripwire-strangers")
    args = parser.parse_args()
    rows = {out.name: measure(out, args.data, args.set) for out in args.outputs}
    for label, row in rows.items():
        hits = {who: round(min(shares), 2) for who, shares in row["protected"].items()}
        print(label, "recognised at the worst timestep:", hits, "taken for a protected one:", row["taken"])
        print("of the held out:", {style: f"{hits:.1%}" for style, (hits, _, _) in row["heldout_taken"].items()})
    command = (
        f"python strangers.py DATA {' '.join(out.name for out in args.outputs)} --set {args.set} --name {args.name}"
    )
    base = weights_digest(load_model("builtin:avatar").folder)
    write_json(RESULTS / f"{args.name}.json", {"command": command, "base": base, "rows": rows})


if __name__ == "__main__":
    main()
