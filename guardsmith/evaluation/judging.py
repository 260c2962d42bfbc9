"""From measurements to the report: intervals, checks and verdict. Nothing is drawn and nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from guardsmith.attacks import find_attack
from guardsmith.attacks.displacement import weight_norms
from guardsmith.config.threat_model import threat_model_of
from guardsmith.evaluation.displacement import Key, displacement_to_break, displacements
from guardsmith.evaluation.measuring import Measurements
from guardsmith.evaluation.planning import attacks_at_rates
from guardsmith.evaluation.preflight import Plan
from guardsmith.evaluation.units import Unit, removal_cost
from guardsmith.gate.checks import EXIT_CODES
from guardsmith.gate.evidence import Evidence, Side
from guardsmith.gate.rules import judge, verdict
from guardsmith.gate.statistics import Units, interval
from guardsmith.hardening.record import run_info
from guardsmith.metrics import Judge
from guardsmith.registry.loader import Subject
from guardsmith.reports.displacement import Displacement, JustEnough
from guardsmith.reports.report import (
    Attacked,
    AttackedSubject,
    PolicyRecord,
    RemovalRecord,
    Report,
    Role,
    Run,
    Score,
)


def evidence_of(plan: Plan, measurements: Measurements, moved: Mapping[Key, Displacement]) -> Evidence:
    """What the rules judge."""

    def classes(subjects: Sequence[Subject]) -> dict[str, str]:
        return {subject.id: subject.class_noun for subject in subjects}

    verify = plan.recipe.verify
    return Evidence(
        protected=classes(plan.attacked), controls=classes(plan.registry.controls),
        attacks={label: find_attack(spec.name).trains for label, spec in verify.attacks.items()},
        points=[point for point in sorted(verify.evaluation_points) if point > 1], scores=measurements.scores,
        released=measurements.released_scores, utility=measurements.utility, levels=plan.policy.classes,
        spec=plan.policy.rules, deployability=measurements.deployability, rates=list(attacks_at_rates(verify)),
        early_points=[point for point in sorted(verify.evaluation_points) if point < 1],
        displacements={key: each.overall for key, each in moved.items() if each.overall is not None},
    )  # fmt: skip


def face_detection_failure(units: Units, judge: Judge) -> float | None:
    """Share of pictures in which a judge of faces detects none (FDFR); `None` for other judges, and where nothing was scored."""
    values = [score for unit in units for score in unit if score is not None]
    if judge.no_face is None or not values:
        return None
    return values.count(judge.no_face) / len(values)


def removal_records(units: Sequence[Unit]) -> list[RemovalRecord]:
    """What removals cost, for every side, subject and attack that had one; units that did not run are left out."""
    costs: dict[tuple[Side, str, str, str], list[dict[str, Any]]] = {}
    for unit in units:
        cost = removal_cost(unit)
        if unit.removal is not None and cost is not None:
            costs.setdefault((unit.side, unit.subject, unit.label, unit.removal["name"]), []).append(cost)
    return [
        RemovalRecord(
            side=side, subject=subject, attack=label, removal=name,
            **{key: mean([cost[key] for cost in each]) for key in ("seconds", "unet_forwards", "changed_weights")},
            pictures=max(cost["pictures"] for cost in each), needs_base=each[0]["needs_base"],
        )
        for (side, subject, label, name), each in costs.items()
    ]  # fmt: skip


def judged_report(
    plan: Plan, measurements: Measurements, searches: Sequence[JustEnough] = (), *, seconds: float
) -> Report:
    """The report, whole.

    Args:
        plan: of the verification.
        measurements: what it measured.
        searches: for just-enough attacks.
        seconds: that all of this took.
    """
    registry, policy = plan.registry, plan.policy
    scores = measurements.scores
    intervals = {key: interval(units) for key, units in scores.items()}
    moved = displacements(measurements.units, weight_norms(plan.models["base"].model))
    evidence = evidence_of(plan, measurements, moved)
    checks = judge(evidence)
    status = verdict(checks)
    groups: tuple[tuple[Role, Sequence[Subject]], ...] = (("protected", plan.attacked), ("control", registry.controls))
    scored = [
        Score(
            side=side, subject=subject, attack=label, evaluation_point=point,
            units=[list(unit) for unit in scores[side, subject, label, point]], interval=similarity,
            fdfr=face_detection_failure(scores[side, subject, label, point], plan.judge),
            displacement=moved.get((side, subject, label, point)),
        )
        for (side, subject, label, point), similarity in intervals.items()
    ]  # fmt: skip
    return Report(
        verdict=status,
        exit_code=EXIT_CODES[status],
        checks=checks,
        scores=scored,
        released=measurements.released_scores,
        displacement_to_break=displacement_to_break(
            scored, evidence.protected, policy.classes, plan.recipe.verify, policy.rules
        ),
        just_enough=list(searches),
        removals=removal_records(measurements.units),
        threat_model=threat_model_of(plan.recipe.verify),
        attacked=Attacked(protected=len(plan.attacked), of=len(registry.subjects), controls=len(registry.controls)),
        subjects=[
            AttackedSubject(id=subject.id, class_noun=subject.class_noun, role=role)
            for role, subjects in groups
            for subject in subjects
        ],
        utility=measurements.utility,
        deployability=list(measurements.deployability),
        failed_units=measurements.failed_units,
        policy=PolicyRecord.of(policy),
        calibration=policy.classes,
        hardening=plan.hardening,
        recipe=plan.recipe.model_copy(update={"subjects": None, "negatives": None}),  # paths of this machine
        run=Run.model_validate(run_info() | {"seconds": round(seconds, 1)}),
    )  # fmt: skip
