"""Registry + base -> hardened model: `out/model` (a diffusers folder) and `out/harden.json` (how it came about).

preflight   load the base, check everything that can be checked, claim the output folder
prepare     pictures and whatever else the method wants collected beforehand
train       run the method, with checkpoints and probes
save        the model, its record, and the state that further subjects can be added to
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import read_kept, write_json
from guardsmith.core.console import first_process, in_words
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.progress import console, stage
from guardsmith.hardening.compatibility import check_against_base, check_computes
from guardsmith.hardening.data import benign_data, draw_prompt, load_negatives, subject_data
from guardsmith.hardening.probes import Probes
from guardsmith.hardening.record import StepCosts, earlier_run, read_hardening, run_info
from guardsmith.methods import (
    HardeningContext,
    HardeningResult,
    Method,
    MethodConfig,
    Preparation,
    Prepared,
    find_method,
)
from guardsmith.models.building import Built, remove_folder
from guardsmith.models.checkpoint import (
    DiffusionModel,
    file_digests,
    load_model,
    save_model,
    stored_dtype,
    weights_digest,
)
from guardsmith.models.narrowed import narrow
from guardsmith.models.saved import base_weights_in, say_what_changed, try_saving
from guardsmith.models.tensor_files import changed_fraction
from guardsmith.registry.loader import Registry, Subject
from guardsmith.runtime.distributed import (
    broadcast,
    main_process_first,
    process_group,
    single_process,
    world_size,
)
from guardsmith.runtime.output import check_apart, discard_output, lock_output, prepare_output, read_settings
from guardsmith.training.compute import ComputeConfig, configure_denoiser
from guardsmith.training.loop import UNetCost, save_modules
from guardsmith.training.optimizers import eight_bits
from guardsmith.training.trackers import check_trackers, tracked


@dataclass(frozen=True)
class _Job:
    """A hardening that has passed its checks.

    Attributes:
        recipe: how.
        output: folder to write.
        method: the recipe's.
        config: its parameters.
        model: the base.
        subjects: whom to protect; those of the run to add to come first, in its order.
        negatives: images of unprotected people, float32 (n, 3, h, w) in [-1, 1].
        settings: everything that decides the result, for the record; a run resumes only with the same.
        start: state of the run to add to.
    """

    recipe: Recipe
    output: Path
    method: Method
    config: MethodConfig
    model: DiffusionModel
    subjects: Sequence[Subject]
    negatives: Tensor | None
    settings: dict[str, Any]
    start: Path | None

    @property
    def record(self) -> Path:
        """The file that says how the model came about; written last."""
        return self.output / "harden.json"

    @property
    def checkpoint(self) -> Path:
        """The file that a killed run resumes from."""
        return self.output / "checkpoints" / "last.safetensors"


class _Trained(NamedTuple):
    """A finished training.

    Attributes:
        result: of the method.
        steps_taken: in this session.
        forward_rows: through the denoiser, of all sessions and processes.
        backward_rows: likewise.
        probes: what they measured.
        class_loss: of the hardened model on class pictures, over the base's; `None` where it is not finite.
    """

    result: HardeningResult
    steps_taken: int
    forward_rows: int
    backward_rows: int
    probes: list[dict[str, float | None]]
    class_loss: float | None


def harden(
    registry: Registry,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    add_to: Path | None = None,
    report_to: Sequence[str] = (),
    check: Callable[[DiffusionModel], None] | None = None,
) -> dict[str, Any]:
    """Harden the recipe's base on the registry's subjects; returns the contents of `harden.json`.

    Args:
        registry: whom to protect.
        recipe: how.
        output: folder to write.
        resume: continue an unfinished run in it.
        overwrite: delete an earlier run in it.
        add_to: output of an earlier run on some of the subjects, to begin from instead of from the base.
        report_to: names of trackers that the losses go to as well, see `check_trackers`.
        check: called with the base before anything is drawn or written, unless there is an unfinished or finished run; it raises
            what stands in the way.

    Raises:
        UserError: bad input, see `prepare_output`, `load_model`, `check_against_base`, `earlier_run`, `lock_output`,
            `check_trackers`.
        RunFailed: the training diverged; the last checkpoint stays.
    """
    check_trackers(report_to)
    with process_group(), ExitStack() as lock:
        job = _preflight(registry, recipe, output, add_to)
        fresh = not output.exists() or (output.is_dir() and not any(output.iterdir()))
        with main_process_first():
            if first_process():
                if check is not None and not job.record.exists():
                    check(job.model)
                _claim_output(job, lock, resume=resume, overwrite=overwrite)
        if (output / "model").is_dir():
            finished = read_kept(job.record, read_hardening, "the model is hardened again")
            if finished is not None:
                if first_process():
                    console.print(f"{output} is complete already.", markup=False, soft_wrap=True)
                return finished
        began = time.monotonic()
        try:
            with main_process_first():
                if first_process():
                    try_saving(job.model, output, half_variant=recipe.half_variant)
            data = _prepare(job)
        except UserError:  # the base cannot be used: there is nothing that --resume could go on with
            if fresh and first_process():
                discard_output(output)
            raise
        trained = _train(job, data, report_to)
        info = _save(job, data, trained, began) if first_process() else None
        with main_process_first():  # the others read what the first one has written
            return _read(job.record) if info is None else info


def _read(record: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return info


def _preflight(registry: Registry, recipe: Recipe, output: Path, add_to: Path | None) -> _Job:
    """Load the base and check whether it, the registry and the recipe fit together; nothing is written or drawn."""
    method = find_method(recipe.method.name)
    config: MethodConfig = method.config(**recipe.method.params)
    model = load_model(recipe.base, recipe.revision)
    check_apart(model.folder, output)
    check_against_base(model, registry, recipe)
    check_computes(model)
    if recipe.compute.optimizer == "adamw8bit":
        eight_bits()  # whether it is installed
    configure_denoiser(model.unet, recipe.compute)
    if recipe.compute.gradient_checkpointing:
        narrow(model.unet)
    base_digest = weights_digest(model.folder)
    settings = {
        "base": recipe.base, "base_digest": base_digest, "registry_digest": registry.digest, "seed": recipe.seed,
        "method": recipe.method.name, "params": config.model_dump(mode="json"), "sampling": recipe.sampling.model_dump(),
        "probe": recipe.probe.model_dump(),
    }  # fmt: skip
    # Left out where they are the default, so that unfinished runs of versions without them can be resumed.
    if recipe.half_variant:
        settings["half_variant"] = True
    if recipe.compute != ComputeConfig():
        settings["compute"] = recipe.compute.model_dump()
    protected = [image.path for subject in registry.subjects for image in subject.images if image.path.is_file()]
    negatives, negatives_digest = load_negatives(model, recipe.negatives, protected)
    if negatives_digest is not None:
        settings["bystanders_digest"] = negatives_digest
    subjects = list(registry.subjects)
    if add_to is not None:
        earlier = earlier_run(add_to, registry, method, recipe.method.name, config, base_digest)
        settings["added_to"] = earlier["model_digest"]
        order = {name: place for place, name in enumerate(earlier["subjects"])}
        subjects.sort(key=lambda subject: order.get(subject.id, len(order)))  # their rows of the state come first
        if output.resolve() == add_to.resolve():
            raise UserError(f"{output} is the run to add to; name another folder for the output.")
    start = None if add_to is None else add_to / "state.safetensors"
    return _Job(recipe, output, method, config, model, subjects, negatives, settings, start)


def _claim_output(job: _Job, lock: ExitStack, *, resume: bool, overwrite: bool) -> None:
    """Make the output folder this run's, and lock it for as long as `lock` is open."""
    exists = read_settings(job.output) is not None
    if exists:
        lock_output(job.output, lock)
    prepare_output(job.output, job.settings, resume=resume, overwrite=overwrite)
    if not exists:
        lock_output(job.output, lock)


