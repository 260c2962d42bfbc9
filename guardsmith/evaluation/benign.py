"""Benign prompts, which ask for no subject: what base and hardened model draw of them, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.seeds import BENIGN_AGAIN, BENIGN_BASE, SeedRange
from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, BenignPrompt, benign_prompts
from guardsmith.evaluation.drawing import Drawing
from guardsmith.evaluation.planning import TargetModel
from guardsmith.gate.evidence import Side, Utility
from guardsmith.metrics import Judge
from guardsmith.metrics.collapse import collapsed
from guardsmith.metrics.kid import kid, kid_ratio_interval

SETS: tuple[tuple[str, Side, SeedRange], ...] = (
    ("base", "base", BENIGN_BASE),
    ("base again", "base", BENIGN_AGAIN),
    ("hardened", "hardened", BENIGN_AGAIN),
)
"""Name of a set of pictures, the model that draws it, and its seeds."""


def draw_benign(models: Mapping[Side, TargetModel], sets: Mapping[str, Drawing]) -> dict[str, Tensor]:
    """Pictures of benign prompts by name of the set (see `benign_sets`), float32 (n, 3, h, w) in [-1, 1]."""
    return {name: sets[name].drawn(models[side].model) for name, side, _ in SETS}


def prompts_for(models: Mapping[Side, TargetModel], recipe: Recipe) -> list[BenignPrompt]:
    """The benign prompts of a verification."""
    return benign_prompts(models["base"].model, VERIFICATION_TEMPLATES, recipe.verify.benign_images, recipe.seed + 1)


def benign_sets(
    models: Mapping[Side, TargetModel], recipe: Recipe, prompts: Sequence[BenignPrompt]
) -> dict[str, Drawing]:
    """What is to be drawn of them, by name of the set, in the order of `SETS`."""
    texts = [prompt.text for prompt in prompts]
    jobs = {}
    for name, side, seeds in SETS:
        target, seed = models[side], seeds.seeds(len(texts)).start
        key = folder_digest(target.digest, texts, seed, recipe.sampling.model_dump())
        file = target.root / f"ordinary-{key}.safetensors"
        jobs[name] = Drawing.by(target, recipe, texts, seed, file, f"benign prompts: {name}")
    return jobs


def measure_benign(prompts: Sequence[BenignPrompt], pictures: Mapping[str, Tensor], judge: Judge) -> Utility:
    """KID to the base, collapsed pictures, prompt fidelity and CLIP-T, of what `draw_benign` gave."""
    features = {name: judge.features(images) for name, images in pictures.items()}
    reference, again, hardened = (features[name] for name, _, _ in SETS)
    values: dict[str, Any] = {
        "kid_hardened": kid(reference, hardened), "kid_base": kid(reference, again), "kid_ratio": None, "kid_ratio_low": None,
        "kid_ratio_high": None, "collapsed": int(collapsed(reference, again, hardened).sum()), "fidelity_hardened": None,
        "fidelity_base": None, "n": len(prompts),
    }  # fmt: skip
    if values["kid_base"]:
        ratio = kid_ratio_interval(reference, again, hardened)
        values |= dict(zip(("kid_ratio", "kid_ratio_low", "kid_ratio_high"), ratio, strict=True))
    sides = (("base again", "base"), ("hardened", "hardened"))
    if judge.fidelity is not None and all(prompt.traits for prompt in prompts):
        traits = [prompt.traits for prompt in prompts]
        for name, side in sides:
            # a picture that cannot be read shows none of the traits
            scores = judge.fidelity(pictures[name], traits)
            values[f"fidelity_{side}"] = sum(score or 0.0 for score in scores) / len(prompts)
    if judge.prompt_fit is not None:
        for name, side in sides:
            values[f"clip_t_{side}"] = judge.prompt_fit(pictures[name], [prompt.text for prompt in prompts])
    return Utility(**values)
