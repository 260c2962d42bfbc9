"""What attackers of a hosted service and of open weights reach on the methods' models of the demo's subject, and everyday use.

python attackers.py FOLDER [--methods NAME ...] [--recipes NAME ...] [--everyday CHECK ...]     runs what is missing
python attackers.py                                                                            tables again, from attackers.json

FOLDER/NAME is the output of `guardsmith harden --recipe RECIPE --output FOLDER/NAME` on registries/demo.yaml; FOLDER/base gets
the attacks on the base, which all share. Attacks are those of avatar-evasion, avatar-hosted and avatar-removal, each on the
protected subject and on the control. A method that fails against the plain attack meets the few of LITTLE only: what evades or
removes a protection says nothing where there is none. An attack with a removal does not run on the base: who has the base needs
no removal, so that it is compared with the same attack without one there. Writes docs/results/attackers.json and attackers.md;
what has not run is "not measured". It can be interrupted and run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from evaluate import RESULTS
from everyday import bench_of, run_checks

from guardsmith.attacks.optimizers import NEEDED
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.core.progress import quiet_libraries
from guardsmith.evaluation.deployability import CHECKS
from guardsmith.evaluation.measuring import draw_class_images
from guardsmith.evaluation.planning import plan_units
from guardsmith.evaluation.preflight import Plan, preflight
from guardsmith.evaluation.runs import run_unit
from guardsmith.evaluation.units import Unit, removal_cost, scores_of
from guardsmith.gate.calibration import calibration, personalized_level
from guardsmith.gate.checks import Check, with_evidence
from guardsmith.gate.evidence import SIDES, Side
from guardsmith.gate.rules.base_attack import check_base_attack
from guardsmith.gate.rules.control import check_control
from guardsmith.gate.rules.protected import check_protected
from guardsmith.registry.loader import load_registry

ROOT = Path(__file__).parent.parent.parent
REGISTRY = ROOT / "registries" / "demo.yaml"
RECIPES = ("avatar-evasion", "avatar-hosted", "avatar-removal")
PLAIN = "plain"
LITTLE = (PLAIN, "lora", "negative", "finish-with-base", "start-with-base", "one-step", "average-two")
ROLES = ("protected", "control")
NOT_MEASURED = "not measured"
FURTHER = {
    "adamw8bit": "{name: dreambooth, params: {optimizer: adamw8bit, learning_rate: 6.0e-4, steps: 60, batch_size: 2}}",
    "prodigy": "{name: dreambooth, params: {optimizer: prodigy, learning_rate: 1.0, steps: 100, batch_size: 2}}",
}
"""Attacks of avatar-hosted that need guardsmith[8bit,prodigy], which a shipped recipe may not."""


def recipe_of(name: str) -> Recipe:
    """A recipe with the further attacks whose optimizers are installed."""
    if name != "avatar-hosted":
        return load_recipe(name)
    installed = {label: text for label, text in FURTHER.items() if find_spec(NEEDED[label][0]) is not None}
    return load_recipe(name, [f"verify.attacks.{label}={text}" for label, text in installed.items()])


def labels_of(name: str) -> list[str]:
    """All attacks that belong to a recipe here."""
    return [*load_recipe(name).verify.attacks, *(FURTHER if name == "avatar-hosted" else ())]


def wanted_units(plan: Plan, label: str, sides: Sequence[str], roles: Sequence[str]) -> list[Unit]:
    """Units of an attack on these sides and on subjects of these roles; on the base none with a removal."""
    controls = {subject.id for subject in plan.registry.controls}
    return [
        unit
        for unit in plan_units(plan.registry, plan.recipe, plan.models, plan.policy)
        if unit.label == label and unit.side in sides and not (unit.side == "base" and unit.removal is not None)
        and ("control" if unit.subject in controls else "protected") in roles
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
    role_of = {subject.id: "protected" for subject in registry.subjects} | {c.id: "control" for c in registry.controls}
    for label in labels:
        if "hardened" in sides and label not in LITTLE and fails_plainly(table, method):
            continue
        units = wanted_units(plan, label, sides, roles)
        failures = run_here(units)
        row = table["attacks"].setdefault(name, {}).setdefault(label, {})
        for unit in units:
            scores = scores_of(unit)
            cell = row.setdefault("base" if unit.side == "base" else method, {}).setdefault(role_of[unit.subject], {})
            cell.clear()
            if scores is None:
                cell["error"] = failures.get(unit.name, "")
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


def fails_plainly(table: dict[str, Any], method: str) -> bool:
    """Whether the plain attack succeeds on a method's model; false where it has not run."""
    row = table["attacks"].get("avatar-evasion", {}).get(PLAIN, {})
    check, _ = checks_of(row, row.get("base", {}), method)
    return check is not None and check.status == "fail"


