"""Samplers, scales, pipelines and accelerators that people use: does the hardened model collapse where the base does not?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from guardsmith.core.errors import RunFailed
from guardsmith.evaluation.deployability.bench import SIDES, Bench, attempt, compared_collapse, solver
from guardsmith.evaluation.deployability.intervals import paired_excess
from guardsmith.gate.deployability import Measurement

TOGETHER = "all settings together"
STRENGTH = 0.6
"""How far img2img goes back."""
Draw = Callable[[Bench, str], Tensor]


def sampled(bench: Bench, side: str, kind: Any, steps: int, guidance: float | None = None, **settings: Any) -> Tensor:
    """Pictures by another scheduler, number of steps or scale."""
    pipeline = bench.pipeline(side)
    usual = pipeline.scheduler
    pipeline.scheduler = solver(pipeline, kind, **settings)
    try:
        return bench.draw(pipeline, steps=steps, guidance=guidance)
    finally:
        pipeline.scheduler = usual


def image_to_image(bench: Bench, side: str) -> Tensor:
    """The base's pictures drawn again under their prompts."""
    before = (bench.plain("base", "first") + 1) / 2
    pipeline = AutoPipelineForImage2Image.from_pipe(bench.pipeline(side))
    pipeline.set_progress_bar_config(disable=True)
    steps = round(bench.steps / STRENGTH)
    return bench.draw(pipeline, noise="", steps=steps, each=lambda some: {"image": before[some], "strength": STRENGTH})


def middle_mask(size: int) -> Tensor:
    """1 where inpainting draws anew, the middle half of a picture; float32 (1, 1, size, size)."""
    quarter = size // 4
    return F.pad(torch.ones(1, 1, size - 2 * quarter, size - 2 * quarter), (quarter,) * 4)


def inpainted(bench: Bench, side: str) -> Tensor:
    """The middle of the base's pictures drawn anew; by diffusers' pipeline, or step by step where that takes no such latents."""
    before, plain = (bench.plain("base", "first") + 1) / 2, bench.pipeline(side)
    channels, size = bench.models[side].unet.config.in_channels, before.shape[-1]
    if channels in (4, 9) and not bench.flow:
        pipeline = AutoPipelineForInpainting.from_pipe(plain)
        pipeline.set_progress_bar_config(disable=True)
        mask = middle_mask(size)

        def masked(some: slice) -> dict[str, Any]:
            images = before[some]
            shape = {"height": size, "width": size, "strength": 1.0}
            return {"image": images, "mask_image": mask.expand(len(images), -1, -1, -1), **shape}

        return bench.draw(pipeline, noise="", each=masked)
    with torch.no_grad():
        original = bench.models["base"].posterior(before * 2 - 1)[0].to(plain.device)
    noise = bench.noise("second", len(original)).to(plain.device)
    mask = middle_mask(original.shape[-1]).to(plain.device)

    def keep(some: slice) -> dict[str, Any]:
        def around(pipeline: Any, step: int, _: Any, latents: dict[str, Tensor]) -> dict[str, Tensor]:
            times = pipeline.scheduler.timesteps
            there = original[some]
            if step + 1 < len(times):
                there = pipeline.scheduler.add_noise(there, noise[some], times[step + 1 : step + 2].repeat(len(there)))
            latents["latents"] = mask * latents["latents"] + (1 - mask) * there
            return latents

        return {"callback_on_step_end": around}

    return bench.draw(plain, each=keep)


def sliced(bench: Bench, side: str) -> Tensor:
    """With attention slicing."""
    pipeline = bench.own_denoiser(side)
    pipeline.enable_attention_slicing(1)
    return bench.draw(pipeline)


def channels_last(bench: Bench, side: str) -> Tensor:
    """With the denoiser's weights in channels-last order."""
    pipeline = bench.own_denoiser(side)
    (pipeline.transformer if bench.flow else pipeline.unet).to(memory_format=torch.channels_last)
    return bench.draw(pipeline)


