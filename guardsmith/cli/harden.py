"""The command harden."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from guardsmith.cli.options import (
    CHANGES,
    DRY_RUN,
    LEVELS,
    NEGATIVES,
    OUTPUT,
    OVERWRITE,
    RECIPE,
    REPORT_TO,
    RESUME,
    SUBJECTS,
    TODAY,
    levels_as_changes,
    named,
    recipe_of,
    registry_of,
)
from guardsmith.core.console import day, first_process, print_line


def harden(
    subjects: SUBJECTS = None,
    output: OUTPUT = Path("out"),
    recipe: RECIPE = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", "--pretrained_model_name_or_path", help="builtin:avatar, a diffusers folder or a Hub id."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="Hardening method (see `guardsmith list methods`).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    negatives: NEGATIVES = None,
    levels: LEVELS = None,
    changes: CHANGES = None,
    add_to: Annotated[
        Path | None,
        typer.Option(
            "--add-to", help="Start from this earlier output folder; the registry must contain its subjects too."
        ),
    ] = None,
    resume: RESUME = False,
    overwrite: OVERWRITE = False,
    report_to: REPORT_TO = None,
    dry_run: DRY_RUN = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print harden.json on stdout at the end; with --dry-run, the plan as JSON.")
    ] = False,
    today: TODAY = None,
) -> None:
    """Harden a base model on the subjects of a registry: OUTPUT/model and OUTPUT/harden.json.

    On the embedded base the method is tripwire by default; on any other base a recipe or a method has to be named.
    """
    flags = {"revision": revision, "method.name": method, "seed": seed, "negatives": negatives}
    settings = recipe_of(recipe, base, [*levels_as_changes(levels), *(changes or [])], **flags)
    registry = registry_of(subjects, settings, today)
    from guardsmith.core.progress import quiet_libraries

    quiet_libraries()
    if dry_run:
        from guardsmith.cli.plan import show_forecast
        from guardsmith.evaluation.forecast import forecast

        show_forecast(forecast(registry, settings, output, verifies=False, today=day(today)), as_json)
        print_line("nothing was written; run again without --dry-run")
        return
    from guardsmith.evaluation.forecast import before_hardening
    from guardsmith.hardening.pipeline import harden as run_hardening
    from guardsmith.hardening.record import check_not_wrecked

    info = run_hardening(
        registry, settings, output, resume=resume, overwrite=overwrite, add_to=add_to, report_to=named(report_to),
        check=before_hardening(registry, settings, output, verifies=False, today=day(today)),
    )  # fmt: skip
    if not first_process():
        return
    if as_json:
        typer.echo(json.dumps(info, indent=1, sort_keys=True))
    print_line(f"hardened on {len(registry.subjects)} subjects in {info['seconds']:.0f} s: {output / 'model'}")
    check_not_wrecked(info, output)
    print_line(f"next: guardsmith verify {shlex.quote(str(output))} --subjects {shlex.quote(str(registry.path))}")
