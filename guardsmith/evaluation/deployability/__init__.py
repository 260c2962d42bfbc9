"""Deployability: does everything that people do with the base still work with the hardened model?

Every check compares both models side by side, the same prompts from the same noise, drawn by diffusers' own pipelines, and
gives typed `Measurement`s (`gate.deployability`), which a rule of the gate compares with the policy's limits. What raises is a
case that failed to run. Adding a check: a file with `run(bench)`, and a line in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from guardsmith.config.deployability import CheckName, DeployabilitySpec
from guardsmith.evaluation.deployability import adapters, controlnet, merges, precision, quantization, samplers
from guardsmith.evaluation.deployability.bench import Bench, attempt
from guardsmith.gate.deployability import Measurement


class DeployabilityCheck(NamedTuple):
    """One entry of the table.

    Attributes:
        run: the bench -> what was measured, one record for every case.
        title: what it asks, in words.
        trained: whether all of it needs something to be trained first, so that `trained: false` leaves it out.
    """

    run: Callable[[Bench], list[Measurement]]
    title: str
    trained: bool = False


CHECKS: dict[CheckName, DeployabilityCheck] = {
    "precision": DeployabilityCheck(precision.run, "pictures in half precision are the pictures in float32"),
    "controlnet": DeployabilityCheck(controlnet.run, "ControlNets and T2I-Adapters of the base steer it"),
    "adapters": DeployabilityCheck(
        adapters.run, "adapters of the base work on it, and its own on the base", trained=True
    ),
    "merges": DeployabilityCheck(merges.run, "merges with checkpoints of the same base draw"),
    "quantization": DeployabilityCheck(quantization.run, "quantized weights draw what the full ones draw"),
    "samplers": DeployabilityCheck(samplers.run, "usual samplers, scales, pipelines and accelerators draw"),
}


def checks_of(spec: DeployabilitySpec) -> list[CheckName]:
    """The checks that a specification names, in the table's order."""
    return [name for name, check in CHECKS.items() if name in spec.checks and (spec.trained or not check.trained)]


def measure(bench: Bench) -> list[Measurement]:
    """Every check that the bench's specification names, in the table's order."""
    measurements: list[Measurement] = []
    for name in checks_of(bench.spec):
        results = attempt(name, name, "faults", lambda name=name: CHECKS[name].run(bench))  # type: ignore[misc]
        measurements += results or [Measurement(check=name, case=name, measure="faults", error="nothing was measured")]
    return measurements


def parts_of(spec: DeployabilitySpec) -> list[DeployabilitySpec]:
    """What a specification asks for as specifications of one check each, or of one kind of adapter, in the table's order."""
    parts = []
    for name in checks_of(spec):
        one = spec.model_copy(update={"checks": (name,)})
        if name == "adapters" and spec.adapters:
            parts += [one.model_copy(update={"adapters": {kind: own}}) for kind, own in spec.adapters.items()]
        else:
            parts.append(one)
    return parts


__all__ = ["CHECKS", "Bench", "DeployabilityCheck", "Measurement", "checks_of", "measure", "parts_of"]
