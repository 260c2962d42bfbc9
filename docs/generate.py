"""The generated pages of the reference: command line, recipe keys, registry keys, report keys, Python API.

python docs/generate.py            writes them (`make docs` does so first; tests/test_docs.py fails where one is not current)

The command line is documented by Typer's own generator; the keys come from the pydantic models and their field docstrings; the
Python API from docstrings, which mkdocstrings reads when the site is built.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import os
import subprocess
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py: change the code and run it again. -->\n\n"
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}", "min_length": "at least {} long"}


def command_line() -> str:
    """Every command with its options, as Typer writes it."""
    command = [sys.executable, "-m", "typer", "guardsmith.cli.app", "utils", "docs", "--name", "guardsmith"]
    environment = {**os.environ, "TERMINAL_WIDTH": "400", "COLUMNS": "400"}
    done = subprocess.run(
        [*command, "--title", "Command line"], capture_output=True, text=True, check=True, env=environment
    )
    lines = done.stdout.split("\n")
    return "\n".join([lines[0], "", "What the exit codes mean is on [a page of its own](exit-codes.md).", *lines[1:]])


def _type(annotation: Any) -> str:
    """A type as people write it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if annotation is type(None):
        return "null"
    if origin is not None and issubclass(origin, Mapping):
        return f"map of {_type(arguments[1])}"
    if origin is not None and issubclass(origin, Iterable):
        return f"list of {_type(arguments[0])}"
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "dict": "map",
        "Any": "anything",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def _bounds(field: FieldInfo) -> str:
    told = []
    for constraint in field.metadata:
        for name, sentence in BOUNDS.items():
            value = getattr(constraint, name, None)
            if value is not None:
                told.append(sentence.format(f"{value:g}" if isinstance(value, float) else value))
    return ", ".join(told)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "none"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    if isinstance(value, tuple | list | dict):
        return f"`{list(value) if isinstance(value, tuple) else value}`" if value else "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _fields(model: type[Any]) -> dict[str, FieldInfo]:
    """The fields of a pydantic model or dataclass; none of anything else."""
    fields: dict[str, FieldInfo] = getattr(model, "model_fields", None) or getattr(model, "__pydantic_fields__", {})
    return fields


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Field -> the string under it, of a model and of those that it extends; not every model hands them to pydantic."""
    found: dict[str, str] = {}
    for part in reversed(model.__mro__):
        if not issubclass(part, BaseModel) or part is BaseModel:
            continue
        for field, below in itertools.pairwise(_classes(part.__module__)[part.__name__].body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = below.value.value
    return found


def keys(model: type[Any], *, defaults: bool = True) -> str:
    """The fields of a model as a table: key, type with its bounds, default, meaning."""
    head = ["key", "type", "default", "meaning"] if defaults else ["key", "type", "meaning"]
    rows = [head, ["---"] * len(head)]
    told = _docstrings(model)
    for name, field in _fields(model).items():
        kind = ", ".join(part for part in (_type(field.annotation), _bounds(field)) if part)
        row = [
            f"`{field.alias or name}`",
            kind.replace("|", "\\|"),
            _default(field),
            _one_line(field.description or told.get(name)),
        ]
        rows.append(row if defaults else [row[0], row[1], row[3]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _models_in(annotation: Any) -> list[type[Any]]:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [annotation] if _fields(annotation) else []
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def nested(model: type[Any]) -> list[type[Any]]:
    """The models that a model is made of, itself first, in the order in which a reader meets them."""
    seen: dict[type[Any], None] = {model: None}
    queue = [model]
    while queue:
        for field in _fields(queue.pop(0)).values():
            for part in _models_in(field.annotation):
                if part not in seen:
                    seen[part] = None
                    queue.append(part)
    return list(seen)


def _sections(models: Iterable[type[Any]], level: int = 2, *, defaults: bool = True) -> str:
    parts = []
    for model in models:
        parts.append(
            f"{'#' * level} {model.__name__}\n\n{_one_line(model.__doc__)}\n\n{keys(model, defaults=defaults)}"
        )
    return "\n".join(parts)


def _tables(title: str, entries: Mapping[str, Any]) -> str:
    parts = [f"## {title}\n"]
    for name, entry in entries.items():
        parts.append(f"### `{name}`\n\n{_one_line(entry.config.__doc__)}\n\n{keys(entry.config)}")
    return "\n".join(parts)


def recipe_keys() -> str:
    """Keys of recipes, and the parameters of everything a recipe can name."""
    from guardsmith.attacks import ATTACKS
    from guardsmith.cli.tables import recipe_lines
    from guardsmith.cloaks import CLOAKS
    from guardsmith.config.recipe import Recipe
    from guardsmith.methods import METHODS
    from guardsmith.purifiers import PURIFIERS

    shipped = "\n".join(f"| `{name}` | {line} |" for name, line in recipe_lines())
    parts = [
        "# Recipes\n\nA recipe is a YAML file that says how to harden, how to attack and how to judge. `guardsmith run RECIPE` "
        "runs one by name or file, and `--set KEY=VALUE` changes a value: `--set method.params.steps=100`. The file is checked "
        "completely before anything runs, and all problems are reported at once.\n",
        f"## Shipped recipes\n\n| name | what |\n| --- | --- |\n{shipped}\n",
        _sections(nested(Recipe)),
        _tables("Parameters of methods", METHODS),
        _tables("Parameters of attacks", ATTACKS),
        _tables("Parameters of cloaks", CLOAKS),
        _tables("Parameters of purifiers", PURIFIERS),
    ]
    return "\n".join(parts)


def registry_keys() -> str:
    """Keys of registries."""
    from guardsmith.registry.types import RegistryFile

    intro = (
        "# Registry keys\n\nHow to write a registry is in [a guide](../how-to/registry.md). `guardsmith registry schema` prints "
        "the JSON schema (`registries/schema.json`), with which an editor completes keys.\n"
    )
    return f"{intro}\n{_sections(nested(RegistryFile))}"


def report_keys() -> str:
    """Keys of report.json."""
    from guardsmith.reports.report import Report

    intro = (
        "# Report keys\n\nWhat `guardsmith verify` writes into `report.json`, for other tools. [report.schema.json]"
        "(report.schema.json) is the same as a JSON schema; `guardsmith report schema` prints it.\n"
    )
    return f"{intro}\n{_sections(nested(Report), defaults=False)}"


def _directive(place: str) -> str:
    return f"::: {place}\n"


EXTEND = {
    "methods.base": ("HardeningMethod", "MethodConfig", "HardeningContext", "Preparation", "Prepared", "HardeningResult",
                     "MemoryFootprint"),
    "methods.data": ("SubjectData", "BenignData"),
    "training.loop": ("TrainingLoop",),
    "attacks.base": ("Attack", "AttackData"),
    "metrics": ("JudgeEntry", "Judge"),
    "models.checkpoint": ("DiffusionModel", "with_own_unet"),
}  # fmt: skip
"""Module -> names that methods, attacks and judges outside of the package need."""


def python_api() -> str:
    """Directives for mkdocstrings: every public name of the package, and what code of one's own needs."""
    import guardsmith
    from guardsmith.release.hub import Published

    things = [getattr(guardsmith, name) for name in guardsmith.__all__ if name != "__version__"] + [Published]
    own = [_directive(f"{thing.__module__}.{thing.__qualname__}") for thing in things]
    extend = [_directive(f"guardsmith.{module}.{name}") for module, names in EXTEND.items() for name in names]
    intro = (
        "# Python API\n\nErrors are those of the command line: `UserError` is what `guardsmith` answers with exit code 2, "
        "`RunFailed` with 4, `Refused` with 1. `guardsmith.__version__` is the version.\n"
    )
    return "\n".join([intro, *own, "## For your own methods, attacks and judges\n", *extend])


PAGES = {
    "cli.md": command_line, "recipe.md": recipe_keys, "registry.md": registry_keys, "report.md": report_keys,
    "python.md": python_api,
}  # fmt: skip


def page(name: str) -> str:
    """The text of a generated page."""
    return NOTE + PAGES[name]().rstrip() + "\n"


def main() -> None:
    """Write every generated page."""
    for name in PAGES:
        (REFERENCE / name).write_text(page(name), encoding="utf-8")
        sys.stdout.write(f"wrote docs/reference/{name}\n")


if __name__ == "__main__":
    main()
