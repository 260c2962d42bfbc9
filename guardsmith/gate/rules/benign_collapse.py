"""Few pictures of benign prompts may have collapsed, which KID can hide."""

from __future__ import annotations

from collections.abc import Iterator

from guardsmith.gate.checks import Check, bounded
from guardsmith.gate.evidence import Evidence
from guardsmith.gate.rules.rule import Rule
from guardsmith.gate.statistics import share_interval, share_pictures


def evaluate(evidence: Evidence) -> Iterator[Check]:
    """The share of collapsed pictures (`metrics.collapse`) with Wilson's interval."""
    collapsed, count = evidence.utility.collapsed, evidence.utility.n
    if collapsed is None or not count:
        yield Check(RULE.title, "", "", "inconclusive", "not measured")
        return
    sentence = f"{collapsed} of {count} pictures of benign prompts have collapsed"
    share, limit = share_interval(collapsed, count), evidence.spec.collapsed_share
    pictures = share_pictures(share.mean, limit)
    yield bounded(RULE.title, "", "", sentence, share, limit, at_most=True, pictures=pictures)


RULE = Rule(
    "benign-prompts-collapsed",
    "benign prompts (collapsed)",
    "hardly any picture of a benign prompt has collapsed",
    evaluate,
)
