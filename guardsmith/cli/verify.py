"""The command verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from guardsmith.cli.options import (
    BASE_RUNS,
    BUDGET,
    CHANGES,
    DRY_RUN,
    EXECUTOR,
    INCLUDE_IMAGES,
    LEVELS,
    POLICY,
    RECIPE,
    SUBJECTS,
    TODAY,
    WORKERS,
    budget_as_changes,
    levels_as_changes,
    policy_of,
    recipe_of,
    registry_of,
    verified_recipe,
)
from guardsmith.core.console import print_line
from guardsmith.core.errors import UserError


def verify(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Output folder of `guardsmith harden`; with --model, the folder for the report."
        ),
    ],
    subjects: SUBJECTS = None,
    recipe: RECIPE = None,
    model: Annotated[
        str | None,
        typer.Option(help="Verify this checkpoint (folder or Hub id) against --base, whatever tool made it."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of --model.")] = None,
    base: Annotated[str | None, typer.Option(help="Base of --model.  [default: the recipe's]")] = None,
    levels: LEVELS = None,
    changes: CHANGES = None,
    base_runs: BASE_RUNS = None,
    workers: WORKERS = None,
    executor: EXECUTOR = "local",
    policy: POLICY = None,
    budget: BUDGET = None,
    include_images: INCLUDE_IMAGES = False,
    dry_run: DRY_RUN = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json on stdout instead of the table.")] = False,
    today: TODAY = None,
) -> None:
    """Attack the base and the hardened model and compare; exit 0 (pass), 1 (fail) or 3 (inconclusive)."""
    if model is None and (base or revision):
        raise UserError("--base and --revision belong to --model; a hardening's own base is on record.")
    flags = [*budget_as_changes(budget), *levels_as_changes(levels), *(changes or [])]
    settings = verified_recipe(output, recipe, flags) if model is None else recipe_of(recipe, base, flags)
    registry = registry_of(subjects, settings, today)
    from guardsmith.core.progress import quiet_libraries

    rules = policy_of(policy)
    quiet_libraries()
    if dry_run:
        from guardsmith.cli.plan import show_forecast
        from guardsmith.core.console import day
        from guardsmith.evaluation.forecast import forecast
        from guardsmith.evaluation.preflight import preflight

        preflight(registry, settings, output, model=model, revision=revision, base_runs=base_runs, policy=rules)
        show_forecast(forecast(registry, settings, output, hardens=False, policy=rules, today=day(today)), as_json)
        print_line("nothing was written; run again without --dry-run")
        return
    from guardsmith.evaluation.pipeline import verify as run_verification

    report = run_verification(
        registry, settings, output, model=model, revision=revision, base_runs=base_runs, workers=workers, executor=executor,
        policy=rules, include_images=include_images, quiet=as_json,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1, sort_keys=True))
    raise typer.Exit(report.exit_code)
