"""How fast guardsmith hardens and verifies, against the plain way of doing the same, on this machine.

make benchmark                                     the embedded base and a small Stable Diffusion 1.5
python recipes/benchmark/benchmark.py --what matrix

Parts, each with its raw samples in docs/results/benchmark.json (parts that were not asked for stay as they are):

    embedded     an inner step of APDM on the embedded base, plain (`plain_apdm.py`) and guardsmith's, by turns, on the same rows
    sd15         the same on a U-Net of Stable Diffusion 1.5's layout with random weights, at the width and size that are given
    floor        U-Net steps of the embedded base: time against FLOPs over the rate of this machine's matrix products
    memory       peak memory of short hardenings, as --dry-run estimates it and as it is
    matrix       attacks one after the other with nothing shared, and by `guardsmith verify`
    cloaks       a picture of 512 pixels: RID's network in the paper's shape, and steps of AdvDM on Stable Diffusion 1.5's layout
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from plain_apdm import Plain
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from guardsmith.attacks import AttackData
from guardsmith.cloaks import advdm, aspl
from guardsmith.cloaks.rid import Defender, applied
from guardsmith.drawing import drawn_by
from guardsmith.losses import draw_rows, row_losses
from guardsmith.matrix import Judged, class_file, plan_units, run_unit, run_units
from guardsmith.methods import apdm
from guardsmith.methods.apdm import ApdmConfig
from guardsmith.methods.data import SubjectData
from guardsmith.models import DiffusionModel, builtin_path, load_model, weights_digest, with_own_unet
from guardsmith.prompts import class_prompt
from guardsmith.recipe import Recipe, load_recipe
from guardsmith.records import write_json
from guardsmith.registry import load_registry
from guardsmith.training import generator, optimizer_step

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "benchmark.json"
TIMES = 3  # blocks of each, by turns


def subject_of(size: int) -> SubjectData:
    """Pictures that show nothing: what is in them does not matter for the time."""
    pictures = torch.rand((16, 3, size, size), generator=generator(1)) * 2 - 1
    return SubjectData("nobody", "person", (), pictures[:4], pictures[4:8], pictures[8:])


def by_turns(model: DiffusionModel, config: ApdmConfig, times: int = TIMES) -> dict[str, Any]:
    """Seconds per inner step of both, block by block, and how far their losses are apart."""
    subject = subject_of(model.image_size)
    plain = Plain(model, subject, config, seed=0)
    theirs, ours = [], []
    first = plain.step(0)  # also warms everything up
    began: list[float] = []

    def on_step(_: int, __: dict[str, float]) -> None:
        began.append(time.perf_counter())

    losses: list[dict[str, float]] = []
    for turn in range(times):
        began.clear()
        _, losses = apdm.harden(
            model, [subject], None, config.model_copy(update={"outer_steps": 2}), seed=0, on_step=on_step
        )
        ours.append((began[1] - began[0]) / config.inner_steps)
        told = plain.step(turn + 1)
        theirs.append(told[-1]["seconds"] / config.inner_steps)
    mean = {key: sum(each[key] for each in first) / len(first) for key in ("dpo", "prior")}
    apart = {key: abs(mean[key] - losses[0][key]) for key in mean}
    apart["personalization"] = abs(first[0]["personalization"] - losses[0]["personalization"])
    return {
        "plain_seconds": theirs, "guardsmith_seconds": ours, "inner_steps": config.inner_steps,
        "ratio": statistics.median(theirs) / statistics.median(ours), "losses_apart": apart,
    }  # fmt: skip


def embedded() -> dict[str, Any]:
    """The embedded base, paths of the paper's length."""
    config = ApdmConfig(outer_steps=1, inner_steps=20, batch_size=1, identifiers=("sks",), reduction="element", leak=True,
                        learning_rate=1e-4, personalization_learning_rate=1e-4)  # fmt: skip
    return by_turns(load_model("builtin:avatar"), config)


