"""Progress on stderr: a rich bar with ETA and live losses on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from guardsmith.core.console import first_process

console = Console(stderr=True)
STYLES = ("auto", "lines", "json")
"""How progress can be printed."""
EVERY = {"lines": 15.0, "json": 1.0}
"""Style -> seconds between two lines."""
_style = "auto"


def show_as(style: str) -> None:
    """Choose one of `STYLES` for every bar from now on."""
    global _style
    _style = style


class Stage:
    """One running bar; call it after every step."""

    def __init__(self, title: str, total: int, progress: Progress | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.progress = progress
        self.silent = not first_process()  # a launcher's other processes take the same steps
        self.task = progress.add_task(title, total=total, losses="") if progress is not None else None
        self.began = self.printed = time.monotonic()

    def __call__(self, losses: Mapping[str, float] | None = None, *, done: int | None = None) -> None:
        """Count one more step.

        Args:
            losses: numbers to print beside it.
            done: steps in all, where it was not one more.
        """
        self.done = self.done + 1 if done is None else done
        text = "  ".join(f"{k} {v:.4g}" for k, v in (losses or {}).items())
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=self.done, losses=text)
        elif self.silent:
            return
        elif time.monotonic() - self.printed > EVERY.get(_style, EVERY["lines"]) or self.done == self.total:
            self.printed = time.monotonic()
            if _style == "json":
                record = {"stage": self.title, "done": self.done, "total": self.total, "shown": dict(losses or {}),
                          "seconds": round(self.printed - self.began, 1)}  # fmt: skip
                sys.stderr.write(json.dumps(record) + "\n")
                return
            left = (self.printed - self.began) / max(self.done, 1) * (self.total - self.done)
            line = f"{self.title}: {self.done}/{self.total}, {left:.0f} s left  {text}".rstrip()
            console.print(line, highlight=False, soft_wrap=True)


def _bars_fit() -> bool:
    """Whether stderr can redraw a bar: a terminal, or a notebook with ipywidgets, which rich needs there."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


@contextmanager
def stage(title: str, total: int) -> Iterator[Stage]:
    """Progress of `total` steps under a title: call what it yields after every step.

    It is a bar on a terminal, and otherwise, or as `show_as` says, a line every `EVERY` seconds.
    """
    if not _bars_fit() or _style != "auto" or not first_process():
        yield Stage(title, total, None)
        return
    rest = TextColumn("[dim]{task.fields[losses]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), rest)  # fmt: skip
    with Progress(*columns, console=console, transient=False, expand=True) as progress:
        yield Stage(title, total, progress)


def quiet_libraries() -> None:
    """Keep the progress bars and notices of diffusers, transformers and peft out of the output."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
