"""Keys of recipes, policies and reports that have got another name: read by either, with a warning that says the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardsmith.core.errors import UserError

GATE_KEYS = {"learnt_share": "personalized_share", "destroyed_share": "collapsed_share"}
"""Of the section `gate` of a recipe, and `rules` of a policy."""

RECIPE_KEYS = {
    "bystanders": "negatives",
    "verify.looks": "verify.evaluation_points",
    "verify.crossed": "verify.full_factorial",
    "verify.ordinary_images": "verify.benign_images",
    "method.params.ordinary_images": "method.params.benign_images",
    **{f"gate.{old}": f"gate.{new}" for old, new in GATE_KEYS.items()},
}
"""Of a recipe, with dots between a section and its key. A key stays in its section."""

POLICY_KEYS = {f"rules.{old}": f"rules.{new}" for old, new in GATE_KEYS.items()}


def with_new_keys(data: Mapping[str, Any], table: Mapping[str, str], where: str) -> tuple[dict[str, Any], list[str]]:
    """A copy of what a file holds under the present names, and a warning for each key that was there under its old one.

    Args:
        data: the file's mapping.
        table: old key -> new key, with dots between sections and their keys.
        where: the file, for warnings and errors.

    Raises:
        UserError: a key is there under both names.
    """
    result, warnings = dict(data), []
    for old, new in table.items():
        *sections, last = old.split(".")
        holder: Any = result
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            continue
        name = new.split(".")[-1]
        if name in holder:
            raise UserError(f"{where}: {old!r} is the old name of {new!r}, and both are there; remove {old!r}")
        new_section = {name if key == last else key: value for key, value in holder.items()}
        warnings.append(f"{where}: {old!r} is called {new!r} now; please rename it")
        result = _replaced(result, sections, new_section)
    return result, warnings


def _replaced(data: dict[str, Any], sections: list[str], value: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested mappings with another one in this place."""
    if not sections:
        return value
    return data | {sections[0]: _replaced(data[sections[0]], sections[1:], value)}
