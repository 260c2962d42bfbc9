"""Attack the base and the hardened model, for protected subjects and controls; score, judge, write the report.

    out/verify/{base,hardened}/<subject>/<attack>/<identifier>/<seed>/
        attack.json   what was run (settings, digests, training loss)
        images/       what the personalized model drew
        scores.json   one score per picture; written last, so its presence says that the unit is complete
    out/verify/{base,hardened}/ordinary.safetensors, class-<noun>.safetensors
    out/verify/report.json, grid.png

A unit is a pure function of its settings: a killed verification goes on with the units that are missing. Units run in
processes of one thread each.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from guardsmith.attacks import ATTACKS, AttackData, draw_after_attack
from guardsmith.errors import GuardsmithError, UserError
from guardsmith.gate import (
    EXIT_CODES,
    Check,
    Units,
    calibration,
    check_control,
    check_learnt,
    check_protected,
    check_utility,
    interval,
    verdict,
)
from guardsmith.harden import check_against_base, drawn_by, folder_digest, run_info, write_json
from guardsmith.images import open_image, square, to_pil, to_tensor
from guardsmith.metrics.fidelity import features, fidelity
from guardsmith.metrics.identity import similarity
from guardsmith.metrics.kid import kid, kid_ratio_interval
from guardsmith.models import DiffusionModel, load_model, weights_digest
from guardsmith.processes import processes
from guardsmith.progress import stage
from guardsmith.prompts import ORDINARY_VERIFICATION, class_prompt, ordinary_prompts
from guardsmith.recipe import Recipe
from guardsmith.registry import Registry
from guardsmith.report import print_report, save_grid

Side = Literal["base", "hardened"]
JUDGED_SIZE = 64


@dataclass(frozen=True)
class Unit:
    """One attack on one model: everything that decides its result."""

    side: Side
    model: str
    model_digest: str
    subject: str
    class_noun: str
    attack_images: tuple[str, ...]
    reference_images: tuple[str, ...]
    images_digest: str
    attack: str
    params: dict[str, Any]
    label: str
    identifier: str
    seed: int
    images: int
    class_pictures: str
    class_images: int
    sampling: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder below out/verify."""
        return f"{self.side}/{self.subject}/{self.label}/{_safe(self.identifier)}/{self.seed}"

    @property
    def digest(self) -> str:
        """Changes with anything that could change the result; paths do not count."""
        told = asdict(self)
        for path in ("model", "attack_images", "reference_images", "class_pictures"):
            told.pop(path)
        return folder_digest(told)


def _safe(identifier: str) -> str:
    return "".join(c if c.isalnum() else f"%{ord(c):x}" for c in identifier)


@lru_cache(maxsize=2)
def _model(source: str) -> DiffusionModel:
    return load_model(source)


def _open(paths: Sequence[str], size: int) -> Tensor:
    return to_tensor([square(open_image(path), size) for path in paths])


def run_unit(unit: Unit, folder: Path) -> None:
    """Attack, draw, score; the folder is complete when `scores.json` is there."""
    model = _model(unit.model)
    class_images = (
        load_file(unit.class_pictures)["images"][: unit.class_images] if unit.class_images else torch.empty(0)
    )
    data = AttackData(_open(unit.attack_images, model.image_size), class_images, unit.identifier, unit.class_noun)
    images, losses = draw_after_attack(
        model, unit.attack, unit.params, data, seed=unit.seed, count=unit.images, sampling=unit.sampling
    )
    prompts = ATTACKS[unit.attack].prompts(unit.identifier, unit.class_noun, unit.images)
    scores = similarity(images, _open(unit.reference_images, JUDGED_SIZE))

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    for i, image in enumerate(images):
        to_pil(image).save(folder / "images" / f"{i:03d}.png")
    tail = losses[-50:]
    described = asdict(unit) | {"digest": unit.digest, "loss_start": losses[0], "loss_end": sum(tail) / len(tail)}
    for path in ("model", "attack_images", "reference_images", "class_pictures"):
        described.pop(path)
    write_json(folder / "attack.json", described)
    write_json(folder / "scores.json", {"identity": scores, "prompts": prompts, "digest": unit.digest})


def finished(unit: Unit, folder: Path) -> bool:
    """Whether the folder holds the complete result of exactly this unit."""
    try:
        told = json.loads((folder / "scores.json").read_text())
        return bool(told["digest"] == unit.digest)
    except (OSError, ValueError, KeyError):
        return False


