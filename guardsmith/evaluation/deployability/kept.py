"""The checks of everyday use within a verification: jobs for its workers, whose results are kept and read again.

<root>/deployability/<digest>.json    what one check, or one kind of adapter, measured
<folder of a side>/everyday/          pictures and adapters that depend on that side's model alone; all of the base's, so that
                                      verifications that share `--base-runs` have them once
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors.torch import load_file

from guardsmith.config.deployability import DeployabilitySpec
from guardsmith.core.atomic_io import folder_digest, write_json
from guardsmith.evaluation.deployability import Bench, checks_of, measure, parts_of
from guardsmith.evaluation.deployability.bench import SIDES, Shelf
from guardsmith.evaluation.loaded import BENCH, model_at
from guardsmith.evaluation.preflight import Plan
from guardsmith.gate.deployability import Measurement
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.registry.loader import Subject

LONGEST = ("samplers", "merges", "adapters")
"""Checks that take long, the longest first."""


class Place(NamedTuple):
    """One side's model for another process.

    Attributes:
        place: what `load_model` reads it from.
        source: where it came from, as the user wrote it.
        digest: of its weights.
        folder: where what it draws is kept.
    """

    place: str
    source: str
    digest: str
    folder: str


@dataclass(frozen=True)
class EverydayUse:
    """Everything that decides what the checks measure.

    Attributes:
        models: by side.
        prompts: benign ones; the first are drawn in every setting.
        benign: files of the base's pictures of them from two sets of noise (see `Bench.known`).
        judge: name and model.
        spec: what is checked.
        sampling: steps, guidance and batch.
        root: folder of the verification.
        controls: unprotected subjects.
        identifier: what adapters' makers call them.
        dreambooth: settings of the recipe's DreamBooth.
        seed: of everything that is trained.
        policy: the policy's judge, which the digest stands for too.
    """

    models: dict[str, Place]
    prompts: tuple[str, ...]
    benign: tuple[str, ...]
    judge: tuple[str, str | None]
    spec: DeployabilitySpec
    sampling: dict[str, Any]
    root: str
    controls: tuple[Subject, ...]
    identifier: str
    dreambooth: dict[str, Any]
    seed: int
    policy: dict[str, Any]

    @property
    def file(self) -> Path:
        """Where the measurements are, or will be."""
        digests = [self.models[side].digest for side in self.models]
        controls = [image.sha256 for subject in self.controls[:1] for image in subject.images]
        settings = self.spec.model_dump(mode="json"), self.sampling, self.policy
        key = folder_digest(
            digests, list(self.prompts), settings, controls, self.identifier, self.dreambooth, self.seed
        )
        return Path(self.root) / "deployability" / f"{key}.json"

    def measured(self) -> list[Measurement] | None:
        """What was measured; `None` unless all of it is there with its pictures."""
        try:
            measurements = [Measurement.model_validate(one) for one in json.loads(self.file.read_text())]
        except (OSError, ValueError, ValidationError):
            return None
        whole = all(one.pictures is None or (Path(self.root) / one.pictures).is_file() for one in measurements)
        return measurements if whole else None

    def bench(self) -> Bench:
        """Both models on a bench, loaded."""
        models = {side: _load(place) for side, place in self.models.items()}
        known = [load_file(file)["images"] for file in self.benign]
        steps, guidance, batch = (self.sampling[key] for key in ("steps", "guidance", "batch"))
        shelves = {
            side: Shelf(place.digest, Path(place.folder) / "everyday", everything=side == "base")
            for side, place in self.models.items()
        }
        return Bench(
            models, self.prompts, load_judge(*self.judge), self.spec, steps, guidance, batch, Path(self.root), self.controls,
            self.identifier, self.dreambooth, self.seed, (known[0], known[1]) if len(known) == 2 else None, shelves,
        )  # fmt: skip


@dataclass(frozen=True)
class PlainPictures:
    """Job: pictures of one side that several checks compare others with."""

    use: EverydayUse
    side: str

    def run(self) -> None:
        """Draw them into the side's folder."""
        bench = replace(self.use, benign=()).bench()  # which need not be there yet
        if self.side == "base":
            bench.plain("base", "first")
        bench.plain(self.side)
        if self.side == "base" and "merges" in self.use.spec.checks:
            bench.plain("base", count=bench.reference)

    @property
    def cost(self) -> int:
        """Pictures, roughly."""
        return 100 if self.side == "base" else self.use.spec.images


