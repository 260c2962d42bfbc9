"""The command `audit-release`: for those who published already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from guardsmith.core.console import print_line
from guardsmith.core.errors import UserError
from guardsmith.core.sources import check_source


def audit_release(
    target: Annotated[
        str, typer.Argument(metavar="RELEASE", help="Model folder, single-file checkpoint or Hub id (org/name).")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="What it was hardened from: folder, Hub id or builtin:avatar.  [default: as it says]"),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", help="Commit, tag or branch of --base.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of RELEASE.  [default: main]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """List what a release should not hold: other files, weights of its base, credentials; exit 1 if there is any."""
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.models.checkpoint import resolve
    from guardsmith.release.audit import audit_folder, audit_single_file, base_of
    from guardsmith.release.audit_hub import audit_repository

    quiet_libraries()
    place = Path(target).expanduser()
    check_source(target, "release")
    on_the_hub = not place.exists() and "/" in target
    if not place.exists() and not on_the_hub:
        raise UserError(f"there is no release at {target}; name a folder, a file or a Hub id (owner/name)")
    if revision is not None and not on_the_hub:
        raise UserError("--revision belongs to a repository on the Hub")
    note = ""
    if on_the_hub:
        findings, commits, unknown = audit_repository(target, base, base_revision=base_revision, revision=revision)
        note = f"; {commits} earlier or other commits were looked at by their lists of files"
        note += (
            f", and {unknown} versions of weights in them were not compared with the base's values" if unknown else ""
        )
    elif place.is_file():
        if base is None:
            raise UserError("a single file does not say which base it was made from; name it with --base")
        findings = audit_single_file(place, resolve(base, base_revision))
    else:
        resolve(str(place))
        if base is None:
            base, base_revision = base_of(place)
        findings = audit_folder(place, resolve(base, base_revision))
    if as_json:
        typer.echo(json.dumps([each._asdict() for each in findings], indent=1))
    else:
        for each in findings:
            typer.echo(f"{each.kind:<10}  {each.where}: {each.what}")
    if findings:
        print_line(
            f"{len(findings)} things in {target} should not be public{note}; what to do: docs/how-to/publish.md",
            style="red",
        )
        raise typer.Exit(1)
    print_line(f"nothing in {target} that should not be there{note}")