def _prepare(job: _Job) -> Prepared:
    """Pictures, and what the method wants beside them."""
    cache, model, recipe, config = job.output / "cache", job.model, job.recipe, job.config
    with main_process_first():  # the others find everything in the cache
        subjects = subject_data(model, recipe, job.subjects, config, cache)
        benign = None
        if job.method.needs_benign(config):
            benign = benign_data(model, recipe, job.negatives, config, cache)
        preparation = Preparation(
            model=model, subjects=subjects, benign=benign, config=config, seed=recipe.seed,
            sampling_steps=recipe.sampling.steps, guidance=recipe.sampling.guidance, cache=cache,
            draw=partial(draw_prompt, model, recipe, count=config.class_images, cache=cache), compute=recipe.compute,
        )  # fmt: skip
        return job.method.prepare(preparation)


def _train(job: _Job, data: Prepared, report_to: Sequence[str]) -> _Trained:
    """Run the method, count what it costs, and let the probes look."""
    recipe, method, output = job.recipe, job.method, job.output
    steps = method.steps(job.config)
    counter, costs = UNetCost(), StepCosts(output / "checkpoints" / "cost.jsonl")
    probes = Probes(job.model, data.subjects, recipe.probe, recipe.sampling, steps, output / "probes", recipe.seed)
    steps_taken = 0

    def on_step(step: int, losses: dict[str, float]) -> None:
        nonlocal steps_taken
        steps_taken += 1
        if first_process():
            costs.add(step, counter.forwards * world_size(), counter.backwards * world_size())
        counter.forwards = counter.backwards = 0
        bar({key: losses[key] for key in list(losses)[:4]}, done=step + 1)
        report(step, losses)

    def probe(step: int, released: Callable[[], Any]) -> bool:
        with single_process():
            stop = first_process() and probes(step, released)
        counter.forwards = counter.backwards = 0  # probes are no part of the method's cost
        return broadcast(stop)

    settings = {"base": recipe.base, "method": recipe.method.name, "seed": recipe.seed, "subjects": len(job.subjects)}
    settings |= {key: value for key, value in job.settings["params"].items() if isinstance(value, int | float | str)}
    tracking = tracked(report_to if first_process() else (), output, settings)
    context = HardeningContext(
        model=job.model, subjects=data.subjects, benign=data.benign, config=job.config, seed=recipe.seed,
        compute=recipe.compute, start=job.start, cache=output / "cache", checkpoint=job.checkpoint,
        checkpoint_every=method.checkpoint_every, on_step=on_step, probe=probe,
    )  # fmt: skip
    with tracking as report, stage(f"hardening ({recipe.method.name})", steps) as bar, counter:
        result = method.run(context)
    forwards, backwards = costs.total(len(result.history)) if first_process() else (0, 0)
    # What came after the last step is in the counter still.
    forwards += counter.forwards * world_size()
    backwards += counter.backwards * world_size()
    with single_process():
        class_loss = probes.class_loss(result.model) if first_process() else None
    return _Trained(result, steps_taken, forwards, backwards, probes.results(), class_loss)


