"""How far attacks moved the weights: the parts of a report about it."""

from __future__ import annotations

from pydantic import BaseModel

from guardsmith.core.redaction import SubjectId
from guardsmith.reports.versions import PART


class Displacement(BaseModel):
    """How far an attack moved the weights: the mean over identifiers and seeds; docs/explanation/displacement.md."""

    model_config = PART
    rate: float | None
    """The attack's learning rate; null where it has none."""
    steps: int
    """Optimizer steps until then, of the attack whose pictures count."""
    largest_possible: float | None = None
    """The largest change of one trained weight that learning rate and steps allow, in the units of the weights; null for
    optimizers whose steps have no such limit, and where it was not measured."""
    largest: float | None = None
    """The largest change of one weight that there was; null where it was not measured."""
    overall: float | None = None
    """The displacement: norm of the change of denoiser and text encoder over the norm of the base's weights; null where it was
    not measured."""
    blocks: dict[str, float] = {}
    """The same of `down`, `mid` and `up` blocks, the `rest` of the denoiser, the `text_encoder`, and new `words`, whose change is
    relative to their first embedding."""


class BreakPoint(BaseModel):
    """A place on an attacker's way."""

    model_config = PART
    displacement: float | None
    """Relative change of the weights' norm; null where it was not measured."""
    rate: float | None
    """Learning rate."""
    steps: int
    """Optimizer steps."""


class DisplacementToBreak(BaseModel):
    """How far an attack has to move the weights for half of the likeness that it usually reaches on the base."""

    model_config = PART
    subject: SubjectId
    """Id of the protected subject."""
    attack: str
    """Label of the attack; its runs at other rates and its just-enough run count too."""
    base: BreakPoint | None
    """On the base; null where it was reached at no evaluation point."""
    hardened: BreakPoint | None
    """On the hardened model; null where the protection held at every evaluation point."""
    tried: BreakPoint
    """How far the attack went on the hardened model."""


class Probe(BaseModel):
    """One point of a search on the base."""

    model_config = PART
    rate: float
    """Learning rate."""
    steps: int
    """Optimizer steps."""
    similarity: float
    """Mean similarity to the subjects, counted from chance."""
    displacement: float
    """How far the attack moved the weights."""
    reached: bool
    """Whether the similarity is at least the level that was searched."""


class JustEnough(BaseModel):
    """The search for the smallest displacement at which an attack still learns its subjects on the base."""

    model_config = PART
    attack: str
    """Label of the attack."""
    subjects: list[SubjectId]
    """Whom it was searched on."""
    share: float
    """Share of what the attack as it is reaches there that had to be reached."""
    genuine: Probe | None
    """The attack as it is; null where it did not run."""
    probes: list[Probe]
    """What was tried, in this order."""
    result: Probe | None
    """The smallest displacement of those that reach it; null where the attack as it is does not learn the subjects."""
