"""What a rule of the gate is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from guardsmith.gate.checks import Check
from guardsmith.gate.evidence import Evidence


@dataclass(frozen=True)
class Rule:
    """One question of the gate.

    Attributes:
        id: for machines, in SARIF; a-z and dashes.
        title: name of its checks in reports.
        explanation: what holds where its checks pass, as a clause that begins in lower case and has no full stop.
        evaluate: its checks on the evidence of one verification; none where it does not apply. Each has the title as its name.
    """

    id: str
    title: str
    explanation: str
    evaluate: Callable[[Evidence], Iterable[Check]]
