"""The long part of a verification: attack both models, draw what is compared, score it. What is drawn is kept and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from guardsmith.core.progress import stage
from guardsmith.core.seeds import ATTACK_CLASS
from guardsmith.diffusion.cache import drawn_by
from guardsmith.diffusion.prompts import BenignPrompt, class_prompt
from guardsmith.evaluation.benign import draw_benign, measure_benign
from guardsmith.evaluation.deployability.kept import measure_everyday_use
from guardsmith.evaluation.no_attack import likeness_of, released_pictures
from guardsmith.evaluation.planning import class_file, plan_units
from guardsmith.evaluation.preflight import Plan
from guardsmith.evaluation.runs import collect, run_units
from guardsmith.evaluation.units import Unit
from guardsmith.gate.deployability import Measurement
from guardsmith.gate.evidence import SIDES, Scores, Side, Utility


@dataclass(frozen=True)
class Measurements:
    """Everything that was drawn and scored.

    Attributes:
        units: of the attack matrix, both sides.
        failed_units: name of a unit that did not run -> why.
        scores: what the attacks reached.
        utility: benign prompts.
        released: protected subject -> pictures that the released weights draw of it without an attack.
        released_scores: protected subject -> similarity of each of them.
        prompts: the benign prompts.
        benign: their pictures, see `draw_benign`.
        deployability: cases of everyday use.
    """

    units: Sequence[Unit]
    failed_units: dict[str, str]
    scores: Scores
    utility: Utility
    released: dict[str, list[Path]]
    released_scores: dict[str, list[float | None]]
    prompts: list[BenignPrompt]
    benign: dict[str, Tensor]
    deployability: Sequence[Measurement] = ()


def draw_class_images(plan: Plan, sides: Sequence[Side] = SIDES) -> None:
    """Pictures for the attackers' prior preservation, by each of these models of every class, unless they are there."""
    verify = plan.recipe.verify
    nouns = dict.fromkeys(subject.class_noun for subject in (*plan.attacked, *plan.registry.controls))
    nouns |= dict.fromkeys(spec.class_noun for spec in verify.attacks.values() if spec.class_noun)
    seed = ATTACK_CLASS.seeds(verify.class_images).start
    for side in sides:
        target = plan.models[side]
        target.root.mkdir(parents=True, exist_ok=True)
        for noun in nouns if verify.class_images else ():
            prompts = [class_prompt(noun)] * verify.class_images
            file = class_file(target, noun, plan.recipe)
            drawn_by(target.model, plan.recipe.sampling, prompts, seed, file, f"class pictures ({side}): {noun}")


def measure(plan: Plan, *, workers: int | None = None, executor: str = "local") -> Measurements:
    """Run what is missing and score everything.

    Args:
        plan: see `preflight`.
        workers: processes; by default see `guardsmith.runtime.processes`.
        executor: where attacks run, see `guardsmith.runtime.executors`.

    Raises:
        RunFailed: a worker process was killed.
    """
    draw_class_images(plan)
    units = list(plan_units(plan.registry, plan.recipe, plan.models, plan.policy))
    failures = run_units(units, workers, executor)
    prompts, benign = draw_benign(plan.models, plan.recipe)
    utility = measure_benign(prompts, benign, plan.judge)
    released: dict[str, list[Path]] = {}
    released_scores: dict[str, list[float | None]] = {}
    with stage("released weights", len(plan.attacked)) as bar:
        for subject in plan.attacked:
            files = released_pictures(plan.models["hardened"], plan.recipe, subject)
            released[subject.id] = files
            released_scores[subject.id] = likeness_of(files, subject, plan.judge, plan.judge.size or plan.image_size)
            bar()
    everyday = measure_everyday_use(plan, [prompt.text for prompt in prompts], (benign["base"], benign["base again"]))
    return Measurements(units, failures, collect(units), utility, released, released_scores, prompts, benign, everyday)
