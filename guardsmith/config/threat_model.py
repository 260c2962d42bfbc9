"""What a verification claims: protection against attackers of a hosted service, or also against those who have the weights."""

from __future__ import annotations

from guardsmith.attacks import find_attack
from guardsmith.config.recipe import ThreatModel, VerifySpec
from guardsmith.core.errors import UserError

CLAIMS: dict[ThreatModel, str] = {
    "hosted": (
        "Attackers of a hosted training service were tested: they choose pictures, words, rates, steps, optimizers, precision "
        "and adapters, and never have the weights."
    ),
    "open-weights": (
        "Attackers who have the weights were tested: besides everything a hosted service offers they edit the model before they "
        "train it."
    ),
}
"""What reports and cards say was tested."""


def editing_attacks(spec: VerifySpec) -> list[str]:
    """Labels of the attacks that change weights by hand."""
    return [
        label
        for label, attack in spec.attacks.items()
        if attack.removal is not None or find_attack(attack.name).edits_weights
    ]


def threat_model_of(spec: VerifySpec) -> ThreatModel:
    """The threat model that the attacks of a recipe test.

    Raises:
        UserError: the recipe names one that its attacks do not fit.
    """
    editing = editing_attacks(spec)
    if spec.threat_model == "hosted" and editing:
        raise UserError(
            f"verify.threat_model is hosted, and {', '.join(editing)} edits the weights, which only an attacker with open "
            "weights can do: remove it or say open-weights"
        )
    if spec.threat_model == "open-weights" and spec.attacks and not editing:
        raise UserError(
            "verify.threat_model is open-weights, and no attack edits the weights: add one with `removal`, or say hosted"
        )
    return spec.threat_model or ("open-weights" if editing else "hosted")
