"""Several verified hardenings side by side: one column a run, one line a question of the gate.

All numbers come from the runs' `verify/report.json`; nothing is measured here. Groups of subjects are pooled: the interval of a
group is over its units and their pictures, as in the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

from guardsmith.core.atomic_io import read_record
from guardsmith.core.errors import UserError
from guardsmith.gate.rules import Interval, Levels, Units, above_chance, attack_at, called, interval, ratio_interval

COLOURS = {True: "green", False: "red", None: "default"}


class Cell(NamedTuple):
    """One answer.

    Attributes:
        text: as it is shown.
        reached: whether it is what is asked for; `None` where nothing is asked, or nothing was measured.
    """

    text: str
    reached: bool | None = None


def read_report(run: Path, place: str = "verify/report.json") -> dict[str, Any]:
    """The report of a verified run: its folder, or the file itself.

    Args:
        run: folder or file.
        place: of the report in such a folder.

    Raises:
        UserError: there is none, or it is not one of this version.
    """
    from pydantic import ValidationError

    from guardsmith.reports.schema import Report

    file = run / place if run.is_dir() else run
    if not file.is_file():
        raise UserError(f"{run} holds no report ({place}); run `guardsmith verify` first.")
    told = read_record(file, ("schema",), "verify again")
    try:
        Report.model_validate(told)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"{file} is not a report of this version of guardsmith ({where}); verify again.") from error
    return told


def group_units(report: dict[str, Any], side: str, ids: set[str], attack: str, look: float) -> Units:
    """Scores of a group of subjects, unit by unit."""
    found: list[list[float | None]] = []
    for told in report["scores"]:
        if (told["side"], told["attack"], told["look"]) == (side, attack, look) and told["subject"] in ids:
            found += told["units"]
    return found


def group(report: dict[str, Any], role: str, same_class: bool | None = None) -> set[str]:
    """Subjects of a role; controls, of a class that has protected subjects, or of another one."""
    nouns = {subject["class_noun"] for subject in report["subjects"] if subject["role"] == "protected"}
    return {
        subject["id"]
        for subject in report["subjects"]
        if subject["role"] == role and same_class in (None, subject["class_noun"] in nouns)
    }


def _shown(found: Interval | None, scale: float = 1, unit: str = "") -> str:
    if found is None:
        return "-"
    digits = 0 if scale == 100 else 2
    mean, low, high = (f"{scale * value:z.{digits}f}" for value in found[:3])
    return f"{mean}{unit} [{low}, {high}]"


def protected_cell(report: dict[str, Any], attack: str, look: float) -> Cell:
    """Similarity of the protected subjects after an attack, and for how many of them the gate says "protected"."""
    checks = [c for c in report["checks"] if (c["name"], c["attack"]) == ("protected", attack_at(attack, look))]
    found = interval(group_units(report, "hardened", group(report, "protected"), attack, look))
    if found is None or not checks:
        return Cell("-")
    held = sum(check["status"] == "pass" for check in checks)
    return Cell(f"{_shown(found)}; {held} of {len(checks)}", held == len(checks))


def base_cell(report: dict[str, Any], attack: str) -> Cell:
    """What the attack reaches on the base, protected subjects."""
    checks = [
        check
        for check in report["checks"]
        if (check["name"], check["attack"]) == ("attack works on base", attack)
        and check["subject"] in group(report, "protected")
    ]
    found = interval(group_units(report, "base", group(report, "protected"), attack, 1))
    if found is None or not checks:
        return Cell("-")
    learnt = sum(check["status"] == "pass" for check in checks)
    return Cell(f"{_shown(found)}; {learnt} of {len(checks)}", learnt == len(checks))


def learns(report: dict[str, Any], attack: str) -> bool:
    """Whether an attack is one that has to learn its subject on the base; one that only asks is not."""
    return any((check["name"], check["attack"]) == ("attack works on base", attack) for check in report["checks"])


def kept(report: dict[str, Any], attack: str, ids: set[str]) -> Interval | None:
    """Share of what an attack reaches on the base that it still reaches on the hardened model, counted from chance.

    `None` where it reaches nothing on the base, or need not.
    """
    if not learns(report, attack):
        return None
    nouns = {subject["id"]: subject["class_noun"] for subject in report["subjects"]}

    def units(side: str) -> Units:
        found: list[Sequence[float | None]] = []
        for name in sorted(ids):
            levels = Levels(**report["calibration"][nouns[name]])
            found += above_chance(group_units(report, side, {name}, attack, 1), levels)
        return found

    return ratio_interval(units("hardened"), units("base"))


def control_cell(report: dict[str, Any], attack: str, same_class: bool, wanted: float) -> Cell:
    """Share of the base's similarity that controls keep."""
    found = kept(report, attack, group(report, "control", same_class))
    return Cell("-") if found is None else Cell(_shown(found, 100, " %"), found.mean >= wanted)


