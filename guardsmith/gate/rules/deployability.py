"""Everyday use: what people do with the base has to work with the hardened model; a rule for every check of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from guardsmith.config.deployability import CheckName
from guardsmith.gate.checks import Check
from guardsmith.gate.evidence import Evidence
from guardsmith.gate.rules.rule import Rule

EXPLANATIONS: dict[CheckName, str] = {
    "precision": "pictures in half precision are those in float32, and the files are in the base's precision",
    "controlnet": "the hardened model follows the ControlNets and T2I-Adapters of the base",
    "adapters": "adapters made on the base work on the hardened model, and the other way round",
    "merges": "merges with checkpoints of the same base draw as they should",
    "quantization": "quantized weights draw what the full ones draw",
    "samplers": "usual samplers, scales, pipelines and accelerators draw as on the base",
}


def title_of(name: CheckName) -> str:
    """Title of the rule of a check."""
    return f"everyday use ({name})"


def evaluate(name: CheckName, evidence: Evidence) -> Iterator[Check]:
    """A check for every case that was tried; the case stands where others have their attack."""
    for measurement in evidence.deployability:
        if measurement.check == name:
            yield measurement.check_of(title_of(name), evidence.spec.deployability)


RULES = tuple(
    Rule(f"everyday-use-{name}", title_of(name), explanation, partial(evaluate, name))
    for name, explanation in EXPLANATIONS.items()
)
