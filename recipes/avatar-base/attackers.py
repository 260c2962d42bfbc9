"""What attackers of a hosted service and of open weights reach on the methods' models of the demo's subject, and everyday use.

python attackers.py FOLDER [--methods NAME ...] [--recipes NAME ...] [--everyday CHECK ...] [--longer]     runs what is missing
python attackers.py                                                                 tables again, from attackers.json

FOLDER/NAME is the output of `guardsmith harden --recipe RECIPE --output FOLDER/NAME` on registries/demo.yaml; FOLDER/base gets
the attacks on the base, which all share. Attacks are those of avatar-evasion, avatar-hosted and avatar-removal, each on the
protected subject and on the control. A method that fails against the plain attack meets the few of LITTLE only: what evades or
removes a protection says nothing where there is none. An attack with a removal does not run on the base: who has the base needs
no removal, so that it is compared with the same attack without one there. `--longer` trains DreamBooth for ten times the steps
and draws on the way. Everyday use of a model that `guardsmith run recipes/demo.yaml` has verified is that of its report. Writes
docs/results/attackers.json and attackers.md; what has not run is "not measured". It can be interrupted and run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from attackers_table import FURTHER, LITTLE, METHODS, PLAIN, RECIPES, ROLES, checks_of, tables
from evaluate import RESULTS
from everyday import bench_of, run_checks

from guardsmith.attacks.displacement import weight_norms
from guardsmith.attacks.optimizers import NEEDED
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.core.progress import quiet_libraries
from guardsmith.evaluation.deployability import CHECKS, Measurement
from guardsmith.evaluation.displacement import displacements
from guardsmith.evaluation.measuring import draw_class_images
from guardsmith.evaluation.planning import plan_units
from guardsmith.evaluation.preflight import Plan, preflight
from guardsmith.evaluation.runs import run_unit
from guardsmith.evaluation.units import Unit, removal_cost, scores_of
from guardsmith.gate.evidence import SIDES, Side
from guardsmith.registry.loader import Registry, load_registry

ROOT = Path(__file__).parent.parent.parent
REGISTRY = ROOT / "registries" / "demo.yaml"
LONGER = {
    "usual-rate": "{name: dreambooth, params: {learning_rate: 3.0e-4, steps: 600, batch_size: 2}}",
    "twice-the-rate": "{name: dreambooth, params: {learning_rate: 6.0e-4, steps: 600, batch_size: 2}}",
    "without-decay": "{name: dreambooth, params: {learning_rate: 6.0e-4, weight_decay: 0.0, steps: 600, batch_size: 2}}",
}
"""Attacks that go on for ten times the steps of `plain`."""
LONGER_POINTS = (0.1, 0.2, 0.33333, 0.5, 0.75, 1.0)
"""Shares of their steps after which they draw: 60, 120, 200, 300, 450 and 600."""


def recipe_of(name: str) -> Recipe:
    """A recipe with the further attacks whose optimizers are installed."""
    if name != "avatar-hosted":
        return load_recipe(name)
    installed = {label: text for label, text in FURTHER.items() if find_spec(NEEDED[label][0]) is not None}
    return load_recipe(name, [f"verify.attacks.{label}={text}" for label, text in installed.items()])


def roles_of(registry: Registry) -> dict[str, str]:
    """Id of every subject -> protected or control."""
    return {s.id: "protected" for s in registry.subjects} | {s.id: "control" for s in registry.controls}


def wanted_units(plan: Plan, label: str, sides: Sequence[str], roles: Sequence[str]) -> list[Unit]:
    """Units of an attack on these sides and on subjects of these roles; on the base none with a removal."""
    role_of = roles_of(plan.registry)
    return [
        unit
        for unit in plan_units(plan.registry, plan.recipe, plan.models, plan.policy)
        if unit.label == label and unit.side in sides and not (unit.side == "base" and unit.removal is not None)
        and role_of[unit.subject] in roles
    ]  # fmt: skip


def run_here(units: list[Unit]) -> dict[str, str]:
    """Run what is missing in this process, whose models stay loaded; name of a unit -> why it failed."""
    failures: dict[str, str] = {}
    for unit in units:
        if scores_of(unit) is not None:
            continue
        try:
            run_unit(unit)
        except Exception as error:  # a finding about that cell, as in a verification
            failures[unit.name] = f"{type(error).__name__}: {error}"
            print(f"{unit.name}: {failures[unit.name]}", flush=True)
    return failures


def attack(
    folder: Path, method: str, name: str, sides: Sequence[Side], roles: Sequence[str], only: Sequence[str] | None,
    table: dict[str, Any],
) -> None:  # fmt: skip
    """Run what is missing of a recipe (of these labels only) on a method's model; the table gets results after every attack."""
    recipe, registry = recipe_of(name), load_registry(REGISTRY)
    plan = preflight(registry, recipe, folder / method, base_runs=folder / "base")
    draw_class_images(plan, sides)
    labels = [label for label in recipe.verify.attacks if only is None or label in only]
    labels.sort(key=lambda label: label != PLAIN)
    role_of = roles_of(registry)
    for label in labels:
        if "hardened" in sides and label not in LITTLE and fails_plainly(table, method):
            continue
        units = wanted_units(plan, label, sides, roles)
        failures = run_here(units)
        row = table["attacks"].setdefault(name, {}).setdefault(label, {})
        for unit in units:
            cell, scores = started(row, unit, method, role_of[unit.subject], failures)
            if scores is None:
                continue
            cell["scores"] = [None if score is None else round(score, 3) for score in scores[1]]
            cost = removal_cost(unit)
            if cost is not None:
                cell["removal_cost"] = {k: round(v, 3) if isinstance(v, float) else v for k, v in cost.items()}
        print(f"{method}: {name}: {label}: " + "; ".join(
            f"{side} {role} {sum(cell['scores']) / len(cell['scores']):.2f}"
            for side in row for role, cell in row[side].items() if cell.get("scores") and side in ("base", method)
        ), flush=True)  # fmt: skip
        save(table)


