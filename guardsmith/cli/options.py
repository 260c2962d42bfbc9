"""Options that several commands share, and what they stand for: a recipe with its changes, a registry."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardsmith.cli.tables import complete_recipe
from guardsmith.core.console import DAY, day, print_line, warn
from guardsmith.core.errors import UserError

if TYPE_CHECKING:
    from guardsmith.config.recipe import Recipe
    from guardsmith.gate.policy import Policy
    from guardsmith.registry.loader import Registry

# Words shared by harden, verify and run. Underscore spellings are those of diffusers' scripts.
SUBJECTS = Annotated[Path | None, typer.Option("--subjects", help="Registry file; by default the recipe's.")]
OUTPUT = Annotated[Path, typer.Option("--output", "--output_dir", "-o", help="Output folder.")]
RECIPE = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Recipe name or file (see `guardsmith list recipes`).", autocompletion=complete_recipe
    ),
]
RECIPE_ARGUMENT = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE", help="The same as --recipe.", show_default=False, autocompletion=complete_recipe),
]
CHANGES = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be repeated.")
]
NEGATIVES = Annotated[
    str | None,
    typer.Option(
        "--negatives",
        "--bystanders",
        help="Images of unprotected people, used as negatives: folder, glob, parquet:FILE or hub:DATASET.",
    ),
]
RESUME = Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in the output folder.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Delete the output folder's earlier run first.")]
BASE_RUNS = Annotated[
    Path | None,
    typer.Option(
        help="Cache folder for what is done to the base (attacks, pictures, adapters); verifications can share it.  "
        "[default: in the output folder]"
    ),
]
WORKERS = Annotated[
    int | None, typer.Option(min=1, help="Number of attacks that run at the same time; by default one per core.")
]
EXECUTOR = Annotated[
    str, typer.Option(help="local, or ray (the cluster at RAY_ADDRESS, or a new one on this machine).")
]
BUDGET = Annotated[
    str | None,
    typer.Option(help="Size of the verification: quick, standard (the recipe's values) or audit; --set overrides it."),
]
POLICY = Annotated[
    Path | None,
    typer.Option(
        help="Policy file: rules and levels of the gate (see `guardsmith policy`).  [default: the recipe's rules]"
    ),
]
REPORT_TO = Annotated[
    str | None,
    typer.Option(
        "--report-to",
        "--report_to",
        help="Trackers for losses and settings, separated by commas: tensorboard, trackio, wandb, ...",
    ),
]
INCLUDE_IMAGES = Annotated[
    bool,
    typer.Option(
        "--include-images",
        help="Include pictures of real persons in report.html; those of invented persons are always included.",
    ),
]
LEVELS = Annotated[
    Path | None,
    typer.Option(
        help="Levels of the judge (see `guardsmith levels`); the file says which judge.  [default: the recipe's]"
    ),
]
DRY_RUN = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan (see `guardsmith plan`) and stop; exit 2 if it cannot work.")
]
TODAY = Annotated[datetime | None, typer.Option(formats=DAY, hidden=True)]


def named_recipe(argument: str | None, option: str | None) -> str | None:
    """The recipe of a command that takes its name as an argument or as `--recipe`.

    Raises:
        UserError: it is given in both ways, and not the same.
    """
    if argument is not None and option is not None and argument != option:
        raise UserError(f"two recipes are named, {argument} and --recipe {option}; name one")
    return argument if option is None else option


def recipe_of(name: str | None, base: str | None, changes: list[str] | None, **values: Any) -> Recipe:
    """The recipe with the flags that were given; without a name, the one that fits base and method.

    Raises:
        UserError: there is none, or it has problems; see `choose_recipe`.
    """
    from guardsmith.config.loading import beside, choose_recipe
    from guardsmith.config.problems import Change

    given = {key: value for key, value in values.items() if value is not None}
    flags = [
        Change(
            f"{key}={json.dumps(beside(Path(), value) if key == 'negatives' else value)}",
            f"--{key.partition('.')[0]} {value}",  # --method is the recipe's method.name
        )
        for key, value in given.items()
    ]
    return choose_recipe(name, base, [*(changes or []), *flags])


def verified_recipe(output: Path, name: str | None, changes: list[str]) -> Recipe:
    """The recipe that a hardening is verified with: the one it was hardened with, unless another is named.

    Raises:
        UserError: it is not on record, and the base is not the embedded one, whose attacks are the demo's.
    """
    from guardsmith.config.choosing import is_embedded
    from guardsmith.config.loading import choose_recipe
    from guardsmith.hardening.record import read_hardening, recorded_recipe

    record = output / "harden.json"
    if name is not None or not record.is_file():
        return recipe_of(name, None, changes)
    hardening = read_hardening(record)
    recipe = recorded_recipe(hardening)
    if recipe is None:
        problem = f"{record} does not say which recipe it is of"
        if not is_embedded(hardening["base"]):
            raise UserError(f"{problem}; name the one whose attacks are to be tried with --recipe")
        warn(f"{problem}: the attacks are those of `demo`; name yours with --recipe")
    return choose_recipe(recipe, None, changes)


def budget_as_changes(name: str | None) -> list[str]:
    """The changes to a recipe that a budget stands for."""
    from guardsmith.config.loading import budget_changes
    from guardsmith.config.problems import Change

    return [Change(f"{key}={json.dumps(value)}", f"--budget {name}") for key, value in budget_changes(name).items()]


def levels_as_changes(levels: Path | None) -> list[str]:
    """The changes to a recipe that a file of levels stands for: its judge takes the place of the recipe's."""
    from guardsmith.config.problems import Change

    if levels is None:
        return []
    return [Change(f"judge={json.dumps({'levels': str(levels.expanduser().resolve())})}", f"--levels {levels}")]


def policy_of(file: Path | None) -> Policy | None:
    """The policy in a file, if one was named.

    Raises:
        UserError: it has problems, one a line.
    """
    from guardsmith.gate.policy import load_policy

    return None if file is None else load_policy(file)


def named(text: str | None) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def registry_of(subjects: Path | None, recipe: Recipe, today: datetime | None) -> Registry:
    """The registry that was named, or the recipe's; its warnings are printed.

    Raises:
        UserError: there is none, or it has problems, one a line.
    """
    from guardsmith.registry.loader import load_registry

    if subjects is None and recipe.subjects is None:
        raise UserError("no registry: name one with --subjects, or in the recipe as `subjects`")
    registry = load_registry(subjects or str(recipe.subjects), today=day(today))
    for warning in registry.warnings:
        print_line(f"warning: {warning}", style="yellow")
    return registry
