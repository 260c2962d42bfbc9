"""What each method needs until the gate says that a subject is protected, from committed records.

python recipes/benchmark/protection.py       writes docs/results/protection-cost.json, and prints it as a table

One protected subject or five of the embedded base, DreamBooth and LoRA of rank 4 by an attacker who does not know the method:
U-Net forward equivalents and seconds of the hardening as its record says, whether the lines "protected" of the gate hold, and the
verdict, which everyday use decides as well. The unit is one run of APDM as published: 800 paths of 20 steps, 17 forward
equivalents a step, and one whose result nothing uses. Tripwire's recogniser is no U-Net: its training is counted in forward
equivalents by its FLOPs, and the preparation of the trunk, which serves every registry on a base, is counted apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.methods import METHODS
from guardsmith.methods.apdm import ApdmConfig
from guardsmith.methods.tripwire.layout import layout_of
from guardsmith.methods.tripwire.recogniser import Drift, Recogniser
from guardsmith.methods.tripwire.training import highest
from guardsmith.methods.tripwire.trunk import rows_predicted
from guardsmith.models.checkpoint import load_model
from guardsmith.training.loop import generator

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TRUNK = Path(__file__).parents[1] / "tripwire" / "results"
TRUNKS = ("trunk-12-4-1000", "trunk-12-4-2000", "trunk-12-4-2000-5000")
"""The records of the shipped trunk: each preparation went on from the one before."""
ROWS = 8  # of each
RUNS = {
    "Tripwire": "tripwire-demo-report", "IMMA": "imma-avatar-report", "PersGuard": "persguard-avatar-report",
    "APDM": "apdm-avatar-report", "IMMA, five subjects": "matrix-imma-report",
    "PersGuard, five subjects": "matrix-persguard-report", "APDM, five subjects": "matrix-apdm-report",
}  # fmt: skip


def published_apdm() -> int:
    """Forward equivalents of one subject's hardening by APDM as its authors published it."""
    config = ApdmConfig()
    return METHODS["apdm"].cost(config, ["person"]) + config.outer_steps * config.inner_steps


