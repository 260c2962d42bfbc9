"""How fast guardsmith hardens and verifies, against the plain way of doing the same, on this machine.

make benchmark                                     the embedded base and a small Stable Diffusion 1.5
python recipes/benchmark/benchmark.py --what matrix

Parts, each with its raw samples in docs/results/benchmark.json (parts that were not asked for stay as they are):

    tripwire     what the parts of a hardening by the tripwire take on the embedded base: preparing the trunk, five subjects, one
                 more, and the time for each of 1 to 50 (`tripwire_parts.py`)
    embedded     an inner step of APDM on the embedded base, plain (`plain_apdm.py`) and guardsmith's, by turns, on the same rows
    precisions   the same on one thread, in float32 and in bfloat16, also on Stable Diffusion 1.5's layout, by operation
    sd15         the same on a U-Net of Stable Diffusion 1.5's layout with random weights, at the width and size that are given
    floor        U-Net steps of the embedded base: time against FLOPs over the rate of this machine's matrix products
    memory       peak memory of short hardenings, as --dry-run estimates it and as it is
    memory-sd15  the same at the full size of Stable Diffusion 1.5, of those that a machine of 24 GB has room for
    matrix       attacks one after the other with nothing shared, and by `guardsmith verify`
    variants     the same step in channels-last, compiled, in bfloat16, with activations computed again or other optimizers; and
                 what a row takes in larger batches, which is all that several attackers in one forward could win
    growth       seconds against the number of subjects, pictures and attacks and the size of the U-Net, with a line through them
    cloaks       a picture of 512 pixels: RID's network in the paper's shape, and steps of AdvDM on Stable Diffusion 1.5's layout
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tripwire_parts
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peak import peak_rss
from plain_apdm import Plain
from scale import stable_diffusion_unet
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from guardsmith.attacks import AttackData
from guardsmith.cloaks import advdm, aspl
from guardsmith.cloaks.rid import Defender, applied
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.core.errors import GuardsmithError
from guardsmith.diffusion.cache import drawn_by
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import class_prompt
from guardsmith.evaluation.planning import TargetModel, class_file, plan_units
from guardsmith.evaluation.runs import run_unit, run_units
from guardsmith.evaluation.units import Unit
from guardsmith.gate.evidence import Side
from guardsmith.hardening.memory import GIB
from guardsmith.hardening.pipeline import harden
from guardsmith.methods import METHODS, HardeningContext
from guardsmith.methods.apdm import ApdmConfig
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import (
    DiffusionModel,
    builtin_path,
    load_model,
    save_model,
    weights_digest,
    with_own_unet,
)
from guardsmith.registry.loader import Registry, load_registry
from guardsmith.training.compute import ComputeConfig, Precision, configure_denoiser
from guardsmith.training.loop import generator, optimizer_step
from guardsmith.training.optimizers import adamw

ROOT = Path(__file__).parents[2]
PEAK = Path(__file__).parent / "peak.py"
RESULTS = ROOT / "docs" / "results" / "benchmark.json"
TIMES = 9  # blocks of each, by turns


def subject_of(size: int) -> SubjectData:
    """Pictures that show nothing: what is in them does not matter for the time."""
    pictures = torch.rand((16, 3, size, size), generator=generator(1)) * 2 - 1
    return SubjectData("nobody", "person", (), pictures[:4], pictures[4:8], pictures[8:])


def by_turns(
    model: DiffusionModel, config: ApdmConfig, times: int = TIMES, precision: Precision = "float32"
) -> dict[str, Any]:
    """Seconds per inner step of both, block by block, and how far their losses are apart.

    Args:
        model: the base.
        config: of APDM.
        times: blocks of each.
        precision: in which guardsmith's computes; the plain loop is as published, in float32.
    """
    subject = subject_of(model.image_size)
    plain, own = Plain(model, subject, config, seed=0), with_own_unet(model)
    configure_denoiser(own.unet, ComputeConfig(precision=precision))
    theirs, ours = [], []
    processor: tuple[list[float], list[float]] = [], []
    first = plain.step(0)  # also warms everything up
    began: list[float] = []
    busy: list[float] = []

    def on_step(_: int, __: dict[str, float]) -> None:
        began.append(time.perf_counter())
        busy.append(time.process_time())

    losses: list[dict[str, float]] = []
    for turn in range(times):
        began.clear()
        busy.clear()
        two = config.model_copy(update={"outer_steps": 2})
        compute = ComputeConfig(precision=precision)
        context = HardeningContext(
            model=own, subjects=[subject], benign=None, config=two, seed=0, compute=compute, on_step=on_step
        )
        _, losses = METHODS["apdm"].run(context)
        ours.append((began[1] - began[0]) / config.inner_steps)
        processor[1].append((busy[1] - busy[0]) / config.inner_steps)
        begun = time.process_time()
        told = plain.step(turn + 1)
        processor[0].append((time.process_time() - begun) / config.inner_steps)
        theirs.append(told[-1]["seconds"] / config.inner_steps)
    mean = {key: sum(each[key] for each in first) / len(first) for key in ("dpo", "prior")}
    apart = {key: abs(mean[key] - losses[0][key]) for key in mean}
    apart["personalization"] = abs(first[0]["personalization"] - losses[0]["personalization"])
    return {
        "plain_seconds": theirs, "guardsmith_seconds": ours, "inner_steps": config.inner_steps,
        "plain_processor_seconds": processor[0], "guardsmith_processor_seconds": processor[1],
        "ratio": statistics.median(theirs) / statistics.median(ours), "losses_apart": apart, "losses": losses[0],
        "processor_ratio": statistics.median(processor[0]) / statistics.median(processor[1]), "precision": precision,
    }  # fmt: skip


EMBEDDED = ApdmConfig(outer_steps=1, inner_steps=20, batch_size=1, identifiers=("sks",), reduction="element", leak=True,
                      overlap=True, learning_rate=1e-4, personalization_learning_rate=1e-4)  # fmt: skip
"""Paths of the paper's length."""
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def embedded() -> dict[str, Any]:
    """The embedded base."""
    return by_turns(load_model("builtin:avatar"), EMBEDDED)


