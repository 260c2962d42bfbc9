"""Losses to where a team watches its runs (TensorBoard, trackio, Weights & Biases, ...), through accelerate's trackers.

Numbers and settings go there, and nothing of the subjects: neither their ids nor pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guardsmith.core.errors import UserError

Report = Callable[[int, Mapping[str, float]], None]
"""Called with the number of a step and its losses."""


def check_trackers(names: Sequence[str]) -> None:
    """Whether these can be used here.

    Raises:
        UserError: one is unknown, or its package is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--report-to {name}: there is no such tracker; choose {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in there:
            raise UserError(f"--report-to {name}: its package is not installed; pip install {name}")


@contextmanager
def tracked(names: Sequence[str], output: Path, settings: Mapping[str, Any]) -> Iterator[Report]:
    """Open trackers for as long as a run lasts.

    Args:
        names: as accelerate knows them; without any, nothing is reported.
        output: of the run; those that write files write into its folder `logs`, and the run has its name.
        settings: of the run, flat: strings and numbers.
    """
    if not names:
        yield lambda step, losses: None
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # trackers ask it which process this is
    trackers = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": output / "logs"} if kind.requires_logging_directory else {}
        tracker = kind(output.resolve().name, **where)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(dict(settings))
        trackers.append(tracker)

    def report(step: int, losses: Mapping[str, float]) -> None:
        for tracker in trackers:
            tracker.log(dict(losses), step=step)

    try:
        yield report
    finally:
        for tracker in trackers:
            tracker.finish()
