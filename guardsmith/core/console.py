"""Console output of commands: data on stdout, messages on stderr. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any, TextIO

import typer

DAY = ["%Y-%m-%d"]
"""Format of dates in options, for Typer."""


def in_words(names: Collection[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(list(names)[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def launched() -> int:
    """Number of processes that a launcher (accelerate, torchrun) has started for this job; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this is the process of a launcher that writes files and messages; always true without a launcher."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


class _Unfailing:
    """A text stream whose writes never fail: what cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # names of files can be any bytes
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unfailing_stderr() -> Iterator[None]:
    """Inside, messages that stderr does not take (a full disk, a closed pipe) are dropped and end no run.

    Messages are not the result of a command; its exit code and its files are, and they have to stay right.
    """
    stream = sys.stderr
    if stream is None:  # closed from the start, as Python has it then; rich writes nowhere
        yield
        return
    sys.stderr = _Unfailing(stream)
    try:
        yield
    finally:
        sys.stderr = stream


def print_line(text: str, style: str = "") -> None:
    """Print a message to stderr, never wrapped, so that `file:line:` stays clickable.

    Args:
        text: the message; markup in it is printed as it is.
        style: of rich, such as "red".
    """
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(text, style=style), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    if first_process():
        print_line(f"warning: {text}", style="yellow")


def day(value: datetime | None) -> date | None:
    """The day of an option that Typer parsed with `DAY`."""
    return value.date() if value else None


def print_schema(schema: dict[str, Any], output: Path | None) -> None:
    """Write a JSON schema to a file, or to stdout without one."""
    text = json.dumps(schema, indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
        print_line(f"wrote {output}")
