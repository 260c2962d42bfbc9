"""How Tripwire grows with the number of protected subjects: protection, controls, benign prompts, strangers and cost.

python many.py DATA FOLDER --counts 1 5 20 50      resumes; needs matplotlib; writes docs/results/<name>.json and .svg

Subjects are of the set `testing`, style by style in turn, the same ten controls for every number. Of many protected subjects,
five are attacked (drawn by the seed of the recipe). A row of many.json is one hardened model; those of numbers not asked for
stay as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import strangers
from evaluate import RESULTS

from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.gate.statistics import Interval, interval
from guardsmith.reports.compare import group, group_units, retention
from guardsmith.reports.report import Report

CONTROLS = 10
ATTACKED = 5
ATTACKS = ("dreambooth", "lora-32")


def run(*command: str, ends: tuple[int, ...] = (0,)) -> None:
    """A command of guardsmith, or a script beside this one, with whatever it prints."""
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code not in ends:
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")


def hardened_and_verified(data: Path, place: Path, base_runs: Path, count: int, changes: list[str]) -> Path:
    """Output of one number of subjects; what is there already is not done again."""
    registry, out = place / "registry.yaml", place / "out"
    if not registry.exists():
        run("make_registries.py", str(data), "--set", "testing", "--protected", str(count), "--controls", str(CONTROLS),
            "--folder", str(place))  # fmt: skip
    given = ["--subjects", str(registry), "--recipe", "several-avatars"]
    if not (out / "harden.json").exists():
        resume = ["--resume"] if (out / "settings.json").exists() else []
        sets = [part for change in changes for part in ("--set", change)]
        run("-m", "guardsmith", "harden", *given, "--output", str(out), *sets, *resume)
    known = load_recipe("several-avatars", []).verify.attacks
    attacks = {label: known[label].model_dump() for label in ATTACKS}
    sets = [f"verify.attacks={json.dumps(attacks)}", "verify.evaluation_points=[1]", f"verify.sample={ATTACKED}"]
    asked = [part for change in sets for part in ("--set", change)]
    run("-m", "guardsmith", "verify", str(out), *given, "--base-runs", str(base_runs), *asked, ends=(0, 1, 3))
    return out


def listed(measured: Interval | None) -> list[float] | None:
    """Mean, ends, and how many pictures were scored and how many could not be."""
    return None if measured is None else list(astuple(measured))


def row(out: Path, data: Path, count: int) -> dict[str, Any]:
    """What is told of one number of subjects."""
    report = Report.load(out)
    told = json.loads((out / "harden.json").read_text())
    found: dict[str, Any] = {}
    for attack in ATTACKS:
        protected, controls = group(report, "protected"), group(report, "control")
        after, before = (group_units(report, side, protected, attack, 1) for side in ("hardened", "base"))
        checks = [c for c in report.checks if c.attack == attack and c.name in ("protected", "control learnable")]
        found[attack] = {
            "base": listed(interval(before)), "hardened": listed(interval(after)),
            "control_kept": listed(retention(report, attack, controls)),
            "passed": {name: [sum(c.status == "pass" for c in checks if c.name == name),
                              sum(c.name == name for c in checks)] for name in ("protected", "control learnable")},
        }  # fmt: skip
    shown = strangers.measure(out, data, "testing")
    return {
        "protected": count, "attacked": report.attacked.model_dump(), "attacks": found,
        "utility": report.utility.model_dump(), "verdict": report.verdict, "seconds": told["seconds"],
        "params": told["params"], "model_digest": told["model_digest"],
        "unet_forward_equivalents": told["unet_forward_equivalents"],
        "recognised": shown["protected"], "heldout_taken": shown["heldout_taken"],
    }  # fmt: skip


def _collapsed(told: dict[str, Any]) -> int:
    """Of a row, which has another word for it in older files."""
    utility = told["utility"]
    return int(utility["collapsed"] if "collapsed" in utility else utility["destroyed"])


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Everything against the number of protected subjects."""
    import matplotlib.pyplot as plt

    counts = [told["protected"] for told in rows]
    figure, ((left, right, below), (kid, traits, cost)) = plt.subplots(2, 3, figsize=(14, 7), constrained_layout=True)

    def line(axis: Any, values: list[Any], label: str, scale: float = 1) -> None:
        means = [scale * value[0] for value in values]
        reach = [[scale * (v[0] - v[1]) for v in values], [scale * (v[2] - v[0]) for v in values]]
        axis.errorbar(counts, means, reach, label=label, marker="o", capsize=3)

    for attack in ATTACKS:
        line(left, [told["attacks"][attack]["base"] for told in rows], f"{attack}, base")
        line(left, [told["attacks"][attack]["hardened"] for told in rows], f"{attack}, hardened")
        line(right, [told["attacks"][attack]["control_kept"] for told in rows], attack, 100)
    for style in rows[0]["heldout_taken"]:
        line(below, [told["heldout_taken"][style] for told in rows], style, 100)
    line(kid, [[told["utility"][f"kid_ratio{end}"] for end in ("", "_low", "_high")] for told in rows], "hardened")
    for label, key in (("prompt fidelity", "fidelity_hardened"), ("on the base", "fidelity_base")):
        traits.plot(counts, [100 * told["utility"][key] for told in rows], marker="o", label=label)
    destroyed = [100 * (1 - _collapsed(told) / told["utility"]["n"]) for told in rows]
    traits.plot(counts, destroyed, marker="o", label="pictures not destroyed")
    cost.plot(counts, [told["unet_forward_equivalents"] / told["protected"] for told in rows], marker="o")
    cost.set_yscale("log")
    right.axhline(95, color="grey", linewidth=1, linestyle=":")
    for axis, title in (
        (left, "similarity of protected subjects after an attack"),
        (right, "controls: % of the base's similarity"),
        (below, "unseen strangers taken for a protected subject, %"),
        (kid, "benign prompts: KID over that of two seeds"),
        (traits, "benign prompts, %"),
        (cost, "U-Net forward equivalents per subject"),
    ):
        axis.set(xscale="log", xticks=counts, xticklabels=counts, xlabel="protected subjects", title=title)
        axis.minorticks_off()
        if axis is not cost:
            axis.legend(fontsize="small")
    plt.rcParams["svg.hashsalt"] = "guardsmith"
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run what is asked for, and write everything anew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 5, 20, 50])
    parser.add_argument("--set", action="append", default=[], help="a change to the hardening, for every number")
    parser.add_argument("--name", default="many", help="of the results")
    args = parser.parse_args()
    file = RESULTS / f"{args.name}.json"
    known = {told["protected"]: told for told in json.loads(file.read_text())["rows"]} if file.exists() else {}
    for count in args.counts:
        place = args.folder / str(count)
        place.mkdir(parents=True, exist_ok=True)
        out = hardened_and_verified(args.data, place, args.folder / "base", count, args.set)
        known[count] = row(out, args.data, count)
        rows = [known[number] for number in sorted(known)]
        changes = "".join(f" --set {change}" for change in args.set)
        counts = " ".join(str(number) for number in sorted(known))
        named = "" if args.name == "many" else f" --name {args.name}"
        write_json(file, {"command": f"python many.py DATA FOLDER --counts {counts}{changes}{named}", "rows": rows})
        plot(json.loads(file.read_text())["rows"], RESULTS / f"{args.name}.svg")


if __name__ == "__main__":
    main()
