"""The attack matrix: every attack on base and hardened model, for protected subjects and controls, as units that resume.

    <root>/<subject>/<attack>/<identifier>/<seed>/<digest>/
        attack.json       what was run (settings, digests, training loss)
        images/<steps>/   what the personalized model drew after so many steps
        scores.json       one score per picture and evaluation point; written last, so its presence says that the unit is complete

An attack that goes on beyond its usual steps ends once it has learnt the subject: nobody trains on for worse.

A unit is a pure function of its settings, which its digest stands for: a killed verification goes on with the units that are
missing, and several verifications can share those of the base. Units run in processes of one thread each.
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from guardsmith.attacks import AttackData, draw_during_attack, find_attack
from guardsmith.attacks.adaptive.base import measured
from guardsmith.attacks.adaptive.removals import find_removal
from guardsmith.attacks.augmentations import CHANGES
from guardsmith.attacks.evasion import EvasionContext, find_evasion, inverted, transformed
from guardsmith.attacks.sampling_tricks import NEEDS_BASE
from guardsmith.config.recipe import AttackSpec, Recipe, VerifySpec
from guardsmith.core.atomic_io import folder_digest, whole_folder, write_json
from guardsmith.core.console import warn
from guardsmith.core.errors import GuardsmithError, UserError, system_errno
from guardsmith.core.images import is_whole_png, open_pictures, to_pil
from guardsmith.core.progress import stage
from guardsmith.gate.calibration import calibration, half_way
from guardsmith.gate.evidence import Side
from guardsmith.gate.policy import Policy
from guardsmith.gate.statistics import Units, interval
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import DiffusionModel, load_model, with_own_unet
from guardsmith.registry.loader import Registry, Subject
from guardsmith.registry.types import Image
from guardsmith.runtime.executors import run_all

AROUND = 3  # pictures of others around the one of the subject
FIRST_IDENTIFIER = "ktn"  # what an attacker in two stages calls whom they train on first
FIRST_NAMES = {
    "evaluation_points": "looks",
    "attacker_noun": "called",
}  # of fields in settings and digests of kept units


@dataclass(frozen=True)
class Judged:
    """One model of the two.

    Attributes:
        model: loaded.
        digest: of its weights.
        root: folder of its units and of what else is drawn by it.
    """

    model: DiffusionModel
    digest: str
    root: Path


@dataclass(frozen=True)
class Unit:
    """One attack on one model: everything that decides its result.

    Attributes:
        class_noun: the registry's word for the subject's class, whose levels count.
        evaluation_points: share of the attack's usual steps -> number of steps; pictures are drawn then.
        change: what the attacker does to the pictures before (`attacks.data.CHANGES`).
        first: whom the attacker trains on before: images, their digest, class_noun, class_pictures.
        trained_on: where the adapters are trained that this model is to draw with: model and its digest.
        judge: who measures, where it is not the embedded encoder: name, model, and the similarity that counts as learnt.
        attacker_noun: the attacker's word for the class, where it is another one.
        precision: how the attacker's denoiser computes, where it is not float32.
        evasion: how the attacker transforms the pictures: names; images and digest of somebody else's, where one needs them.
        drawing: how the personalized model draws, where that is not as usual: name and, where it hands over, hand_over.
        removal: how the attacker edits the weights before: name and params.
        public: the public base, where drawing or removal needs it: model and digest.
    """

    side: Side
    root: str
    model: str
    model_digest: str
    subject: str
    class_noun: str
    attack_images: tuple[str, ...]
    reference_images: tuple[str, ...]
    images_digest: str
    attack: str
    params: dict[str, Any]
    evaluation_points: dict[float, int]
    label: str
    identifier: str
    seed: int
    images: int
    class_pictures: str
    class_images: int
    sampling: dict[str, Any]
    change: str | None = None
    first: dict[str, Any] | None = None
    trained_on: dict[str, str] | None = None
    judge: dict[str, Any] | None = None
    attacker_noun: str | None = None
    precision: str | None = None
    evasion: dict[str, Any] | None = None
    drawing: dict[str, Any] | None = None
    removal: dict[str, Any] | None = None
    public: dict[str, str] | None = None

    @property
    def noun(self) -> str:
        """What the attacker calls the class."""
        return self.attacker_noun or self.class_noun

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.side}/{self.subject}/{self.label}/{self.identifier}/{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result: paths and the label do not. Renamed fields keep their first name here."""
        settings = {FIRST_NAMES.get(key, key): value for key, value in asdict(self).items()}
        for key in ("side", "root", "label", "model", "attack_images", "reference_images", "class_pictures"):
            settings.pop(key)
        # Left out where they are not used, so that units of versions that did not have them stay what they were.
        first, trained_on = (settings.pop(key) for key in ("first", "trained_on"))
        evasion, public = (settings.pop(key) for key in ("evasion", "public"))
        settings |= {"evasion": {key: value for key, value in evasion.items() if key != "images"}} if evasion else {}
        settings |= {"public": public["digest"]} if public else {}
        keys = ("change", "judge", "called", "precision", "drawing", "removal")
        options = {key: settings.pop(key) for key in keys}
        settings |= {key: value for key, value in options.items() if value}
        revision = find_attack(self.attack).revision
        settings |= {"revision": revision} if revision > 1 else {}
        settings |= {"first": {key: first[key] for key in ("digest", "class_noun")}} if first else {}
        return settings | ({"trained_on": trained_on["digest"]} if trained_on else {})

    @property
    def digest(self) -> str:
        """Of the settings."""
        return folder_digest(self.settings)

    @property
    def folder(self) -> Path:
        """Where its result is, or will be."""
        return Path(self.root) / self.subject / self.label / _safe(self.identifier) / str(self.seed) / self.digest

    def renamed(self, subject: str) -> Unit:
        """The same under another id of its subject."""
        return replace(self, subject=subject)

    def scores(self) -> dict[float, list[float | None]] | None:
        """Scores at every evaluation point, one per picture; `None` unless this unit's complete result is there."""
        return scores_of(self)

    def pictures(self, point: float) -> list[Path]:
        """What was drawn at an evaluation point, or at the end of an attack that succeeded before."""
        steps = self.evaluation_points[point]
        drawn = [folder for folder in (self.folder / "images").glob("*") if int(folder.name) <= steps]
        return sorted(max(drawn, key=lambda folder: int(folder.name)).glob("*.png")) if drawn else []


