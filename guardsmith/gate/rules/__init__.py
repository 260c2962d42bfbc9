"""The rules of the gate, one file each, and their table: page, JUnit, SARIF, card and comparison read it.

A new rule is a file with a `RULE` and its entry in `RULES`. How intervals are compared with limits is in `gate.checks`.
"""

from __future__ import annotations

from collections.abc import Sequence

from guardsmith.config.displacement import attack_of
from guardsmith.core.console import warn
from guardsmith.gate.checks import Check, Status
from guardsmith.gate.evidence import Evidence
from guardsmith.gate.rules import (
    base_attack,
    benign_clip_t,
    benign_collapse,
    benign_fidelity,
    benign_kid,
    claimed_displacement,
    control,
    deployability,
    protected,
    released,
)
from guardsmith.gate.rules.rule import Rule


def _table(*rules: Rule) -> tuple[Rule, ...]:
    """The rules, if no two share an id or a title; reports find them by both."""
    for names in ([rule.id for rule in rules], [rule.title for rule in rules]):
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rules of the gate are called {', '.join(sorted(twice))}")
    return rules


RULES = _table(
    released.RULE,
    base_attack.RULE,
    protected.RULE,
    claimed_displacement.RULE,
    control.RULE,
    benign_kid.RULE,
    benign_collapse.RULE,
    benign_fidelity.RULE,
    benign_clip_t.RULE,
    *deployability.RULES,
)
"""Every rule, in the order of reports."""


def rule_of(title: str) -> Rule | None:
    """The rule that a check of a report comes from; `None` for one that this version does not have."""
    return next((rule for rule in RULES if rule.title == title), None)


def judge(evidence: Evidence, rules: Sequence[Rule] = RULES) -> list[Check]:
    """All checks: the released weights, then attack by attack the protected subjects and the controls, then the whole model.

    A rule that raises fails to run: its check is inconclusive and says so, and the others are made all the same.

    Args:
        evidence: what was measured.
        rules: which ones.
    """
    checks: list[Check] = []
    for rule in rules:
        try:
            checks += list(rule.evaluate(evidence))
        except Exception as error:  # hours of attacks were spent on this evidence: the verdict can only get worse
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warn(f"the rule '{rule.title}' failed to run ({reason}); please report this")
            sentence = f"the rule failed to run ({type(error).__name__}); nothing is known of what it checks"
            checks.append(Check(rule.title, "", "", "inconclusive", sentence))
    subjects = {name: number for number, name in enumerate((*evidence.protected, *evidence.controls))}
    attacks = {label: number for number, label in enumerate(evidence.attacks)}

    def place(check: Check) -> tuple[int, int, int]:
        if not check.subject:
            return 2, 0, 0
        label = attack_of(check.attack)
        return int(bool(check.attack)), attacks.get(label, -1), subjects.get(check.subject, -1)

    return sorted(checks, key=place)


def verdict(checks: Sequence[Check]) -> Status:
    """The worst status of all checks (fail before inconclusive before pass); inconclusive where no protection was checked."""
    statuses = {check.status for check in checks}
    if "fail" in statuses:
        return "fail"
    checked = any(check.name == protected.RULE.title for check in checks)
    return "inconclusive" if "inconclusive" in statuses or not checked else "pass"


__all__ = ["RULES", "Rule", "judge", "rule_of", "verdict"]
