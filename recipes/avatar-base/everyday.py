"""Everyday use of a hardened model of the embedded base, without the attacks of a whole verification.

python everyday.py MODEL OUTPUT [--result FILE] [--quick]      OUTPUT keeps the pictures; FILE gets the table,
                                                               in which checks of an earlier run with the same settings stay

MODEL is a diffusers folder (`out/model` of a hardening) or builtin:avatar, which is the base against itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guardsmith.config.deployability import DeployabilityLimits
from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.core.progress import quiet_libraries
from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, benign_prompts
from guardsmith.evaluation.deployability import CHECKS, Bench
from guardsmith.evaluation.deployability.bench import attempt
from guardsmith.hardening.record import run_info
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import load_model, weights_digest
from guardsmith.registry.loader import load_registry

REGISTRY = Path(__file__).parent.parent.parent / "registries" / "demo.yaml"


def bench_of(model: str, output: Path, quick: bool) -> tuple[Bench, DeployabilityLimits]:
    """What the checks run on, and their limits: the embedded base and a hardened model of it, with the demo's settings."""
    recipe, base = load_recipe("demo"), load_model("builtin:avatar")
    spec = recipe.verify.deployability
    if quick:
        spec = spec.model_copy(update={"trained": False, "images": 8})
    prompts = [prompt.text for prompt in benign_prompts(base, VERIFICATION_TEMPLATES, 100, recipe.seed + 1)]
    sampling = recipe.sampling
    bench = Bench(
        {"base": base, "hardened": load_model(model)}, prompts, load_judge("avatar"), spec, sampling.steps,
        sampling.guidance, sampling.batch, output, load_registry(REGISTRY).controls, "zwx",
        recipe.verify.attacks["dreambooth"].params,
    )  # fmt: skip
    return bench, recipe.gate.deployability


def run_checks(
    bench: Bench, limits: DeployabilityLimits, names: Sequence[str], done: dict[str, Any], save: Callable[[], None]
) -> None:
    """Run the named checks, one after the other; `done` gets each, and `save` is called then."""
    for name in names:
        if CHECKS[name].trained and not bench.spec.trained:
            continue
        began, lines = time.process_time(), []
        for one in attempt(name, name, "faults", lambda name=name: CHECKS[name].run(bench)):
            status = one.status(limits)
            lines.append(one.model_dump(mode="json", exclude={"check", "pictures"}) | {"status": status})
            print(
                f"{status:12} {name}: {one.case}: {one.sentence()} [{one.low}, {one.high}] {one.error or ''}",
                flush=True,
            )
        done[name] = {"cpu_seconds": round(time.process_time() - began, 1), "cases": lines}
        print(f"{name}: {done[name]['cpu_seconds']} s of one core", flush=True)
        save()


def main() -> None:
    """Run every check, one after the other; say what each measured and how long it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--checks", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    args = parser.parse_args()
    quiet_libraries()
    bench, limits = bench_of(args.model, args.output, args.quick)
    told: dict[str, Any] = {
        "command": "python everyday.py MODEL OUTPUT" + (" --quick" if args.quick else ""),
        "base_digest": weights_digest(bench.models["base"].folder),
        "model_digest": weights_digest(bench.models["hardened"].folder),
        "limits": limits.model_dump(), "spec": bench.spec.model_dump(mode="json"),
    }  # fmt: skip
    done: dict[str, Any] = {}
    if args.result is not None and args.result.exists():
        before = json.loads(args.result.read_text())
        if all(before[key] == value for key, value in told.items()):
            done = before["checks"]

    def save() -> None:
        if args.result is not None:
            write_json(args.result, told | {"checks": done, "run": run_info()})

    run_checks(bench, limits, args.checks, done, save)


if __name__ == "__main__":
    main()