def _safe(identifier: str) -> str:
    return "".join(c if c.isalnum() else f"%{ord(c):x}" for c in identifier)


@lru_cache(maxsize=2)
def _model(source: str) -> DiffusionModel:
    return load_model(source)


def _computing(model: DiffusionModel, precision: str | None) -> DiffusionModel:
    """The same, or a copy that computes so: the model itself is kept for units to come."""
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


def run_unit(unit: Unit) -> None:
    """Attack, draw, score; the folder appears whole."""
    judged = _computing(_model(unit.model), unit.precision)
    model = judged if unit.trained_on is None else _computing(_model(unit.trained_on["model"]), unit.precision)
    change = None if unit.change is None else CHANGES[unit.change]
    images = open_pictures(unit.attack_images, model.image_size, change)
    evasion, names = evasion_of(unit, model)
    images = transformed(images, names, evasion)
    public = None if unit.public is None else _computing(_model(unit.public["model"]), unit.precision)
    data = AttackData(images, _class_images(unit.class_pictures, unit.class_images), unit.identifier, unit.noun)
    first = None
    if unit.first is not None:
        others = _class_images(unit.first["class_pictures"], unit.class_images)
        first = AttackData(
            open_pictures(unit.first["images"], model.image_size), others, FIRST_IDENTIFIER, unit.first["class_noun"]
        )
    policy = unit.judge or {"name": "avatar", "model": None, "learnt": half_way(calibration()[unit.class_noun])}
    judge, level = load_judge(policy["name"], policy["model"]), policy["learnt"]
    references = open_pictures(unit.reference_images, judge.size or model.image_size)
    cost = None
    if unit.removal is not None:
        removal = find_removal(unit.removal["name"])
        model, cost = measured(removal, model, data, unit.removal["params"], seed=unit.seed, base=public)
    scores: dict[int, list[float | None]] = {}

    def stop(steps: int, images: Tensor) -> bool:
        scores[steps] = judge.similarity(inverted(images, names, evasion), references)
        reached = interval([scores[steps]])
        return steps >= unit.evaluation_points[1] and reached is not None and reached.mean >= level

    drawn, losses = draw_during_attack(
        model, unit.attack, unit.params, data, evaluate_at=list(unit.evaluation_points.values()), seed=unit.seed,
        count=unit.images, sampling=unit.sampling, stop=stop, first=first, first_steps=unit.evaluation_points[1],
        onto=None if unit.trained_on is None else judged, base=public, **drawing_of(unit),
    )  # fmt: skip
    drawn = {steps: inverted(images, names, evasion) for steps, images in drawn.items()}
    prompts = find_attack(unit.attack).prompts(unit.identifier, unit.noun, unit.images)

    with whole_folder(unit.folder) as folder:
        for steps, images in drawn.items():
            place = folder / "images" / str(steps)
            place.mkdir(parents=True)
            for i, image in enumerate(images):
                to_pil(image).save(place / f"{i:03d}.png")
        tail = losses[-50:]
        training = {
            "digest": unit.digest, "loss_start": losses[0], "loss_end": sum(tail) / len(tail), "steps_taken": len(losses)
        }  # fmt: skip
        training |= {"removal_cost": cost.record()} if cost is not None else {}
        write_json(folder / "attack.json", unit.settings | training)
        write_json(folder / "scores.json", {"identity": scores, "prompts": prompts, "digest": unit.digest})