def stable_diffusion(width: int, size: int) -> DiffusionModel:
    """Networks of Stable Diffusion 1.5's layout with random weights, but this many channels in the U-Net's first block.

    Args:
        width: 320 for the real one.
        size: side of the latents.
    """
    known = load_model("builtin:avatar")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=size, block_out_channels=(width, 2 * width, 4 * width, 4 * width), cross_attention_dim=768,
            attention_head_dim=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=8 * size,
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(known.tokenizer), hidden_size=768, intermediate_size=3072,
                                            num_hidden_layers=12, num_attention_heads=12))  # fmt: skip
    for network in (unet, vae, text):
        network.eval().requires_grad_(False)
    tokenizer = known.tokenizer
    tokenizer.model_max_length = 77
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return DiffusionModel(unet, vae, text, tokenizer, scheduler, "random", builtin_path("avatar"))


def sd15(width: int, size: int) -> dict[str, Any]:
    """Stable Diffusion 1.5's layout."""
    config = ApdmConfig(
        outer_steps=1, inner_steps=2, batch_size=1, identifiers=("sks",), reduction="element", leak=True
    )
    model = stable_diffusion(width, size)
    weights = sum(p.numel() for p in model.unet.parameters())
    return {"width": width, "latent_size": size, "unet_weights": weights} | by_turns(model, config, 2)


def matrix_product_rate() -> float:
    """FLOPs per second of float32 matrix products of 1024 x 1024 here, the best of ten."""
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best