def plan_units(
    registry: Registry, recipe: Recipe, models: dict[Side, tuple[DiffusionModel, str]], root: Path
) -> Iterator[Unit]:
    """Every attack x identifier x seed on base and hardened, for protected subjects and controls."""
    for side, (model, digest) in models.items():
        for subject in (*registry.subjects, *registry.controls):
            attacked, judged = subject.images_of("attack"), subject.images_of("reference")
            for label, spec in recipe.verify.attacks.items():
                for identifier in recipe.verify.identifiers:
                    for seed in recipe.verify.seeds:
                        yield Unit(
                            side=side, model=model.place, model_digest=digest, subject=subject.id,
                            class_noun=subject.class_noun, attack_images=tuple(str(i.path) for i in attacked),
                            reference_images=tuple(str(i.path) for i in judged),
                            images_digest=folder_digest([i.sha256 for i in (*attacked, *judged)]), attack=spec.name,
                            params=spec.params, label=label, identifier=identifier, seed=seed,
                            images=recipe.verify.images_per_unit,
                            class_pictures=str(_class_file(root, side, subject.class_noun, digest, recipe)),
                            class_images=recipe.verify.class_images, sampling=recipe.sampling.model_dump(),
                        )  # fmt: skip


def _class_file(root: Path, side: Side, noun: str, digest: str, recipe: Recipe) -> Path:
    key = folder_digest(digest, recipe.sampling.model_dump(), recipe.verify.class_images)
    return root / side / f"class-{noun.replace(' ', '-')}-{key}.safetensors"


def run_units(units: Sequence[Unit], root: Path, workers: int) -> dict[str, str]:
    """Run what is missing; returns unit name -> reason for those that failed."""
    missing = [unit for unit in units if not finished(unit, root / unit.name)]
    failed: dict[str, str] = {}
    if not missing:
        return failed
    with stage("attacks", len(missing)) as bar, processes(workers) as (pool, _):
        running = {pool.submit(run_unit, unit, root / unit.name): unit for unit in missing}
        for future in as_completed(running):
            unit = running[future]
            try:
                future.result()
            except BrokenProcessPool:
                raise
            except GuardsmithError as error:
                failed[unit.name] = str(error)
            except Exception as error:  # an attack that crashes is a finding about that cell, not the end of the run
                failed[unit.name] = f"{type(error).__name__}: {error}"
            bar()
    return failed


def measure_ordinary(
    models: dict[Side, tuple[DiffusionModel, str]], recipe: Recipe, root: Path
) -> dict[str, float | None]:
    """Ordinary prompts on base (two sets of seeds) and hardened (the second set): KID to the base, prompt fidelity."""
    base = models["base"][0]
    asked = ordinary_prompts(base, ORDINARY_VERIFICATION, recipe.verify.ordinary_images, recipe.seed + 1)
    texts = [prompt.text for prompt in asked]
    drawn: dict[str, Tensor] = {}
    sets: tuple[tuple[str, Side, int], ...] = (
        ("base", "base", 40_000), ("base again", "base", 50_000), ("hardened", "hardened", 50_000)
    )  # fmt: skip
    for name, side, seed in sets:
        model, digest = models[side]
        key = folder_digest(digest, texts, seed, recipe.sampling.model_dump())
        file = root / side / f"ordinary-{key}.safetensors"
        drawn[name] = drawn_by(model, recipe, texts, seed, file, f"ordinary prompts: {name}")
    seen = {name: features(images) for name, images in drawn.items()}
    values: dict[str, float | None] = {
        "kid_hardened": kid(seen["base"], seen["hardened"]),
        "kid_base": kid(seen["base"], seen["base again"]),
        "kid_ratio": None,
        "kid_ratio_low": None,
        "kid_ratio_high": None,
        "fidelity_hardened": None,
        "fidelity_base": None,
        "n": len(texts),
    }
    if values["kid_base"]:
        found = kid_ratio_interval(seen["base"], seen["base again"], seen["hardened"])
        values |= dict(zip(("kid_ratio", "kid_ratio_low", "kid_ratio_high"), found, strict=True))
    if all(prompt.asked for prompt in asked):
        wanted = [prompt.asked for prompt in asked]
        for name, key in (("base again", "fidelity_base"), ("hardened", "fidelity_hardened")):
            # a picture that cannot be read shows nothing of what was asked for
            values[key] = sum(score or 0.0 for score in fidelity(drawn[name], wanted)) / len(texts)
    return values


def collect(units: Sequence[Unit], root: Path, failed: dict[str, str]) -> dict[tuple[Side, str, str], Units]:
    """Scores by (side, subject, attack label); a failed unit counts as one with nothing scored."""
    scores: dict[tuple[Side, str, str], list[list[float | None]]] = {}
    for unit in units:
        values: list[float | None] = [None] * unit.images
        if unit.name not in failed and finished(unit, root / unit.name):
            values = json.loads((root / unit.name / "scores.json").read_text())["identity"]
        scores.setdefault((unit.side, unit.subject, unit.label), []).append(values)
    return dict(scores)


