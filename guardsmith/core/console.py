"""What commands say: data on stdout, talk on stderr. Nothing heavy is imported here."""

from __future__ import annotations

import json
import os
from datetime import date, datetime
from pathlib import Path
from typing import Any

import typer

DAY = ["%Y-%m-%d"]


def launched() -> int:
    """How many processes a launcher (accelerate, torchrun) has started for this job; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this is the process of a launcher that writes and talks; without one it is."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def say(text: str, style: str = "") -> None:
    """Print a line of talk to stderr; never wrapped, so that `file:line:` stays clickable."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(text, style=style), soft_wrap=True)


def day(value: datetime | None) -> date | None:
    """The day of what Typer parsed with `DAY`."""
    return value.date() if value else None


def print_schema(schema: dict[str, Any], output: Path | None) -> None:
    """A JSON schema into a file, or on stdout."""
    text = json.dumps(schema, indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
        say(f"wrote {output}")
