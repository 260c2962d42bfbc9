"""What several verifications have in common, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guardsmith.config.displacement import DisplacementSpec, attack_of, rate_names
from guardsmith.core.errors import UserError
from guardsmith.gate.checks import attack_at
from guardsmith.reports.report import Report

CONDITIONS = ("identifiers", "seeds", "full_factorial", "sample", "images_per_unit", "class_images")


def in_common(reports: Mapping[str, Report]) -> tuple[dict[str, Report], list[str]]:
    """The reports with those attacks and evaluation points only that all of them have in the same way, and the other names.

    Raises:
        UserError: no attack is left, or the attackers had other conditions.
    """
    specs = {name: report.recipe.verify for name, report in reports.items()}
    first, *others = specs
    for name in others:
        for key in CONDITIONS:
            if getattr(specs[name], key) != getattr(specs[first], key):
                raise UserError(f"{name} was verified with other {key} than {first}: no comparison.")
    everything = {label: attack for spec in specs.values() for label, attack in spec.attacks.items()}
    attacks = {
        label: attack
        for label, attack in everything.items()
        if all(spec.attacks.get(label) == attack for spec in specs.values())
    }
    if not attacks:
        raise UserError(f"{others[0]} was verified with other attacks than {first}: no comparison.")
    all_points = sorted({point for spec in specs.values() for point in spec.evaluation_points})
    points = [point for point in all_points if all(point in spec.evaluation_points for spec in specs.values())]
    left_out = [label for label in everything if label not in attacks]
    left_out += [f"{point:g} x steps" for point in all_points if point not in points and point > 1]
    displacement, other_rates = _common_displacement([spec.displacement for spec in specs.values()])
    left_out += other_rates
    names = [name for label in attacks for name in (label, *rate_names(label, displacement))]
    compared_attacks = {attack_at(name, point) for name in names for point in points}
    result = {}
    for name, report in reports.items():
        changes = {"attacks": attacks, "evaluation_points": tuple(points), "displacement": displacement}
        verify = specs[name].model_copy(update=changes)
        scores = [score for score in report.scores if score.attack in names and score.evaluation_point in points]
        checks = [
            check
            for check in report.checks
            if check.attack in compared_attacks or attack_of(check.attack) not in everything
        ]
        recipe = report.recipe.model_copy(update={"verify": verify})
        result[name] = report.model_copy(update={"recipe": recipe, "checks": checks, "scores": scores})
    return result, left_out


def _common_displacement(specs: Sequence[DisplacementSpec]) -> tuple[DisplacementSpec, list[str]]:
    """The attacks and rates that all of them have, and the names of the other rates."""
    attacks = tuple(label for label in specs[0].attacks if all(label in spec.attacks for spec in specs))
    rates = tuple(rate for rate in specs[0].rates if all(rate in spec.rates for spec in specs))
    other = sorted({rate for spec in specs for rate in spec.rates} - set(rates))
    return specs[0].model_copy(update={"attacks": attacks, "rates": rates}), [f"{rate:g} x rate" for rate in other]
