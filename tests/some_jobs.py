"""Jobs for processes, in a file that imports little: every process imports it."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from guardsmith.core.errors import UserError


@dataclass(frozen=True)
class Job:
    folder: str
    number: int


def write(job):
    """Leaves a file, as units do; some raise."""
    if job.number == 3:
        raise UserError("number 3 is not wanted")
    if job.number == 4:
        raise ZeroDivisionError("four")
    (Path(job.folder) / str(job.number)).write_text(str(os.getpid()))


def lost_once(job):
    """Its worker is killed the first time."""
    mark = Path(job.folder) / f"begun-{job.number}"
    if job.number == 1 and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    write(job)


def lost(job):
    os.kill(os.getpid(), signal.SIGKILL)