def _save(job: _Job, data: Prepared, trained: _Trained, began: float) -> dict[str, Any]:
    """Write the model, the state and last the record, which it returns.

    Raises:
        UserError: no stored weight differs from the base's.
        RunFailed: weights of the base would be in the folder.
    """
    (model, history), output = trained.result, job.output
    folder_contents, changed = _save_hardened(job, model)
    forwards = data.forward_rows + trained.forward_rows
    backwards = data.backward_rows + trained.backward_rows
    info = {
        "schema": 1,
        **job.settings,
        "recipe": job.recipe.model_dump(mode="json"),
        "base_revision": job.recipe.revision,
        "model_digest": weights_digest(output / "model"),
        "files": file_digests(output / "model"),
        "left_out": folder_contents.left_out,
        "nulled": folder_contents.nulled,
        "precision": {
            name: str(stored_dtype(output / "model", name)).removeprefix("torch.") for name in job.model.networks
        },
        "subjects": [subject.id for subject in job.subjects],
        "paper": job.method.paper,
        # Steps of earlier sessions; the rows below include theirs, the seconds do not.
        "resumed_after": len(history) - trained.steps_taken,
        "seconds": round(time.monotonic() - began, 1),
        # Pictures of the class and of benign prompts, which serve every run on this base, do not count.
        "unet_forward_rows": forwards,
        "unet_backward_rows": backwards,
        "unet_forward_equivalents": forwards + 2 * backwards,
        "changed_weights": changed,
        "history": history,
        "stopped_early": len(history) < job.method.steps(job.config),
        "probes": trained.probes,
        "class_loss": trained.class_loss,
        "run": run_info(),
    }
    say_what_changed(folder_contents, info["precision"], job.model)
    save_modules(job.checkpoint, output / "state.safetensors")
    write_json(job.record, info)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return info


def _save_hardened(job: _Job, model: DiffusionModel) -> tuple[Built, float]:
    """Write the model's folder, or none; returns what was built and the share of stored weights that changed."""
    base, folder, denoiser = job.model, job.output / "model", job.model.family.denoiser
    parts = [name for name, network in model.networks.items() if network is not base.networks[name]]
    for network in model.networks.values():
        network.zero_grad(set_to_none=True)  # room for the copy that saving in another precision takes
    if job.recipe.compute.gradient_checkpointing:
        narrow(model.unet)  # what is stored in half precision is saved without a copy then
    folder_contents = save_model(model, folder, parts, half_variant=job.recipe.half_variant)
    changed = changed_fraction(base.folder / denoiser, folder / denoiser)
    if changed == 0:
        shutil.rmtree(folder)
        raise UserError(
            f"Hardening changed no stored weight in {job.method.steps(job.config)} steps: there are too few, or the "
            "learning rate is too small for the precision of the base."
        )
    leaks = [f"{file}: {what}" for file, what in base_weights_in(base.folder, folder, parts)]
    if leaks:
        remove_folder(folder)
        raise RunFailed(f"the hardened model would hold weights of the base ({in_words(leaks)}); it was not kept.")
    return folder_contents, changed
