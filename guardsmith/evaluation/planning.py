"""Which units a verification runs: every attack on base and hardened model, for protected subjects and controls."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from guardsmith.attacks import find_attack
from guardsmith.attacks.adaptive.removals import find_removal
from guardsmith.attacks.augmentations import CHANGES
from guardsmith.attacks.evasion import find_evasion
from guardsmith.attacks.sampling_tricks import NEEDS_BASE
from guardsmith.config.displacement import JUST_ENOUGH, at_rate, attack_of
from guardsmith.config.recipe import AttackSpec, Recipe, VerifySpec
from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.errors import UserError
from guardsmith.evaluation.units import Unit
from guardsmith.gate.calibration import half_way
from guardsmith.gate.evidence import Side
from guardsmith.gate.policy import Policy
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.registry.loader import Registry, Subject
from guardsmith.registry.types import Image

MIXED_OTHERS = 3  # pictures of others beside the one of the subject, in an attack on mixed pictures


@dataclass(frozen=True)
class TargetModel:
    """A model that the attackers attack: the base or the hardened one.

    Attributes:
        model: loaded.
        digest: of its weights.
        root: folder of its units and of what else is drawn by it.
    """

    model: DiffusionModel
    digest: str
    root: Path


def attacked_subjects(registry: Registry, spec: VerifySpec, seed: int) -> list[Subject]:
    """The protected subjects that are attacked: all of them, or a sample drawn by the recipe's seed."""
    subjects = list(registry.subjects)
    if spec.sample is None or spec.sample >= len(subjects):
        return subjects
    sample = set(random.Random(seed).sample(range(len(subjects)), spec.sample))
    return [subject for number, subject in enumerate(subjects) if number in sample]


def class_file(target: TargetModel, noun: str, recipe: Recipe) -> Path:
    """Where the class pictures are that a model drew for its attackers."""
    key = folder_digest(target.digest, recipe.sampling.model_dump(), recipe.verify.class_images)
    return target.root / f"class-{noun.replace(' ', '-')}-{key}.safetensors"


def attack_images(subject: Subject, data: str, everyone: Sequence[Subject]) -> tuple[Image, ...]:
    """The attacker's pictures of a subject (see `AttackSpec.data`).

    Raises:
        UserError: the registry has too few pictures of others of its class.
    """
    if data == "hardened_on":
        return subject.images_of("harden") or subject.images_of("attack")  # controls were not hardened on
    if data != "mixed":
        return subject.images_of("attack")
    others = [other for other in everyone if other.class_noun == subject.class_noun and other.id != subject.id]
    in_turn = [image for row in zip_longest(*(other.images_of("attack") for other in others)) for image in row if image]
    if len(in_turn) < MIXED_OTHERS:
        raise UserError(
            f"data: mixed needs {MIXED_OTHERS} pictures of others of class {subject.class_noun} in the registry beside those of "
            f"{subject.id}."
        )
    return (subject.images_of("attack")[0], *in_turn[:MIXED_OTHERS])


def stranger_to(subject: Subject, everyone: Sequence[Subject], purpose: str = "two_stage") -> Subject:
    """The other subject that an attacker in two stages trains on first, or puts beside the subject: the last of the registry.

    Raises:
        UserError: there is no other subject.
    """
    for other in reversed(everyone):
        if other.id != subject.id:
            return other
    raise UserError(f"{purpose} needs another subject beside {subject.id} in the registry.")


def evasion_plan(spec: AttackSpec, subject: Subject, everyone: Sequence[Subject]) -> dict[str, Any] | None:
    """`Unit.evasion` of an attack on a subject.

    Raises:
        UserError: a transformation needs another subject's pictures and there is none.
    """
    if not spec.evasion:
        return None
    plan: dict[str, Any] = {"names": list(spec.evasion)}
    if any(find_evasion(name).needs_stranger for name in spec.evasion):
        images = stranger_to(subject, everyone, "side_by_side").images_of("attack")
        plan |= {"images": [str(i.path) for i in images], "digest": folder_digest([i.sha256 for i in images])}
    compared = [name for name in spec.evasion if find_evasion(name).of_references]
    return plan | ({"of_references": compared} if compared else {})


def check_others(registry: Registry, recipe: Recipe) -> None:
    """The registry has to have the other subjects whose pictures some attacks use.

    Raises:
        UserError: it does not.
    """
    attacked = (*attacked_subjects(registry, recipe.verify, recipe.seed), *registry.controls)
    everyone = (*registry.subjects, *registry.controls)
    for attack in recipe.verify.attacks.values():
        for subject in attacked:
            attack_images(subject, attack.data, everyone)
            evasion_plan(attack, subject, everyone)
            if attack.two_stage:
                stranger_to(subject, attacked)


def first_stage_plan(stranger: Subject, class_pictures: Path) -> dict[str, Any]:
    """`Unit.first` of an attacker in two stages, who trains on this stranger before the subject."""
    images = stranger.images_of("attack")
    return {
        "images": [str(image.path) for image in images], "digest": folder_digest([image.sha256 for image in images]),
        "class_noun": stranger.class_noun, "class_pictures": str(class_pictures),
    }  # fmt: skip


