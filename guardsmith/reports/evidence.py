"""What pages and grids are made of: finished attacks and their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class AttackRun(Protocol):
    """One attack on one model, as `guardsmith.evaluation.units.Unit` has it."""

    @property
    def side(self) -> str:
        """The model attacked, "base" or "hardened"."""

    @property
    def subject(self) -> str:
        """Id of the subject or control."""

    @property
    def label(self) -> str:
        """The attack's name in the recipe."""

    @property
    def evaluation_points(self) -> Mapping[float, int]:
        """Share of the attack's usual steps -> number of steps after which pictures were drawn."""

    def pictures(self, point: float) -> list[Path]:
        """The pictures drawn at an evaluation point."""

    def scores(self) -> Mapping[float, list[float | None]] | None:
        """Scores at every evaluation point, one per picture, `None` where one could not be scored; `None` without a result."""

    def renamed(self, subject: str) -> AttackRun:
        """The same under another id of its subject."""