@dataclass(frozen=True)
class CheckJob:
    """Job: one check, or one kind of adapter."""

    use: EverydayUse

    def run(self) -> None:
        """Measure, and write what was measured; what failed to run is tried again by the next verification."""
        file = self.use.file
        file.parent.mkdir(parents=True, exist_ok=True)
        bench = replace(_bench(self.use), spec=self.use.spec)
        write_json(file, [one.model_dump(mode="json") for one in measure(bench)])


def _bench(use: EverydayUse) -> Bench:
    """The bench of this process: checks that follow each other share what it has loaded and drawn."""
    usual = DeployabilitySpec().model_copy(update={"images": use.spec.images})
    key = str(replace(use, spec=usual).file)
    if key not in BENCH:
        BENCH.clear()
        BENCH[key] = use.bench()
    bench: Bench = BENCH[key]
    return bench


def _load(place: Place) -> DiffusionModel:
    return replace(model_at(place.place), source=place.source)


def everyday_use(plan: Plan, prompts: Sequence[str], benign: Sequence[Path]) -> EverydayUse:
    """What the plan's recipe asks for, as a whole.

    Args:
        plan: of the verification.
        prompts: benign ones.
        benign: files of the base's pictures of them from two sets of noise.
    """
    recipe, spec = plan.recipe, plan.recipe.verify.deployability
    spec = spec.model_copy(update={"images": min(spec.images, len(prompts))})  # every picture has a prompt of its own
    attacks = recipe.verify.attacks.values()
    dreambooth = next((attack.params for attack in attacks if attack.name == "dreambooth"), {})
    models: dict[str, Place] = {
        side: Place(target.model.place, target.model.source, target.digest, str(target.root))
        for side, target in plan.models.items()
    }
    judge = plan.policy.judge
    return EverydayUse(
        models, tuple(prompts), tuple(map(str, benign)), (judge.name, judge.model), spec, recipe.sampling.model_dump(),
        str(plan.root), tuple(plan.registry.controls), recipe.verify.identifiers[0], dict(dreambooth), recipe.verify.seeds[0],
        judge.model_dump(),
    )  # fmt: skip


def parts(use: EverydayUse) -> list[EverydayUse]:
    """The same, in parts that run on their own; one where an earlier version measured all of it."""
    if use.measured() is not None:
        return [use]
    return [replace(use, spec=spec) for spec in parts_of(use.spec)]


def missing_checks(use: EverydayUse) -> list[CheckJob]:
    """Jobs for what was not measured yet, or failed to run, the longest first."""
    jobs = [CheckJob(one) for one in parts(use) if (earlier := one.measured()) is None or any(m.error for m in earlier)]
    names = [*LONGEST, *(name for name in checks_of(use.spec) if name not in LONGEST)]
    return sorted(jobs, key=lambda job: names.index(job.use.spec.checks[0]))


def missing_plain(use: EverydayUse, checks: Sequence[CheckJob]) -> list[PlainPictures]:
    """Jobs for pictures that several of these checks need."""
    return [PlainPictures(use, side) for side in SIDES] if len(checks) > 1 else []


def everyday_measurements(use: EverydayUse) -> list[Measurement]:
    """What the checks measured, in the table's order; a check whose measurements are gone failed to run."""
    measurements = []
    for part in parts(use):
        for name in part.spec.checks[:1]:
            gone = Measurement(check=name, case=name, measure="faults", error="its measurements are not there")
            measurements += part.measured() or [gone]
    return measurements