def drawing_plan(spec: AttackSpec) -> dict[str, Any] | None:
    """`Unit.drawing` of an attack."""
    if spec.drawing == "usual":
        return None
    return {"name": spec.drawing} | ({"hand_over": spec.hand_over} if spec.drawing in NEEDS_BASE else {})


def needs_public_base(spec: AttackSpec) -> bool:
    """Whether an attacker uses the public base beside the model under attack."""
    return spec.drawing in NEEDS_BASE or (spec.removal is not None and find_removal(spec.removal.name).needs_base)


def learning_rate(attack: str, params: Mapping[str, Any]) -> float | None:
    """The learning rate of an attack under these settings; `None` where it has no such setting."""
    rate = find_attack(attack).config(**params).model_dump().get("learning_rate")
    return None if rate is None else float(rate)


def attacks_at_rates(spec: VerifySpec) -> dict[str, AttackSpec]:
    """Name -> attack for every attack at a further rate (`verify.displacement.rates`).

    Raises:
        UserError: an attack has no learning rate.
    """
    result = {}
    for label, multiple in product(spec.displacement.attacks, sorted(spec.displacement.rates)):
        result[at_rate(label, multiple)] = with_rate(label, spec.attacks[label], multiple)
    return result


def with_rate(label: str, attack: AttackSpec, multiple: float) -> AttackSpec:
    """The attack at a multiple of its learning rate.

    Raises:
        UserError: it has none.
    """
    rate = learning_rate(attack.name, attack.params)
    if rate is None:
        raise UserError(f"verify.displacement.attacks: the attack {label} has no learning_rate; leave it out.")
    params = attack.params | {"learning_rate": float(f"{rate * multiple:.6g}")}
    return attack.model_copy(update={"params": params})


def attacks_to_search(spec: VerifySpec) -> list[str]:
    """Labels of the attacks whose just-enough attack has to be searched."""
    labels = spec.displacement.attacks if spec.displacement.just_enough else ()
    return [label for label in labels if f"{label}{JUST_ENOUGH}" not in spec.attacks]


def plan_units(
    registry: Registry, recipe: Recipe, models: dict[Side, TargetModel], policy: Policy | None = None
) -> Iterator[Unit]:
    """Attack x identifier x seed on base and hardened, for protected subjects and controls, judged as the policy says.

    Attacks at further rates are for protected subjects only.
    """
    spec = recipe.verify
    protected = attacked_subjects(registry, spec, recipe.seed)
    everyone = (*registry.subjects, *registry.controls)
    pairs = list(product(spec.identifiers, spec.seeds))
    public = models.get("base")
    further = attacks_at_rates(spec)
    columns = {label: number for number, label in enumerate(spec.attacks)}
    for side, target in models.items():
        for row, subject in enumerate((*protected, *registry.controls)):
            references = subject.images_of("reference")
            beyond_usual = side == "hardened" and row < len(protected)
            attacks = spec.attacks | (further if row < len(protected) else {})
            for label, attack in attacks.items():
                column = columns[attack_of(label)]
                usual = find_attack(attack.name).steps(attack.params)
                points = {
                    point: max(1, round(point * usual))
                    for point in sorted(spec.evaluation_points)
                    if point <= 1 or beyond_usual
                }
                images = attack_images(subject, attack.data, everyone)
                trainer = target if attack.trained_on == "itself" else models.get(attack.trained_on, target)
                first = None
                if attack.two_stage:
                    stranger = stranger_to(subject, (*protected, *registry.controls))
                    first = first_stage_plan(stranger, class_file(trainer, stranger.class_noun, recipe))
                noun = attack.class_noun or subject.class_noun
                for identifier, seed in pairs if spec.full_factorial else [pairs[(row + column) % len(pairs)]]:
                    yield Unit(
                        side=side, root=str(target.root), model=target.model.place, model_digest=target.digest,
                        subject=subject.id, class_noun=subject.class_noun,
                        attack_images=tuple(str(i.path) for i in images),
                        reference_images=tuple(str(i.path) for i in references),
                        images_digest=folder_digest([i.sha256 for i in (*images, *references)]), attack=attack.name,
                        params=attack.params | {"steps": max(points.values())}, evaluation_points=points, label=label,
                        identifier=identifier, seed=seed, images=spec.images_per_unit,
                        class_pictures=str(class_file(trainer, noun, recipe)),
                        class_images=spec.class_images, sampling=recipe.sampling.model_dump(),
                        attacker_noun=None if noun == subject.class_noun else noun,
                        change=attack.data if attack.data in CHANGES else None,
                        precision=None if attack.precision == "float32" else attack.precision,
                        first=first, evasion=evasion_plan(attack, subject, everyone), drawing=drawing_plan(attack),
                        removal=None if attack.removal is None else attack.removal.model_dump(),
                        public={"model": public.model.place, "digest": public.digest}
                        if public is not None and needs_public_base(attack) else None,
                        trained_on=None if trainer is target else {
                            "model": trainer.model.place, "digest": trainer.digest
                        },
                        judge=None if policy is None or policy.judge.name == "avatar" else {
                            "name": policy.judge.name, "model": policy.judge.model,
                            "level": half_way(policy.classes[subject.class_noun]),
                        },
                    )  # fmt: skip
