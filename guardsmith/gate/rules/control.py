"""Personalizing on an unprotected subject must still work nearly as well as on the base."""

from __future__ import annotations

from collections.abc import Iterator

from guardsmith.config.recipe import GateSpec
from guardsmith.gate.calibration import Levels, above_chance
from guardsmith.gate.checks import Check, bounded, enough, too_few, with_evidence
from guardsmith.gate.evidence import Evidence
from guardsmith.gate.rules.base_attack import check_base_attack
from guardsmith.gate.rules.rule import Rule
from guardsmith.gate.statistics import Units, interval, ratio_interval


def check_control(subject: str, attack: str, hardened: Units, base: Units, levels: Levels, spec: GateSpec) -> Check:
    """The check of one attack on one control: its retention, counted from chance."""
    limit = spec.control_retention
    ratio = ratio_interval(above_chance(hardened, levels), above_chance(base, levels))
    if ratio is None or not enough(ratio, spec):
        fewest = min((interval(hardened), interval(base)), key=lambda scored: 0 if scored is None else scored.n)
        if ratio is None and fewest is not None:
            sentence = "no share of the base's can be measured: the attack reaches nothing above chance there"
        else:
            sentence = too_few(ratio or fewest, limit, spec)
        return Check(RULE.title, subject, attack, "inconclusive", sentence, limit=limit)
    sentence = f"keeps {100 * ratio.mean:.0f} % of what the attack reaches on the base"
    return bounded(RULE.title, subject, attack, sentence, ratio, limit, at_most=False)


def evaluate(evidence: Evidence) -> Iterator[Check]:
    """A check for every attack that trains, on every control; without controls, one that is inconclusive."""
    for label in evidence.training_attacks:
        for control in evidence.controls:
            hardened, base = (evidence.scores[side, control, label, 1] for side in ("hardened", "base"))
            levels, spec = evidence.levels_of(control), evidence.spec
            check = check_control(control, label, hardened, base, levels, spec)
            yield with_evidence(check, check_base_attack(control, label, base, levels, spec))
    if not evidence.controls:
        sentence = "the registry has no controls: protection cannot be distinguished from breakage"
        yield Check(RULE.title, "", "", "inconclusive", sentence)


RULE = Rule("control-learnable", "control learnable", "unprotected subjects can still be learnt", evaluate)
