"""Reports of earlier schemas as the present one has them.

1: until version 0.1.0; `look`, `faceless` and `destroyed` for what is `evaluation_point`, `fdfr` and `collapsed` now
2: of unreleased versions after 0.1.0; as 1 too, checks called "ordinary prompts (...)" for "benign prompts (...)"
3: the present one; unreleased versions had `steps_to_break` in it, as all before
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict

from guardsmith.config.renamed import RECIPE_KEYS, with_new_keys
from guardsmith.core.errors import UserError

SCHEMA: Any = 3
"""The schema that is written."""

PART = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True, serialize_by_alias=True)
"""Of every part of a report. Fields that a reader does not know are left out: a report may come from a later version."""

SCORE_KEYS = {"look": "evaluation_point", "faceless": "fdfr"}
UTILITY_KEYS = {"destroyed": "collapsed"}
CHECK_NAMES = {
    "ordinary prompts (KID)": "benign prompts (KID)",
    "ordinary prompts (destroyed)": "benign prompts (collapsed)",
    "ordinary prompts (fidelity)": "benign prompts (fidelity)",
    "ordinary prompts (CLIP-T)": "benign prompts (CLIP-T)",
}


def upgraded(data: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """What a report holds in the present schema; of an earlier one a warning, which names the keys that have got another name.

    What is no report is handed back as it is: validation refuses it and says why.

    Args:
        data: the report, of any schema up to the present one.
        where: it is from, for messages.

    Raises:
        UserError: its schema is later than the present one.
    """
    schema = data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UserError(
            f"{where} is not a report of this version of guardsmith (its schema is {schema}, the latest known {SCHEMA}); "
            "update guardsmith."
        )
    if schema not in (1, 2):
        return _with_break_points(data), []
    result = _with_break_points(data) | {"schema": SCHEMA}
    old_keys: dict[str, str] = {}
    if isinstance(data.get("checks"), list):
        result["checks"] = [_with_new_name(check) for check in data["checks"]]
    if schema == 1:
        if isinstance(data.get("scores"), list):
            result["scores"] = [_renamed(score, SCORE_KEYS, "scores.", old_keys) for score in data["scores"]]
        result["utility"] = _renamed(data.get("utility"), UTILITY_KEYS, "utility.", old_keys)
    if isinstance(data.get("recipe"), dict):
        result["recipe"], warnings = with_new_keys(data["recipe"], RECIPE_KEYS, where)
        old_keys |= {
            f"recipe.{old}": f"recipe.{new}"
            for old, new in RECIPE_KEYS.items()
            if f"{old!r} is called" in " ".join(warnings)
        }
    if result.get("released") is None:
        result.pop("released", None)
    if schema == 2 and not old_keys:  # no release wrote it, and only the names of checks are other ones
        return result, []
    names = ", ".join(f"{old.rsplit('.', 1)[-1]} ({new.rsplit('.', 1)[-1]})" for old, new in old_keys.items())
    return result, [
        f"{where} is of schema {schema}, from an earlier version, and is read all the same; verify again to have what that "
        "version did not measure" + (f" (keys that have another name now: {names})" if names else "")
    ]


def _with_break_points(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which `steps_to_break`, which had numbers of steps alone, is `displacement_to_break`."""
    result = dict(data)
    old = result.pop("steps_to_break", None)
    if isinstance(old, list) and "displacement_to_break" not in result:
        result["displacement_to_break"] = [_break_points(each) for each in old]
    return result


def _break_points(each: Any) -> Any:
    def point(steps: Any) -> Any:
        return None if steps is None else {"displacement": None, "rate": None, "steps": steps}

    if not isinstance(each, dict):
        return each
    return each | {side: point(each[side]) for side in ("base", "hardened", "tried") if side in each}


def _with_new_name(check: Any) -> Any:
    """A check under the present name of its rule."""
    new = CHECK_NAMES.get(str(check.get("name"))) if isinstance(check, dict) else None
    return check if new is None else check | {"name": new}


def _renamed(part: Any, table: Mapping[str, str], prefix: str, old_keys: dict[str, str]) -> Any:
    """One mapping of the report under new keys; old and new names are added to `old_keys`."""
    if not isinstance(part, dict):
        return part
    old_keys |= {prefix + old: prefix + new for old, new in table.items() if old in part}
    return {table.get(key, key): value for key, value in part.items()}