def break_cell(report: dict[str, Any], attack: str, wanted: float) -> Cell:
    """Steps to break, hardened over base: the median over subjects. Who was not broken counts with the steps tried."""
    told = [t for t in report["steps_to_break"] if t["attack"] == attack and t["base"] is not None]
    if not told:
        return Cell("-")
    ratios = [(t["tried"] if t["hardened"] is None else t["hardened"]) / t["base"] for t in told]
    broken = [ratio for t, ratio in zip(told, ratios, strict=True) if t["hardened"] is not None]
    sign = "at least " if len(broken) < len(told) else ""
    text = f"{sign}{median(ratios):.1f} x; {len(broken)} of {len(told)} broken"
    if min(ratios) >= wanted:
        return Cell(text, True)
    return Cell(text, False if min(broken, default=wanted) < wanted else None)


def rows(
    report: dict[str, Any], *, control: float = 0.95, fidelity: float = 0.02, steps: float = 10.0
) -> dict[str, Cell]:
    """All answers of one run, by question.

    Args:
        report: see `read_report`.
        control: share of the base's similarity that controls have to keep.
        fidelity: how much of the prompt fidelity may be lost.
        steps: how many times the base's steps an attack should need.
    """
    spec, hardening, utility = report["recipe"]["verify"], report["hardening"], report["utility"]
    further = [look for look in sorted(spec["looks"]) if look > 1]
    cost = hardening["unet_forward_equivalents"]
    found = {
        "method": Cell(hardening["method"] or "not guardsmith's"),
        "cost, U-Net forward equivalents": Cell("-" if cost is None else f"{cost:,}"),
    }
    for attack in spec["attacks"]:
        if learns(report, attack):
            found[f"{attack}: base"] = base_cell(report, attack)
        found[f"{attack}: protected"] = protected_cell(report, attack, 1)
        for look in further:
            found[f"{attack}: protected, {look:g} x steps"] = protected_cell(report, attack, look)
        if further:
            found[f"{attack}: steps to break over the base's"] = break_cell(report, attack, steps)
        for same in (True, False):
            if learns(report, attack) and group(report, "control", same):
                which = "same class" if same else "other class"
                found[f"{attack}: control keeps, {which}"] = control_cell(report, attack, same, control)
    ratio, limit = utility["kid_ratio"], report["recipe"]["gate"]["kid_ratio"]
    if ratio is None:
        found["ordinary prompts: KID over that of two seeds"] = Cell("-")
    else:
        bounds = Interval(ratio, utility["kid_ratio_low"], utility["kid_ratio_high"], 0, 0)
        found["ordinary prompts: KID over that of two seeds"] = Cell(_shown(bounds), bounds.high <= limit)
    lost = [c for c in report["checks"] if c["name"] == "ordinary prompts (destroyed)" and c["value"] is not None]
    if lost:
        share = Interval(lost[0]["value"], lost[0]["low"], lost[0]["high"], 0, 0)
        found["ordinary prompts: pictures destroyed"] = Cell(_shown(share, 100, " %"), lost[0]["status"] == "pass")
    now, before = utility["fidelity_hardened"], utility["fidelity_base"]
    if now is None or before is None:
        found["ordinary prompts: fidelity (base)"] = Cell("-")
    else:
        shown = f"{100 * now:.1f} % ({100 * before:.1f} %)"
        found["ordinary prompts: fidelity (base)"] = Cell(shown, now >= before - fidelity)
    found["verdict of the gate"] = Cell(report["verdict"], report["verdict"] == "pass")
    return found