def started(
    row: dict[str, Any], unit: Unit, method: str, role: str, failures: dict[str, str]
) -> tuple[dict[str, Any], Any]:
    """The empty cell of a unit, and its scores; without scores the cell says why, and these are `None`."""
    cell = row.setdefault("base" if unit.side == "base" else method, {}).setdefault(role, {})
    cell.clear()
    scores = scores_of(unit)
    if scores is None:
        cell["error"] = failures.get(unit.name, "")
    return cell, scores


def train_longer(
    folder: Path, method: str, sides: Sequence[Side], roles: Sequence[str], only: Sequence[str] | None, table: dict[str, Any]
) -> None:  # fmt: skip
    """Run what is missing of `LONGER` (of these labels only); the table gets similarity and movement at every point."""
    chosen = {label: text for label, text in LONGER.items() if only is None or label in only}
    attacks = ", ".join(f"{label}: {text}" for label, text in chosen.items())
    changes = [f"verify.attacks={{{attacks}}}", f"verify.evaluation_points={list(LONGER_POINTS)}"]
    registry = load_registry(REGISTRY)
    plan = preflight(registry, load_recipe("avatar-hosted", changes), folder / method, base_runs=folder / "base")
    draw_class_images(plan, sides)
    norms, role_of = weight_norms(plan.models["base"].model), roles_of(registry)
    for label in chosen:
        units = wanted_units(plan, label, sides, roles)
        failures = run_here(units)
        moved = displacements(units, norms)
        row = table["longer"].setdefault(label, {})
        for unit in units:
            cell, scores = started(row, unit, method, role_of[unit.subject], failures)
            if scores is None:
                continue
            for point, steps in unit.evaluation_points.items():
                displacement = moved[unit.side, unit.subject, label, point].overall
                cell[str(steps)] = {
                    "scores": [None if score is None else round(score, 3) for score in scores[point]],
                    "displacement": None if displacement is None else round(displacement, 4),
                }
            print(f"{label}: {unit.name}: {cell}", flush=True)
        save(table)


def measured_before(method: str, digest: str) -> dict[str, Any]:
    """Everyday use of this very model as the demo's committed verification measured it; empty where that had another model."""
    file = RESULTS / f"{method}-demo-report.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    if report.get("hardening", {}).get("model_digest") != digest:
        return {}
    limits, checks = load_recipe("demo").gate.deployability, {}
    for one in map(Measurement.model_validate, report["deployability"]):
        case = one.model_dump(mode="json", exclude={"check", "pictures"}) | {"status": one.status(limits)}
        checks.setdefault(one.check, {"cases": [], "report": file.name})["cases"].append(case)
    return checks


def fails_plainly(table: dict[str, Any], method: str) -> bool:
    """Whether the plain attack succeeds on a method's model; false where it has not run."""
    row = table["attacks"].get("avatar-evasion", {}).get(PLAIN, {})
    check, _ = checks_of(row, row.get("base", {}), method)
    return check is not None and check.status == "fail"


def save(table: dict[str, Any]) -> None:
    """Write both files."""
    write_json(RESULTS / "attackers.json", table)
    (RESULTS / "attackers.md").write_text(tables(table), encoding="utf-8")


def main() -> None:
    """Attack and write, or write only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--methods", nargs="+", default=[*METHODS[1:], METHODS[0]])
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES), help="whom to attack")
    parser.add_argument("--attacks", nargs="+", help="labels of a recipe's attacks, or of --longer; by default all")
    parser.add_argument("--longer", action="store_true", help="train for ten times the steps, too")
    parser.add_argument("--everyday", nargs="*", choices=tuple(CHECKS), default=list(CHECKS))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)  # as in the processes of a verification
    file = RESULTS / "attackers.json"
    table = json.loads(file.read_text()) if file.exists() else {}
    table |= {"command": "python attackers.py FOLDER"}
    for key in ("models", "attacks", "longer", "everyday"):
        table.setdefault(key, {})
    for method in args.methods if args.folder is not None else ():
        record = json.loads((args.folder / method / "harden.json").read_text())
        model = {k: record[k] for k in ("method", "params", "seconds", "unet_forward_equivalents", "model_digest")}
        if table["models"].get(method, model) != model:  # another model: what the earlier one reached is not its result
            for rows in (*table["attacks"].values(), table["longer"]):
                for row in rows.values():
                    row.pop(method, None)
            table["everyday"].pop(method, None)
        table["models"][method] = model
        for name in args.recipes:
            attack(args.folder, method, name, args.sides, args.roles, args.attacks, table)
        if args.longer:
            train_longer(args.folder, method, args.sides, args.roles, args.attacks, table)
        done = table["everyday"].setdefault(method, measured_before(method, model["model_digest"]))
        if missing := [check for check in args.everyday if check not in done]:
            bench, limits = bench_of(
                str(args.folder / method / "model"), args.folder / f"{method}-everyday", quick=False
            )
            run_checks(bench, limits, missing, done, lambda: save(table))
    save(table)


if __name__ == "__main__":
    main()