def floor() -> dict[str, Any]:
    """Training steps of the embedded base's U-Net, and what the same FLOPs take as one large matrix product."""
    from torch.profiler import ProfilerActivity, profile

    model = load_model("builtin:avatar")
    own = with_own_unet(model)
    own.unet.requires_grad_(True)
    parameters = list(own.unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    found: dict[str, Any] = {}
    for rows in (2, 5, 32):
        side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
        batch = draw_rows(
            torch.randn(rows, channels, side, side, generator=generator(2)),
            torch.randn(
                1, model.tokenizer.model_max_length, model.unet.config.cross_attention_dim, generator=generator(3)
            ),
            generator(4),
        )

        def step(batch: Any = batch) -> None:
            row_losses(own.unet, own.scheduler, batch).mean().backward()
            optimizer_step(optimizer, parameters)

        with FlopCounterMode(display=False) as counter:
            step()
        samples = []
        for _ in range(10):
            began = time.perf_counter()
            step()
            samples.append(time.perf_counter() - began)
        rate = matrix_product_rate()
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            for _ in range(3):
                step()
        spent = sorted(watched.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
        total = sum(entry.self_cpu_time_total for entry in spent)
        flops = counter.get_total_flops()
        found[str(rows)] = {
            "seconds": samples, "flops": flops, "matrix_product_rate": rate,
            "floor_ratio": statistics.median(samples) / (flops / rate),
            "where": {entry.key: round(entry.self_cpu_time_total / total, 3) for entry in spent[:8]},
        }  # fmt: skip
    return found


ATTACKS = {
    "dreambooth": {"name": "dreambooth", "params": {"learning_rate": 3e-4, "steps": 300, "batch_size": 2}},
    "lora-4": {"name": "lora", "params": {"learning_rate": 2e-3, "steps": 300, "batch_size": 2, "rank": 4}},
    "lora-32": {"name": "lora", "params": {"learning_rate": 2e-3, "steps": 300, "batch_size": 2, "rank": 32}},
    "textual-inversion": {"name": "textual_inversion",
                          "params": {"learning_rate": 2e-2, "steps": 300, "batch_size": 4, "vectors": 4}},
}  # fmt: skip


def matrix() -> dict[str, Any]:
    """Four attacks with two identifiers on the demo's subject and control, on the base: 16 units.

    Plainly, each loads the model, draws the class pictures, attacks and draws, one after the other with all threads; guardsmith
    draws class pictures once and runs units in processes of one thread. A second verification that shares its runs on the base
    (`--base-runs`) would find all of them done.
    """
    registry = load_registry(ROOT / "registries" / "demo.yaml")
    asked = [f"verify.attacks={json.dumps(ATTACKS)}", "verify.identifiers=[zwx,xjy]"]
    recipe = load_recipe("avatar-attacks", asked)
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        shared = Judged(load_model(recipe.base), weights_digest(builtin_path("avatar")), Path(place) / "shared")
        units = list(plan_units(registry, recipe, {"base": shared}))
        began = time.perf_counter()
        for noun in dict.fromkeys(unit.noun for unit in units):
            draw_class(shared, noun, recipe)
        run_units(units)
        told["guardsmith_seconds"] = time.perf_counter() - began
        told["units"] = len(units)
        times = []
        for number, unit in enumerate(units):
            began = time.perf_counter()
            alone = Judged(load_model(recipe.base), shared.digest, Path(place) / str(number))
            draw_class(alone, unit.noun, recipe)
            run_unit(
                dataclasses.replace(
                    unit, root=str(alone.root), class_pictures=str(class_file(alone, unit.noun, recipe))
                )
            )
            times.append(time.perf_counter() - began)
    return told | {"plain_seconds": times, "ratio": sum(times) / told["guardsmith_seconds"]}


def draw_class(judged: Judged, noun: str, recipe: Recipe) -> None:
    """What an attacker draws of the class before."""
    prompts = [class_prompt(noun)] * recipe.verify.class_images
    drawn_by(judged.model, recipe, prompts, 60_000, class_file(judged, noun, recipe), f"class pictures: {noun}")


SHORT = {
    "apdm": {"outer_steps": 2, "inner_steps": 2, "batch_size": 1},
    "persguard": {"steps": 2, "batch_size": 1, "ordinary_images": 2},
    "imma": {"steps": 4, "batch_size": 1, "ordinary_images": 2},
    "tripwire": {"steps": 2, "batch_size": 2, "rehearsal_steps": 0, "ordinary_images": 2},
}  # of each method, as few steps as its peak needs


def memory(width: int, size: int) -> dict[str, Any]:
    """Peak memory of short hardenings, as `--dry-run` estimates it and as the system measures it."""
    found: dict[str, Any] = {"width": width, "latent_size": size}
    model = stable_diffusion(width, size)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
        StableDiffusionPipeline(
            **parts, tokenizer=model.tokenizer, scheduler=model.scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
        for name, params in SHORT.items():
            recipe = Path(place) / f"{name}.yaml"
            asked = {"method": {"name": name, "params": params | {"class_images": 4}}, "base": str(folder),
                     "sampling": {"steps": 2, "batch": 1}, "probe": {"times": 0}}  # fmt: skip
            recipe.write_text(json.dumps(asked))
            out = Path(place) / name
            command = [sys.executable, "-c", WATCHED, "harden", "--recipe", str(recipe), "--output", str(out), "--subjects",
                       str(ROOT / "registries" / "demo.yaml")]  # fmt: skip
            dry = subprocess.run([*command, "--dry-run"], stdout=subprocess.PIPE, text=True, check=True)
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            told = json.JSONDecoder().raw_decode(dry.stdout)[0]["memory_gib"]
            peak = float(run.stdout.splitlines()[-1]) / 2**20
            found[name] = {"estimated_gib": told, "peak_gib": peak, "ratio": told["together"] / peak}
            shutil.rmtree(out)
    return found


def cloaks() -> dict[str, Any]:
    """Seconds for one picture of 512 pixels, by networks of the papers' sizes with random weights.

    AdvDM and ASPL are so many steps on the pixels; some of AdvDM's are measured. A step of ASPL on the pixels is the same work;
    training its surrogate between them comes on top (not measured: it does not fit into the memory of a laptop).
    """
    model = stable_diffusion(320, 64)
    picture = torch.rand((1, 3, model.image_size, model.image_size), generator=generator(1)) * 2 - 1
    defender = Defender(model.image_size, 16, 1152, 14, 8)
    passes = []
    with torch.no_grad():
        for _ in range(6):
            began = time.perf_counter()
            applied(defender, picture, 8)
            passes.append(time.perf_counter() - began)
    ends = [time.perf_counter()]
    advdm.cloak(
        [model], AttackData(picture, picture[:0], "sks", "person"), advdm.AdvdmConfig(steps=4), seed=0,
        on_step=lambda _: ends.append(time.perf_counter()),
    )  # fmt: skip
    steps = [after - before for before, after in itertools.pairwise(ends)][1:]
    settings = aspl.AsplConfig()
    taken = {"advdm": advdm.AdvdmConfig().steps, "aspl, without its surrogate": settings.rounds * settings.steps}
    one = statistics.median(passes[1:])
    return {
        "rid_seconds": passes[1:], "rid_weights": sum(p.numel() for p in defender.parameters()), "step_seconds": steps,
        "steps": taken, "ratios": {name: count * statistics.median(steps) / one for name, count in taken.items()},
    }  # fmt: skip


WATCHED = """
import resource, sys
from guardsmith.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""
"""The command line, and after it the peak memory of its process in KiB."""


PARTS = {
    "embedded": lambda args: embedded(), "sd15": lambda args: sd15(args.width, args.size), "floor": lambda args: floor(),
    "matrix": lambda args: matrix(), "memory": lambda args: memory(args.width, args.size),
    "cloaks": lambda args: cloaks(),
}  # fmt: skip


def main() -> None:
    """Measure what is asked for, each part in a process of its own, and write everything down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", nargs="+", choices=PARTS, default=["embedded", "sd15", "floor"])
    parser.add_argument(
        "--width", type=int, default=160, help="channels of the first block (Stable Diffusion 1.5: 320)"
    )
    parser.add_argument("--size", type=int, default=32, help="side of its latents (Stable Diffusion 1.5: 64)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        [part] = args.what
        told = PARTS[part](args)
        told["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(told))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.what:
        settings = ["--width", str(args.width), "--size", str(args.size)] if part in ("sd15", "memory") else []
        command = [sys.executable, __file__, "--what", part, *settings]
        done = subprocess.run([*command, "--here"], stdout=subprocess.PIPE, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        words = " ".join(["python recipes/benchmark/benchmark.py --what", part, *settings])
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.machine(),
                   "torch": torch.__version__}  # fmt: skip
        known[part] = {"command": words, "machine": machine} | told
        write_json(RESULTS, known)
    print_table(known)


def print_table(known: dict[str, Any]) -> None:
    """The ratios."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "plain", "guardsmith", "ratio")
    for part, label in (("embedded", "APDM, embedded base: s per inner step"), ("sd15", "APDM, small SD1.5: s per inner step"),
                        ("matrix", "16 attacks: s")):  # fmt: skip
        if part in known:
            told = known[part]
            plain, ours = (
                statistics.median(told[key]) if part != "matrix" else total(told[key])
                for key in ("plain_seconds", "guardsmith_seconds")
            )
            table.add_row(label, f"{plain:.3g}", f"{ours:.3g}", f"{told['ratio']:.2f}")
    for method, told in known.get("memory", {}).items():
        if method in SHORT:
            label = f"{method}, small SD1.5: peak memory in GiB (estimated, measured)"
            table.add_row(
                label, f"{told['estimated_gib']['together']:.3g}", f"{told['peak_gib']:.3g}", f"{told['ratio']:.2f}"
            )
    if "cloaks" in known:
        told = known["cloaks"]
        for name, count in told["steps"].items():
            table.add_row(
                f"a picture of 512 px, {name} ({count} steps) against RID: s",
                f"{count * statistics.median(told['step_seconds']):.3g}", f"{statistics.median(told['rid_seconds']):.3g}",
                f"{told['ratios'][name]:.0f}",
            )  # fmt: skip
    for rows, told in known.get("floor", {}).items():
        if isinstance(told, dict) and "floor_ratio" in told:
            label = f"training step of the embedded U-Net, {rows} rows: s, against its floor"
            table.add_row(label, "", f"{statistics.median(told['seconds']):.3g}", f"{told['floor_ratio']:.2f}")
    Console().print(table)


def total(value: float | list[float]) -> float:
    """Of one number or several."""
    return sum(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
