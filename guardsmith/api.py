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

    Returns:
        The registry, with absolute paths and the SHA-256 of every picture.

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
        UserError: there is no such recipe, or it has problems, one a line.
    """
    from guardsmith.config.loading import load_recipe as load
    from guardsmith.config.problems import as_changes

    return load(str(name), as_changes(changes or {}))


@dataclass(frozen=True)
class Hardened:
    """A hardened model on disk, as `harden` and `load_hardened` return it.

    Attributes:
        output: folder of the run: `model/` (a diffusers folder), `harden.json`, and `verify/` after `verify`.
        record: content of `harden.json`: base, digests, method, parameters, seed, losses, and the cost
            in seconds and in U-Net forward equivalents.
    """

    output: Path
    record: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The diffusers folder, safetensors only."""
        return self.output / "model"

    def to_pipeline(self, **options: Any) -> Any:
        """Load the model as a diffusers pipeline, on the CPU and in the stored precision unless the options say otherwise.

        Args:
            options: arguments of `DiffusionPipeline.from_pretrained`, e.g. `torch_dtype=torch.bfloat16`.

        Returns:
            The pipeline of the base's family, e.g. `StableDiffusionPipeline`.
        """
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(self.model, use_safetensors=True, **options)


def load_hardened(output: str | Path) -> Hardened:
    """Open the output folder of an earlier hardening.

    Args:
        output: the folder that `harden` or `guardsmith harden` wrote.

    Raises:
        UserError: there is no finished hardening in it, or its `harden.json` is damaged.
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
        params: the method's parameters, e.g. `{"steps": 100}`; the others are the recipe's.
        recipe: name, file, or from `load_recipe`; by default the one that fits base and method.
        output: folder to write.
        seed: of everything random; by default the recipe's.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`; by default an accelerator if there is one.
        precision: how the denoiser computes during training (autocast); weights, gradients and optimizer stay float32.
        deterministic: bit-identical results on any number of cores of one kind of machine, slower.
        resume: continue an unfinished run in `output`; it ends with the weights of an unbroken one.
        overwrite: delete an earlier run in `output`.
        report_to: trackers of losses and settings, e.g. `["tensorboard"]`.

    Returns:
        The hardened model. If its loss on class pictures ended above ten times the base's, a warning says so.

    Raises:
        UserError: bad input; the message says in one sentence what to do.
        RunFailed: the training diverged, or memory or disk ran out; with `resume` it continues from the last checkpoint.
    """
    from guardsmith.config.loading import choose_recipe
    from guardsmith.core.console import warn
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.forecast import before_hardening
    from guardsmith.hardening.pipeline import harden as run
    from guardsmith.hardening.record import wrecked_sentence

    folder = Path(output)
    quiet_libraries()
    with _runtime_settings(device, deterministic):
        place = base if isinstance(base, str) else str(_saved(base, folder))
        changes = {"method.name": method, "seed": seed, "compute.precision": precision}
        changes |= {f"method.params.{key}": value for key, value in (params or {}).items()}
        settings = choose_recipe(recipe, place, {key: value for key, value in changes.items() if value is not None})
        check = before_hardening(registry, settings, folder, verifies=False)
        record = run(registry, settings, folder, resume=resume, overwrite=overwrite, report_to=report_to, check=check)
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
        recipe: name, file, or from `load_recipe`: its attacks, pictures and rules count; by default the one that the model was
            hardened with.
        policy: rules and levels of the gate, a file (`guardsmith policy`) or a `Policy`; by default the recipe's rules.
        output: folder in which `verify/` is written; by default that of the hardening.
        budget: how much is tried: `quick`, `standard` (the recipe's values) or `audit`.
        base_runs: folder of the attacks on the base, which several verifications can share.
        workers: number of attacks that run at the same time; by default one per core, or one on an accelerator.
        device: see `harden`.
        deterministic: see `harden`.
        include_images: put pictures of real persons into report.html too.

    Returns:
        The report; `verdict` is `pass`, `fail` or `inconclusive`, `exit_code` 0, 1 or 3. Similarities are cosines
            in [-1, 1].

    Raises:
        UserError: bad input; the message says in one sentence what to do.
        RunFailed: a worker was killed, or memory or disk ran out; the same call continues with what is missing.
    """
    from guardsmith.config.choosing import is_embedded
    from guardsmith.config.loading import budget_changes, choose_recipe
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.pipeline import verify as run
    from guardsmith.gate.policy import load_policy
    from guardsmith.hardening.record import recorded_recipe

    is_hardened = isinstance(model, Hardened)
    if is_hardened and base is not None:
        raise UserError("base= belongs to a checkpoint made elsewhere; a hardening's own base is on record")
    if not is_hardened and (base is None or output is None):
        raise UserError("a checkpoint made elsewhere needs base= to compare it with, and output= for the report")
    folder = Path(model.output if output is None else output)
    changes = budget_changes(budget)
    quiet_libraries()
    with _runtime_settings(device, deterministic):
        if is_hardened:
            source, place = None, None
            recipe = recorded_recipe(model.record) if recipe is None else recipe
            if recipe is None and not is_embedded(model.record["base"]):
                raise UserError("this hardening is of an earlier version and names no recipe; give recipe=")
        else:
            source = model if isinstance(model, str | Path) else _saved(model, folder, "model")
            place = base if isinstance(base, str) else str(_saved(base, folder))
        settings = choose_recipe(recipe, place, changes)
        rules = load_policy(Path(policy)) if isinstance(policy, str | Path) else policy
        return run(
            registry, settings, folder, model=None if source is None else str(source), base_runs=_path(base_runs),
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
        contact: address or link for people who want to be protected, printed on the card.
        today: the day on which consents have to hold; by default the present day.
        options: `licence` (id on the Hub) and `licence_file` (its text) where the base does not state them; `force`, the reason
            to publish although the gate failed; `sign_key` (PEM file) or `keyless=True` to sign; `private`, `gated` ("auto" or
            "manual"), `branch`, `create_pr`, `tag`; `dry_run=True` writes `OUTPUT/release` and uploads nothing.

    Returns:
        Commit, URL, whether anything changed, and the deleted files; with `dry_run` they are empty.

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
def _runtime_settings(device: str | None, deterministic: bool | None) -> Iterator[None]:
    """Device and determinism for one call; worker processes inherit them through the environment."""
    import torch

    from guardsmith.runtime.device import DETERMINISTIC, VARIABLE

    variables = {VARIABLE: device, DETERMINISTIC: None if deterministic is None else str(int(deterministic))}
    before = {name: os.environ.get(name) for name in variables}
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.update({name: value for name, value in variables.items() if value is not None})
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