def save(table: dict[str, Any]) -> None:
    """Write both files."""
    write_json(RESULTS / "attackers.json", table)
    (RESULTS / "attackers.md").write_text(tables(table), encoding="utf-8")


def checks_of(row: dict[str, Any], reference: dict[str, Any], side: str) -> tuple[Check | None, Check | None]:
    """The gate's checks of an attack on a model, of protected subject and control; `None` where it was not measured."""
    levels, spec = calibration()["person"], load_recipe("demo").gate
    result: list[Check | None] = []
    for role in ROLES:
        ours, base = (each.get(role, {}).get("scores") for each in (row.get(side, {}), reference))
        if not ours or not base:
            result.append(None)
            continue
        check = (
            check_protected(role, "", [ours], levels, spec)
            if role == "protected"
            else check_control(role, "", [ours], [base], levels, spec)
        )
        on_base = check_base_attack(role, "", [base], levels, spec)
        if role == "control" and on_base.status != "pass":
            check = replace(check, value=None)  # a share of nothing says nothing
        result.append(with_evidence(check, on_base))
    return result[0], result[1]


def written(check: Check | None, cell: dict[str, Any], share: bool) -> str:
    """A cell of a table: number, interval and, where it is no pass, what it is."""
    if "error" in cell:
        return f"failed to run ({cell['error']})"
    if check is None:
        return NOT_MEASURED
    if check.value is None or check.low is None or check.high is None:
        return "no evidence"
    factor, digits, unit = (100, 0, " %") if share else (1, 2, "")
    mean, low, high = (f"{factor * each:z.{digits}f}" for each in (check.value, check.low, check.high))
    text = f"{mean}{unit} [{low}, {high}]"
    if check.status == "fail":
        return f"🔴 **{text}**"
    if check.status == "inconclusive":
        return text + (": no evidence" if check.sentence.startswith("no evidence") else ": undecided")
    return text


def slipped(cell: dict[str, Any]) -> str:
    """How many pictures count as personalized on their own although their mean is that of another subject."""
    level = personalized_level(calibration()["person"], load_recipe("demo").gate)
    scores = cell.get("scores", [])
    shown = sum(score is not None and score >= level for score in scores)
    return f"; {shown} of {len(scores)} show the subject" if shown else ""


def on_base(cells: dict[str, Any]) -> str:
    """Mean similarity that an attack reaches on the base, protected subject and control."""
    means = []
    for role in ROLES:
        scores = cells.get(role, {}).get("scores")
        means.append(f"{sum(scores) / len(scores):z.2f}" if scores else NOT_MEASURED)
    return ", ".join(means)


