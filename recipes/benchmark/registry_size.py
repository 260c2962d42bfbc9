"""What a registry of thousands costs, from `check` to the report of its verification.

node recipes/avatar-base/render.mjs DATA crowd                       13,000 identities of five styles, eight views each
python recipes/benchmark/registry_size.py DATA FOLDER --counts 10 100 1000 --parts check screen plan report harden

Every part is a process of its own; its processor time (user and system, one thread) and its peak memory count, because the wall
clock of a shared machine says little. Rows and parts that were measured before stay in docs/results/registry-size.json.

    check    `guardsmith check`
    screen   `guardsmith screen` of uploads of one unseen picture: one without a kept index, then 50 of strangers, 50 of subjects
    plan     `guardsmith harden --dry-run`
    report   judging and writing a verification of at most 300 protected subjects (`verify.sample`) whose SCORES ARE MADE UP
    harden   Tripwire with a few steps, killed (SIGKILL) after its first checkpoint and resumed. THE MODEL PROTECTS NOBODY
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import large_world

from guardsmith.core.atomic_io import write_json

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "results" / "registry-size.json"
UPLOADS = 50
SAMPLE = 300  # protected subjects attacked: if all hold, at most 1 % of the others do not (rule of three, 95 %)
FEW = {
    "groups": 12, "outer_groups": 4, "trunk": "builtin:avatar", "early_steps": [], "copies": 4, "transformed": 4,
    "transformed_others": 0.1, "steps": 220, "class_images": 16, "benign_images": 16, "positives": 16, "negatives": 32,
}  # fmt: skip
"""Parameters of the hardening: enough to go through everything once."""


def run(*command: str, ends: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A command through peak.py: `seconds` of processor time, `mib` at its peak, `out`, what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in ends:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}")
    out, _, peak = done.stdout.rstrip("\n").rpartition("\n")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(used, 2), "mib": round(int(peak) / 2**20), "out": out}


def guardsmith(*command: str, ends: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A command of guardsmith."""
    return run(str(HERE / "peak.py"), *command, ends=ends)


def cost(measured: dict[str, Any]) -> dict[str, Any]:
    """Processor seconds and memory alone."""
    return {key: measured[key] for key in ("seconds", "mib")}


def measure_check(registry: Path) -> dict[str, Any]:
    """The quicker of two."""
    return cost(min((guardsmith("check", str(registry)) for _ in range(2)), key=lambda each: each["seconds"]))


def measure_screen(world: large_world.World, folder: Path, registry: Path, count: int) -> dict[str, Any]:
    """Making the index, and then uploads of strangers and of protected subjects."""
    shutil.rmtree(folder / "uploads", ignore_errors=True)
    places = {
        "strangers": world.people[-large_world.STRANGERS :],
        "protected": random.Random(0).sample(world.people[:count], min(UPLOADS, count)),
    }
    index, figures = folder / f"index-{count}", {}
    shutil.rmtree(index, ignore_errors=True)
    given = ["--subjects", str(registry), "--index", str(index), "--json"]
    for name, people in places.items():
        uploads = large_world.write_uploads(world, folder / "uploads" / name, people)
        if not figures:
            one = next(uploads.iterdir())
            figures["first"] = cost(guardsmith("screen", str(one), *given, ends=(0, 1, 3)))
            figures["one"] = cost(guardsmith("screen", str(one), *given, ends=(0, 1, 3)))
        done = guardsmith("screen", str(uploads), "--batch", *given, ends=(0, 1, 3))
        report = json.loads(done["out"])
        figures[name] = cost(done) | {
            "uploads": len(report["uploads"]), "seen": report["counts"]["seen"], "undecided": report["counts"]["undecided"],
            "stated_rate": report["uploads"][0]["false_alarm_rate"],
        }  # fmt: skip
    return figures


def harden_command(registry: Path, output: Path) -> list[str]:
    """Tripwire with few steps."""
    sets = [f"method.params={json.dumps(FEW)}", "probe.times=0", "negatives=null"]
    given = ["harden", "--recipe", "demo", "--subjects", str(registry), "--output", str(output)]
    return [*given, *(part for change in sets for part in ("--set", change))]


def measure_plan(folder: Path, registry: Path, count: int) -> dict[str, Any]:
    """The plan of the same hardening."""
    done = guardsmith(*harden_command(registry, folder / f"none-{count}"), "--dry-run", "--json")
    planned = json.loads(done["out"])
    return cost(done) | {"planned_gib": planned["memory_gib"], "planned_hours": planned["hours"]}


def measure_harden(folder: Path, registry: Path, count: int) -> dict[str, Any]:
    """A hardening that is killed after its first checkpoint and resumed."""
    output = folder / f"out-{count}"
    shutil.rmtree(output, ignore_errors=True)
    command = harden_command(registry, output)
    child = subprocess.Popen([sys.executable, "-m", "guardsmith", *command], env=os.environ | {"OMP_NUM_THREADS": "1"})
    saved = output / "checkpoints" / "last.safetensors"
    while not saved.exists():
        if child.poll() is not None:
            raise SystemExit("the hardening ended before its first checkpoint")
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = guardsmith(*command, "--resume")
    record = json.loads((output / "harden.json").read_text())
    return cost(done) | {
        "resumed_after": record["resumed_after"], "steps": len(record["history"]), "subjects": len(record["subjects"]),
        "state_mib": round((output / "state.safetensors").stat().st_size / 2**20, 2),
        "model_mib": round(sum(f.stat().st_size for f in (output / "model").rglob("*") if f.is_file()) / 2**20, 1),
        "params": FEW,
    }  # fmt: skip


def measure_report(folder: Path, registry: Path, count: int) -> dict[str, Any]:
    """Judging, report, page, grid and exports, in a process that has made the scores up (`made_up.py`)."""
    output = folder / f"verify-{count}"
    shutil.rmtree(output, ignore_errors=True)
    done = run(str(HERE / "made_up.py"), str(registry), str(output), str(SAMPLE))
    figures: dict[str, Any] = json.loads(done["out"].rpartition("\n")[2])
    sizes = {
        name: round((output / "verify" / name).stat().st_size / 1e6, 2)
        for name in ("report.json", "report.html", "grid.png", "public/report.html", "report.junit.xml", "report.sarif")
    }
    return figures | {"mib": done["mib"], "megabytes": sizes}


def measure(part: str, world: large_world.World, folder: Path, registry: Path, count: int) -> dict[str, Any]:
    """One part of one row."""
    if part == "check":
        return measure_check(registry)
    if part == "screen":
        return measure_screen(world, folder, registry, count)
    return {"plan": measure_plan, "report": measure_report, "harden": measure_harden}[part](folder, registry, count)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--parts", nargs="+", default=["check", "screen", "plan", "report", "harden"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    figures |= {
        "command": "python recipes/benchmark/registry_size.py DATA FOLDER",
        "pictures_a_subject": sum(large_world.SPLITS.values()), "controls": large_world.CONTROLS,
    }  # fmt: skip
    for count in args.counts:
        world = large_world.load_world(args.data, count)
        registry = large_world.write_registry(world, args.folder, count)
        row = figures["rows"].setdefault(str(count), {}) | {"left_out": world.left_out}
        figures["rows"][str(count)] = row
        for part in args.parts:
            row[part] = measure(part, world, args.folder, registry, count)
            print(count, part, json.dumps(row[part]), file=sys.stderr, flush=True)
            write_json(RESULTS, figures)


if __name__ == "__main__":
    main()