CONDITIONS = ("identifiers", "seeds", "crossed", "sample", "images_per_unit", "class_images")


def in_common(reports: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The reports with those attacks and looks only that all of them have in the same way, and the names of the others.

    Raises:
        UserError: no attack is left, or the attackers had other conditions.
    """
    specs = {name: report["recipe"]["verify"] for name, report in reports.items()}
    names = list(specs)
    for name in names[1:]:
        for key in CONDITIONS:
            if specs[name][key] != specs[names[0]][key]:
                raise UserError(f"{name} was verified with other {key} than {names[0]}: no comparison.")
    everything = {label: spec for told in specs.values() for label, spec in told["attacks"].items()}
    attacks = {
        label: spec
        for label, spec in everything.items()
        if all(told["attacks"].get(label) == spec for told in specs.values())
    }
    if not attacks:
        raise UserError(f"{names[1]} was verified with other attacks than {names[0]}: no comparison.")
    all_looks = sorted({look for told in specs.values() for look in told["looks"]})
    looks = [look for look in all_looks if all(look in told["looks"] for told in specs.values())]
    left_out = [label for label in everything if label not in attacks]
    left_out += [f"{look:g} x steps" for look in all_looks if look not in looks and look > 1]
    kept = {}
    for name, report in reports.items():
        verify = report["recipe"]["verify"] | {"attacks": attacks, "looks": looks}
        kept[name] = report | {"recipe": report["recipe"] | {"verify": verify}}
    return kept, left_out


def compare(reports: dict[str, dict[str, Any]], **asked: float) -> tuple[Table, dict[str, dict[str, Any]]]:
    """A table and the same as data: question -> run -> {text, reached}; of attacks and looks that all reports have in common.

    Args:
        reports: name of the run -> its report.
        asked: see `rows`.

    Raises:
        UserError: the runs were not attacked in the same way on the same subjects, so they cannot be compared.
    """
    reports, left_out = in_common(reports)
    first, *others = reports.values()
    for name, report in zip(list(reports)[1:], others, strict=True):
        for what, mine, other in (
            ("subjects", first["subjects"], report["subjects"]),
            ("base", first["hardening"]["base_digest"], report["hardening"]["base_digest"]),
        ):
            if mine != other:
                raise UserError(f"{name} was verified with other {what} than {next(iter(reports))}: no comparison.")
    columns = {name: rows(report, **asked) for name, report in reports.items()}
    questions = list(dict.fromkeys(question for column in columns.values() for question in column))
    caption = f"not in all of them, and left out: {', '.join(left_out)}" if left_out else None
    table = Table(title="guardsmith compare", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name)
    told: dict[str, dict[str, Any]] = {}
    for question in questions:
        cells = {name: column.get(question, Cell("-")) for name, column in columns.items()}
        told[question] = {name: cell._asdict() for name, cell in cells.items()}
        table.add_row(question, *(f"[{COLOURS[cell.reached]}]{cell.text}[/]" for cell in cells.values()))
    return table, told


def as_markdown(told: dict[str, dict[str, Any]]) -> str:
    """The same for a document; what is not reached is marked."""
    names: Sequence[str] = list(next(iter(told.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for question, cells in told.items():
        texts = [f"🔴 {c['text']}" if c["reached"] is False else str(c["text"]) for c in cells.values()]
        lines.append(f"| {question} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


class Change(NamedTuple):
    """One check of two reports.

    Attributes:
        check: its name, subject and attack.
        before: status and value in the first report; empty where it was not made.
        after: the same in the second.
        kind: "better" or "worse" by status, "new" or "gone", "moved" where the intervals do not overlap.
    """

    check: str
    before: str
    after: str
    kind: str


RANKS = {"pass": 0, "inconclusive": 1, "fail": 2}
KINDS = {"worse": "red", "gone": "red", "moved": "yellow", "new": "yellow", "better": "green"}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """What is different in the second of two reports, the worst first; checks are matched by name, subject and attack."""

    def keyed(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {called(check): check for check in report["checks"]}

    def told(check: dict[str, Any] | None) -> str:
        if check is None:
            return ""
        return check["status"] if check["value"] is None else f"{check['status']}, {check['value']:.3f}"

    old, new = keyed(before), keyed(after)
    found = []
    for key in dict.fromkeys((*old, *new)):
        one, other = old.get(key), new.get(key)
        if one is None or other is None:
            kind = "new" if one is None else "gone"
        elif one["status"] != other["status"]:
            kind = "worse" if RANKS[other["status"]] > RANKS[one["status"]] else "better"
        elif None not in (one["low"], one["high"], other["low"], other["high"]) and (
            one["high"] < other["low"] or other["high"] < one["low"]
        ):
            kind = "moved"
        else:
            continue
        found.append(Change(key, told(one), told(other), kind))
    order = list(KINDS)
    return sorted(found, key=lambda change: order.index(change.kind))


CIRCUMSTANCES = {
    "model": ("hardening", "model_digest"), "base": ("hardening", "base_digest"), "registry": ("hardening", "registry_digest"),
    "method": ("hardening", "method"), "attacks and budget": ("recipe", "verify"), "sampling": ("recipe", "sampling"),
    "rules of the gate": ("recipe", "gate"), "guardsmith": ("run", "guardsmith"), "packages": ("run", "packages"),
}  # fmt: skip


def circumstances(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else differs between two reports: names of `CIRCUMSTANCES`, and the levels that similarities are compared with."""
    found = [
        name
        for name, (part, key) in CIRCUMSTANCES.items()
        if before.get(part, {}).get(key) != after.get(part, {}).get(key)
    ]
    return found + (["levels of similarity"] if before.get("calibration") != after.get("calibration") else [])


def compare_two(before: Path, after: Path) -> tuple[Table, dict[str, Any]]:
    """What changed from one verified run (folder or report) to another, as a table and as data.

    Raises:
        UserError: see `read_report`.
    """
    first, second = (read_report(run) for run in (before, after))
    found, also = changes(first, second), circumstances(first, second)
    table = Table(title=f"verdict: {first['verdict']} -> {second['verdict']}", title_justify="left")
    for heading in ("check", "before", "after", "change"):
        table.add_column(heading)
    for change in found:
        table.add_row(change.check, change.before, change.after, f"[{KINDS[change.kind]}]{change.kind}[/]")
    data = {
        "verdict": [first["verdict"], second["verdict"]], "different": also,
        "changes": [change._asdict() for change in found],
    }  # fmt: skip
    return table, data


def compare_runs(runs: Sequence[Path], **asked: float) -> tuple[Table, dict[str, dict[str, Any]]]:
    """`compare` on folders (or reports), which give the columns their names.

    Raises:
        UserError: two runs have one name; see also `read_report` and `compare`.
    """
    names = [run.resolve().name if run.is_dir() else run.stem for run in runs]
    if len(set(names)) < len(names):
        raise UserError("two of the runs have the same name; the columns could not be told apart.")
    return compare({name: read_report(run) for name, run in zip(names, runs, strict=True)}, **asked)