def recogniser_equivalents() -> dict[str, float]:
    """FLOPs of a step of the demo's recogniser over those of one row through the U-Net, and that for all of its steps."""
    model, recipe = load_model("builtin:avatar"), load_recipe("demo")
    config = METHODS["tripwire"].config(**recipe.method.params)
    side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
    recogniser = Recogniser(model.unet, layout_of(model.unet, config.groups, config.outer_groups))
    count = config.positives + config.negatives + config.negatives // 4  # a quarter more are half-finished pictures
    rows = torch.randn((count, channels, side, side), generator=generator(0))
    context = torch.zeros(1, model.tokenizer.model_max_length, model.unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as step:
        scores, constancy = recogniser.scores_and_constancy(
            rows, Drift(config.drift, config.norm_drift, rows, generator(1))
        )
        (highest(scores).mean() + constancy).backward()
    with FlopCounterMode(display=False) as row, torch.no_grad():
        model.unet(rows[:1], torch.zeros(1, dtype=torch.long), context, return_dict=False)
    of_step = step.get_total_flops() / row.get_total_flops()
    return {"of_a_step": of_step, "steps": config.steps, "together": of_step * config.steps}


def trunk() -> dict[str, Any]:
    """Forward equivalents and seconds of the shipped trunk, as its records have them."""
    steps, seconds = [], 0.0
    for name in TRUNKS:
        record = json.loads((TRUNK / f"{name}.json").read_text())
        steps.append(int(record["command"].partition("--steps ")[2].split()[0]))
        seconds += record["seconds"]
    rows = [rows_predicted(count, ROWS) for count in steps]
    return {
        "steps": sum(steps), "rows": ROWS, "seconds": seconds,
        "forward_equivalents": sum(forward + 2 * backward for forward, backward in rows),
    }  # fmt: skip


def of_report(name: str) -> dict[str, Any]:
    """Cost and result of a hardening that was verified."""
    report = json.loads((RESULTS / f"{name}.json").read_text())
    about, lines = report["hardening"], [check for check in report["checks"] if check["name"] == "protected"]
    equivalents = about.get("unet_forward_equivalents")
    if equivalents is None:  # its record is older than the count
        method = METHODS[about["method"]]
        known = {key: value for key, value in about["params"].items() if key in method.config.model_fields}
        nouns = [subject["class_noun"] for subject in report["subjects"] if subject["role"] == "protected"]
        equivalents = method.cost(method.config(**known), nouns)
    return {
        "report": f"{name}.json", "forward_equivalents": equivalents, "seconds": about["seconds"],
        "protected": sum(line["status"] == "pass" for line in lines), "of": len(lines), "verdict": report["verdict"],
    }  # fmt: skip


def own_scale() -> dict[str, dict[str, Any]]:
    """APDM and PersGuard in many steps, under the smallest attack that personalizes the base (own-scale.md)."""
    costs = {}
    models = json.loads((RESULTS / "own-scale.json").read_text())["models"]["avataaars"]
    for name, steps in (("apdm", "400"), ("persguard, target", "300")):
        about = models[name][steps]
        method = METHODS[name.partition(",")[0]]
        known = {key: value for key, value in about["hardening"]["params"].items() if key in method.config.model_fields}
        reached = about["attacks"]["unseen"]["400"]["similarity"]
        label = "APDM, 400 paths" if name == "apdm" else "PersGuard, 300 steps"
        costs[label] = {
            "report": "own-scale.json", "forward_equivalents": method.cost(method.config(**known), ["person"]),
            "seconds": None, "reached": reached[0],
            "reached_of_base": models["base"]["0"]["attacks"]["unseen"]["400"]["similarity"][0],
        }  # fmt: skip
    return costs


def run() -> dict[str, Any]:
    """All of it; see the module."""
    unit, prepared, recogniser = published_apdm(), trunk(), recogniser_equivalents()
    lines: dict[str, dict[str, Any]] = {name: of_report(report) for name, report in RUNS.items()} | own_scale()
    own = lines["Tripwire"]
    with_recogniser = own["forward_equivalents"] + recogniser["together"]
    lines["Tripwire, with its recogniser"] = own | {"forward_equivalents": with_recogniser}
    whole = with_recogniser + prepared["forward_equivalents"]
    lines["Tripwire, with recogniser and trunk"] = own | {
        "forward_equivalents": whole, "seconds": own["seconds"] + prepared["seconds"]
    }  # fmt: skip
    for line in lines.values():
        line["of_published_apdm"] = line["forward_equivalents"] / unit
    return {
        "command": "python recipes/benchmark/protection.py", "published_apdm": unit, "trunk": prepared,
        "recogniser": recogniser, "methods": lines,
        "at_most_a_hundredth": lines["Tripwire"]["of_published_apdm"] <= 0.01,
    }  # fmt: skip


def table(costs: dict[str, Any]) -> str:
    """As Markdown, ascending by cost."""
    lines = [
        "| | forward equivalents | of APDM as published | seconds | protected | verdict |", "|---|---|---|---|---|---|"
    ]  # fmt: skip
    for name, row in sorted(costs["methods"].items(), key=lambda item: item[1]["forward_equivalents"]):
        holds = f"{row['protected']} of {row['of']}" if "protected" in row else "no"
        if "reached" in row:
            holds = f"no: {row['reached']:.2f} of the base's {row['reached_of_base']:.2f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:,.0f}"
        lines.append(
            f"| {name} | {row['forward_equivalents']:,.0f} | {100 * row['of_published_apdm']:.3g} % | {seconds} | {holds} "
            f"| {row.get('verdict', '')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    result = run()
    write_json(RESULTS / "protection-cost.json", result)
    print(table(result))