def scores_of(unit: Unit) -> dict[float, list[float | None]] | None:
    """Scores at every evaluation point, one per picture; `None` unless the complete result of exactly this unit is there.

    Points after the end of an attack that succeeded early have the scores of its end.
    """
    try:
        record = json.loads((unit.folder / "scores.json").read_text())
        if record["digest"] != unit.digest:
            return None
        by_steps, last = record["identity"], max(map(int, record["identity"]))
        if last < unit.evaluation_points[1]:
            return None
        scores = {point: by_steps[str(min(steps, last))] for point, steps in unit.evaluation_points.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return scores if all(len(values) == unit.images for values in scores.values()) else None


def damaged_pictures(unit: Unit) -> bool:
    """Whether a complete unit has lost pictures, to a power loss or otherwise; a warning names the first one."""
    for point in unit.evaluation_points:
        files = unit.pictures(point)
        lost = [file for file in files if not is_whole_png(file)]
        if lost or len(files) < unit.images:
            which = f"{lost[0]} cannot be read" if lost else f"{unit.folder / 'images'} lacks pictures"
            warn(f"{which}; the attack {unit.name} runs again")
            return True
    return False


def removal_cost(unit: Unit) -> dict[str, Any] | None:
    """What editing the weights cost in a complete unit (`RemovalCost`); `None` where it did not run, or edited nothing."""
    try:
        cost = json.loads((unit.folder / "attack.json").read_text())["removal_cost"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(cost)


def attacked_subjects(registry: Registry, spec: VerifySpec, seed: int) -> list[Subject]:
    """The protected subjects that are attacked: all of them, or a sample drawn by the recipe's seed."""
    everyone = list(registry.subjects)
    if spec.sample is None or spec.sample >= len(everyone):
        return everyone
    drawn = set(random.Random(seed).sample(range(len(everyone)), spec.sample))
    return [subject for number, subject in enumerate(everyone) if number in drawn]


def class_file(judged: Judged, noun: str, recipe: Recipe) -> Path:
    """Where the class pictures are that a model drew for its attackers."""
    key = folder_digest(judged.digest, recipe.sampling.model_dump(), recipe.verify.class_images)
    return judged.root / f"class-{noun.replace(' ', '-')}-{key}.safetensors"


def attack_images(subject: Subject, data: str, everyone: Sequence[Subject]) -> tuple[Image, ...]:
    """The attacker's pictures of a subject (see `AttackSpec.data`).

    Raises:
        UserError: nobody else of its class is there to mix it with.
    """
    if data == "hardened_on":
        return subject.images_of("harden") or subject.images_of("attack")  # controls were not hardened on
    if data != "mixed":
        return subject.images_of("attack")
    others = [other for other in everyone if other.class_noun == subject.class_noun and other.id != subject.id]
    in_turn = [image for row in zip_longest(*(other.images_of("attack") for other in others)) for image in row if image]
    if len(in_turn) < AROUND:
        raise UserError(
            f"data: mixed needs {AROUND} pictures of others of class {subject.class_noun} beside {subject.id} in the registry."
        )
    return (subject.images_of("attack")[0], *in_turn[:AROUND])


def stranger_to(subject: Subject, everyone: Sequence[Subject], purpose: str = "two_stage") -> Subject:
    """Whom an attacker in two stages trains on first, or puts beside the subject: the last one that is somebody else.

    Raises:
        UserError: nobody is.
    """
    for other in reversed(everyone):
        if other.id != subject.id:
            return other
    raise UserError(f"{purpose} needs somebody else beside {subject.id} in the registry.")


def evasion_plan(spec: AttackSpec, subject: Subject, everyone: Sequence[Subject]) -> dict[str, Any] | None:
    """`Unit.evasion` of an attack on a subject.

    Raises:
        UserError: a transformation needs somebody else's pictures and nobody else is there.
    """
    if not spec.evasion:
        return None
    plan: dict[str, Any] = {"names": list(spec.evasion)}
    if any(find_evasion(name).needs_stranger for name in spec.evasion):
        images = stranger_to(subject, everyone, "side_by_side").images_of("attack")
        plan |= {"images": [str(i.path) for i in images], "digest": folder_digest([i.sha256 for i in images])}
    return plan


def drawing_plan(spec: AttackSpec) -> dict[str, Any] | None:
    """`Unit.drawing` of an attack."""
    if spec.drawing == "usual":
        return None
    return {"name": spec.drawing} | ({"hand_over": spec.hand_over} if spec.drawing in NEEDS_BASE else {})


def needs_public_base(spec: AttackSpec) -> bool:
    """Whether an attacker uses the public base beside the model under attack."""
    return spec.drawing in NEEDS_BASE or (spec.removal is not None and find_removal(spec.removal.name).needs_base)


def plan_units(
    registry: Registry, recipe: Recipe, models: dict[Side, Judged], policy: Policy | None = None
) -> Iterator[Unit]:
    """Attack x identifier x seed on base and hardened, for protected subjects and controls, judged as the policy says."""
    spec = recipe.verify
    protected = attacked_subjects(registry, spec, recipe.seed)
    everyone = (*registry.subjects, *registry.controls)
    pairs = list(product(spec.identifiers, spec.seeds))
    public = models.get("base")
    for side, judged in models.items():
        for row, subject in enumerate((*protected, *registry.controls)):
            references = subject.images_of("reference")
            further = side == "hardened" and row < len(protected)
            for column, (label, attack) in enumerate(spec.attacks.items()):
                usual = find_attack(attack.name).steps(attack.params)
                points = {
                    point: max(1, round(point * usual))
                    for point in sorted(spec.evaluation_points)
                    if point <= 1 or further
                }
                attacked = attack_images(subject, attack.data, everyone)
                trained = judged if attack.trained_on == "itself" else models.get(attack.trained_on, judged)
                first = None
                if attack.two_stage:
                    stranger = stranger_to(subject, (*protected, *registry.controls))
                    before = stranger.images_of("attack")
                    first = {
                        "images": [str(i.path) for i in before], "digest": folder_digest([i.sha256 for i in before]),
                        "class_noun": stranger.class_noun,
                        "class_pictures": str(class_file(trained, stranger.class_noun, recipe)),
                    }  # fmt: skip
                noun = attack.class_noun or subject.class_noun
                for identifier, seed in pairs if spec.full_factorial else [pairs[(row + column) % len(pairs)]]:
                    yield Unit(
                        side=side, root=str(judged.root), model=judged.model.place, model_digest=judged.digest,
                        subject=subject.id, class_noun=subject.class_noun,
                        attack_images=tuple(str(i.path) for i in attacked),
                        reference_images=tuple(str(i.path) for i in references),
                        images_digest=folder_digest([i.sha256 for i in (*attacked, *references)]), attack=attack.name,
                        params=attack.params | {"steps": max(points.values())}, evaluation_points=points, label=label,
                        identifier=identifier, seed=seed, images=spec.images_per_unit,
                        class_pictures=str(class_file(trained, noun, recipe)),
                        class_images=spec.class_images, sampling=recipe.sampling.model_dump(),
                        attacker_noun=None if noun == subject.class_noun else noun,
                        change=attack.data if attack.data in CHANGES else None,
                        precision=None if attack.precision == "float32" else attack.precision,
                        first=first, evasion=evasion_plan(attack, subject, everyone), drawing=drawing_plan(attack),
                        removal=None if attack.removal is None else attack.removal.model_dump(),
                        public={"model": public.model.place, "digest": public.digest}
                        if public is not None and needs_public_base(attack) else None,
                        trained_on=None if trained is judged else {
                            "model": trained.model.place, "digest": trained.digest
                        },
                        judge=None if policy is None or policy.judge.name == "avatar" else {
                            "name": policy.judge.name, "model": policy.judge.model,
                            "learnt": half_way(policy.classes[subject.class_noun]),
                        },
                    )  # fmt: skip


def run_units(units: Sequence[Unit], workers: int | None = None, executor: str = "local") -> dict[str, str]:
    """Run what is missing (see `executors.run_all`); returns unit name -> reason for those that failed."""
    missing = [unit for unit in units if scores_of(unit) is None or damaged_pictures(unit)]
    failed: dict[str, str] = {}
    if not missing:
        return failed
    # The longest first, so that no core waits for a single one at the end.
    missing.sort(key=lambda unit: -max(unit.evaluation_points.values()))
    with stage("attacks", len(missing)) as bar:
        for unit, error in run_all(run_unit, missing, executor=executor, workers=workers):
            if isinstance(error, GuardsmithError):
                failed[unit.name] = str(error)
            elif error is not None:  # an attack that crashes is a finding about that cell, not the end of the run
                if system_errno(error) == errno.ENOSPC:  # unlike a full disk
                    raise error
                failed[unit.name] = f"{type(error).__name__}: {error}"
            bar()
    return failed


def collect(units: Sequence[Unit]) -> dict[tuple[Side, str, str, float], Units]:
    """Scores by (side, subject, attack label, evaluation point); a failed unit counts as one with nothing scored."""
    scores: dict[tuple[Side, str, str, float], list[list[float | None]]] = {}
    for unit in units:
        measured = scores_of(unit) or {point: [None] * unit.images for point in unit.evaluation_points}
        for point, values in measured.items():
            scores.setdefault((unit.side, unit.subject, unit.label, point), []).append(values)
    return dict(scores)
