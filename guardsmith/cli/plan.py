"""The command plan, and what --dry-run prints: what is known of a run before its first step."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardsmith.cli.options import (
    BUDGET,
    CHANGES,
    LEVELS,
    NEGATIVES,
    OUTPUT,
    POLICY,
    RECIPE,
    RECIPE_ARGUMENT,
    SUBJECTS,
    TODAY,
    budget_as_changes,
    levels_as_changes,
    named_recipe,
    policy_of,
    recipe_of,
    registry_of,
)
from guardsmith.core.console import day, print_line, warn

if TYPE_CHECKING:
    from guardsmith.evaluation.forecast import Forecast

STYLES = {"fine": "", "warning": "yellow", "problem": "red"}


def show_forecast(result: Forecast, as_json: bool) -> None:
    """Print a forecast: on stdout a table, or JSON.

    Raises:
        typer.Exit: with 2, something stands in the way.
    """
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=1))
    else:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for line in result.lines:
            mark = "" if line.outlook == "fine" else line.outlook
            table.add_row(line.what, Text(mark, style=STYLES[line.outlook]), Text(line.detail))
        console = Console()
        if not console.is_terminal:
            console.width = 200  # a file or a CI log wants whole lines
        console.print(table)
    for sentence in result.found("warning") if as_json else ():
        warn(sentence)
    for sentence in result.found("problem"):
        print_line(sentence, style="red")
    if result.found("problem"):
        raise typer.Exit(2)


def plan(
    argument: RECIPE_ARGUMENT = None,
    recipe: RECIPE = None,
    subjects: SUBJECTS = None,
    base: Annotated[str | None, typer.Option(help="Base in place of the recipe's.")] = None,
    output: OUTPUT = Path("out"),
    negatives: NEGATIVES = None,
    changes: CHANGES = None,
    policy: POLICY = None,
    levels: LEVELS = None,
    budget: BUDGET = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    today: TODAY = None,
) -> None:
    """Say what a run will cost and what stands in its way, before anything is drawn; exit 2 if something does."""
    flags = [*budget_as_changes(budget), *levels_as_changes(levels), *(changes or [])]
    recipe = named_recipe(argument, recipe)
    settings = recipe_of(recipe, base, flags, negatives=negatives)
    registry = registry_of(subjects, settings, today)
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.forecast import forecast

    quiet_libraries()
    result = forecast(registry, settings, output, policy=policy_of(policy), today=day(today))
    show_forecast(result, as_json)
    flags_of_run: list[Any] = ["--base", settings.base] if base is not None else []
    names = [] if recipe is None else [recipe]
    words = ["guardsmith", "run", *names, *flags_of_run, "--subjects", str(registry.path), "--output", str(output)]
    words += ["--levels", str(levels)] if levels is not None else []
    words += ["--policy", str(policy)] if policy is not None else []
    words += ["--budget", budget] if budget is not None else []
    words += ["--negatives", negatives] if negatives is not None else []
    words += [word for change in changes or () for word in ("--set", change)]
    print_line(f"next: {shlex.join(words)}")
