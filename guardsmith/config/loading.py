"""Reading recipes: by name or file, with changes applied, and checked as a whole; every problem at once.

`load_recipe("demo")` finds `recipes/demo.yaml`; a path is taken as it is. `--set method.params.beta=2` changes one value.
"""

from __future__ import annotations

import copy
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardsmith.config.judge import RecipeJudge, with_levels
from guardsmith.config.problems import Change, as_changes, attributed, key_of, origin_of, recipe_findings
from guardsmith.config.recipe import BUDGETS, MethodSpec, Recipe
from guardsmith.config.renamed import RECIPE_KEYS, with_new_keys
from guardsmith.config.shipped import find_recipe, recipe_names
from guardsmith.core.console import first_process, print_line, warn
from guardsmith.core.errors import UserError
from guardsmith.core.yaml_text import Problem, parse, read_yaml


def _set(data: dict[str, Any], change: str) -> None:
    key, equals, text = (part.strip() for part in change.partition("="))
    origin = origin_of(change)
    if not equals or not key:
        raise UserError(f"{origin}: write it as key=value, e.g. --set method.params.beta=2")
    if key in RECIPE_KEYS:
        warn(f"{origin}: {key!r} is called {RECIPE_KEYS[key]!r} now")
    place = data
    *parents, last = RECIPE_KEYS.get(key, key).split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise UserError(f"{origin}: {parent!r} is not a section of the recipe")
    try:
        place[last], _, problems = parse(Path("--set"), text)
    except UserError:
        problems = [Problem(1, "")]
    if problems:
        excerpt = reprlib.repr(text)
        raise UserError(f"--set {key.strip()}={excerpt}: {excerpt} is not a YAML value; put it in quotes")


def _leave_out_params_of_another_method(data: dict[str, Any], changes: Sequence[str]) -> None:
    """Where a change names another method than the file, the file's parameters are not that method's."""
    names = [text for key, _, text in (change.partition("=") for change in changes) if key.strip() == "method.name"]
    method = data.get("method")
    if names and isinstance(method, dict) and method.get("name", MethodSpec().name) != names[-1].strip().strip("\"'"):
        data["method"] = {key: value for key, value in method.items() if key != "params"}


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, with `key=value` changes applied first; method and attack parameters are checked too.

    Args:
        name: name of a shipped recipe, or a file.
        changes: each `dotted.key=VALUE`, the value as YAML.

    Raises:
        UserError: every problem, one sentence a line.
    """
    path = find_recipe(name)
    data, warnings = with_new_keys(read_yaml(path, "a recipe"), RECIPE_KEYS, str(path))
    for warning in warnings:
        warn(warning)
    recipe = checked_recipe(data, str(path), changes)
    places: dict[str, Any] = {}
    if recipe.subjects is not None:
        places["subjects"] = str((path.parent / recipe.subjects).resolve())
    if recipe.negatives is not None:
        places["negatives"] = beside(path.parent, recipe.negatives)
    section = data.get("judge")
    replaces = isinstance(section, dict) and "name" in section
    changed = [
        change for change in changes if key_of(change) in ("judge", "judge.levels")
    ]  # typed here, so it begins here
    try:
        places["judge"] = with_levels(recipe.judge, Path() if changed else path.parent, replaces)
    except UserError as error:
        origin = origin_of(changed[-1]) if changed else str(path)
        raise UserError("\n".join(f"{origin}: {sentence}" for sentence in str(error).split("\n"))) from None
    return recipe.model_copy(update=places)


def checked_recipe(data: dict[str, Any], where: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe that a mapping holds, with changes applied first.

    Args:
        data: keys and values of a recipe; it is changed.
        where: it comes from, for messages.
        changes: see `load_recipe`.

    Raises:
        UserError: every problem, one sentence a line.
    """
    problems = []
    file_data = copy.deepcopy(data)
    _leave_out_params_of_another_method(data, changes)
    for change in changes:
        try:
            _set(data, change)
        except UserError as error:
            problems.append(str(error))
    # A change may be a whole section, with old names in it.
    sections = [change for change in changes if any(old.startswith(f"{key_of(change)}.") for old in RECIPE_KEYS)]
    data, warnings = with_new_keys(data, RECIPE_KEYS, origin_of(sections[-1]) if sections else where)
    for warning in warnings:
        warn(warning)
    if findings := recipe_findings(data):
        of_file = recipe_findings(file_data) if changes else findings
        problems += attributed(findings, where, changes, of_file)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return Recipe.model_validate(data)


def choose_recipe(
    recipe: Recipe | str | Path | None, base: str | None = None, changes: Mapping[str, Any] | Sequence[str] = ()
) -> Recipe:
    """The recipe that a command or a call uses.

    Args:
        recipe: a recipe, the name of a shipped one, or a file; `None` for the shipped one that fits base and method;
            off the embedded base a method has to be named then.
        base: `builtin:avatar`, a diffusers folder or a Hub id, in place of the recipe's.
        changes: `dotted.key=VALUE` each, or a mapping of dotted keys to values; in a mapping `None` changes nothing.

    Raises:
        UserError: there is no such recipe, or it has problems, one a line.
    """
    if isinstance(changes, Mapping):
        changes = as_changes({key: value for key, value in changes.items() if value is not None})
    if base is not None:
        changes = [*changes, Change(f"base={json.dumps(base)}", f"base {base}")]
    if isinstance(recipe, Recipe):
        changed = checked_recipe(recipe.model_dump(mode="json"), "the recipe", changes) if changes else recipe
        levels = changed.judge.levels is not None  # levels that are named take the place of those on record
        judge = with_levels(RecipeJudge(levels=changed.judge.levels), Path(), False) if levels else changed.judge
        return changed.model_copy(update={"judge": judge})
    if recipe is None:
        from guardsmith.config.choosing import is_embedded, shipped_recipe

        methods = [change.partition("=")[2].strip("\"' ") for change in changes if change.startswith("method.name=")]
        recipe = shipped_recipe(base, methods[-1] if methods else None, recipe_names())
        if not is_embedded(base) and first_process():
            print_line(f"recipe: {recipe}, by base and method")
    return load_recipe(str(recipe), changes)


def budget_changes(name: str | None) -> dict[str, Any]:
    """The changes to a recipe that a budget (`quick`, `standard` or `audit`) stands for, by dotted key.

    Raises:
        UserError: there is no such budget.
    """
    if name is None:
        return {}
    if name not in BUDGETS:
        raise UserError(f"there is no budget {name!r}; choose {', '.join(BUDGETS)}")
    return {f"verify.{key}": value for key, value in BUDGETS[name].items()}


def beside(folder: Path, place: str) -> str:
    """Where pictures are, with the path in it made absolute; relative ones begin at the folder."""
    kind, colon, rest = place.partition(":")
    if colon and kind == "hub":
        return place
    if colon and kind in ("imagefolder", "parquet"):
        return f"{kind}:{(folder / Path(rest).expanduser()).resolve()}"
    return str((folder / Path(place).expanduser()).resolve())