def precisions(width: int, size: int) -> dict[str, Any]:
    """The published loop against guardsmith's on one thread and without its second one, in float32 and in bfloat16.

    What counts is processor time, so that the machine may do other work meanwhile.

    Args:
        width: channels of the first block of the small Stable Diffusion 1.5.
        size: side of its latents.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = EMBEDDED.model_copy(update={"overlap": False})
    model = load_model("builtin:avatar")
    found: dict[str, Any] = {"embedded": {kind: by_turns(model, alone, 2, kind) for kind in PRECISIONS}}
    found["embedded"]["where"] = {kind: where_time_goes(model, alone, kind) for kind in PRECISIONS}
    model, one = stable_diffusion(width, size), alone.model_copy(update={"inner_steps": 1})
    found["sd15"] = {kind: by_turns(model, one, 1, kind) for kind in PRECISIONS}
    torch.set_num_threads(threads)
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    has = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_fp16") if flag in flags]
    return {"width": width, "latent_size": size, "instructions": has, **found}


def where_time_goes(model: DiffusionModel, config: ApdmConfig, precision: Precision = "float32") -> dict[str, Any]:
    """Shares of processor time by operation in a path of guardsmith's APDM, and the number of calls, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    two = config.model_copy(update={"outer_steps": 2, "inner_steps": 4, "overlap": False})
    own, compute = with_own_unet(model), ComputeConfig(precision=precision)
    configure_denoiser(own.unet, compute)
    subject, watched = subject_of(model.image_size), profile(activities=[ProfilerActivity.CPU])

    def on_step(step: int, _: dict[str, float]) -> None:
        (watched.stop if step else watched.start)()

    context = HardeningContext(
        model=own, subjects=[subject], benign=None, config=two, seed=0, compute=compute, on_step=on_step
    )
    METHODS["apdm"].run(context)
    spent = sorted(watched.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    total = sum(entry.self_cpu_time_total for entry in spent)
    return {
        "inner_steps": two.inner_steps, "microseconds": total,
        "operations": {e.key: {"share": round(e.self_cpu_time_total / total, 3), "calls": e.count} for e in spent[:16]},
    }  # fmt: skip


def stable_diffusion(width: int, size: int) -> DiffusionModel:
    """Networks of Stable Diffusion 1.5's layout with random weights, but this many channels in the U-Net's first block.

    Args:
        width: 320 for the real one.
        size: side of the latents.
    """
    known = load_model("builtin:avatar")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = stable_diffusion_unet(width, size)
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
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
    )
    return DiffusionModel(unet, vae, text, tokenizer, scheduler, "random", builtin_path("avatar"))