def reference_of(label: str, row: dict[str, Any], attacks: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """With what an attack is compared on the base: itself or, with a removal, the same without one; and what that reached."""
    if row.get("base"):
        return label, row["base"]
    recipe = "avatar-hosted"
    same = "lora" if load_recipe("avatar-removal").verify.attacks[label].name == "lora" else PLAIN
    return same, attacks.get(recipe, {}).get(same, {}).get("base", {})


def attack_table(chosen: list[tuple[str, str]], attacks: dict[str, Any], sides: list[str]) -> list[str]:
    """What attacks reached on the base and on these models; the price of a removal stands beside it.

    Args:
        chosen: (recipe, label) of every line.
        attacks: recipe -> label -> side -> role -> what was measured.
        sides: the models.
    """
    priced = all(name == "avatar-removal" for name, _ in chosen)
    heads = ["attack", *(PRICE if priced else ()), "base: protected, control"]
    heads += [f"{side}: {what}" for side in sides for what in ("protected", "control keeps")]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, label in chosen:
        row = attacks.get(name, {}).get(label, {})
        if not any(row.values()):
            lines.append(f"| `{label}` |" + f" {NOT_MEASURED} |" * (len(heads) - 1))
            continue
        same, reference = reference_of(label, row, attacks)
        cells = [f"`{label}`", *(price(row, sides) if priced else ())]
        cells.append(on_base(reference) + ("" if same == label else f" (`{same}`)"))
        for side in sides:
            checks = checks_of(row, reference, side)
            for role, check in zip(ROLES, checks, strict=True):
                cell = row.get(side, {}).get(role, {})
                text = written(check, cell, role == "control")
                cells.append(text + (slipped(cell) if role == "protected" and check and check.status != "fail" else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


PRICE = ("seconds", "U-Net forwards", "pictures", "public base")


def price(row: dict[str, Any], sides: list[str]) -> list[str]:
    """What a removal cost on the protected subject's model."""
    cost = row.get(sides[0], {}).get("protected", {}).get("removal_cost")
    if cost is None:
        return [NOT_MEASURED] * len(PRICE)
    needed = "needed" if cost["needs_base"] else "no"
    return [f"{cost['seconds']:.1f}", f"{cost['unet_forwards']:,}", str(cost["pictures"]), needed]


def everyday_table(everyday: dict[str, Any]) -> list[str]:
    """Everyday use of every method's model, a case a line; cases that count faults only where there is one."""
    sides = list(everyday)
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for side, checks in everyday.items():
        for check, measured in checks.items():
            for case in measured["cases"]:
                cases.setdefault((check, case["case"], case["measure"]), {})[side] = case
    lines = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for (_, name, measure), each in cases.items():
        if measure == "faults" and not any(case["value"] != 0 for case in each.values()):
            continue
        cells = [case_text(each.get(side)) for side in sides]
        lines.append(f"| {name}: {MEASURES[measure]} | " + " | ".join(cells) + " |")
    return lines


MEASURES = {
    "difference": "difference, times the base's", "faults": "faults", "collapsed": "collapsed beyond the base's",
    "control": "control followed", "retention": "likeness kept",
}  # fmt: skip


def case_text(case: dict[str, Any] | None) -> str:
    """One case of everyday use."""
    if case is None:
        return NOT_MEASURED
    if case["value"] is None:
        return "failed to run"
    factor, digits, unit = {
        "difference": (1, 1, ""), "faults": (1, 0, ""), "collapsed": (100, 0, " %"), "control": (100, 0, " %"),
        "retention": (100, 0, " %"),
    }[case["measure"]]  # fmt: skip
    text = f"{factor * case['value']:z.{digits}f}{unit}"
    if case["low"] is not None and case["high"] is not None:
        text += f" [{factor * case['low']:z.{digits}f}, {factor * case['high']:z.{digits}f}]"
    if case["status"] == "fail":
        return f"🔴 **{text}**"
    return text + (": undecided" if case["status"] == "inconclusive" else "")


def tables(table: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    attacks = table["attacks"]
    present = {side for rows in attacks.values() for row in rows.values() for side in row}
    methods = [side for side in ("tripwire", "persguard", "imma", "apdm") if side in present]
    little = [("avatar-hosted" if label == "lora" else "avatar-evasion", label) for label in LITTLE]
    parts = ["# Four methods under attack", "", "What the words mean: [results](README.md#four-methods).", ""]
    parts += ["## Methods", "", *attack_table(little, attacks, methods), ""]
    for title, name in zip(("Evasion", "Hosted", "Removal"), RECIPES, strict=True):
        chosen = [(name, label) for label in labels_of(name)]
        parts += [f"## {title}", "", *attack_table(chosen, attacks, ["tripwire"]), ""]
    everyday = {side: checks for side, checks in table.get("everyday", {}).items() if checks}
    parts += ["## Everyday use", "", *everyday_table(everyday)] if everyday else []
    return "\n".join(parts) + "\n"


def main() -> None:
    """Attack and write, or write only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--methods", nargs="+", default=["persguard", "imma", "apdm", "tripwire"])
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES), help="whom to attack")
    parser.add_argument("--attacks", nargs="+", help="labels of a recipe's attacks; by default all")
    parser.add_argument("--everyday", nargs="*", choices=tuple(CHECKS), default=list(CHECKS))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)  # as in the processes of a verification
    file = RESULTS / "attackers.json"
    table = json.loads(file.read_text()) if file.exists() else {}
    table |= {"command": "python attackers.py FOLDER"}
    for key in ("models", "attacks", "everyday"):
        table.setdefault(key, {})
    for method in args.methods if args.folder is not None else ():
        record = json.loads((args.folder / method / "harden.json").read_text())
        model = {k: record[k] for k in ("method", "params", "seconds", "unet_forward_equivalents", "model_digest")}
        if table["models"].get(method, model) != model:  # another model: what the earlier one reached is not its result
            for rows in table["attacks"].values():
                for row in rows.values():
                    row.pop(method, None)
            table["everyday"].pop(method, None)
        table["models"][method] = model
        for name in args.recipes:
            attack(args.folder, method, name, args.sides, args.roles, args.attacks, table)
        done = table["everyday"].setdefault(method, {})
        if missing := [check for check in args.everyday if check not in done]:
            bench, limits = bench_of(
                str(args.folder / method / "model"), args.folder / f"{method}-everyday", quick=False
            )
            run_checks(bench, limits, missing, done, lambda: save(table))
    save(table)


if __name__ == "__main__":
    main()
