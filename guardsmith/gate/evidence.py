"""What the rules of the gate judge: everything that a verification measured, as one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from guardsmith.config.recipe import GateSpec
from guardsmith.gate.calibration import Levels
from guardsmith.gate.deployability import Measurement
from guardsmith.gate.statistics import Units

Side = Literal["base", "hardened"]
SIDES: tuple[Side, ...] = ("base", "hardened")

Scores = Mapping[tuple[Side, str, str, float], Units]
"""Similarities by (side, id of the subject or control, attack label, evaluation point)."""


class Utility(BaseModel):
    """Benign prompts, hardened model against base."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    kid_hardened: float | None
    """KID of the hardened model's pictures to the base's."""
    kid_base: float | None
    """KID of the base's with other seeds to the base's."""
    kid_ratio: float | None
    """The first over the second."""
    kid_ratio_low: float | None
    """Lower end of its 95 % interval."""
    kid_ratio_high: float | None
    """Upper end."""
    collapsed: int | None = None
    """How many of the hardened model's pictures are further from the base's than chance explains."""
    fidelity_hardened: float | None
    """Share of what the prompts ask for that the hardened model's pictures show."""
    fidelity_base: float | None
    """The same of the base's."""
    clip_t_hardened: list[float | None] | None = None
    """How well each of the hardened model's pictures fits its prompt (CLIP-T); null or absent where it was not measured."""
    clip_t_base: list[float | None] | None = None
    """The same of the base's, in the same order."""
    n: int
    """Prompts."""


@dataclass(frozen=True)
class Evidence:
    """Everything that rules judge.

    Attributes:
        protected: id -> class noun of every protected subject that was attacked.
        controls: id -> class noun of every control.
        attacks: label -> whether the attack trains the model, so that it has to work on the base.
        points: evaluation points beyond 1, ascending; protected subjects have to hold at each.
        scores: what the attacks reached.
        released: protected subject -> similarity of what the released weights draw of it without an attack.
        utility: benign prompts.
        levels: class noun -> what similarities mean.
        spec: limits of the gate.
        deployability: cases of everyday use.
        rates: names of attacks at other rates than the recipe's; each begins with the attack's label and a comma.
        early_points: evaluation points below 1, ascending.
        displacements: how far the attacks moved the weights, by the keys of `scores`, as far as it was measured.
    """

    protected: Mapping[str, str]
    controls: Mapping[str, str]
    attacks: Mapping[str, bool]
    points: Sequence[float]
    scores: Scores
    released: Mapping[str, Sequence[float | None]]
    utility: Utility
    levels: Mapping[str, Levels]
    spec: GateSpec
    deployability: Sequence[Measurement] = ()
    rates: Sequence[str] = ()
    early_points: Sequence[float] = ()
    displacements: Mapping[tuple[Side, str, str, float], float] = field(default_factory=dict)

    def levels_of(self, subject: str) -> Levels:
        """Levels of the class of a subject or control."""
        return self.levels[self.protected[subject] if subject in self.protected else self.controls[subject]]

    @property
    def training_attacks(self) -> list[str]:
        """Labels of the attacks that train the model."""
        return [label for label, trains in self.attacks.items() if trains]
