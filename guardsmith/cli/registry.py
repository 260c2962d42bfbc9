"""Commands about registries: check, registry add, registry schema."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardsmith.core.console import DAY, day, print_line, print_schema, warn
from guardsmith.core.errors import UserError

if TYPE_CHECKING:
    from guardsmith.registry.loader import Registry, Subject

registry_app = typer.Typer(help="Write registries of protected subjects.", no_args_is_help=True)


def check(
    registry: Annotated[Path, typer.Argument(metavar="R.yaml", help="Registry file.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model to check as well: folder or Hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    today: Annotated[datetime | None, typer.Option(formats=DAY, hidden=True)] = None,
) -> None:
    """Check a registry (its keys, pictures, hashes, splits and consents) and, if wanted, a base model."""
    from guardsmith.registry.add import small_splits
    from guardsmith.registry.loader import load_registry, missing_controls

    content = load_registry(registry, today=day(today))
    if base is not None:
        from guardsmith.hardening.compatibility import check_computes
        from guardsmith.models.checkpoint import load_model

        check_computes(load_model(base))
    warnings = [*content.warnings, *filter(None, [missing_controls(content)])]
    if as_json:
        typer.echo(json.dumps(_as_json(content) | {"warnings": warnings}, indent=2))
    else:
        _print_subjects(content)
    for warning in warnings:
        warn(warning)
    for subject in (*content.subjects, *content.controls):
        for sentence in small_splits(subject):
            warn(sentence)
    print_line(f"the registry is in order: {len(content.subjects)} protected, {len(content.controls)} controls")
    if base is not None:
        print_line(f"the base is in order: {base}")
    if all(subject.is_invented for subject in content.subjects):  # as those that the embedded base can draw
        print_line(f"next: guardsmith harden --subjects {shlex.quote(str(registry))}")
    else:
        print_line("a recipe has to fit your base (docs/how-to/base.md)")
        print_line("next: guardsmith list recipes")


def _print_subjects(registry: Registry) -> None:
    from guardsmith.registry.loader import SPLITS

    rows = [["id", "kind", "class", "role", *SPLITS, "consent"]]
    for role, subjects in (("protected", registry.subjects), ("control", registry.controls)):
        for subject in subjects:
            counts = [str(len(subject.images_of(split))) for split in SPLITS]
            rows.append([subject.id, subject.kind, subject.class_noun, role, *counts, _consent_until(subject)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:  # a rich table of a thousand subjects takes longer than reading their pictures
        cells = [cell.rjust(w) if cell.isdigit() else cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def _consent_until(subject: Subject) -> str:
    if subject.consent is None:
        return "not needed"
    return str(subject.consent.expires_on or "no end")


def _as_json(registry: Registry) -> dict[str, Any]:
    return {
        "path": str(registry.path),
        "digest": registry.digest,
        "subjects": [subject.model_dump(mode="json") for subject in registry.subjects],
        "controls": [subject.model_dump(mode="json") for subject in registry.controls],
    }


@registry_app.command("add")
def registry_add(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, or with folders harden, attack and reference.")],
    registry: Annotated[Path, typer.Option(help="Registry file; created if it does not exist.")],
    subject_id: Annotated[str, typer.Option("--id", help="Id of the subject: a-z, 0-9, - and _.")],
    kind: Annotated[str, typer.Option(help="person, object, character or style.")],
    class_noun: Annotated[str, typer.Option(help="Class noun as it stands in prompts: person, dog, teddy bear.")],
    consent_basis: Annotated[str | None, typer.Option(help="What the consent rests on: request, self, ...")] = None,
    reference: Annotated[str | None, typer.Option(help="Where the consent is on record.")] = None,
    granted_on: Annotated[
        datetime | None, typer.Option(formats=DAY, help="First day of the consent (by default today).")
    ] = None,
    expires: Annotated[datetime | None, typer.Option(formats=DAY, help="Last day of the consent.")] = None,
    control: Annotated[bool, typer.Option("--control", help="Add a control, which is not protected.")] = False,
    identifier: Annotated[
        list[str] | None, typer.Option(help="Name the subject is known under; may be repeated.")
    ] = None,
    ratio: Annotated[
        str, typer.Option(help="Relative sizes of harden:attack:reference (by default 2:1:1; 0:1:1 for a control).")
    ] = "",
) -> None:
    """Hash a folder of pictures into a new entry of a registry."""
    from guardsmith.registry.add import add_subject
    from guardsmith.registry.loader import SPLITS

    subject = add_subject(
        registry,
        folder,
        subject_id,
        kind,
        class_noun,
        identifiers=identifier or [],
        consent_basis=consent_basis,
        reference=reference,
        granted_on=day(granted_on),
        expires_on=day(expires),
        control=control,
        ratios=dict(zip(SPLITS, _ratio(ratio), strict=True)) if ratio else None,
        on_warning=warn,
    )
    counts = ", ".join(f"{len(subject.images_of(split))} {split}" for split in SPLITS)
    print_line(f"added {subject.id} to {registry}: {counts}")
    print_line(f"next: guardsmith check {shlex.quote(str(registry))}")


def _ratio(text: str) -> list[float]:
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < float("inf") for part in parts):
        raise UserError(f"--ratio is {text!r}, but must be three numbers harden:attack:reference, like 2:1:1")
    return parts


@registry_app.command("schema")
def registry_schema(
    output: Annotated[Path | None, typer.Option(help="File to write; by default stdout.")] = None,
) -> None:
    """Print the JSON schema of registry files, for editors."""
    from guardsmith.registry.loader import json_schema

    print_schema(json_schema(), output)
