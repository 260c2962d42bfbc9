"""The Python interface: what the command line does, as functions that take and return diffusers pipelines.

    import guardsmith as gs

    registry = gs.load_registry("registry.yaml")
    hardened = gs.harden("builtin:avatar", registry, method="tripwire", output="out")
    report = gs.verify(hardened, registry)
    print(report.verdict)
    pipe = hardened.to_pipeline(torch_dtype=torch.float16)

Errors are those of the command line: `UserError` for bad input, `RunFailed` for a run that could not finish.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guardsmith.core.errors import UserError

if TYPE_CHECKING:
    from guardsmith.config.recipe import Recipe
    from guardsmith.gate.policy import Policy
    from guardsmith.registry.loader import Registry
    from guardsmith.release.hub import Published
    from guardsmith.reports.report import Report

Precision = Literal["float32", "bfloat16", "float16"]


def load_registry(path: str | Path, *, today: date | None = None) -> Registry:
    """Read and check a registry file: keys, pictures, hashes, splits and consents.

    Args:
        path: YAML file.
        today: the day on which consents have to hold; by default the present day.

    Raises:
        UserError: every problem of the file, one line each, as `FILE:LINE: sentence`.
    """
    from guardsmith.registry.loader import load_registry as load

    return load(path, today=today)


def load_recipe(name: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        name: name of a shipped recipe (`guardsmith list recipes`) or a YAML file.
        changes: dotted key -> value, applied before the check, e.g. `{"method.params.steps": 100}`.

    Raises:
        UserError: there is no such recipe, or it has problems; every problem on one line.
    """
    from guardsmith.config.loading import load_recipe as load

    return load(str(name), [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()])


