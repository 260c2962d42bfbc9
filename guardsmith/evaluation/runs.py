"""Running units of the attack matrix, in processes of one thread each: attack, draw, score, write.

An attack that goes on beyond its usual steps ends at the first evaluation point at which the model is personalized.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from guardsmith.attacks import AttackData, draw_during_attack, find_attack
from guardsmith.attacks.adaptive.base import run_removal
from guardsmith.attacks.adaptive.removals import find_removal
from guardsmith.attacks.augmentations import CHANGES
from guardsmith.attacks.displacement import Movement
from guardsmith.attacks.evasion import EvasionContext, inverted, transformed
from guardsmith.core.atomic_io import whole_folder, write_json
from guardsmith.core.errors import GuardsmithError, system_errno
from guardsmith.core.images import open_pictures, to_pil
from guardsmith.core.progress import stage
from guardsmith.evaluation.drawing import Job
from guardsmith.evaluation.loaded import BENCH, model_at
from guardsmith.evaluation.units import Unit, damaged_pictures, scores_of
from guardsmith.gate.calibration import calibration, half_way
from guardsmith.gate.evidence import Side
from guardsmith.gate.statistics import Units, interval
from guardsmith.metrics import Judge, load_judge
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.runtime.executors import run_all

FIRST_IDENTIFIER = "ktn"  # what an attacker in two stages calls whom they train on first


def _in_precision(model: DiffusionModel, precision: str | None) -> DiffusionModel:
    """The model, or a copy that computes in this precision: units to come need the model as it is."""
    if precision is None:
        return model
    own = with_own_unet(model)
    own.unet.compute_in(precision)
    return own


def _class_images(file: str, count: int) -> Tensor:
    return load_file(file)["images"][:count] if count else torch.empty(0)


def evasion_of(unit: Unit, model: DiffusionModel) -> tuple[EvasionContext, tuple[str, ...]]:
    """What the unit's transformations may use, and their names; none without evasion."""
    if unit.evasion is None:
        return EvasionContext(), ()
    strangers = unit.evasion.get("images")
    pictures = torch.empty(0) if strangers is None else open_pictures(strangers, model.image_size)
    return EvasionContext(unit.seed, model, pictures), tuple(unit.evasion["names"])


def drawing_of(unit: Unit) -> dict[str, Any]:
    """The arguments of `draw_during_attack` that say how the personalized model draws."""
    if unit.drawing is None:
        return {}
    return {"trick": unit.drawing["name"]} | {key: unit.drawing[key] for key in ("hand_over",) if key in unit.drawing}


def first_stage(unit: Unit, image_size: int) -> AttackData | None:
    """Whom an attacker in two stages trains on before the subject; `None` for the others."""
    if unit.first is None:
        return None
    others = _class_images(unit.first["class_pictures"], unit.class_images)
    return AttackData(
        open_pictures(unit.first["images"], image_size), others, FIRST_IDENTIFIER, unit.first["class_noun"]
    )


def judge_of(unit: Unit) -> tuple[Judge, float]:
    """The unit's judge, and the mean similarity from which on the model counts as personalized."""
    policy = unit.judge or {"name": "avatar", "model": None, "level": half_way(calibration()[unit.class_noun])}
    return load_judge(policy["name"], policy["model"]), policy["level"]


