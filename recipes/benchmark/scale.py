"""What a registry of thousands would cost on Stable Diffusion 1.5: an estimate on paper, nothing is trained.

python recipes/benchmark/scale.py    writes docs/results/scale.json, and prints the table of docs/explanation/large-registries.md

Work is what the methods count themselves (`Method.cost`, which `guardsmith harden --dry-run` prints), by the recipes shipped for
that model, times the FLOPs of one row through a U-Net of its shape (counted on shapes alone). What a subject gets of a method's
steps is the same whatever their number: of PersGuard, IMMA and APDM what the recipe gives to one. Tripwire's trunk is that of
every registry, and its recogniser is no U-Net: its steps are not among the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.hardening.memory import BYTES, GIB
from guardsmith.methods import METHODS
from guardsmith.methods.tripwire.examples import EARLY_COPIES, EARLY_TRANSFORMED
from guardsmith.models.families import SDUNet

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "scale.json"
COUNTS = (1, 5, 20, 80, 640, 10_000)
SIDE = 64  # of the latents
PICTURES = 4  # of a subject to harden on, as in the shipped registries
SAMPLE = 300  # protected subjects attacked: if all hold, at most 1 % of the others do not (rule of three, 95 %)
CONTROLS = 30
RATE = 100e12  # FLOP/s: a third of what an A100 is sold for in bfloat16. Assumed, not measured


def stable_diffusion_unet(width: int = 320, side: int = SIDE) -> SDUNet:
    """A U-Net of Stable Diffusion 1.5's layout, weights as they come.

    Args:
        width: channels of the first block; those are the real one's.
        side: of the latents.
    """
    channels = (width, 2 * width, 4 * width, 4 * width)
    return SDUNet(sample_size=side, block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8)


def forward_flops(unet: Any) -> int:
    """Of one row."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        unet(
            torch.empty(1, 4, SIDE, SIDE), torch.empty(1, dtype=torch.long), torch.empty(1, 77, 768), return_dict=False
        )
    return int(counter.get_total_flops())


def params_for(method: str, count: int) -> dict[str, Any]:
    """The recipe's parameters, for so many subjects."""
    params = load_recipe(f"{method}-sd15", []).method.params
    if method == "tripwire":
        return dict(params)
    steps = "outer_steps" if method == "apdm" else "steps"
    return params | {steps: params[steps] * count}


def kept_latents(config: Any) -> int:
    """How many latents of a subject a method keeps in memory: of its pictures, variations, and early pictures (Tripwire)."""
    kept = PICTURES * (1 + getattr(config, "copies", 0) + getattr(config, "transformed", 0))
    early = len(getattr(config, "early_steps", ())) * getattr(config, "early_images", 0)
    return kept + early * (1 + EARLY_COPIES + (EARLY_TRANSFORMED if getattr(config, "transformed", 0) else 0))


def verification() -> dict[str, int]:
    """Forward equivalents of one unit of every attack of the recipe: training with gradients (3 a row) and guided drawing."""
    recipe = load_recipe("tripwire-sd15", [])
    drawing = recipe.verify.images_per_unit * recipe.sampling.steps * 2
    found = {}
    for label, spec in recipe.verify.attacks.items():
        prior = spec.name != "textual_inversion"  # a word has no prior preservation
        rows = spec.params["batch_size"] * (1 + prior)
        found[label] = 3 * rows * spec.params["steps"] + drawing
    return found


def estimate() -> dict[str, Any]:
    """Rows of methods and numbers of subjects."""
    with torch.device("meta"):
        unet = stable_diffusion_unet()
    flops = forward_flops(unet)
    latent = 4 * SIDE * SIDE * BYTES
    rows = []
    for method in ("tripwire", "persguard", "imma", "apdm"):
        found = METHODS[method]
        for count in COUNTS:
            params = params_for(method, count)
            config = found.config(**params)
            forwards = found.cost(config, ["person"] * count)
            kept = kept_latents(config)
            rows.append({
                "method": method, "subjects": count, "params": params, "unet_forward_equivalents": forwards,
                "hours": forwards * flops / RATE / 3600, "latents_gib": count * kept * latent / GIB,
            })  # fmt: skip
    units = verification()
    forwards = 2 * (SAMPLE + CONTROLS) * sum(units.values())
    return {
        "command": "python recipes/benchmark/scale.py", "estimate": True, "flops_a_row": flops, "flops_a_second": RATE,
        "rows": rows,
        "verification": {"attacked": SAMPLE, "controls": CONTROLS, "a_unit": units, "unet_forward_equivalents": forwards,
                         "hours": forwards * flops / RATE / 3600},
    }  # fmt: skip


def markdown(told: dict[str, Any]) -> str:
    """The rows as a table: million forward equivalents, and hours."""
    methods = list(dict.fromkeys(row["method"] for row in told["rows"]))
    lines = [f"| subjects | {' | '.join(methods)} |", "|---" * (1 + len(methods)) + "|"]
    for count in COUNTS:
        cells = []
        for row in (row for row in told["rows"] if row["subjects"] == count):
            forwards, hours = row["unet_forward_equivalents"] / 1e6, row["hours"]
            cells.append(f"{forwards:,.{2 if forwards < 10 else 0}f} M; {hours:,.{2 if hours < 10 else 0}f} h")
        lines.append(f"| {count:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Estimate, write, print."""
    told = estimate()
    write_json(RESULTS, told)
    print(markdown(told))


if __name__ == "__main__":
    main()
