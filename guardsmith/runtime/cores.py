"""How many cores this process may use, which a batch system or a container limits."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of this process's control group, if it is a container's."""


def usable_cores() -> int:
    """Cores of the machine that this process may run on, at most its container's share of time, rounded up.

    A container with `--cpus 2` still sees every core of the machine; as many processes would share the time of two, and its
    memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share()
    return cores if share is None else max(1, min(cores, math.ceil(share)))


def _share() -> float | None:
    """The control group's limit in cores, or None where there is none."""
    try:
        if (GROUPS / "cpu.max").exists():  # cgroup v2
            quota, period = (GROUPS / "cpu.max").read_text().split()
        else:
            quota = (GROUPS / "cpu/cpu.cfs_quota_us").read_text()
            period = (GROUPS / "cpu/cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # other systems; v2's "max"
        return None