def judge(
    registry: Registry, recipe: Recipe, scores: dict[tuple[Side, str, str], Units], utility: dict[str, float | None]
) -> list[Check]:
    """All checks of the gate, protected subjects first."""
    levels, checks = calibration(), []
    for label in recipe.verify.attacks:
        for subject in registry.subjects:
            level = levels[subject.class_noun]
            checks.append(check_learnt(subject.id, label, scores["base", subject.id, label], level, recipe.gate))
            checks.append(check_protected(subject.id, label, scores["hardened", subject.id, label], level))
        for control in registry.controls:
            level = levels[control.class_noun]
            base = scores["base", control.id, label]
            checks.append(check_learnt(control.id, label, base, level, recipe.gate))
            checks.append(check_control(control.id, label, scores["hardened", control.id, label], base, recipe.gate))
    if not registry.controls:
        sentence = "the registry has no controls: breakage cannot be told from protection"
        checks.append(Check("control learnable", "", "", "inconclusive", sentence))
    return checks + check_utility(utility, recipe.gate)


def _hardening(record: Path) -> dict[str, Any]:
    """What harden.json says, with every key that verification needs."""
    needed = ("base", "base_revision", "base_digest", "model_digest", "registry_digest", "method", "params", "seed")
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{record} is not valid JSON; harden again.") from error
    missing = [key for key in needed if not isinstance(told, dict) or key not in told]
    if missing:
        raise UserError(f"{record} lacks {', '.join(missing)}; harden again.")
    return dict(told)


def verify(
    registry: Registry, recipe: Recipe, output: Path, *, workers: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Verify `output/model` against its base; returns what `report.json` says (`exit_code` in it is the command's).

    Raises:
        UserError: there is no hardened model in `output`, the registry is not the one it was hardened on, a class has no
            calibration.
        RunFailed: a worker process was killed.
    """
    record = output / "harden.json"
    if not record.is_file() or not (output / "model").is_dir():
        raise UserError(
            f"{output} holds no finished hardening (no harden.json and model/); run `guardsmith harden` first."
        )
    told = _hardening(record)
    if told["registry_digest"] != registry.digest:
        raise UserError(f"{registry.path} is not the registry that {output} was hardened on (the digests differ).")
    if not recipe.verify.attacks:
        raise UserError("The recipe names no attacks (verify.attacks); nothing would be verified.")
    hardened_digest = weights_digest(output / "model")
    if hardened_digest != told["model_digest"]:
        raise UserError(
            f"{output / 'model'} was changed after hardening (its digest differs from harden.json); harden again."
        )
    base = load_model(told["base"], told["base_revision"])
    if weights_digest(base.folder) != told["base_digest"]:
        raise UserError(f"{told['base']} is not the base that {output} was hardened from (the digests differ).")
    unknown = sorted({s.class_noun for s in (*registry.subjects, *registry.controls)} - calibration().keys())
    if unknown or base.image_size != JUDGED_SIZE:
        raise UserError(
            f"The embedded judges read 64 px avatars of class {', '.join(calibration())}; this registry or base is of another "
            "kind, and no other identity metric is built in yet."
        )
    hardened = load_model(str(output / "model"))
    check_against_base(base, registry, recipe)
    models: dict[Side, tuple[DiffusionModel, str]] = {
        "base": (base, told["base_digest"]),
        "hardened": (hardened, hardened_digest),
    }
    root = output / "verify"
    root.mkdir(exist_ok=True)
    nouns = dict.fromkeys(s.class_noun for s in (*registry.subjects, *registry.controls))
    for side, (model, digest) in models.items():
        for noun in nouns if recipe.verify.class_images else ():
            prompts = [class_prompt(noun)] * recipe.verify.class_images
            file = _class_file(root, side, noun, digest, recipe)
            drawn_by(model, recipe, prompts, 60_000, file, f"class pictures ({side}): {noun}")
    units = list(plan_units(registry, recipe, models, root))
    failed = run_units(units, root, workers or os.cpu_count() or 1)
    utility = measure_ordinary(models, recipe, root)
    scores = collect(units, root, failed)
    checks = judge(registry, recipe, scores, utility)
    status = verdict(checks)
    report = {
        "schema": 1,
        "verdict": status,
        "exit_code": EXIT_CODES[status],
        "checks": [check._asdict() for check in checks],
        "scores": [
            {"side": side, "subject": subject, "attack": label, "units": values, "interval": _as_dict(values)}
            for (side, subject, label), values in scores.items()
        ],
        "utility": utility,
        "failed_units": failed,
        "calibration": {noun: level._asdict() for noun, level in calibration().items()},
        "hardening": {
            k: told[k] for k in ("base", "base_digest", "model_digest", "registry_digest", "method", "params", "seed")
        },
        "recipe": recipe.model_dump(mode="json", exclude={"subjects"}),
        "run": run_info(),
    }
    write_json(root / "report.json", report)
    save_grid(root / "grid.png", registry, recipe, root, base.image_size)
    if not quiet:
        print_report(report, root)
    return report


def _as_dict(values: Units) -> dict[str, float] | None:
    found = interval(values)
    return None if found is None else found._asdict()
