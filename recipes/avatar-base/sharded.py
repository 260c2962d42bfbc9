"""A large registry in parts: subjects hardened together, one group after the other, or groups apart whose changes are added up.

python sharded.py DATA FOLDER                 resumes; writes docs/results/sharded.json

Subjects are of the set `testing`, style by style in turn, with the settings of `demo` (no bystanders). The ways:

    together     all of them in one run
    in turn      the first group, then all with --add-to and the same number of steps
    added up     every group by itself; the base plus the sum of what they changed (Ilharco et al. 2023,
                 hf.co/papers/2212.04089) and all read-outs, then all of them with --add-to from there and some steps
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from evaluate import RESULTS
from images_table import write_registry
from many import listed, run

from guardsmith.core.atomic_io import write_json
from guardsmith.gate.statistics import interval
from guardsmith.models.checkpoint import load_model
from guardsmith.reports.compare import group, group_units, retention
from guardsmith.reports.report import Report
from guardsmith.training.loop import load_checkpoint, module_tensors, save_checkpoint

ATTACK = "dreambooth"


def hardened(registry: Path, out: Path, *more: str) -> Path:
    """One run, unless it is there."""
    if not (out / "harden.json").exists():
        resume = ["--resume"] if (out / "settings.json").exists() else []
        run(
            "-m",
            "guardsmith",
            "harden",
            "--subjects",
            str(registry),
            "--recipe",
            "demo",
            "--output",
            str(out),
            *more,
            *resume,
        )
    return out


def added_up(parts: list[Path], out: Path) -> Path:
    """A folder that --add-to can begin from: the base and the sum of the changes, and every read-out."""
    if (out / "state.safetensors").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    base = module_tensors(load_model("builtin:avatar").unet, "unet")
    states = [load_checkpoint(part / "state.safetensors")[0] for part in parts]
    whole = {key: value + sum(state[key] - value for state in states) for key, value in base.items()}
    whole["readout.weight"] = torch.cat([state["readout.weight"] for state in states])
    save_checkpoint(out / "state.safetensors", whole, {})
    told = [json.loads((part / "harden.json").read_text()) for part in parts]
    write_json(out / "harden.json", told[0] | {"subjects": [name for each in told for name in each["subjects"]]})
    return out


def row(name: str, out: Path, before: list[Path]) -> dict[str, Any]:
    """What is told of one way."""
    report = Report.load(out)
    protected, controls = group(report, "protected"), group(report, "control")
    runs = [json.loads((place / "harden.json").read_text()) for place in (*before, out)]
    checks = [c for c in report.checks if c.attack == ATTACK and c.name == "protected"]
    return {
        "way": name, "base": listed(interval(group_units(report, "base", protected, ATTACK, 1))),
        "hardened": listed(interval(group_units(report, "hardened", protected, ATTACK, 1))),
        "passed": [sum(c.status == "pass" for c in checks), len(checks)],
        "control_kept": listed(retention(report, ATTACK, controls)), "utility": report.utility.model_dump(),
        "verdict": report.verdict, "seconds": [told["seconds"] for told in runs],
        "unet_forward_equivalents": sum(told["unet_forward_equivalents"] for told in runs),
        "longest_run": max(told["unet_forward_equivalents"] for told in runs),
    }  # fmt: skip


def main() -> None:
    """Harden every way, attack, and write everything down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--each", type=int, default=2, help="subjects in a group")
    parser.add_argument("--steps", type=int, default=80, help="after adding up")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    registry = args.folder / "registry.yaml"
    if not registry.exists():
        run("make_registries.py", str(args.data), "--set", "testing", "--protected", str(args.groups * args.each),
            "--controls", "5", "--folder", str(args.folder))  # fmt: skip
    ids = [each["id"] for each in yaml.safe_load(registry.read_text())["subjects"]]
    groups = [ids[start : start + args.each] for start in range(0, len(ids), args.each)]
    apart = [
        hardened(write_registry(args.folder / f"group-{i}.yaml", names, registry=registry), args.folder / f"group-{i}")
        for i, names in enumerate(groups)
    ]
    ways = {"together": ([], hardened(registry, args.folder / "together"))}
    before = apart[0]
    for i in range(1, len(groups)):
        so_far = write_registry(args.folder / f"up-to-{i}.yaml", ids[: (i + 1) * args.each], registry=registry)
        before = hardened(so_far, args.folder / f"up-to-{i}", "--add-to", str(before))
    ways["in turn"] = ([apart[0], *(args.folder / f"up-to-{i}" for i in range(1, len(groups) - 1))], before)
    start = added_up(apart, args.folder / "added-up-start")
    out = hardened(
        registry, args.folder / "added-up", "--add-to", str(start), "--set", f"method.params.steps={args.steps}"
    )
    ways["added up"] = (apart, out)
    attack = {ATTACK: {"name": ATTACK, "params": {"learning_rate": 3e-4, "steps": 300, "batch_size": 2}}}
    rows = []
    for name, (earlier, place) in ways.items():
        run("-m", "guardsmith", "verify", str(place), "--subjects", str(registry), "--recipe", "demo", "--base-runs",
            str(args.folder / "base"), "--set", f"verify.attacks={json.dumps(attack)}", ends=(0, 1, 3))  # fmt: skip
        rows.append(row(name, place, earlier))
    told = f"python sharded.py DATA FOLDER --groups {args.groups} --each {args.each} --steps {args.steps}"
    write_json(RESULTS / "sharded.json", {"command": told, "groups": groups, "rows": rows})


if __name__ == "__main__":
    main()