def compiled(bench: Bench, side: str) -> Tensor:
    """With the denoiser compiled: once, where both sides are networks of the same shapes. `run` forgets what was compiled."""
    pipeline = bench.own_denoiser(side)
    name = "transformer" if bench.flow else "unet"
    setattr(pipeline, name, torch.compile(getattr(pipeline, name), backend=bench.spec.compile))
    return bench.draw(pipeline, count=bench.spec.images)


def settings(bench: Bench) -> dict[str, tuple[Draw, str]]:
    """Case -> how it is drawn, and what is to be said about it."""
    plain = "own solver" if bench.flow else "DPM++ 2M"
    own: dict[str, Any] = {} if bench.flow else {"algorithm_type": "dpmsolver++"}
    kind = FlowMatchEulerDiscreteScheduler if bench.flow else DPMSolverMultistepScheduler
    cases: dict[str, tuple[Draw, str]] = {}

    def add(name: str, scheduler: Any, steps: int, guidance: float | None = None, **further: Any) -> None:
        cases[name] = partial(_sampled, scheduler, steps, guidance, further), ""

    if bench.flow:
        add("Heun, 20 steps", FlowMatchHeunDiscreteScheduler, 20)
    else:
        add("DDIM, 20 steps", DDIMScheduler, 20)
        add("Euler a, 20 steps", EulerAncestralDiscreteScheduler, 20)
        add("LCM, 4 steps", LCMScheduler, 4)
    for steps in (4, 8, 50):
        add(f"{plain}, {steps} steps", kind, steps, **own)
    for guidance in (1.0, 7.5, 12.0):
        add(f"{plain}, CFG {guidance:g}", kind, bench.steps, guidance, **own)
    cases["img2img"] = image_to_image, f"strength {STRENGTH:g}"
    diffusers = bench.models["base"].unet.config.in_channels in (4, 9) and not bench.flow
    cases["inpainting"] = (
        inpainted,
        "" if diffusers else "diffusers' text-to-image pipeline, the rest put back after each step",
    )
    cases["attention slicing"] = sliced, ""
    cases["channels-last"] = channels_last, ""
    cases["torch.compile"] = compiled, f"backend {bench.spec.compile}"
    return cases


def _sampled(kind: Any, steps: int, guidance: float | None, further: dict[str, Any], bench: Bench, side: str) -> Tensor:
    return sampled(bench, side, kind, steps, guidance, **further)


def run(bench: Bench) -> list[Measurement]:
    """Every setting, and all of them together."""
    measurements: list[Measurement] = []
    collapsed: dict[str, list[bool]] = {side: [] for side in SIDES}

    def one(name: str, draw: Draw, how: str) -> Measurement:
        base, hardened = (bench.pictures(side, name, partial(draw, bench, side), how) for side in SIDES)
        measured = compared_collapse(bench, "samplers", name, base, hardened, part=True, how=how)
        for side, pictures in zip(SIDES, (base, hardened), strict=True):
            collapsed[side] += bench.collapsed(pictures).tolist()
        return measured

    try:
        for name, (draw, how) in settings(bench).items():
            measurements += attempt("samplers", name, "collapsed", partial(one, name, draw, how))
    finally:
        torch.compiler.reset()
    return measurements + attempt("samplers", TOGETHER, "collapsed", partial(together, collapsed))


def together(collapsed: dict[str, list[bool]]) -> Measurement:
    """All settings that ran as one share.

    Raises:
        RunFailed: none did.
    """
    if not collapsed["base"]:
        raise RunFailed("no setting ran")
    excess = paired_excess(collapsed["hardened"], collapsed["base"])
    shares = {side: sum(rows) / len(rows) for side, rows in collapsed.items()}
    return Measurement(
        check="samplers", case=TOGETHER, measure="collapsed", value=excess.mean, low=excess.low, high=excess.high,
        n=len(collapsed["base"]), base=shares["base"], hardened=shares["hardened"],
    )  # fmt: skip
