"""The just-enough attack: searched on the base, the smallest displacement at which an attack still learns its subjects.

The attack as it is, of the recipe, says what is genuine. From its learning rate the search goes down by halves, each time for as
many steps, until the attack no longer reaches the share of genuine at any evaluation point; then it tries the rate in between.
Of everything that reached the share, the smallest displacement wins. All is random by fixed seeds, and every attack of the search
is a unit like those of the attack matrix: kept beside the other runs on the base, and not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from guardsmith.attacks import find_attack
from guardsmith.attacks.displacement import displacement
from guardsmith.config.displacement import JUST_ENOUGH, at_rate
from guardsmith.config.recipe import Recipe
from guardsmith.core.console import warn
from guardsmith.evaluation.measuring import draw_class_images
from guardsmith.evaluation.planning import TargetModel, attacks_to_search, plan_units, with_rate
from guardsmith.evaluation.preflight import Plan
from guardsmith.evaluation.runs import run_units
from guardsmith.evaluation.units import Unit, movements_of, scores_of
from guardsmith.gate.evidence import Side
from guardsmith.gate.statistics import interval
from guardsmith.reports.displacement import JustEnough, Probe

POINTS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the attack's steps after which every attack of the search is judged."""
HALVINGS = 10


@dataclass(frozen=True)
class Search:
    """A search for one attack.

    Attributes:
        plan: of the verification.
        label: of the attack.
        workers: processes.
        executor: where attacks run.
    """

    plan: Plan
    label: str
    workers: int | None
    executor: str

    def genuine_units(self) -> list[Unit]:
        """The attack as it is on the first subjects: those units of the attack matrix, with the first identifier and seed."""
        verify = self.plan.recipe.verify
        subjects = [subject.id for subject in self.plan.attacked[: verify.displacement.subjects]]
        units: dict[str, Unit] = {}
        models: dict[Side, TargetModel] = {"base": self.plan.models["base"]}
        for unit in plan_units(self.plan.registry, self.plan.recipe, models, self.plan.policy):
            if unit.label == self.label and unit.subject in subjects:
                units.setdefault(unit.subject, unit)
        return list(units.values())

    def units_at(self, multiple: float) -> list[Unit]:
        """The same at a multiple of the learning rate, judged on the way."""
        attack = with_rate(self.label, self.plan.recipe.verify.attacks[self.label], multiple)
        usual = find_attack(attack.name).steps(attack.params)
        points = {point: max(1, round(point * usual)) for point in POINTS}
        params = attack.params | {"steps": usual}
        name = at_rate(self.label, multiple)
        return [replace(unit, params=params, evaluation_points=points, label=name) for unit in self.genuine_units()]

    def run(self, units: Sequence[Unit], level: float) -> list[Probe]:
        """Attack, and say what was reached at every evaluation point; nothing where an attack did not run.

        Args:
            units: one for each subject, with the same settings.
            level: mean similarity above chance that is searched.
        """
        if run_units(units, self.workers, self.executor):
            return []
        probes = []
        for point in sorted(units[0].evaluation_points):
            similarities, moved = [], []
            for unit in units:
                scores, movements = scores_of(unit), movements_of(unit)
                value = None if scores is None else interval([scores[point]])
                if value is None or point not in movements:
                    return []
                similarities.append(value.mean - self.plan.policy.classes[unit.class_noun].chance)
                movement = movements[point][1]
                moved.append(displacement(movement.change, movement.norm))
            params = units[0].params
            probes.append(
                Probe(
                    rate=find_attack(units[0].attack).config(**params).model_dump()["learning_rate"],
                    steps=units[0].evaluation_points[point], similarity=mean(similarities), displacement=mean(moved),
                    reached=mean(similarities) >= level,
                )
            )  # fmt: skip
        return probes

    def result(self) -> JustEnough:
        """Search; see the module."""
        spec, units = self.plan.recipe.verify.displacement, self.genuine_units()
        ends = {unit.subject: self.plan.policy.classes[unit.class_noun] for unit in units}
        own = self.run(units, math.inf)
        genuine = own[-1] if own else None
        record = JustEnough(
            attack=self.label, subjects=list(ends), share=spec.share, genuine=genuine, probes=[], result=None
        )
        least = self.plan.policy.rules.personalized_share * mean(each.genuine - each.chance for each in ends.values())
        if genuine is None or genuine.similarity < least:
            return record
        level = spec.share * genuine.similarity
        probes = [probe.model_copy(update={"reached": probe.similarity >= level}) for probe in own]
        multiple = 1.0
        for _ in range(HALVINGS):
            found = self.run(self.units_at(multiple / 2), level)
            probes += found
            if not any(probe.reached for probe in found):
                break
            multiple /= 2
        probes += self.run(self.units_at(multiple / math.sqrt(2)), level)
        best = min((probe for probe in probes if probe.reached), key=lambda probe: (probe.displacement, probe.steps))
        genuine = genuine.model_copy(update={"reached": True})
        return record.model_copy(update={"genuine": genuine, "probes": probes, "result": best})


def with_just_enough(
    plan: Plan, *, workers: int | None = None, executor: str = "local"
) -> tuple[Plan, list[JustEnough]]:
    """The plan with the just-enough attacks that its recipe asks for, and how they were found.

    An attack that does not learn its subjects on the base has none, and a warning says so; nor has one that is just enough as it
    is.

    Args:
        plan: see `preflight`.
        workers: processes; by default see `guardsmith.runtime.processes`.
        executor: where attacks run.

    Raises:
        RunFailed: a worker process was killed.
    """
    searches, verify = [], plan.recipe.verify
    labels = attacks_to_search(verify)
    if labels:
        draw_class_images(plan, ["base"])
    for label in labels:
        search = Search(plan, label, workers, executor).result()
        searches.append(search)
        if search.result is None or search.genuine is None:
            warn(f"{label} does not learn its subjects on the base; it has no just-enough attack")
            continue
        if (search.result.rate, search.result.steps) == (search.genuine.rate, search.genuine.steps):
            continue  # the attack as it is, which runs anyway
        params = {"learning_rate": search.result.rate, "steps": search.result.steps}
        attack = verify.attacks[label].model_copy(update={"params": verify.attacks[label].params | params})
        verify = verify.model_copy(update={"attacks": verify.attacks | {f"{label}{JUST_ENOUGH}": attack}})
    recipe: Recipe = plan.recipe.model_copy(update={"verify": verify})
    return replace(plan, recipe=recipe), searches
