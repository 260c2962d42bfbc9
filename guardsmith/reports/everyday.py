"""The page's section about everyday use: every case of every check, with pictures of base and hardened model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from guardsmith.gate.checks import Status
from guardsmith.gate.deployability import Measurement
from guardsmith.gate.rules.deployability import EXPLANATIONS
from guardsmith.registry.loader import Subject
from guardsmith.reports.report import Report


class Case(NamedTuple):
    """One case.

    Attributes:
        measurement: of it.
        status: by the limits of the report's policy.
        sentence: what was measured.
        limit: what its unfavourable end is compared with.
        picture: a `data:` address; empty where there is none, or where it is left out.
    """

    measurement: Measurement
    status: Status
    sentence: str
    limit: float
    picture: str


class Section(NamedTuple):
    """One check.

    Attributes:
        name: of the check.
        explanation: what it asks.
        cases: empty where it was not run.
    """

    name: str
    explanation: str
    cases: list[Case]


def sections(
    report: Report,
    root: Path | None,
    subjects: Mapping[str, Subject],
    shows: Callable[[Subject], bool],
    embedded: Callable[[Path], str],
) -> list[Section]:
    """All checks, also those that were not run; nothing for a report from before they were there.

    Args:
        report: of a verification.
        root: its folder; `None` where the pictures are not at hand.
        subjects: by id.
        shows: whether pictures of a subject may be on the page.
        embedded: file -> `data:` address.
    """
    limits, result = report.recipe.gate.deployability, []
    for name, explanation in EXPLANATIONS.items():
        cases = []
        for one in (one for one in report.deployability if one.check == name):
            file = root / one.pictures if root is not None and one.pictures is not None else None
            hidden = one.subject is not None and (one.subject not in subjects or not shows(subjects[one.subject]))
            picture = "" if file is None or hidden or not file.is_file() else embedded(file)
            cases.append(Case(one, one.status(limits), one.sentence(), one.limit(limits), picture))
        result.append(Section(name, explanation, cases))
    return result if report.deployability else []
