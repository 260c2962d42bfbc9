"""The gate's policy: its rules and the levels that similarities are compared with, in a file of their own.

Whoever signs a release can keep one file under review, and use it with every recipe: `guardsmith policy > policy.yaml`, then
`guardsmith verify out --policy policy.yaml`. The report names it with its date and digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from guardsmith.config.deployability import DeployabilityLimits
from guardsmith.config.loading import explain
from guardsmith.config.recipe import GateSpec, ThreatModel
from guardsmith.config.renamed import GATE_KEYS, POLICY_KEYS, with_new_keys
from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.console import warn
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures
from guardsmith.core.redaction import Place
from guardsmith.core.yaml_text import odd_numbers, read_yaml
from guardsmith.gate.calibration import Levels, calibration, calibration_info
from guardsmith.metrics import find_judge, load_judge
from guardsmith.registry.loader import Registry
from guardsmith.registry.types import Day


class JudgeSpec(BaseModel):
    """Who measures similarity."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = "avatar"
    """`avatar`: the embedded encoder, for the embedded world only. `dino`, `clip`: vision transformers of the Hub. `face`: dlib's
    face recognition (`pip install guardsmith[face]`). `module:NAME`: one of your own."""
    model: Place | None = None
    """Folder or Hub id of the encoder, where it is not the usual one; for `face`, the DINO that compares ordinary pictures."""
    clip_t: Place | None = None
    """Folder or Hub id of a CLIP that says how well ordinary pictures fit their prompts (CLIP-T); `null`: nobody does."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            find_judge(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name


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
    """Levels of a judge, measured on the pictures of a registry, which should be of subjects that nobody verifies.

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
    measured = load_judge(judge.name, judge.model)
    everyone = (*registry.subjects, *registry.controls)
    classes, measured_on = {}, []
    for noun in dict.fromkeys(subject.class_noun for subject in everyone):
        people = [subject for subject in everyone if subject.class_noun == noun]
        if len(people) < 2:
            raise UserError(
                f"{registry.path}: class {noun} has one subject only; levels need two at least, better twenty."
            )
        drawn_from, compared_with = (
            [open_pictures([image.path for image in person.images_of(split)], size) for person in people]
            for split in ("attack", "reference")
        )
        scores = [[measured.similarity(mine, theirs) for theirs in compared_with] for mine in drawn_from]
        for person, row, i in zip(people, scores, range(len(people)), strict=True):
            if measured.nobody is not None and (lost := row[i].count(measured.nobody)):
                raise UserError(
                    f"{registry.path}: no face is found in {lost} of the attack pictures of {person.id}; leave them out."
                )
        means = [[_mean(each) for each in row] for row in scores]
        own = [means[i][i] for i in range(len(people))]
        pairs = [means[i][j] for i in range(len(people)) for j in range(len(people)) if i != j]
        levels = Levels(float(np.mean(pairs)), float(np.quantile(pairs, 0.95)), float(np.mean(own)))
        if levels.chance_high >= levels.genuine:
            raise UserError(
                f"{registry.path}: the judge {judge.name} cannot tell subjects of class {noun} apart (two different ones "
                f"{levels.chance_high:.2f}, one and the same {levels.genuine:.2f}); choose another."
            )
        classes[noun] = levels
        measured_on.append(f"{len(people)} of class {noun}")
    return Policy(
        name=f"measured with {judge.name}", dated=datetime.now(UTC).date(),
        measured_on=f"{registry.path.name}: {', '.join(measured_on)}", judge=judge, rules=rules or GateSpec(), classes=classes,
    )  # fmt: skip


def _mean(scores: Sequence[float | None]) -> float:
    return float(np.mean([score for score in scores if score is not None]))


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
        known = [*Policy.model_fields, *GateSpec.model_fields, *(field.name for field in fields(Levels))]
        raise UserError("\n".join(explain(error, str(path), known))) from None
    problems = [f"{path}: {sentence}" for sentence in odd_numbers(data, policy)]
    if problems:
        raise UserError("\n".join(problems))
    return policy


def as_yaml(policy: Policy) -> str:
    """The file that `load_policy` reads."""
    return yaml.safe_dump(policy.model_dump(mode="json") | {"dated": policy.dated}, sort_keys=False, width=120)
