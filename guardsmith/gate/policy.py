"""The gate's policy: its rules and the levels that similarities are compared with, in a file of their own.

One file under review serves every recipe: `guardsmith policy > policy.yaml`, then
`guardsmith verify out --policy policy.yaml`. The report names it with its date and digest.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, date, datetime
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from guardsmith.config.deployability import DeployabilityLimits
from guardsmith.config.judge import ClassLevels, JudgeSpec
from guardsmith.config.problems import explain
from guardsmith.config.recipe import GateSpec, Recipe, ThreatModel
from guardsmith.config.renamed import GATE_KEYS, POLICY_KEYS, with_new_keys
from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.console import warn
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures
from guardsmith.core.yaml_text import odd_numbers, read_yaml
from guardsmith.gate.calibration import Levels, calibration, calibration_info
from guardsmith.gate.levels import class_levels
from guardsmith.metrics import load_judge
from guardsmith.registry.loader import Registry
from guardsmith.registry.types import Day


class Policy(BaseModel):
    """Who judges, by which rules and levels."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """What the report calls it."""
    dated: Day
    """Day from which it holds, or on which the levels were measured."""
    measured_on: str = ""
    """Where the levels come from."""
    threat_model: ThreatModel | None = None
    """What attackers have to have had: `hosted` or `open-weights`; left out, a verification of either is judged."""
    judge: JudgeSpec = JudgeSpec()
    """Whose similarities the levels are levels of."""
    rules: GateSpec = GateSpec()
    """See `gate` in a recipe, whose place they take."""
    classes: dict[str, Levels] = Field(min_length=1)
    """Class noun -> chance, chance_high, genuine (`gate.calibration.Levels`)."""

    @field_validator("classes")
    @classmethod
    def _in_order(cls, classes: dict[str, Levels]) -> dict[str, Levels]:
        for noun, levels in classes.items():
            if not -1 <= levels.chance <= levels.chance_high < levels.genuine <= 1:
                raise ValueError(
                    f"the levels of {noun!r} must rise from chance over chance_high to genuine, in [-1, 1]"
                )
        return classes

    @property
    def digest(self) -> str:
        """Of all that decides a verdict: the name does not. Keys that were renamed count under their first name."""
        content = self.model_dump(mode="json", exclude={"name", "dated", "measured_on", "classes"})
        if self.threat_model is None:  # policies from before there was the key keep their digest
            del content["threat_model"]
        for old, new in GATE_KEYS.items():
            content["rules"][old] = content["rules"].pop(new)
        if self.rules.claimed_displacement is None:
            del content["rules"]["claimed_displacement"]
        if self.rules.deployability == DeployabilityLimits():
            del content["rules"][
                "deployability"
            ]  # digests of policies from before there were such limits stay what they were
        levels = {noun: [each.chance, each.chance_high, each.genuine] for noun, each in self.classes.items()}
        return folder_digest(content | {"classes": levels})


def default_policy(rules: GateSpec | None = None) -> Policy:
    """The levels of the embedded judges, with these rules."""
    return Policy(
        name="guardsmith, embedded judges", dated=date.fromisoformat(calibration_info("date")),
        measured_on=calibration_info("measured_on"), rules=rules or GateSpec(), classes=calibration(),
    )  # fmt: skip


def measure_policy(registry: Registry, judge: JudgeSpec, size: int, rules: GateSpec | None = None) -> Policy:
    """Levels of a judge, measured on the pictures of a registry, which should be of subjects that are never verified.

    Genuine is the mean similarity of a subject's `attack` pictures to its `reference` pictures; chance is the same between two
    subjects of one class, and chance_high what 95 % of these pairs stay below.

    Args:
        registry: at least two subjects of every class.
        judge: whose levels.
        size: pictures are opened at, in pixels.
        rules: to go with them.

    Raises:
        UserError: a class has one subject only, or the judge cannot tell its subjects apart.
    """
    loaded_judge = load_judge(judge.name, judge.model)
    everyone = (*registry.subjects, *registry.controls)
    classes, measured_on = {}, []
    for noun in dict.fromkeys(subject.class_noun for subject in everyone):
        people = [subject for subject in everyone if subject.class_noun == noun]
        drawn_from, compared_with = (
            [open_pictures([image.path for image in person.images_of(split)], size) for person in people]
            for split in ("attack", "reference")
        )
        names = [person.id for person in people]
        classes[noun] = levels_of(
            class_levels(loaded_judge, names, drawn_from, compared_with, noun, str(registry.path))
        )
        measured_on.append(f"{len(people)} of class {noun}")
    return Policy(
        name=f"measured with {judge.name}", dated=datetime.now(UTC).date(),
        measured_on=f"{registry.path.name}: {', '.join(measured_on)}", judge=judge, rules=rules or GateSpec(), classes=classes,
    )  # fmt: skip


def levels_of(levels: ClassLevels) -> Levels:
    """Levels as the gate compares with them."""
    return Levels(levels.chance, levels.chance_high, levels.genuine)


def recipe_policy(recipe: Recipe, policy: Policy | None = None) -> Policy:
    """The policy that judges a recipe's verification: judge and levels of the recipe, with the rules of a policy if one is given.

    A policy with a judge of its own, other than the embedded one, keeps it.

    Args:
        recipe: with `judge` and `gate`.
        policy: read from a file.

    Raises:
        UserError: the recipe's judge has no levels.
    """
    judge = recipe.judge
    if policy is not None and (judge.name == "avatar" or policy.judge.name != "avatar"):
        return policy
    if judge.name == "avatar":
        return default_policy(recipe.gate)
    if judge.measured is None:
        raise UserError(
            f"the recipe's judge ({judge.name}) has no measured levels of similarity: measure them on pictures of "
            f"unprotected people or objects (`guardsmith levels FOLDER --judge {judge.name} > levels.yaml`) and name the file "
            "with --levels, or as judge.levels in the recipe"
        )
    own = JudgeSpec(name=judge.name, model=judge.model, clip_t=judge.clip_t)
    classes = {noun: levels_of(each) for noun, each in judge.measured.classes.items()}
    values = {"judge": own, "classes": classes, "measured_on": judge.measured.measured_on}
    if policy is not None:
        return policy.model_copy(update=values)
    return Policy(name=f"the recipe's, judged by {judge.name}", dated=judge.measured.dated, rules=recipe.gate, **values)


def load_policy(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        UserError: every problem, one sentence a line.
    """
    data, warnings = with_new_keys(read_yaml(path, "a policy"), POLICY_KEYS, str(path))
    for warning in warnings:
        warn(warning)
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        keys = [*Policy.model_fields, *GateSpec.model_fields, *(field.name for field in fields(Levels))]
        raise UserError("\n".join(explain(error, str(path), keys))) from None
    problems = [f"{path}: {sentence}" for sentence in odd_numbers(data, policy)]
    if problems:
        raise UserError("\n".join(problems))
    return policy


def as_yaml(policy: Policy) -> str:
    """The file that `load_policy` reads."""
    return yaml.safe_dump(policy.model_dump(mode="json") | {"dated": policy.dated}, sort_keys=False, width=120)
