"""A table of the attacks of a recipe that have run so far, from their kept results: what each reached on base and hardened model.

python attack_table.py avatar-evasion OUT [BASE_RUNS] --name evasion      writes docs/results/<name>.json

OUT is a folder of `guardsmith verify`, BASE_RUNS its `--base-runs` where it had one. Means come with 95 % intervals over
pictures; what editing the weights cost is there where it was measured. An attack that has not run has no entry.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from evaluate import RESULTS

from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.gate.statistics import interval


def kept(root: Path, label: str) -> dict[str, dict[str, Any]]:
    """Subject -> what an attack reached on it, of all identifiers and seeds together."""
    found: dict[str, dict[str, Any]] = {}
    for subject in sorted(path for path in root.glob("*") if (path / label).is_dir()):
        units, costs = [], []
        for file in sorted((subject / label).glob("*/*/*/scores.json")):
            scores = json.loads(file.read_text())["identity"]
            units.append(scores[max(scores, key=int)])
            attack = json.loads((file.parent / "attack.json").read_text())
            costs += [attack["removal_cost"]] if "removal_cost" in attack else []
        level = interval(units)
        if level is not None:
            found[subject.name] = {
                "mean": round(level.mean, 3), "low": round(level.low, 3), "high": round(level.high, 3), "pictures": level.n
            } | ({"removal_cost": costs[0]} if costs else {})  # fmt: skip
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("base_runs", type=Path, nargs="?")
    parser.add_argument("--name", required=True)
    given = parser.parse_args()
    sides = {"base": given.base_runs or given.out / "verify" / "base", "hardened": given.out / "verify" / "hardened"}
    labels = load_recipe(given.recipe).verify.attacks
    table = {label: {side: kept(root, label) for side, root in sides.items()} for label in labels}
    done = {label: row for label, row in table.items() if any(row.values())}
    command = (
        f"guardsmith verify OUT --recipe {given.recipe}; python attack_table.py {given.recipe} OUT --name {given.name}"
    )
    missing = [label for label in table if label not in done]
    write_json(RESULTS / f"{given.name}.json", {"command": command, "attacks": done, "not_run": missing})
