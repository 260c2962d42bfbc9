"""The long part of a verification: attack both models, draw what is compared, score it. What is drawn is kept and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from guardsmith.core.progress import stage
from guardsmith.core.seeds import ATTACK_CLASS
from guardsmith.diffusion.prompts import BenignPrompt, class_prompt
from guardsmith.evaluation.benign import SETS, benign_sets, draw_benign, measure_benign, prompts_for
from guardsmith.evaluation.deployability.kept import (
    EverydayUse,
    everyday_measurements,
    everyday_use,
    missing_checks,
    missing_plain,
)
from guardsmith.evaluation.drawing import Costed, Drawing, Job, draw_beside_each_other
from guardsmith.evaluation.no_attack import ReleasedPictures, likeness_of, released_folder, released_pictures
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


def class_sets(plan: Plan, sides: Sequence[Side] = SIDES) -> list[tuple[Side, Drawing]]:
    """Pictures for the attackers' prior preservation that each of these models is to draw of every class."""
    verify = plan.recipe.verify
    nouns = dict.fromkeys(subject.class_noun for subject in (*plan.attacked, *plan.registry.controls))
    nouns |= dict.fromkeys(spec.class_noun for spec in verify.attacks.values() if spec.class_noun)
    seed = ATTACK_CLASS.seeds(verify.class_images).start
    jobs = []
    for side in sides:
        target = plan.models[side]
        for noun in nouns if verify.class_images else ():
            prompts = [class_prompt(noun)] * verify.class_images
            file = class_file(target, noun, plan.recipe)
            jobs.append(
                (side, Drawing.by(target, plan.recipe, prompts, seed, file, f"class pictures ({side}): {noun}"))
            )
    return jobs


def draw_class_images(plan: Plan, sides: Sequence[Side] = SIDES) -> None:
    """Draw `class_sets`, unless they are there."""
    for side in sides:
        plan.models[side].root.mkdir(parents=True, exist_ok=True)
    for side, job in class_sets(plan, sides):
        job.drawn(plan.models[side].model)


def measure(plan: Plan, *, workers: int | None = None, executor: str = "local") -> Measurements:
    """Run what is missing and score everything.

    Args:
        plan: see `preflight`.
        workers: processes; by default see `guardsmith.runtime.processes`.
        executor: where attacks run, see `guardsmith.runtime.executors`.

    Raises:
        RunFailed: a worker process was killed.
    """
    prompts = prompts_for(plan.models, plan.recipe)
    sets = benign_sets(plan.models, plan.recipe, prompts)
    of_base = [sets[name] for name, side, _ in SETS if side == "base"]
    use = everyday_use(plan, of_base[0].prompts, [job.file for job in of_base])
    _draw_first(plan, of_base, use, workers, executor)
    units = list(plan_units(plan.registry, plan.recipe, plan.models, plan.policy))
    failures = run_units(units, workers, executor, _beside(plan, sets, use))
    benign = draw_benign(plan.models, sets)
    utility = measure_benign(prompts, benign, plan.judge)
    released: dict[str, list[Path]] = {}
    released_scores: dict[str, list[float | None]] = {}
    with stage("released weights", len(plan.attacked)) as bar:
        for subject in plan.attacked:
            files = released_pictures(plan.models["hardened"], plan.recipe, subject)
            released[subject.id] = files
            released_scores[subject.id] = likeness_of(files, subject, plan.judge, plan.judge.size or plan.image_size)
            bar()
    everyday = everyday_measurements(use)
    return Measurements(units, failures, collect(units), utility, released, released_scores, prompts, benign, everyday)


def _draw_first(plan: Plan, of_base: Sequence[Drawing], use: EverydayUse, workers: int | None, executor: str) -> None:
    """What attacks and checks of everyday use need: class pictures, and the base's pictures of benign prompts."""
    for target in plan.models.values():
        target.root.mkdir(parents=True, exist_ok=True)
    checks = missing_checks(use)
    sets = [*(job for _, job in class_sets(plan)), *(of_base if checks else ())]
    jobs: list[Costed] = [job for job in sets if not job.file.is_file()]
    jobs += missing_plain(use, checks)
    draw_beside_each_other(jobs, "class pictures and benign prompts", workers, executor)
    draw_class_images(plan)
    if checks:
        for job in of_base:
            job.drawn(plan.models["base"].model)


def _beside(plan: Plan, sets: Mapping[str, Drawing], use: EverydayUse) -> list[Job]:
    """What is missing of that which runs in the attacks' workers, the longest first."""
    target = plan.models["hardened"]
    jobs: list[Job] = [*missing_checks(use)]
    jobs += [sets[name] for name, side, _ in SETS if side == "hardened" and not sets[name].file.is_file()]
    jobs += [
        ReleasedPictures(target.model.place, target.digest, target.root, plan.recipe, subject) for subject in plan.attacked
        if not released_folder(target, plan.recipe, subject).is_dir()
    ]  # fmt: skip
    return jobs
