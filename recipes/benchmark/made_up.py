"""A verification whose scores are made up, to measure what judging and writing one of many subjects costs (`registry_size.py`).

python made_up.py REGISTRY OUTPUT SAMPLE    prints JSON: seconds of processor time of each part; and the peak of memory

The matrix is that of the recipe `demo`, whose "hardened model" is the base itself. Attacks on the base and on controls score 0.6,
on protected subjects 0.0, one in twenty of these 0.6 too; what they drew are the subject's own pictures.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import torch
from peak import peak_rss

from guardsmith.attacks.displacement import Movement, weight_norms
from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, benign_prompts
from guardsmith.evaluation.judging import judged_report
from guardsmith.evaluation.measuring import Measurements
from guardsmith.evaluation.planning import plan_units
from guardsmith.evaluation.preflight import Plan, preflight
from guardsmith.evaluation.runs import collect, run_units
from guardsmith.evaluation.units import Unit
from guardsmith.evaluation.writing import write
from guardsmith.gate.evidence import Utility
from guardsmith.models.checkpoint import load_model
from guardsmith.registry.loader import load_registry


def finish(unit: Unit, score: float, moved: Movement, rng: random.Random) -> None:
    """What a finished attack leaves, with scores around this one."""
    steps = unit.evaluation_points[1.0]
    place = unit.folder / "images" / str(steps)
    place.mkdir(parents=True)
    for number in range(unit.images):
        os.link(unit.attack_images[number % len(unit.attack_images)], place / f"{number:03d}.png")
    scores = [rng.gauss(score, 0.05) for _ in range(unit.images)]
    write_json(
        unit.folder / "attack.json", unit.settings | {"digest": unit.digest, "movement": {steps: moved.record()}}
    )
    write_json(
        unit.folder / "scores.json", {"identity": {steps: scores}, "prompts": [""] * unit.images, "digest": unit.digest}
    )


def measured(plan: Plan, units: list[Unit]) -> Measurements:
    """What `measure` would give: it finds all attacks finished."""
    assert not run_units(units)
    prompts = benign_prompts(plan.models["base"].model, VERIFICATION_TEMPLATES, 12, 0)
    drawn = torch.rand(12, 3, 64, 64) * 2 - 1
    utility = Utility(
        kid_hardened=0.001, kid_base=0.001, kid_ratio=1.0, kid_ratio_low=0.8, kid_ratio_high=1.2, collapsed=0,
        fidelity_hardened=0.9, fidelity_base=0.9, n=200,
    )  # fmt: skip
    released = {subject.id: [image.path for image in subject.images_of("attack")] for subject in plan.attacked}
    scores: dict[str, list[float | None]] = {name: [0.0] * len(files) for name, files in released.items()}
    benign = dict.fromkeys(("base", "base again", "hardened"), drawn)
    return Measurements(units, {}, collect(units), utility, released, scores, prompts, benign)


def main() -> None:
    """Make up, judge, write."""
    registry_file, output, sample = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    clock, seconds = time.process_time, {}
    recipe = load_recipe("demo", [f"verify.sample={sample}", "verify.deployability.checks=[]"])
    plan = preflight(load_registry(registry_file), recipe, output, model=str(load_model("builtin:avatar").folder))
    units = list(plan_units(plan.registry, plan.recipe, plan.models, plan.policy))
    controls, rng = {control.id for control in plan.registry.controls}, random.Random(0)
    norms = weight_norms(plan.models["base"].model)
    moved = Movement(0.1, 0.1, {block: 0.05 * norm for block, norm in norms.items()}, norms)
    for unit in units:
        holds = unit.side == "hardened" and unit.subject not in controls and rng.random() > 0.05
        finish(unit, 0.0 if holds else 0.6, moved, rng)
    began = clock()
    measurements = measured(plan, units)
    seconds["reading"] = round(clock() - began, 2)
    began = clock()
    report = judged_report(plan, measurements, seconds=0.0)
    seconds["judging"] = round(clock() - began, 2)
    began = clock()
    write(plan, measurements, report, include_images=False)
    seconds["writing"] = round(clock() - began, 2)
    print(json.dumps({"attacked": len(plan.attacked), "units": len(units), "seconds": seconds}))
    print(peak_rss())


if __name__ == "__main__":
    main()
