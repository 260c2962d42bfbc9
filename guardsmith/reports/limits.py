"""What a verification does not show, for those who decide by its page."""

from __future__ import annotations

from guardsmith.attacks import find_attack
from guardsmith.reports.frontier import percent
from guardsmith.reports.report import Report


def not_shown(report: Report) -> list[str]:
    """What a verification does not show, one sentence each."""
    attacks = report.recipe.verify.attacks.values()
    precisions = sorted({attack.precision for attack in attacks})
    weights = "without the weights" if report.threat_model == "hosted" else "with the weights"
    who = f"attackers {weights}" if report.threat_model else "the attackers below"
    sentences = [
        f"Threat model: {who} were tested, with the attacks and settings below; other attacks, longer ones and "
        "other settings were not.",
        f"Precision: attackers trained and drew in {' and '.join(precisions)}; nothing is known of any other precision.",
        f"Subjects: {report.attacked.protected} of {report.attacked.of} protected subjects and {report.attacked.controls} "
        f"control{'' if report.attacked.controls == 1 else 's'} were attacked; intervals do not say how others would fare.",
    ]
    furthest = max(
        (
            score.displacement.overall or 0.0
            for score in report.scores
            if score.side == "hardened" and score.displacement
        ),
        default=0.0,
    )
    claim = report.recipe.gate.claimed_displacement
    if claim is not None:
        sentences.append(
            f"Displacement: the claim goes up to attackers who change the weights by {percent(claim)} of their norm; those who "
            "go further are not judged."
        )
    elif furthest:
        sentences.append(
            f"Displacement: no attacker changed the weights by more than {percent(furthest)} of their norm; nothing is known of "
            "those who do."
        )
    adaptive = any(attack.removal is not None or find_attack(attack.name).edits_weights for attack in attacks)
    if adaptive:
        sentences.append(
            "Adaptive attackers: some that know how such protection works were tested, and there may be better ones."
        )
    else:
        sentences.append(
            "Adaptive attackers: none was tested. An attacker who knows the method may be able to remove the protection."
        )
    sentences.append("Other models: anyone who has the base, or another model, can personalize that.")
    return sentences