def run_unit(unit: Unit) -> None:
    """Attack, draw, score; the folder appears whole."""
    target = _in_precision(model_at(unit.model), unit.precision)
    model = target if unit.trained_on is None else _in_precision(model_at(unit.trained_on["model"]), unit.precision)
    change = None if unit.change is None else CHANGES[unit.change]
    images = open_pictures(unit.attack_images, model.image_size, change)
    evasion, names = evasion_of(unit, model)
    images = transformed(images, names, evasion)
    public = None if unit.public is None else _in_precision(model_at(unit.public["model"]), unit.precision)
    data = AttackData(images, _class_images(unit.class_pictures, unit.class_images), unit.identifier, unit.noun)
    judge, level = judge_of(unit)
    references = open_pictures(unit.reference_images, judge.size or model.image_size)
    references = transformed(references, (unit.evasion or {}).get("of_references", ()), evasion)
    cost = None
    if unit.removal is not None:
        removal = find_removal(unit.removal["name"])
        model, cost = run_removal(removal, model, data, unit.removal["params"], seed=unit.seed, base=public)
    scores: dict[int, list[float | None]] = {}
    movements: dict[int, Any] = {}

    def stop(steps: int, images: Tensor) -> bool:
        scores[steps] = judge.similarity(inverted(images, names, evasion), references)
        similarity = interval([scores[steps]])
        return steps >= unit.evaluation_points[1] and similarity is not None and similarity.mean >= level

    def keep(steps: int, moved: Movement | None) -> None:
        if moved is not None:
            movements[steps] = moved.record()

    pictures, losses = draw_during_attack(
        model, unit.attack, unit.params, data, evaluate_at=list(unit.evaluation_points.values()), seed=unit.seed,
        count=unit.images, sampling=unit.sampling, stop=stop, first=first_stage(unit, model.image_size),
        first_steps=unit.evaluation_points[1], onto=None if unit.trained_on is None else target, base=public,
        on_movement=keep, **drawing_of(unit),
    )  # fmt: skip
    pictures = {steps: inverted(images, names, evasion) for steps, images in pictures.items()}
    prompts = find_attack(unit.attack).prompts(unit.identifier, unit.noun, unit.images)

    with whole_folder(unit.folder) as folder:
        for steps, images in pictures.items():
            place = folder / "images" / str(steps)
            place.mkdir(parents=True)
            for i, image in enumerate(images):
                to_pil(image).save(place / f"{i:03d}.png")
        tail = losses[-50:]
        training = {
            "digest": unit.digest, "loss_start": losses[0], "loss_end": sum(tail) / len(tail), "steps_taken": len(losses)
        }  # fmt: skip
        training |= {"movement": movements} if movements else {}
        training |= {"removal_cost": cost.record()} if cost is not None else {}
        write_json(folder / "attack.json", unit.settings | training)
        write_json(folder / "scores.json", {"identity": scores, "prompts": prompts, "digest": unit.digest})


def run_job(job: Unit | Job) -> None:
    """In a worker: an attack, or what runs beside the attacks."""
    if isinstance(job, Unit):
        BENCH.clear()  # its memory is the attack's
        run_unit(job)
    else:
        job.run()


def run_units(
    units: Sequence[Unit], workers: int | None = None, executor: str = "local", beside: Sequence[Job] = ()
) -> dict[str, str]:
    """Run what is missing, and other jobs in the same workers (see `executors.run_all`).

    Args:
        units: attacks; those whose result is there are left out.
        workers: see `run_all`.
        executor: likewise.
        beside: jobs that begin before the attacks.

    Returns:
        Unit name -> reason for those that failed.

    Raises:
        Exception: what one of the other jobs raised.
    """
    missing = [unit for unit in units if scores_of(unit) is None or damaged_pictures(unit)]
    failures: dict[str, str] = {}
    if not missing and not beside:
        return failures
    # The longest first, so that no core waits for a single one at the end.
    missing.sort(key=lambda unit: -max(unit.evaluation_points.values()))
    jobs: list[Unit | Job] = [*beside, *missing]
    with stage("attacks and checks" if beside else "attacks", len(jobs)) as bar:
        for job, error in run_all(run_job, jobs, executor=executor, workers=workers):
            if error is not None:
                if not isinstance(job, Unit):
                    raise error
                failures[job.name] = _reason(error)
            bar()
    return failures


def _reason(error: Exception) -> str:
    """Why an attack failed: a crash is a finding about its cell, not the end of the run, unlike a full disk, which is raised."""
    if isinstance(error, GuardsmithError):
        return str(error)
    if system_errno(error) == errno.ENOSPC:
        raise error
    return f"{type(error).__name__}: {error}"


def collect(units: Sequence[Unit]) -> dict[tuple[Side, str, str, float], Units]:
    """Scores by (side, subject, attack label, evaluation point); a failed unit counts as one with nothing scored."""
    scores: dict[tuple[Side, str, str, float], list[list[float | None]]] = {}
    for unit in units:
        by_point = scores_of(unit) or {point: [None] * unit.images for point in unit.evaluation_points}
        for point, values in by_point.items():
            scores.setdefault((unit.side, unit.subject, unit.label, point), []).append(values)
    return dict(scores)