@dataclass(frozen=True)
class Hardened:
    """A hardened model on disk.

    Attributes:
        output: folder of the run: `model/` (a diffusers folder), `harden.json`, and `verify/` after `verify`.
        record: what `harden.json` says: base, digests, method, parameters, cost, losses.
    """

    output: Path
    record: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The diffusers folder, safetensors only."""
        return self.output / "model"

    def to_pipeline(self, **options: Any) -> Any:
        """The model as a diffusers pipeline.

        Args:
            options: arguments of `DiffusionPipeline.from_pretrained`, e.g. `torch_dtype=torch.float16`.
        """
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(self.model, use_safetensors=True, **options)


def load_hardened(output: str | Path) -> Hardened:
    """An earlier hardening.

    Args:
        output: the folder that `harden` or `guardsmith harden` wrote.

    Raises:
        UserError: there is no finished hardening in it.
    """
    from guardsmith.hardening.record import read_hardening

    folder = Path(output)
    if not (folder / "harden.json").is_file() or not (folder / "model").is_dir():
        raise UserError(f"{folder} holds no finished hardening (no harden.json and model/); run gs.harden first.")
    return Hardened(folder, read_hardening(folder / "harden.json"))


def harden(
    base: Any,
    registry: Registry,
    *,
    method: str | None = None,
    params: Mapping[str, Any] | None = None,
    recipe: Recipe | str | Path | None = None,
    output: str | Path = "out",
    seed: int | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    deterministic: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report_to: Sequence[str] = (),
) -> Hardened:
    """Harden a base model on the subjects of a registry.

    Args:
        base: `builtin:avatar`, a diffusers folder, a Hub id (`org/name`), or a diffusers pipeline, which is saved to
            `OUTPUT-base` first so that the run can be resumed and verified.
        registry: from `load_registry`.
        method: hardening method (`guardsmith list methods`); by default the recipe's. Off the embedded base there is no default:
            a method or a recipe has to be named.
        params: the method's parameters; the others are the recipe's.
        recipe: name, file, or from `load_recipe`; by default the one that fits base and method.
        output: folder to write.
        seed: of everything random.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`; by default an accelerator if there is one.
        precision: how products are computed; weights and optimizer stay float32.
        deterministic: the same bits on any number of cores, slower.
        resume: go on with an unfinished run in `output`.
        overwrite: delete an earlier run in `output`.
        report_to: trackers of the losses, e.g. `["tensorboard"]`.

    Raises:
        UserError: bad input; one sentence says what to do.
        RunFailed: the training diverged, memory or disk ran out; `resume` goes on from the last checkpoint.
    """
    from guardsmith.config.loading import choose_recipe
    from guardsmith.core.console import warn
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.forecast import before_hardening
    from guardsmith.hardening.pipeline import harden as run
    from guardsmith.hardening.record import wrecked_sentence

    folder = Path(output)
    quiet_libraries()
    with _computing(device, deterministic):
        place = base if isinstance(base, str) else str(_saved(base, folder))
        changes = {"method.name": method, "seed": seed, "compute.precision": precision}
        changes |= {f"method.params.{key}": value for key, value in (params or {}).items()}
        chosen = choose_recipe(recipe, place, {key: value for key, value in changes.items() if value is not None})
        check = before_hardening(registry, chosen, folder, verifies=False)
        record = run(registry, chosen, folder, resume=resume, overwrite=overwrite, report_to=report_to, check=check)
        if sentence := wrecked_sentence(record):
            warn(f"{folder}: {sentence}")
    return Hardened(folder, record)


def verify(
    model: Any,
    registry: Registry,
    *,
    base: Any = None,
    recipe: Recipe | str | Path | None = None,
    policy: Policy | str | Path | None = None,
    output: str | Path | None = None,
    budget: str | None = None,
    base_runs: str | Path | None = None,
    workers: int | None = None,
    device: str | None = None,
    deterministic: bool | None = None,
    include_images: bool = False,
) -> Report:
    """Attack base and hardened model, judge, and write the report to `OUTPUT/verify`.

    Args:
        model: from `harden` or `load_hardened`; or any checkpoint as a folder, a Hub id or a diffusers pipeline.
        registry: the one that the model was hardened on.
        base: what any other checkpoint is compared with; a `Hardened` knows its own.
        recipe: attacks and images; by default the one that the model was hardened with.
        policy: rules and levels of the gate (`guardsmith policy`).
        output: where the report goes; by default the folder of the hardening.
        budget: `quick`, `standard` or `audit`.
        base_runs: folder of the attacks on the base, which several verifications can share.
        workers: attacks that run at the same time.
        device: see `harden`.
        deterministic: see `harden`.
        include_images: put pictures of real persons into report.html too.

    Returns:
        The report; `verdict` is `pass`, `fail` or `inconclusive`.

    Raises:
        UserError: bad input; one sentence says what to do.
        RunFailed: a worker was killed, memory or disk ran out; calling again goes on.
    """
    from guardsmith.config.choosing import is_embedded
    from guardsmith.config.loading import budget_changes, choose_recipe
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.pipeline import verify as run
    from guardsmith.gate.policy import load_policy
    from guardsmith.hardening.record import recorded_recipe

    known = isinstance(model, Hardened)
    if known and base is not None:
        raise UserError("base= belongs to a checkpoint made elsewhere; a hardening's own base is on record")
    if not known and (base is None or output is None):
        raise UserError("a checkpoint made elsewhere needs base= to compare it with, and output= for the report")
    folder = Path(model.output if output is None else output)
    changes = budget_changes(budget)
    quiet_libraries()
    with _computing(device, deterministic):
        if known:
            source, place = None, None
            recipe = recorded_recipe(model.record) if recipe is None else recipe
            if recipe is None and not is_embedded(model.record["base"]):
                raise UserError("this hardening is of an earlier version and names no recipe; give recipe=")
        else:
            source = model if isinstance(model, str | Path) else _saved(model, folder, "model")
            place = base if isinstance(base, str) else str(_saved(base, folder))
        chosen = choose_recipe(recipe, place, changes)
        rules = load_policy(Path(policy)) if isinstance(policy, str | Path) else policy
        return run(
            registry, chosen, folder, model=None if source is None else str(source), base_runs=_path(base_runs),
            workers=workers, policy=rules, include_images=include_images, quiet=True,
        )  # fmt: skip


def publish(
    hardened: Hardened, registry: Registry, repo_id: str, *, contact: str, today: date | None = None, **options: Any
) -> Published:
    """Upload a verified model to the Hugging Face Hub, with a model card that carries the evidence.

    Args:
        hardened: from `harden` or `load_hardened`, verified with verdict `pass`.
        registry: the one that was verified.
        repo_id: `organisation/name`.
        contact: whom to write to, for the card.
        today: the day on which consents have to hold; by default the present day.
        options: see `guardsmith.release.publish.publish`: `licence`, `force`, `sign_key`, `dry_run`, `private`, ...

    Raises:
        Refused: the verdict is not `pass`, the model or the registry was changed since, or a consent has expired.
        UserError: there is no report, the licence is unknown, the Hub refuses name or token.
        RunFailed: the Hub cannot be reached.
    """
    from guardsmith.registry.loader import present_day
    from guardsmith.release.publish import publish as run

    return run(hardened.output, registry, repo_id, today=today or present_day(), contact=contact, **options)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _saved(pipeline: Any, output: Path, what: str = "base") -> Path:
    """A pipeline as a diffusers folder beside the output; one of the same weights that is there already stays.

    Raises:
        UserError: it is no pipeline, or another model is in that folder.
    """
    from guardsmith.core.atomic_io import whole_folder
    from guardsmith.models.checkpoint import weights_digest

    if not hasattr(pipeline, "save_pretrained"):
        raise UserError(f"a {type(pipeline).__name__} is no model; give a folder, a Hub id or a diffusers pipeline")
    folder = output.with_name(f"{output.name}-{what}")
    fresh = folder.with_name(f"{folder.name}-new")
    with whole_folder(fresh) as place:
        pipeline.save_pretrained(place, safe_serialization=True)
    try:
        if not folder.exists():
            fresh.rename(folder)
        elif weights_digest(folder) != weights_digest(fresh):
            raise UserError(f"{folder} holds another model; delete it, or name another output folder.")
    finally:
        if fresh.exists():
            import shutil

            shutil.rmtree(fresh)
    return folder


@contextmanager
def _computing(device: str | None, deterministic: bool | None) -> Iterator[None]:
    """Device and determinism for one call; worker processes inherit them through the environment."""
    import torch

    from guardsmith.runtime.device import DETERMINISTIC, VARIABLE

    wanted = {VARIABLE: device, DETERMINISTIC: None if deterministic is None else str(int(deterministic))}
    before = {name: os.environ.get(name) for name in wanted}
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.update({name: value for name, value in wanted.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
