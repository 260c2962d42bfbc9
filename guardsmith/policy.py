"""The gate's policy: its rules and the levels that similarities are compared with, in a file of their own.

Whoever signs a release can keep one file under review, and use it with every recipe: `guardsmith policy > policy.yaml`, then
`guardsmith verify out --policy policy.yaml`. The report names it with its date and digest.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from guardsmith.errors import UserError
from guardsmith.gate import Levels, calibration, calibration_info
from guardsmith.recipe import GateSpec, explain
from guardsmith.records import folder_digest


class Policy(BaseModel):
    """Rules and levels."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """What the report calls it."""
    dated: date
    """Day from which it holds, or on which the levels were measured."""
    measured_on: str = ""
    """Where the levels come from."""
    rules: GateSpec = GateSpec()
    """See `gate` in a recipe, whose place they take."""
    classes: dict[str, Levels] = Field(min_length=1)
    """Class noun -> chance, chance_high, genuine (`gate.Levels`)."""

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
        """Of all that decides a verdict: the name does not."""
        return folder_digest(self.model_dump(mode="json", exclude={"name", "dated", "measured_on"}))

    def told(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "name": self.name,
            "dated": self.dated.isoformat(),
            "measured_on": self.measured_on,
            "digest": self.digest,
        }


def default_policy(rules: GateSpec | None = None) -> Policy:
    """The levels of the embedded judges, with these rules."""
    return Policy(
        name="guardsmith, embedded judges", dated=date.fromisoformat(calibration_info("date")),
        measured_on=calibration_info("measured_on"), rules=rules or GateSpec(), classes=calibration(),
    )  # fmt: skip


def load_policy(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        UserError: every problem, one sentence a line.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a policy file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a policy is a mapping of keys to values; this file is not")
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        known = [*Policy.model_fields, *GateSpec.model_fields, *Levels._fields]
        raise UserError("\n".join(explain(error, str(path), known))) from None


def as_yaml(policy: Policy) -> str:
    """The file that `load_policy` reads."""
    told = json.loads(policy.model_dump_json())
    told["dated"] = policy.dated
    told["classes"] = {noun: levels._asdict() for noun, levels in policy.classes.items()}
    return yaml.safe_dump(told, sort_keys=False, width=120)
