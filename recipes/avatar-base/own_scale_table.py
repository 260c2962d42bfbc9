"""The tables of own_scale.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guardsmith.gate.statistics import ratio_interval

NOT_MEASURED = "not measured"
COURSES = {
    "known": "under the identifier and on the pictures of the hardening; `published` after 400 steps",
    "unseen": "under another identifier and on other pictures",
    "control, seen": "on the control, under an identifier of the hardening",
}
LINES = {"similarity": 2, "backdoor": 2, "loss": 2, "gradient": 1, "displacement": 4}
"""What a course shows, and with how many digits."""


def entries(trials: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, results) of every model of a subject that has any."""
    for name in sorted(trials, key=lambda each: (each != "base", each)):
        for steps, entry in trials[name].items():
            if entry["attacks"]:
                yield name if steps == "0" else f"{name}, {steps} steps", entry


def attack_of(entry: dict[str, Any], label: str) -> dict[str, Any] | None:
    """An attack on a model, where it ran; `published` begins as `known` does and goes on."""
    attacks = entry["attacks"]
    result: dict[str, Any] | None = (
        attacks.get("published", attacks.get(label)) if label == "known" else attacks.get(label)
    )
    return result


def last(points: dict[str, Any], at: int | None = None) -> dict[str, Any]:
    """An attack after so many steps, or at its end."""
    result: dict[str, Any] = points.get(str(max(map(int, points)) if at is None else at), {})
    return result


def reached(points: dict[str, Any] | None, at: int | None = None) -> str:
    """Similarity with its interval."""
    found = last(points, at).get("similarity") if points else None
    return "{:z.2f} [{:z.2f}, {:z.2f}]".format(*found) if found else NOT_MEASURED


def kept(points: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Similarity of a control as a share of the base's."""
    found = ratio_interval([last(points)["scores"]], [last(base)["scores"]]) if points and base else None
    return "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * each for each in found.ends)) if found else NOT_MEASURED


def half_way(points: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Steps and displacement at which an attack has half of what it reaches on the base in 400 steps, between two points."""
    if not points or not base:
        return NOT_MEASURED
    level, before = last(base, 400)["similarity"][0] / 2, (0, 0.0, 0.0)
    for steps in sorted(map(int, points)):
        if steps == 0 or "similarity" not in points[str(steps)]:
            continue
        now = (steps, points[str(steps)]["similarity"][0], points[str(steps)]["displacement"])
        if now[1] >= level:
            share = (level - before[1]) / (now[1] - before[1])
            return f"{before[0] + share * (now[0] - before[0]):.0f}, {before[2] + share * (now[2] - before[2]):.4f}"
        before = now
    return f"not in {before[0]}, {before[2]:.4f}"


def row(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(heads: list[str], lines: list[list[str]]) -> list[str]:
    """All of one, with an empty line behind it."""
    return [row(heads), "|---" * len(heads) + "|", *map(row, lines), ""]


def base_table(attacks: dict[str, Any]) -> list[str]:
    """What every attack reaches on the base and how far it moves the weights."""
    lines = [
        [f"`{label}`", reached(points), f"{last(points)['displacement']:.4f}"] for label, points in attacks.items()
    ]
    return table(["attack on the base", "similarity", "displacement"], lines)


def models_table(trials: dict[str, Any]) -> list[str]:
    """What the attacks reach on every model of one subject."""
    base, known_base, lines = trials["base"]["0"]["attacks"], attack_of(trials["base"]["0"], "known"), []
    for name, entry in entries(trials):
        attacks, benign = entry["attacks"], entry.get("benign")
        cells = [name, "0", "1", "100 %", "0 %"]
        if benign:
            cells[1:] = [
                f"{benign['displacement']:.3f}", "{:.1f} [{:.1f}, {:.1f}]".format(*benign["kid_ratio"]),
                f"{100 * benign['fidelity']:.0f} %", f"{100 * benign['collapsed']:.0f} %",
            ]  # fmt: skip
        known = attack_of(entry, "known")
        cells += [
            reached(known, 400),
            half_way(known, known_base),
            reached(attacks.get("published"), 800),
        ]
        unseen = attacks.get("unseen")
        cells += [reached(unseen), half_way(unseen, base["unseen"]), reached(attacks.get("lora"))]
        cells.append(reached(base["control"]) if name == "base" else kept(attacks.get("control"), base["control"]))
        lines.append(cells)
    heads = ["model", "displacement of the hardening", "KID ratio", "fidelity", "collapsed", "`known`",
             "`known`: half-way", "`published`", "`unseen`", "`unseen`: half-way", "`lora`"]  # fmt: skip
    return table([*heads, "`control` (base), keeps"], lines)


def course_table(trials: dict[str, Any], label: str) -> list[str]:
    """Similarity, share of backdoors, loss, gradient and displacement along an attack, on every model of one subject."""
    followed = [(name, points) for name, entry in entries(trials) if (points := attack_of(entry, label))]
    steps = sorted({int(at) for _, points in followed for at in points})
    lines = []
    for name, points in followed:
        for key, digits in LINES.items():
            values = [points.get(str(at), {}).get(key) for at in steps]
            numbers = [value[0] if isinstance(value, list) else value for value in values]
            if any(value is not None for value in values):
                shown = ["" if value is None else f"{value:z.{digits}f}" for value in numbers]
                lines.append([f"{name}: {key}", *shown])
    return table(["after so many steps", *map(str, steps)], lines) if lines else []


def tables(data: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    parts = ["# APDM and PersGuard at their own scale", ""]
    parts += ["What the words mean: [results](README.md#apdm-and-persguard-at-their-own-scale).", ""]
    for style, trials in data["models"].items():
        if not trials.get("base", {}).get("0", {}).get("attacks"):
            continue
        parts += [
            f"## Subject of style {style}",
            "",
            *base_table(trials["base"]["0"]["attacks"]),
            *models_table(trials),
        ]
        for label, meaning in COURSES.items():
            course = course_table(trials, label)
            parts += [f"### `{label}`: {meaning}", "", *course] if course else []
    return "\n".join(parts).rstrip("\n") + "\n"
