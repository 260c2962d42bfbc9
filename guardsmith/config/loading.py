"""Reading recipes: by name or file, with changes applied, and checked as a whole; every problem at once.

`load_recipe("demo")` finds `recipes/demo.yaml`; a path is taken as it is. `--set method.params.beta=2` changes one value.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from guardsmith.config.deployability import ADAPTERS
from guardsmith.config.judge import RecipeJudge, with_levels
from guardsmith.config.recipe import BUDGETS, MethodSpec, Recipe
from guardsmith.config.renamed import RECIPE_KEYS, with_new_keys
from guardsmith.core.console import first_process, print_line, warn
from guardsmith.core.errors import UserError, did_you_mean
from guardsmith.core.yaml_text import Problem, odd_numbers, parse, read_yaml


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside it in a checkout."""
    in_package = Path(__file__).parents[1] / "builtin" / "recipes"
    return in_package if in_package.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(file.stem for file in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or path; a path need not exist.

    Raises:
        UserError: there is neither such a file nor such a name.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    in_folder = recipe_folder() / f"{name}.yaml"
    if in_folder.is_file():
        return in_folder
    hint = did_you_mean(name, recipe_names()) or "; `guardsmith list recipes` prints the shipped ones, such as demo"
    raise UserError(f"there is no recipe {name!r}, neither as a file nor by name{hint}")


def _set(data: dict[str, Any], change: str) -> None:
    key, equals, text = (part.strip() for part in change.partition("="))
    if not equals or not key:
        raise UserError(f"--set {change}: write it as key=value, e.g. --set method.params.beta=2")
    if key in RECIPE_KEYS:
        warn(f"--set {change}: {key!r} is called {RECIPE_KEYS[key]!r} now")
    place = data
    *parents, last = RECIPE_KEYS.get(key, key).split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {change}: {parent!r} is not a section of the recipe")
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


def explain(error: ValidationError, where: str, keys: Sequence[str]) -> list[str]:
    """Pydantic's findings as sentences, with a near word for unknown keys."""
    sentences = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = _near(str(problem["loc"][-1]), place.rpartition(".")[0], keys) or "; remove it"
            sentences.append(f"{where}: {place!r} is not a known key{hint}")
        else:
            reason = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
            sentences.append(f"{where}: {place}: {reason} (found {reprlib.repr(problem['input'])})")
    return sentences


def _near(word: str, parent: str, keys: Sequence[str]) -> str:
    """The end of a sentence about an unknown key: one spelt nearly like it in the same place, or the place of one elsewhere."""
    here = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent]
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    if hint := did_you_mean(word, here):
        return hint
    return f"; did you mean {elsewhere[word]!r}?" if word in elsewhere else did_you_mean(word, keys)


def _known_keys(model: type[BaseModel], parent: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(f"{parent}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{parent}{name}.")
    return keys


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
    changed = any(change.split("=")[0].strip() == "judge.levels" for change in changes)  # typed here, so it begins here
    places["judge"] = with_levels(recipe.judge, Path() if changed else path.parent, replaces)
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
    from guardsmith.config.threat_model import threat_model_of

    problems = []
    _leave_out_params_of_another_method(data, changes)
    for change in changes:
        try:
            _set(data, change)
        except UserError as error:
            problems.append(str(error))
    data, warnings = with_new_keys(data, RECIPE_KEYS, "--set")  # a change may be a whole section
    for warning in warnings:
        warn(warning)
    try:
        problems += [f"{where}: {sentence}" for sentence in odd_numbers(data, Recipe.model_validate(data))]
    except ValidationError as error:
        problems += explain(error, where, _known_keys(Recipe))
    problems += _parameter_problems(data, where)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    recipe = Recipe.model_validate(data)
    try:
        threat_model_of(recipe.verify)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe


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
        changes = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    if base is not None:
        changes = [*changes, f"base={json.dumps(base)}"]
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


def _parameter_problems(data: dict[str, Any], where: str) -> list[str]:
    """What is wrong with names and parameters of method and attacks, by the tables of methods and attacks.

    Reads the raw data, so that one wrong key elsewhere does not hide the other problems.
    """
    from guardsmith.attacks import find_attack
    from guardsmith.attacks.adaptive.removals import find_removal
    from guardsmith.cloaks import find_cloak
    from guardsmith.cloaks.rid import RidTraining
    from guardsmith.methods import find_method
    from guardsmith.purifiers import find_purifier

    verify = data.get("verify")
    attacks = verify.get("attacks") if isinstance(verify, dict) else None
    sections: list[tuple[str, Any, Callable[[str], Any]]] = [("method", data.get("method"), find_method)]
    problems = _evasion_problems(attacks, where) if isinstance(attacks, dict) else []
    for label, spec in attacks.items() if isinstance(attacks, dict) else ():
        sections.append((f"verify.attacks.{label}", spec, find_attack))
        if isinstance(spec, dict) and isinstance(spec.get("removal"), dict):
            sections.append((f"verify.attacks.{label}.removal", spec["removal"], find_removal))
    everyday = verify.get("deployability") if isinstance(verify, dict) else None
    adapters = everyday.get("adapters") if isinstance(everyday, dict) else None
    for kind, params in adapters.items() if isinstance(adapters, dict) else ():
        if kind in ADAPTERS:
            spec = {"name": ADAPTERS[kind][0], "params": params}
            sections.append((f"verify.deployability.adapters.{kind}", spec, find_attack))
    pixels: tuple[tuple[str, Callable[[str], Any]], ...] = (("cloaks", find_cloak), ("purifiers", find_purifier))
    for table, find_pixels in pixels:
        specs = data.get(table)
        for label, spec in specs.items() if isinstance(specs, dict) else ():
            sections.append((f"{table}.{label}", spec, find_pixels))
    if isinstance(data.get("defender"), dict):
        try:
            RidTraining.model_validate(data["defender"])
        except ValidationError as error:
            problems += explain(error, f"{where}: defender", list(RidTraining.model_fields))
    for place, spec, find in sections:
        mapping = spec if isinstance(spec, dict) else {}
        name, params = mapping.get("name", MethodSpec().name if place == "method" else None), mapping.get("params", {})
        if not isinstance(name, str) or not isinstance(params, dict):
            continue  # the recipe's own types refuse it
        try:
            config = find(name).config
            checked = config.model_validate(params)
            problems += [f"{where}: {place}.params.{sentence}" for sentence in odd_numbers(params, checked)]
        except UserError as error:
            problems.append(f"{where}: {place}: {error}")
        except ValidationError as error:
            problems += explain(error, f"{where}: {place}.params", list(config.model_fields))
    return problems


def _evasion_problems(attacks: dict[str, Any], where: str) -> list[str]:
    """Names of transformations that do not exist."""
    from guardsmith.attacks.evasion import find_evasion

    problems = []
    for label, spec in attacks.items():
        names = spec.get("evasion", ()) if isinstance(spec, dict) else ()
        for name in (names,) if isinstance(names, str) else names if isinstance(names, list) else ():
            try:
                find_evasion(str(name))
            except UserError as error:
                problems.append(f"{where}: verify.attacks.{label}.evasion: {error}")
    return problems
