"""The checks of everyday use within a verification: on its models, prompts and controls, kept and read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from guardsmith.core.atomic_io import folder_digest, write_json
from guardsmith.evaluation.deployability import Bench, measure
from guardsmith.evaluation.preflight import Plan
from guardsmith.gate.deployability import Measurement
from guardsmith.models.checkpoint import DiffusionModel


def measure_everyday_use(plan: Plan, prompts: Sequence[str], benign: tuple[Tensor, Tensor]) -> list[Measurement]:
    """Every case that the recipe asks for; those that ran are kept in `deployability/<digest>.json` under the plan's root.

    Args:
        plan: of the verification.
        prompts: benign ones; the first are drawn in every setting.
        benign: the base's pictures of them from two sets of noise, float32 (n, 3, h, w) in [-1, 1].
    """
    recipe, spec = plan.recipe, plan.recipe.verify.deployability
    if not spec.checks:
        return []
    spec = spec.model_copy(update={"images": min(spec.images, len(prompts))})  # every picture has a prompt of its own
    attacks = recipe.verify.attacks.values()
    dreambooth = next((attack.params for attack in attacks if attack.name == "dreambooth"), {})
    models: dict[str, DiffusionModel] = {side: target.model for side, target in plan.models.items()}
    bench = Bench(
        models, prompts, plan.judge, spec, recipe.sampling.steps, recipe.sampling.guidance, recipe.sampling.batch, plan.root,
        plan.registry.controls, recipe.verify.identifiers[0], dreambooth, recipe.verify.seeds[0], benign,
    )  # fmt: skip
    digests = [plan.models[side].digest for side in plan.models]
    controls = [image.sha256 for subject in bench.controls[:1] for image in subject.images]
    settings = spec.model_dump(mode="json"), recipe.sampling.model_dump(), plan.policy.judge.model_dump()
    key = folder_digest(digests, list(prompts), settings, controls, bench.identifier, dict(dreambooth), bench.seed)
    file = bench.folder / f"{key}.json"
    cached = _read(file)
    if cached is not None and all(one.pictures is None or (plan.root / one.pictures).is_file() for one in cached):
        return cached
    measurements = measure(bench)
    if not any(one.error for one in measurements):  # what failed to run is tried again the next time
        bench.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, [one.model_dump(mode="json") for one in measurements])
    return measurements


def _read(file: Path) -> list[Measurement] | None:
    try:
        return [Measurement.model_validate(one) for one in json.loads(file.read_text())]
    except (OSError, ValueError, ValidationError):
        return None
