"""The command run: harden and verify, and publish what passed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardsmith.cli.options import (
    BASE_RUNS,
    BUDGET,
    CHANGES,
    DRY_RUN,
    EXECUTOR,
    INCLUDE_IMAGES,
    LEVELS,
    NEGATIVES,
    OUTPUT,
    OVERWRITE,
    POLICY,
    RECIPE,
    RECIPE_ARGUMENT,
    REPORT_TO,
    RESUME,
    SUBJECTS,
    TODAY,
    WORKERS,
    budget_as_changes,
    levels_as_changes,
    named,
    named_recipe,
    policy_of,
    recipe_of,
    registry_of,
)
from guardsmith.cli.release import CONTACT, LICENCE, LICENCE_FILE, check_contact, check_repo_id
from guardsmith.core.console import day, print_line
from guardsmith.core.errors import UserError

if TYPE_CHECKING:
    from guardsmith.config.recipe import Recipe
    from guardsmith.registry.loader import Registry


def check_publishing(
    registry: Registry, recipe: Recipe, repo_id: str, licence: str | None, licence_file: Path | None
) -> None:
    """Refuse before hours of work what could not be published after them.

    Raises:
        UserError: the base's licence is not known, the token may not write there, or there are no controls.
        RunFailed: the Hub does not answer.
    """
    from guardsmith.registry.loader import missing_controls
    from guardsmith.release.card import licence_before
    from guardsmith.release.hub import check_rights

    licence_before(recipe.base, recipe.revision, licence, licence_file)
    check_rights(repo_id)
    if sentence := missing_controls(registry):
        raise UserError(f"nothing would be published: {sentence}")


def run(
    argument: RECIPE_ARGUMENT = None,
    recipe: RECIPE = None,
    output: OUTPUT = Path("out"),
    subjects: SUBJECTS = None,
    base: Annotated[str | None, typer.Option(help="Base in place of the recipe's.")] = None,
    negatives: NEGATIVES = None,
    levels: LEVELS = None,
    changes: CHANGES = None,
    resume: RESUME = False,
    overwrite: OVERWRITE = False,
    base_runs: BASE_RUNS = None,
    workers: WORKERS = None,
    executor: EXECUTOR = "local",
    policy: POLICY = None,
    budget: BUDGET = None,
    include_images: INCLUDE_IMAGES = False,
    report_to: REPORT_TO = None,
    repo_id: Annotated[
        str | None,
        typer.Option("--publish", metavar="REPO_ID", help="Publish to this repository if the verdict is pass."),
    ] = None,
    contact: Annotated[str | None, CONTACT] = None,
    licence: Annotated[str | None, LICENCE] = None,
    licence_file: Annotated[Path | None, LICENCE_FILE] = None,
    dry_run: DRY_RUN = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
    today: TODAY = None,
) -> None:
    """Harden and verify as a recipe says; exit 0 (pass), 1 (fail) or 3 (inconclusive)."""
    if repo_id is not None:
        check_repo_id(repo_id)
    if (repo_id is None) != (contact is None):
        raise UserError("--publish and --contact belong together: the model card says whom to write to")
    if contact is not None:
        check_contact(contact)
    flags = [*budget_as_changes(budget), *levels_as_changes(levels), *(changes or [])]
    settings = recipe_of(named_recipe(argument, recipe), base, flags, negatives=negatives)
    registry = registry_of(subjects, settings, today)
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.forecast import before_hardening, forecast
    from guardsmith.evaluation.pipeline import verify as run_verification
    from guardsmith.hardening.pipeline import harden as run_hardening
    from guardsmith.hardening.record import check_not_wrecked
    from guardsmith.runtime.executors import check_executor

    rules = policy_of(policy)
    check_executor(executor)
    quiet_libraries()
    if repo_id is not None:
        check_publishing(registry, settings, repo_id, licence, licence_file)
    if dry_run:
        from guardsmith.cli.plan import show_forecast

        show_forecast(forecast(registry, settings, output, policy=rules, today=day(today)), as_json)
        print_line("nothing was written; run again without --dry-run")
        return
    check = before_hardening(registry, settings, output, policy=rules, today=day(today))
    info = run_hardening(
        registry, settings, output, resume=resume, overwrite=overwrite, report_to=named(report_to), check=check
    )
    check_not_wrecked(info, output)
    report = run_verification(
        registry, settings, output, base_runs=base_runs, workers=workers, executor=executor, policy=rules,
        include_images=include_images,
    )  # fmt: skip
    if repo_id is not None and contact is not None and report.exit_code == 0:
        from guardsmith.registry.loader import present_day
        from guardsmith.release.publish import publish as run_publishing

        on = day(today) or present_day()
        result = run_publishing(
            output, registry, repo_id, today=on, contact=contact, licence=licence, licence_file=licence_file
        )
        print_line(f"published: {result.url} at {result.commit}")
    elif repo_id is not None:
        print_line(f"not published: the verdict is {report.verdict}")
    raise typer.Exit(report.exit_code)
