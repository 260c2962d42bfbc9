"""What a process that runs jobs of a verification keeps between them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from guardsmith.models.checkpoint import DiffusionModel, load_model

BENCH: dict[str, Any] = {}
"""The bench of the checks of everyday use by the digest of what it is for, at most one; attacks empty it (see `runs.run_job`)."""


@lru_cache(maxsize=2)
def model_at(place: str) -> DiffusionModel:
    """A model by its `place`; nothing may change it."""
    return load_model(place)


def forget() -> None:
    """As if the process had just started."""
    model_at.cache_clear()
    BENCH.clear()
