"""Step times and peak memory of hardenings and attacks on an accelerator, against what the plan says: one page.

python recipes/benchmark/gpu.py --base stable-diffusion-v1-5/stable-diffusion-v1-5    writes gpu.json and gpu.md to docs/results
python recipes/benchmark/gpu.py --device cpu --output FOLDER                            the embedded base; says that it is no GPU

Each line is a few steps of one method or attack in one precision, after steps to warm up: the median of their seconds, and the
most memory that torch had allocated, beside the estimate of `guardsmith harden --dry-run`. Nobody has run it on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peak import peak_rss

from guardsmith.attacks import ATTACKS, AttackData
from guardsmith.config.recipe import MethodSpec, Recipe
from guardsmith.core.atomic_io import write_json, write_text
from guardsmith.core.errors import GuardsmithError, out_of_memory
from guardsmith.hardening.memory import GIB, estimate
from guardsmith.methods import METHODS, HardeningContext
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.models.checkpoint import DiffusionModel, load_model, with_own_unet
from guardsmith.runtime.device import VARIABLE, chosen_device
from guardsmith.training.compute import ComputeConfig, configure_denoiser

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PRECISIONS = ("float32", "bfloat16", "float16")
WARM_UP = 2
HARDENINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "PersGuard, all weights": ("persguard", {"distillation_weight": 0.0}, {"gradient_checkpointing": True}),
    "IMMA, adapters": ("imma", {}, {}),
    "APDM along adapters, attention": (
        "apdm", {"inner_steps": 2, "path": "lora", "parameters": "attention"}, {"gradient_checkpointing": True}),
}  # fmt: skip
ATTACKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DreamBooth, one picture and one of the class": ("dreambooth", {"batch_size": 1}),
    "LoRA, rank 4": ("lora", {"batch_size": 1}),
}
Line = dict[str, Any]


def pictures(model: DiffusionModel, count: int) -> torch.Tensor:
    """Noise, float32 (count, 3, h, w) in [-1, 1]: what is in a picture takes no time."""
    side = model.image_size
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(count)) * 2 - 1


def measured(run: Callable[[Callable[..., None]], object]) -> Line:
    """Seconds between the steps of a run, which calls what it is given after each, and its peak memory in GiB."""
    device, ends = chosen_device(), list[float]()

    def on_step(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run(on_step)
    except (RuntimeError, GuardsmithError) as error:
        reason = "out of memory" if out_of_memory(error) else str(error).splitlines()[0]
        return {"seconds": None, "peak_gib": None, "failed": reason}
    seconds = [after - before for before, after in pairwise(ends)][WARM_UP - 1 :]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak_gib": peak / GIB}


def harden_once(model: DiffusionModel, label: str, precision: str, steps: int) -> Line:
    """A few steps of a method in one precision."""
    name, params, how = HARDENINGS[label]
    method, compute = METHODS[name], ComputeConfig(precision=precision, **how)
    count = {"outer_steps" if name == "apdm" else "steps": steps + WARM_UP}
    config = method.config(**params | count)
    base = with_own_unet(model)
    configure_denoiser(base.unet, compute)
    own, drawn = pictures(base, 2), pictures(base, 3)
    subject = SubjectData("subject", "person", (), own, drawn[:2], drawn, instead_images=own)
    benign = BenignData(own, ["a photo", "a picture"])
    recipe = Recipe(base=model.source, method=MethodSpec(name=name, params=params | count), compute=compute)
    planned = estimate(recipe, method, config)["together"]
    line = measured(
        lambda on_step: method.run(
            HardeningContext(model=base, subjects=[subject], benign=benign, config=config, seed=0, compute=compute,
                             on_step=on_step)
        )
    )  # fmt: skip
    return {"what": label, "precision": precision, "planned_gib": planned} | line


def attack_once(model: DiffusionModel, label: str, precision: str, steps: int) -> Line:
    """A few steps of an attack in one precision."""
    name, params = ATTACKERS[label]
    attacked, attack = with_own_unet(model), ATTACKS[name]
    attacked.unet.compute_in(precision)
    data = AttackData(pictures(model, 2), pictures(model, 3), "sks", "person")
    config = attack.config(**params, steps=steps + WARM_UP)
    line = measured(lambda on_step: attack.run(attacked, data, config, seed=0, on_step=on_step))
    return {"what": label, "precision": precision, "planned_gib": None} | line


def markdown(found: dict[str, Any]) -> str:
    """The page."""
    machine = found["machine"]
    lines = ["# On an accelerator", ""]
    if not found["measured_on_a_gpu"]:
        lines += [
            f"**Not measured on a GPU yet**: what follows was measured on {machine['device']} and says nothing of one.",
            "",
        ]
    lines += [
        f"{found['base']}, {found['image_size']} px, {found['steps']} steps each on {machine['device']}, torch "
        f"{machine['torch']} (`{found['command']}`, [data](gpu.json)). Peak memory is what torch allocated there; on a CPU it is "
        "the most that the process had until then.",
        "",
        "| what | precision | seconds a step | peak, GiB | planned, GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in found["lines"]:
        cells = [line["failed"], "", ""] if "failed" in line else [f"{line['seconds']:.3g}", f"{line['peak_gib']:.1f}"]
        if "failed" not in line:
            cells.append("" if line["planned_gib"] is None else f"{line['planned_gib']:.1f}")
        lines.append(f"| {line['what']} | {line['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(base: str, steps: int, precisions: tuple[str, ...] = PRECISIONS) -> dict[str, Any]:
    """Measure everything; see the module.

    Args:
        base: folder, Hub id or `builtin:avatar`.
        steps: that are timed, of each.
        precisions: to compute in.
    """
    model, device = load_model(base), chosen_device()
    lines = [harden_once(model, label, each, steps) for label in HARDENINGS for each in precisions]
    lines += [attack_once(model, label, each, steps) for label in ATTACKERS for each in precisions]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"device": f"{device.type} ({name})", "torch": torch.__version__, "threads": torch.get_num_threads()}
    command = f"python recipes/benchmark/gpu.py --base {base} --steps {steps} --device {device}"
    return {"command": command, "base": base, "image_size": model.image_size, "steps": steps, "machine": machine,
            "measured_on_a_gpu": device.type not in ("cpu", "meta"), "lines": lines}  # fmt: skip


def main() -> None:
    """Measure, write the page and its data, print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin:avatar", help="folder, Hub id or builtin:avatar")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, of each")
    parser.add_argument("--device", help="as guardsmith's own --device")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for gpu.json and gpu.md")
    args = parser.parse_args()
    if args.device:
        os.environ[VARIABLE] = args.device
    found = run(args.base, args.steps, tuple(args.precisions))
    write_json(args.output / "gpu.json", found)
    write_text(args.output / "gpu.md", markdown(found))
    print(json.dumps(found["machine"]))
    print(markdown(found))


if __name__ == "__main__":
    main()
