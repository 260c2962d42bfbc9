"""The tables of attackers.py: what attackers reached on the methods' models, and everyday use of these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from guardsmith.config.loading import load_recipe
from guardsmith.evaluation.deployability import CHECKS
from guardsmith.gate.calibration import calibration, personalized_level
from guardsmith.gate.checks import Check, with_evidence
from guardsmith.gate.rules.base_attack import check_base_attack
from guardsmith.gate.rules.control import check_control
from guardsmith.gate.rules.protected import check_protected

METHODS = ("tripwire", "persguard", "imma", "apdm")
RECIPES = ("avatar-evasion", "avatar-hosted", "avatar-removal")
PLAIN = "plain"
LITTLE = (PLAIN, "lora", "negative", "finish-with-base", "start-with-base", "one-step", "average-two")
"""Attacks that every method's model meets."""
ROLES = ("protected", "control")
NOT_MEASURED = "not measured"
FURTHER = {
    "adamw8bit": "{name: dreambooth, params: {optimizer: adamw8bit, learning_rate: 6.0e-4, steps: 60, batch_size: 2}}",
    "prodigy": "{name: dreambooth, params: {optimizer: prodigy, learning_rate: 1.0, steps: 100, batch_size: 2}}",
}
"""Attacks of avatar-hosted that need guardsmith[8bit,prodigy], which a shipped recipe may not."""


def labels_of(name: str) -> list[str]:
    """All attacks that belong to a recipe here."""
    return [*load_recipe(name).verify.attacks, *(FURTHER if name == "avatar-hosted" else ())]


def checks_of(row: dict[str, Any], reference: dict[str, Any], side: str) -> tuple[Check | None, Check | None]:
    """The gate's checks of an attack on a model, of protected subject and control; `None` where it was not measured."""
    levels, spec = calibration()["person"], load_recipe("demo").gate
    result: list[Check | None] = []
    for role in ROLES:
        ours, base = (each.get(role, {}).get("scores") for each in (row.get(side, {}), reference))
        if not ours or (role == "control" and not base):
            result.append(None)
            continue
        units = [base] if base else []  # without the base's result a protected subject's is shown, as no evidence
        check = (
            check_protected(role, "", [ours], levels, spec)
            if role == "protected"
            else check_control(role, "", [ours], units, levels, spec)
        )
        on_base = check_base_attack(role, "", units, levels, spec)
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
            cells += checked_cells(row, reference, side)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def checked_cells(row: dict[str, Any], reference: dict[str, Any], side: str) -> list[str]:
    """The cells of a model in a row: protected subject and control."""
    cells = []
    for role, check in zip(ROLES, checks_of(row, reference, side), strict=True):
        cell = row.get(side, {}).get(role, {})
        text = written(check, cell, role == "control")
        cells.append(text + (slipped(cell) if role == "protected" and check and check.status != "fail" else ""))
    return cells


PRICE = ("seconds", "U-Net forwards", "pictures", "public base")


def price(row: dict[str, Any], sides: list[str]) -> list[str]:
    """What a removal cost on the protected subject's model."""
    cost = row.get(sides[0], {}).get("protected", {}).get("removal_cost")
    if cost is None:
        return [NOT_MEASURED] * len(PRICE)
    needed = "needed" if cost["needs_base"] else "no"
    return [f"{cost['seconds']:.1f}", f"{cost['unet_forwards']:,}", str(cost["pictures"]), needed]


def at(cells: dict[str, Any], step: str) -> dict[str, Any]:
    """What was measured after so many steps, or why the attack failed to run."""
    return cells if "error" in cells else cells.get(step, {})


def longer_table(longer: dict[str, Any]) -> list[str]:
    """What DreamBooth reached on the base and on Tripwire's model after more and more steps, and how far it moved the weights."""
    heads = ["attack", "steps", "weights moved: base, tripwire", "base: protected, control", "tripwire: protected"]
    heads.append("tripwire: control keeps")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for label, sides in longer.items():
        steps = {step for roles in sides.values() for cells in roles.values() for step in cells if step != "error"}
        for step in sorted(steps, key=int):
            row = {side: {role: at(cells, step) for role, cells in roles.items()} for side, roles in sides.items()}
            moved = [row.get(side, {}).get("protected", {}).get("displacement") for side in ("base", "tripwire")]
            cells = [f"`{label}`", step, ", ".join(NOT_MEASURED if m is None else f"{100 * m:.1f} %" for m in moved)]
            cells += [on_base(row.get("base", {})), *checked_cells(row, row.get("base", {}), "tripwire")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def everyday_table(everyday: dict[str, Any]) -> list[str]:
    """Everyday use of every method's model, a case a line; faults and single settings only where there is something to say."""
    sides = [side for side in METHODS if everyday.get(side)]
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for check in CHECKS:
        for side in sides:
            for case in everyday[side].get(check, {}).get("cases", ()):
                cases.setdefault((check, case["case"], case["measure"]), {})[side] = case
    lines = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for (check, name, measure), each in cases.items():
        quiet = all(case["value"] == 0 and case["status"] == "pass" for case in each.values())
        if quiet and (measure == "faults" or any(case["part"] for case in each.values())):
            continue
        cells = [case_text(each.get(side)) for side in sides]
        words = UNMERGED if (check, measure) == ("merges", "difference") else MEASURES[measure]
        lines.append(f"| {BEFORE.get(check, '')}{name}: {words} | " + " | ".join(cells) + " |")
    return lines


BEFORE = {"merges": "merged ", "samplers": "samplers and accelerators, "}
"""Words that some checks' cases need in front of them."""
UNMERGED = "difference, times the unmerged model's"
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
    methods = [side for side in METHODS if side in present]
    little = [("avatar-hosted" if label == "lora" else "avatar-evasion", label) for label in LITTLE]
    parts = ["# Four methods under attack", "", "What the words mean: [results](README.md#four-methods).", ""]
    parts += ["## Methods", "", *attack_table(little, attacks, methods), ""]
    for title, name in zip(("Evasion", "Hosted", "Removal"), RECIPES, strict=True):
        chosen = [(name, label) for label in labels_of(name)]
        parts += [f"## {title}", "", *attack_table(chosen, attacks, ["tripwire"]), ""]
        if name == "avatar-hosted" and table.get("longer"):
            parts += ["## Ten times the steps", "", *longer_table(table["longer"]), ""]
    everyday = table.get("everyday", {})
    parts += ["## Everyday use", "", *everyday_table(everyday)] if any(everyday.values()) else []
    return "\n".join(parts) + "\n"
