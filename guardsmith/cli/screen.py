"""The command that screens uploads."""

from __future__ import annotations

import json
import shlex
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardsmith.core.console import DAY, day, print_line
from guardsmith.core.errors import UserError

if TYPE_CHECKING:
    from guardsmith.config.recipe import Recipe
    from guardsmith.screening.encoders import Encoder
    from guardsmith.screening.index import Index
    from guardsmith.screening.pipeline import Screening, ScreeningSettings


def screen(
    uploads: Annotated[
        list[Path],
        typer.Argument(metavar="UPLOAD...", help="Pictures or folders of one upload, or one adapter or checkpoint."),
    ],
    subjects: Annotated[Path, typer.Option("--subjects", help="Registry of the protected subjects.")],
    batch: Annotated[
        bool, typer.Option("--batch", help="UPLOAD is a folder with one folder or file for each upload.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the JSON report to this file too.")
    ] = None,
    rate: Annotated[float, typer.Option("--false-alarms", help="Stated false-alarm rate for each upload.")] = 0.001,
    review: Annotated[
        float, typer.Option("--review-rate", help="Stated rate of harmless uploads that a person has to look at.")
    ] = 0.01,
    undo: Annotated[
        str, typer.Option(help="Transformations that are undone before comparing: usual, or none (30 times as fast).")
    ] = "usual",
    trigger: Annotated[
        list[str] | None, typer.Option(help="Trigger word of an adapter or checkpoint; may be repeated.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=1, help="Pictures drawn by an adapter or checkpoint for each trigger word and class.")
    ] = 8,
    base: Annotated[str | None, typer.Option(help="Base of uploaded adapters.  [default: the recipe's]")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe with the base and its sampling.")] = "demo",
    judge: Annotated[str, typer.Option(help="avatar, dino, clip or face.")] = "avatar",
    judge_model: Annotated[str | None, typer.Option(help="Folder or Hub id of the judge's encoder.")] = None,
    strangers: Annotated[
        str | None,
        typer.Option(help="Pictures of others to measure levels on: folder, glob, parquet:FILE or hub:DATASET."),
    ] = None,
    index: Annotated[Path | None, typer.Option(help="Folder for the registry's index.  [default: the cache]")] = None,
    today: Annotated[datetime | None, typer.Option(formats=DAY, hidden=True)] = None,
) -> None:
    """Look for protected subjects in uploads: training pictures, adapters, checkpoints.

    Exit code 0: nothing seen; 1: a protected subject seen; 2: wrong usage; 3: undecided, a person has to look.
    """
    from guardsmith.config.loading import load_recipe
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.registry.loader import load_registry
    from guardsmith.screening.encoders import load_encoder
    from guardsmith.screening.index import kept_index, load_index
    from guardsmith.screening.pipeline import (
        ScreeningSettings,
        check_settings,
        screen_batch,
        screen_upload,
        screening_report,
    )
    from guardsmith.screening.uploads import read_batch

    base_recipe = load_recipe(recipe, [] if base is None else [f"base={json.dumps(base)}"])
    settings = ScreeningSettings(
        rate, review, undo, tuple(trigger or ()), pictures, {"steps": base_recipe.sampling.steps,
        "guidance": base_recipe.sampling.guidance, "batch": base_recipe.sampling.batch},
    )  # fmt: skip
    check_settings(settings)
    if batch and len(uploads) != 1:
        raise UserError("--batch takes one folder, with one folder or file for each upload")
    entries = read_batch(uploads[0]) if batch else []
    quiet_libraries()
    registry = load_registry(subjects, today=day(today), check_images=False)
    encoder = load_encoder(judge, judge_model)
    vectors = kept_index(registry, encoder, index)
    if vectors is None:  # the pictures are needed once
        registry = load_registry(subjects, today=day(today))
        vectors = load_index(registry, encoder, index)
    screening = _screening(vectors, encoder, base_recipe, settings, uploads if not batch else entries, judge, strangers)
    began = time.perf_counter()
    records = screen_batch(screening, entries) if batch else [screen_upload(screening, uploads)]
    report = screening_report(screening, registry, records, began)
    _show(report, output, as_json=as_json)
    if report["exit_code"]:
        raise typer.Exit(report["exit_code"])


def _screening(
    index: Index,
    encoder: Encoder,
    recipe: Recipe,
    settings: ScreeningSettings,
    paths: list[Path],
    judge: str,
    strangers: str | None,
) -> Screening:
    """Index, levels and, where a model was uploaded, the base."""
    from guardsmith.models.checkpoint import load_model
    from guardsmith.screening.index import levels_against
    from guardsmith.screening.levels import shipped_levels
    from guardsmith.screening.pipeline import Screening
    from guardsmith.screening.uploads import holds_model
    from guardsmith.screening.variants import LEVELS

    if strangers is not None:
        from guardsmith.core.images import open_pictures
        from guardsmith.hardening.data import negative_files

        pictures = open_pictures(negative_files(strangers), encoder.size)
        tables = levels_against(index, encoder, pictures, LEVELS[settings.undo])
    elif judge == "avatar":
        tables = shipped_levels()[settings.undo]
    else:
        raise UserError(f"the judge {judge} has no measured levels: name pictures of strangers with --strangers")
    needs_base = any(holds_model(path) for path in paths)
    model = load_model(recipe.base, recipe.revision) if needs_base else None
    return Screening(index, encoder, tables, settings, model)


def _show(report: dict[str, Any], output: Path | None, *, as_json: bool) -> None:
    """Write the report to a file where one is named, and print it."""
    if output is not None:
        from guardsmith.core.atomic_io import write_json

        write_json(output, report)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print_records(report)
    counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items())
    print_line(f"{len(report['uploads'])} uploads: {counts}")


def _print_records(report: dict[str, Any]) -> None:
    from rich.table import Table

    from guardsmith.reports.terminal import print_table

    table = Table(title="uploads", title_justify="left")
    for heading in ("upload", "verdict", "subject", "similarity", "threshold", "in", "after undoing"):
        table.add_column(heading, overflow="fold")
    for record in report["uploads"]:
        first = record["subjects"][0] if record["subjects"] else None
        cells = ["-"] * 5
        if first is not None:
            cells = [
                first["subject"], f"{first['similarity']:.2f}", f"{first['threshold']:.2f}", Path(first["picture"]).name,
                first["variant"],
            ]  # fmt: skip
        table.add_row(record["upload"], record["verdict"], *cells)
        for reason in record["reasons"]:
            print_line(f"{shlex.quote(record['upload'])}: {reason}", style="yellow")
    print_table(table, 140)