def save_base(model: DiffusionModel, folder: Path) -> None:
    """Write a base as diffusers does, in the precision that its weights have."""
    unet = UNet2DConditionModel.from_config(model.unet.config).to(
        model.unet.dtype
    )  # the pipeline's index names the class
    unet.load_state_dict(model.unet.state_dict(), assign=True)
    StableDiffusionPipeline(
        unet=unet, vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, scheduler=model.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


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
    found: dict[str, Any] = {}
    for rows in (2, 5, 32):
        step = unet_step(model, rows)
        with FlopCounterMode(display=False) as counter:
            step()
        samples = seconds_of(step, 10)
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


def unet_step(
    model: DiffusionModel, rows: int, how: ComputeConfig | None = None, layout: str = ""
) -> Callable[[], None]:
    """A training step of a copy of the U-Net on rows of noise.

    Args:
        model: whose.
        rows: how many.
        how: precision, activations and optimizer.
        layout: "channels-last" or "compiled".
    """
    own = with_own_unet(model)
    configure_denoiser(own.unet, how or ComputeConfig())
    unet: Any = own.unet.requires_grad_(True)
    parameters = list(unet.parameters())
    if layout == "channels-last":
        unet = unet.to(memory_format=torch.channels_last)
    if layout == "compiled":
        # Else the shapes of a second model are taken for dimensions that vary.
        unet = torch.compile(unet, dynamic=False)
    optimizer = adamw(parameters, lr=1e-5, kind=(how or ComputeConfig()).optimizer)
    side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
    latents = torch.randn(rows, channels, side, side, generator=generator(2))
    width, tokens = model.unet.config.cross_attention_dim, model.tokenizer.model_max_length
    batch = noise_samples(latents, torch.randn(1, tokens, width, generator=generator(3)), generator(4))

    def step() -> None:
        row_losses(unet, own.scheduler, batch).mean().backward()
        optimizer_step(optimizer, parameters)

    return step


def seconds_of(step: Callable[[], None], times: int) -> list[float]:
    """Of so many calls, after one that does not count."""
    step()
    return [timed(step) for _ in range(times)]


def timed(step: Callable[[], None]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


VARIANTS: dict[str, tuple[ComputeConfig, str]] = {
    "channels-last": (ComputeConfig(), "channels-last"),
    "compiled": (ComputeConfig(), "compiled"),
    "bfloat16": (ComputeConfig(precision="bfloat16"), ""),
    "activations computed again": (ComputeConfig(gradient_checkpointing=True), ""),
    "moments in 8 bits": (ComputeConfig(optimizer="adamw8bit"), ""),
}


def variants(width: int, size: int) -> dict[str, Any]:
    """Each way of computing a step, by turns with the usual one, on the embedded base and on Stable Diffusion 1.5's layout."""
    found: dict[str, Any] = {"width": width, "latent_size": size}
    for label, model, rows, times in (
        ("embedded", load_model("builtin:avatar"), 16, 8), ("sd15", stable_diffusion(width, size), 2, 4),
    ):  # fmt: skip
        samples: dict[str, Any] = {}
        usual = unet_step(model, rows)
        usual()
        for name, (how, layout) in VARIANTS.items():
            try:
                other = unet_step(model, rows, how, layout)
                other()  # what has to be installed, or compiled
                turns = [(timed(usual), timed(other)) for _ in range(times)]
                samples[name] = {"usual": [turn[0] for turn in turns], "so": [turn[1] for turn in turns]}
            except (GuardsmithError, RuntimeError, TypeError) as error:
                samples[name] = str(error).splitlines()[0]
        found[label] = {"rows": rows, "seconds": samples, "speed": {
            name: statistics.median(told["usual"]) / statistics.median(told["so"])
            for name, told in samples.items() if isinstance(told, dict)
        }}  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as attacks run
    model = load_model("builtin:avatar")
    by_rows = {rows: seconds_of(unet_step(model, rows), 6) for rows in (4, 8, 16, 32)}
    torch.set_num_threads(threads)
    each = {rows: statistics.median(seconds) / rows for rows, seconds in by_rows.items()}
    return found | {"stacked": {"seconds": by_rows, "seconds_a_row": each, "most_to_win": each[4] / min(each.values())}}


def line_through(points: dict[int, float]) -> dict[str, float]:
    """Least squares: value = start + slope * number, and the share of the variance that it explains."""
    numbers, values = list(points), list(points.values())
    slope, start = statistics.linear_regression(numbers, values)
    explained = statistics.correlation(numbers, values) ** 2 if len(set(values)) > 1 else 1.0
    return {"start": start, "slope": slope, "explained": explained}


def part_of(registry: Registry, subjects: int, pictures: int) -> Registry:
    """So many of its subjects, with so many pictures to harden on, and one control."""
    chosen = []
    for subject in registry.subjects[:subjects]:
        left = set(subject.images_of("harden")[pictures:])
        chosen.append(subject.model_copy(update={"images": tuple(i for i in subject.images if i not in left)}))
    return registry.model_copy(update={"subjects": tuple(chosen), "controls": registry.controls[:1]})


def growth() -> dict[str, Any]:
    """Short hardenings by Tripwire with 1 to 6 subjects and 1 to 4 pictures, short verifications, U-Nets of several sizes."""
    short = ["steps=20", "copies=4", "class_images=8", "benign_images=16", "transformed=8"]
    short += ["early_steps=[4,8]", "early_images=4"]
    changes = [f"method.params.{change}" for change in short] + ["probe.times=0"]
    known = load_registry(ROOT / "registries" / "avatars.yaml")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def hardened(subjects: int, pictures: int) -> tuple[float, int]:
            recipe = load_recipe("demo", changes)
            told = harden(part_of(known, subjects, pictures), recipe, place / f"{subjects}-{pictures}")
            return told["seconds"], told["unet_forward_equivalents"]

        for what, runs in (
            ("subjects", {n: hardened(n, 4) for n in (1, 2, 4, 6)}), ("pictures", {n: hardened(1, n) for n in (1, 2, 3)})
        ):  # fmt: skip
            seconds, forwards = ({n: run[which] for n, run in runs.items()} for which in (0, 1))
            found[what] = {"seconds": seconds, "seconds_line": line_through(seconds), "forward_equivalents": forwards,
                           "forward_equivalents_line": line_through(forwards)}  # fmt: skip
        registry = part_of(known, 1, 4)
        times = {}
        for count in (1, 2, 4):
            names = list(ATTACKS)[:count]
            attacks = {name: ATTACKS[name] | {"params": ATTACKS[name]["params"] | {"steps": 60}} for name in names}
            recipe = load_recipe("avatar-attacks", [f"verify.attacks={json.dumps(attacks)}"])
            shared = TargetModel(
                load_model(recipe.base), weights_digest(builtin_path("avatar")), place / f"attacks-{count}"
            )
            units = list(plan_units(registry, recipe, {"base": shared}))
            draw_classes(shared, units, recipe)
            began = time.perf_counter()
            run_units(units)
            times[count] = time.perf_counter() - began
        found["attacks"] = {"seconds": times, "seconds_line": line_through(times)}
    sizes = {}
    for width in (32, 64, 96, 128):
        model = stable_diffusion(width, 8)
        millions = round(sum(p.numel() for p in model.unet.parameters()) / 1e6)
        sizes[millions] = statistics.median(seconds_of(unet_step(model, 2), 3))
    found["million_weights"] = {"seconds": sizes, "seconds_line": line_through(sizes)}
    return found


ATTACKS: dict[str, dict[str, Any]] = {
    "dreambooth": {"name": "dreambooth", "params": {"learning_rate": 3e-4, "steps": 300, "batch_size": 2}},
    "lora-4": {"name": "lora", "params": {"learning_rate": 2e-3, "steps": 300, "batch_size": 2, "rank": 4}},
    "lora-32": {"name": "lora", "params": {"learning_rate": 2e-3, "steps": 300, "batch_size": 2, "rank": 32}},
    "textual-inversion": {"name": "textual_inversion",
                          "params": {"learning_rate": 2e-2, "steps": 300, "batch_size": 4, "vectors": 4}},
}  # fmt: skip


SAMPLED = 3  # units of each attack of the matrix that are run plainly, too


def matrix(steps: int) -> dict[str, Any]:
    """The standard matrix: 6 protected subjects and 6 controls, 4 attacks, 2 identifiers, on the base and on a second model.

    Plainly, each attack loads the model, draws the class pictures, trains and draws, one after the other with all threads; some
    of those are measured, as many of each attack, spread over the matrix, and their mean counts for all. guardsmith draws class
    pictures once and runs units in processes of one thread. A second verification that shares its runs on the base
    (`--base-runs`) finds half done.

    Args:
        steps: of every attack (recipes: 300).
    """
    registry = load_registry(ROOT / "registries" / "avatars.yaml")
    attacks = {name: spec | {"params": spec["params"] | {"steps": steps}} for name, spec in ATTACKS.items()}
    recipe = load_recipe("avatar-attacks", [f"verify.attacks={json.dumps(attacks)}", "verify.identifiers=[zwx,xjy]"])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        second = with_own_unet(load_model(recipe.base))
        for parameter in second.unet.parameters():
            parameter.mul_(1.001)
        save_model(second, place / "second")
        models: dict[Side, TargetModel] = {}
        for side, source in (("base", recipe.base), ("hardened", str(place / "second"))):
            model = load_model(source)
            models[side] = TargetModel(model, weights_digest(model.folder), place / side)
        units = list(plan_units(registry, recipe, models))
        began = time.perf_counter()
        for target in models.values():
            draw_classes(target, units, recipe)
        run_units(units)
        seconds = time.perf_counter() - began
        times = {}
        alike = {label: [unit for unit in units if unit.label == label] for label in attacks}
        sampled = [some[len(some) * n // SAMPLED] for some in alike.values() for n in range(SAMPLED)]
        for number, unit in enumerate(sampled):
            began = time.perf_counter()
            model = load_model(recipe.base if unit.side == "base" else str(place / "second"))
            alone = TargetModel(model, unit.model_digest, place / str(number))
            draw_classes(alone, [unit], recipe)
            pictures = str(class_file(alone, unit.noun, recipe))
            run_unit(dataclasses.replace(unit, root=str(alone.root), class_pictures=pictures))
            times[f"{unit.side} {unit.subject} {unit.label} {unit.identifier}"] = time.perf_counter() - began
    plain = len(units) * statistics.mean(times.values())
    return {
        "units": len(units), "steps": steps, "guardsmith_seconds": seconds, "plain_sample_seconds": times, "plain_seconds": plain,
        "ratio": plain / seconds,
    }  # fmt: skip


def draw_classes(target: TargetModel, units: Sequence[Unit], recipe: Recipe) -> None:
    """What attackers draw of their classes before."""
    for noun in dict.fromkeys(unit.noun for unit in units):
        prompts = [class_prompt(noun)] * recipe.verify.class_images
        drawn_by(
            target.model, recipe.sampling, prompts, 60_000, class_file(target, noun, recipe), f"class pictures: {noun}"
        )


TRIPWIRE = {"trunk_steps": 4, "trunk_batch_size": 1, "steps": 2, "positives": 2, "negatives": 4, "benign_images": 2,
            "copies": 2, "transformed": 2, "early_steps": [2], "early_images": 1, "early_sampling_steps": 2}  # fmt: skip
LITTLE = {"optimizer": "adamw8bit", "gradient_checkpointing": True}
APDM = {"outer_steps": 2, "inner_steps": 2, "batch_size": 1}  # the first path meets no moments of the outer AdamW yet
SHORT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "apdm": ("apdm", APDM, {}),
    "apdm, moments in 8 bits": ("apdm", APDM, {"optimizer": "adamw8bit"}),
    "apdm, activations computed again": ("apdm", APDM, {"gradient_checkpointing": True}),
    "apdm along adapters, attention": ("apdm", APDM | {"path": "lora", "parameters": "attention"}, {}),
    "persguard": ("persguard", {"steps": 2, "batch_size": 1, "benign_images": 2}, {}),
    "imma": ("imma", {"steps": 4, "batch_size": 1, "benign_images": 2}, {}),
    "tripwire": (
        "tripwire",
        TRIPWIRE,
        {},
    ),
    "tripwire, moments in 8 bits, activations computed again": ("tripwire", TRIPWIRE, LITTLE),
}  # method, as few steps as its peak needs, how it computes
LEAN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "apdm along adapters, attention": SHORT["apdm along adapters, attention"],
    "apdm along adapters, attention, activations computed again":
        (*SHORT["apdm along adapters, attention"][:2], {"gradient_checkpointing": True}),
    "apdm, moments in 8 bits, activations computed again":
        ("apdm", APDM, LITTLE),
    "tripwire, moments in 8 bits, activations computed again": ("tripwire", TRIPWIRE, LITTLE),
}  # fmt: skip


def memory(width: int, size: int, runs: dict[str, tuple[str, dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Peak memory of short hardenings, as `--dry-run` estimates it and as the system measures it."""
    found: dict[str, Any] = {"width": width, "latent_size": size}
    model = stable_diffusion(width, size)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        save_base(model, folder)
        del model  # there is room for one of them only
        for number, (label, (method, params, how)) in enumerate(runs.items()):
            recipe, out = Path(place) / f"{number}.yaml", Path(place) / str(number)
            asked = {"method": {"name": method, "params": params | {"class_images": 4}}, "base": str(folder), "compute": how,
                     "sampling": {"steps": 2, "batch": 1}, "probe": {"times": 0}}  # fmt: skip
            recipe.write_text(json.dumps(asked))
            command = [sys.executable, str(PEAK), "harden", "--recipe", str(recipe), "--output", str(out), "--subjects",
                       str(ROOT / "registries" / "demo.yaml")]  # fmt: skip
            dry = subprocess.run([*command, "--dry-run", "--json"], stdout=subprocess.PIPE, text=True, check=True)
            told = json.JSONDecoder().raw_decode(dry.stdout)[0]["memory_gib"]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            found[label] = {"estimated_gib": told}
            if run.returncode == 0:
                peak = int(run.stdout.splitlines()[-1]) / GIB
                found[label] |= {"peak_gib": peak, "ratio": told["together"] / peak}
            shutil.rmtree(out, ignore_errors=True)
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


PARTS = {
    "tripwire": lambda args: tripwire_parts.run(),
    "precisions": lambda args: precisions(args.width, args.size),
    "embedded": lambda args: embedded(), "sd15": lambda args: sd15(args.width, args.size), "floor": lambda args: floor(),
    "matrix": lambda args: matrix(args.steps), "memory": lambda args: memory(args.width, args.size, SHORT),
    "memory-sd15": lambda args: memory(320, 64, LEAN),
    "cloaks": lambda args: cloaks(), "variants": lambda args: variants(args.width, args.size),
    "growth": lambda args: growth(),
}  # fmt: skip


def main() -> None:
    """Measure what is asked for, each part in a process of its own, and write everything down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--width", type=int, default=160, help="channels of the first block (Stable Diffusion 1.5: 320)"
    )
    parser.add_argument("--size", type=int, default=32, help="side of its latents (Stable Diffusion 1.5: 64)")
    parser.add_argument("--steps", type=int, default=100, help="of the matrix's attacks")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        [part] = args.what
        told = PARTS[part](args)
        told["peak_rss_gib"] = peak_rss() / GIB
        print(json.dumps(told))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.what:
        settings = []
        if part in ("sd15", "memory", "variants", "precisions"):
            settings = ["--width", str(args.width), "--size", str(args.size)]
        elif part == "matrix":
            settings = ["--steps", str(args.steps)]
        command = [sys.executable, __file__, "--what", part, *settings]
        done = subprocess.run([*command, "--here"], stdout=subprocess.PIPE, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        words = " ".join(["python recipes/benchmark/benchmark.py --what", part, *settings])
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.machine(),
                   "torch": torch.__version__}  # fmt: skip
        known[part] = {"command": words, "machine": machine} | told
        known["summary"] = summary(known)
        write_json(RESULTS, known)
    print_table(known)


def summary(known: dict[str, Any]) -> dict[str, float]:
    """The figures that are aimed for, of the parts that there are."""
    found = {
        name: known[part]["ratio"]
        for name, part in (("apdm_step_ratio_embedded", "embedded"), ("apdm_step_ratio_sd15", "sd15"), ("matrix_ratio", "matrix"))
        if part in known
    }  # fmt: skip
    if "floor" in known:
        found["floor_ratio"] = known["floor"]["32"]["floor_ratio"]
    if "memory-sd15" in known:
        found["peak_rss_gib"] = max(
            told["peak_gib"] for told in known["memory-sd15"].values() if isinstance(told, dict) and "peak_gib" in told
        )
    return found


def print_table(known: dict[str, Any]) -> None:
    """The ratios."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "plain", "guardsmith", "ratio")
    for part, label in (("embedded", "APDM, embedded base: s per inner step"), ("sd15", "APDM, small SD1.5: s per inner step"),
                        ("matrix", "standard matrix, 192 attacks: s")):  # fmt: skip
        if part in known:
            told = known[part]
            plain, ours = (
                told[key] if part == "matrix" else statistics.median(told[key])
                for key in ("plain_seconds", "guardsmith_seconds")
            )
            table.add_row(label, f"{plain:.3g}", f"{ours:.3g}", f"{told['ratio']:.2f}")
    for part, size in (("memory", "small SD1.5"), ("memory-sd15", "SD1.5")):
        for label, told in known.get(part, {}).items():
            if isinstance(told, dict) and "peak_gib" in told:
                estimated, peak = told["estimated_gib"]["together"], told["peak_gib"]
                words = f"{label}, {size}: peak memory in GiB (estimated, measured)"
                table.add_row(words, f"{estimated:.3g}", f"{peak:.3g}", f"{told['ratio']:.2f}")
    for label in ("embedded", "sd15"):
        for name, ratio in known.get("variants", {}).get(label, {}).get("speed", {}).items():
            table.add_row(f"a training step {name}, {label}: times as fast", "", "", f"{ratio:.2f}")
    for what, told in known.get("growth", {}).items():
        if isinstance(told, dict) and "seconds_line" in told:
            line = told["seconds_line"]
            words = f"{line['start']:.1f} s and {line['slope']:.2g} s for each (r2 {line['explained']:.2f})"
            table.add_row(f"growth with {what.replace('_', ' ')}", "", words, "")
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


if __name__ == "__main__":
    main()
