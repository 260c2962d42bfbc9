"""On the base an attack must have personalized the model, or its failure elsewhere means nothing."""

from __future__ import annotations

from collections.abc import Iterator

from guardsmith.config.recipe import GateSpec
from guardsmith.gate.calibration import Levels, personalized_level
from guardsmith.gate.checks import Check, Status, enough, too_few, undecided
from guardsmith.gate.evidence import Evidence
from guardsmith.gate.rules.rule import Rule
from guardsmith.gate.statistics import Units, interval


def check_base_attack(subject: str, attack: str, base: Units, levels: Levels, spec: GateSpec) -> Check:
    """The check of one attack on one subject or control; it passes or is inconclusive, for it judges the attack."""
    limit = personalized_level(levels, spec)
    similarity = interval(base)
    if similarity is None or not enough(similarity, spec):
        return Check(RULE.title, subject, attack, "inconclusive", too_few(similarity, limit, spec), limit=limit)
    status: Status = "pass" if similarity.low >= limit else "inconclusive"
    sentence = f"the attack on the base reaches {similarity.mean:z.2f}, real pictures {levels.genuine:z.2f}"
    if status == "inconclusive" and similarity.mean >= limit:
        sentence += undecided(similarity, limit)
    elif status == "inconclusive":
        sentence += ": it did not learn the subject there, so its failure elsewhere means nothing"
    return Check(RULE.title, subject, attack, status, sentence, similarity.mean, similarity.low, similarity.high, limit)


def evaluate(evidence: Evidence) -> Iterator[Check]:
    """A check for every attack that trains, on every subject and control."""
    for label in evidence.training_attacks:
        for subject in (*evidence.protected, *evidence.controls):
            scores = evidence.scores["base", subject, label, 1]
            yield check_base_attack(subject, label, scores, evidence.levels_of(subject), evidence.spec)


RULE = Rule("attack-works-on-base", "attack works on base", "attacks learn their subject on the base model", evaluate)
