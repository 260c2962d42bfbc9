"""Commands that print what there is: runs side by side, the gate's policy, the tables of methods and attacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from guardsmith.core.console import DAY, day, print_line
from guardsmith.core.errors import UserError


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Output folders of verifications, or their report.json: one column each."
        ),
    ],
    control: Annotated[float, typer.Option(help="Share of the base's similarity that controls must keep.")] = 0.95,
    fidelity: Annotated[float, typer.Option(help="Largest loss of prompt fidelity.")] = 0.02,
    steps: Annotated[
        float, typer.Option(help="How many times the steps that break the base an attack should need.")
    ] = 10.0,
    displacement: Annotated[
        float, typer.Option(help="How many times as far as on the base an attack should have to move the weights.")
    ] = 3.0,
    changed: Annotated[
        bool, typer.Option("--changes", help="Compare two runs and show only what the second one changes.")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Also save the table as an SVG picture.")] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(help="Also save similarity against displacement, base and all runs, as an SVG picture."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare verified hardenings in one table; what falls short is red."""
    from guardsmith.reports.changes import compare_two
    from guardsmith.reports.compare import Demands, as_markdown, compare_runs, load_runs

    if changed:
        if len(runs) != 2 or markdown or svg or frontier:
            raise UserError("--changes takes two runs, and prints a table or, with --json, data.")
        table, two = compare_two(*runs)
        if as_json:
            typer.echo(json.dumps(two, indent=1))
            return
        from guardsmith.reports.terminal import print_table

        print_table(table, 160)
        print_line(f"different besides: {', '.join(two['different']) or 'nothing'}")
        return
    demands = Demands(control=control, fidelity=fidelity, steps=steps, displacement=displacement)
    table, comparison = compare_runs(runs, demands)
    if as_json:
        typer.echo(json.dumps(comparison, indent=1))
    elif markdown:
        typer.echo(as_markdown(comparison), nl=False)
    else:
        from guardsmith.reports.terminal import print_table

        print_table(table, 60 + 44 * len(runs))
    if svg is not None:
        from guardsmith.reports.terminal import save_table

        save_table(table, 60 + 44 * len(runs), svg)
        print_line(f"wrote {svg}")
    if frontier is not None:
        from guardsmith.reports.curves import save_frontiers
        from guardsmith.reports.frontier_charts import compared_frontiers
        from guardsmith.reports.in_common import in_common

        save_frontiers(frontier, *compared_frontiers(in_common(load_runs(runs))[0]))
        print_line(f"wrote {frontier}")


def print_policy(
    judge: Annotated[
        str | None, typer.Option(help="Measure the levels of this judge (avatar, dino, clip or face) on --subjects.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the judge's encoder.  [default: the usual one]")
    ] = None,
    clip_t: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a CLIP that measures how well pictures fit benign prompts."),
    ] = None,
    subjects: Annotated[
        Path | None, typer.Option(help="Registry to measure on, best with subjects that no verification uses.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Size in pixels at which pictures are opened.")] = 512,
    today: Annotated[datetime | None, typer.Option(formats=DAY, hidden=True)] = None,
) -> None:
    """Print a policy of the gate as YAML: judge, rules, and the levels that similarities are compared with.

    Without options it is the one of the embedded world; with a judge its levels are measured.
    """
    from guardsmith.config.judge import JudgeSpec
    from guardsmith.gate.policy import as_yaml, default_policy, measure_policy
    from guardsmith.metrics import find_judge

    if (judge is None) != (subjects is None) or ((judge_model or clip_t) and judge is None):
        raise UserError("--judge and --subjects belong together: levels are measured with a judge on a registry.")
    if judge is not None:
        find_judge(judge)
    if judge is None or subjects is None:
        policy = default_policy()
    else:
        from guardsmith.core.progress import quiet_libraries
        from guardsmith.registry.loader import load_registry

        quiet_libraries()
        spec = JudgeSpec.model_validate({"name": judge, "model": judge_model, "clip_t": clip_t})
        policy = measure_policy(load_registry(subjects, today=day(today)), spec, size)
    typer.echo(as_yaml(policy), nl=False)
    print_line("next: put it into a file; plan, verify and run take it as --policy FILE")


TABLES = ("methods", "attacks", "evasions", "removals", "cloaks", "purifiers", "recipes")


def complete_table(incomplete: str) -> list[str]:
    """Names of tables for the shell's completion, given the first letters."""
    return [name for name in TABLES if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes for the shell's completion, given the first letters."""
    from guardsmith.config.shipped import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def recipe_lines() -> list[tuple[str, str]]:
    """Every shipped recipe with the first line of its header, which says in one sentence what it is."""
    from guardsmith.config.shipped import find_recipe, recipe_names

    lines = []
    for name in recipe_names():
        with find_recipe(name).open(encoding="utf-8") as file:
            lines.append((name, file.readline().removeprefix("#").strip()))
    return lines


def list_table(
    what: Annotated[str, typer.Argument(metavar="|".join(TABLES), help="Which table.", autocompletion=complete_table)],
) -> None:
    """List methods, attacks, evasions, removals, cloaks, purifiers or shipped recipes: a name and what it is, a line each."""
    if what == "recipes":
        for name, line in recipe_lines():
            typer.echo(f"{name}\t{line}")
    elif what == "evasions":
        from guardsmith.attacks.evasion import EVASIONS

        for name, evasion in EVASIONS.items():
            drawn = "compared with real pictures after the same" if evasion.of_references else "judged as drawn"
            inverse = "exact inverse" if evasion.exact else "approximate inverse" if evasion.invert else drawn
            typer.echo(f"{name}\t{inverse}")
    elif what == "removals":
        from guardsmith.attacks.adaptive.removals import REMOVALS

        for name, removal in REMOVALS.items():
            typer.echo(f"{name}\t{'needs the public base' if removal.needs_base else 'needs the weights only'}")
    elif what in ("methods", "attacks", "cloaks", "purifiers"):
        from guardsmith.attacks import ATTACKS
        from guardsmith.cloaks import CLOAKS
        from guardsmith.methods import METHODS
        from guardsmith.purifiers import PURIFIERS

        tables: dict[str, Mapping[str, Any]] = {
            "methods": METHODS, "attacks": ATTACKS, "cloaks": CLOAKS, "purifiers": PURIFIERS
        }  # fmt: skip
        for name, entry in tables[what].items():
            typer.echo(f"{name}\t{entry.paper}")
    else:
        raise UserError(f"there is no table {what!r}: {', '.join(TABLES[:-1])} or {TABLES[-1]}")
