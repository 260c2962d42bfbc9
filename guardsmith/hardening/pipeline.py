"""Registry + base -> hardened model: `out/model` (a diffusers folder) and `out/harden.json` (how it came about)."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardsmith import __version__
from guardsmith.config.recipe import ComputeSpec, Recipe
from guardsmith.core.atomic_io import folder_digest, read_record, write_json
from guardsmith.core.console import first_process, launched
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.images import open_image, open_pictures, square, to_tensor
from guardsmith.core.progress import console, stage
from guardsmith.diffusion.cache import drawn_by, drawn_with_states
from guardsmith.diffusion.prompts import ORDINARY_HARDENING, class_prompt, ordinary_prompts
from guardsmith.diffusion.states import States
from guardsmith.hardening.compatibility import check_against_base
from guardsmith.hardening.probes import Probes
from guardsmith.methods import METHODS
from guardsmith.methods.data import OrdinaryData, SubjectData
from guardsmith.methods.tripwire.ideal import imagined_by, with_ideal_states
from guardsmith.methods.tripwire.rehearsal import rehearsed_by
from guardsmith.models.building import remove_folder
from guardsmith.models.checkpoint import (
    DiffusionModel,
    file_digests,
    load_model,
    save_model,
    stored_dtype,
    weights_digest,
)
from guardsmith.models.contents import in_words
from guardsmith.models.saved import base_weights_in, say_what_changed, try_saving
from guardsmith.models.tensor_files import changed_fraction
from guardsmith.registry.images import files_of
from guardsmith.registry.loader import Registry, Split, Subject
from guardsmith.registry.types import ImageEntry
from guardsmith.runtime.distributed import agreed, alone, first_alone, together, world
from guardsmith.runtime.output import check_apart, only_run, prepare_output, read_settings
from guardsmith.training.loop import UNetCost, save_modules
from guardsmith.training.optimizers import eight_bits
from guardsmith.training.trackers import check_trackers, tracked


def load_pictures(model: DiffusionModel, subject: Subject, split: Split) -> Tensor:
    """A subject's pictures of one split at the model's size, float32 (n, 3, h, w) in [-1, 1]."""
    return open_pictures([image.path for image in subject.images_of(split)], model.image_size)


def bystander_files(place: str) -> list[Path]:
    """Pictures of others (see `Recipe.bystanders`).

    Raises:
        UserError: there are none.
    """
    kind, colon, rest = place.partition(":")
    named = {"dataset": rest if kind == "hub" else place} if colon else {"path": place}
    if not colon and not Path(place).is_dir() and not any(sign in place for sign in "*?["):
        raise UserError(f"bystanders: there is no folder {place}; name a folder, a glob or a dataset of pictures.")
    entry = ImageEntry.model_validate(named | {"split": "harden"})
    try:
        return [file for file, _ in files_of(entry, Path())]
    except UserError as error:
        raise UserError(f"bystanders: {error}") from error


def load_bystanders(model: DiffusionModel, place: str | None) -> tuple[Tensor | None, str | None]:
    """The same pictures at the model's size, as `load_pictures` has them, and their digest.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    if place is None:
        return None, None
    files = bystander_files(place)
    pictures = [square(open_image(file), model.image_size) for file in files]
    return to_tensor(pictures), folder_digest([hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures])


def compute_as(model: DiffusionModel, how: ComputeSpec) -> None:
    """Set precision and memory use of the model's denoiser, which copies of it inherit."""
    model.unet.precision, model.unet.optimizer = getattr(torch, how.precision), how.optimizer
    if how.optimizer == "adamw8bit":
        eight_bits()  # before pictures are drawn
    if how.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()


def run_info() -> dict[str, Any]:
    """Versions and machine, for the record."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow")
    return {
        "guardsmith": __version__,
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": launched(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


HARDENED = ("base", "base_revision", "base_digest", "model_digest", "registry_digest", "method", "params", "seed", "subjects",
            "seconds", "unet_forward_equivalents")  # fmt: skip


def read_hardening(record: Path) -> dict[str, Any]:
    """What a finished run's harden.json says, with every key that later runs need.

    Raises:
        UserError: it is not JSON, or lacks one.
    """
    return read_record(record, HARDENED, "harden again")


def earlier_run(folder: Path, registry: Registry, method: str, base_digest: str) -> dict[str, Any]:
    """What an earlier hardening says of itself, if this registry can be added to it.

    Raises:
        UserError: it is not finished, was another base or method, or protects someone whom the registry does not name.
    """
    record, state = folder / "harden.json", folder / "state.safetensors"
    if not (record.is_file() and state.is_file()):
        raise UserError(f"{folder} holds no finished hardening to add to (no harden.json and state.safetensors).")
    told = read_hardening(record)
    for what, then, now in (("method", told["method"], method), ("base", told["base_digest"], base_digest)):
        if then != now:
            raise UserError(f"{folder} was hardened with another {what} ({then}); add to it with the same one.")
    lost = [name for name in told["subjects"] if name not in {subject.id for subject in registry.subjects}]
    if lost:
        raise UserError(
            f"{folder} protects {', '.join(lost)}, whom {registry.path} does not name; subjects can be added to a hardened "
            "model but not taken out: harden again from the base, without --add-to."
        )
    return told


def subject_data(
    model: DiffusionModel, recipe: Recipe, wanted: Sequence[Subject], config: Any, cache: Path
) -> list[SubjectData]:
    """The subjects with their pictures, pictures of their class, and what a method draws instead of them."""
    class_images: dict[str, Tensor] = {}
    class_states: dict[str, States] = {}
    for noun in dict.fromkeys(subject.class_noun for subject in wanted):
        file = cache / f"class-{noun.replace(' ', '-')}.safetensors"
        prompts = [class_prompt(noun)] * config.class_images
        class_images[noun], class_states[noun] = drawn_with_states(
            model, recipe.sampling, prompts, 10_000, file, f"class pictures: {noun}"
        )
    found = []
    draws = METHODS[recipe.method.name].draws
    for number, subject in enumerate(wanted):
        noun, images = subject.class_noun, load_pictures(model, subject, "harden")
        positives = class_images[noun].roll(-number * len(images), dims=0)[: len(images)]
        prompt = None if draws is None else draws(config, noun)
        instead = None
        if prompt is not None:
            file = cache / f"instead-{folder_digest(prompt)}.safetensors"
            instead = drawn_by(
                model, recipe.sampling, [prompt] * config.class_images, 30_000, file, f"pictures of '{prompt}'"
            )
        found.append(
            SubjectData(
                subject.id, noun, subject.identifiers, images, positives, class_images[noun], class_states[noun],
                instead_images=instead,
            )
        )  # fmt: skip
    return found


def ordinary_data(
    model: DiffusionModel,
    recipe: Recipe,
    subjects: Sequence[SubjectData],
    bystanders: Tensor | None,
    config: Any,
    cache: Path,
) -> tuple[OrdinaryData, int]:
    """Ordinary pictures and bystanders, and the U-Net rows that it took to show the latter as an attack would draw them."""
    texts = [p.text for p in ordinary_prompts(model, ORDINARY_HARDENING, config.ordinary_images, recipe.seed)]
    images, states = drawn_with_states(
        model, recipe.sampling, texts, 20_000, cache / "ordinary.safetensors", "ordinary pictures"
    )
    ordinary = OrdinaryData(images, texts, states, bystanders)
    close: int = getattr(config, "ideal_bystanders", 0)
    if bystanders is None or not close:
        return ordinary, 0
    return with_ideal_states(
        model, subjects, ordinary, close, seed=recipe.seed, steps=recipe.sampling.steps,
        guidance=recipe.sampling.guidance, cache=cache / "bystanders.safetensors",
    )  # fmt: skip


def harden(
    registry: Registry,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    add_to: Path | None = None,
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Harden the recipe's base on the registry's subjects; returns what `harden.json` says.

    Args:
        registry: whom to protect.
        recipe: how.
        output: folder to write.
        resume: go on with an unfinished run in it.
        overwrite: delete an earlier run in it.
        add_to: output of an earlier run on some of the subjects, to begin from instead of from the base.
        report_to: trackers that the losses go to as well, see `check_trackers`.

    Raises:
        UserError: bad input, see `prepare_output`, `load_model`, `check_against_base`, `earlier_run`, `only_run`,
            `check_trackers`.
        RunFailed: the training diverged; the last checkpoint stays.
    """
    check_trackers(report_to)
    with together(), ExitStack() as held:
        return _harden(registry, recipe, output, resume, overwrite, add_to, report_to, held)


def _harden(
    registry: Registry,
    recipe: Recipe,
    output: Path,
    resume: bool,
    overwrite: bool,
    add_to: Path | None,
    report_to: Sequence[str],
    held: ExitStack,
) -> dict[str, Any]:
    method = METHODS[recipe.method.name]
    config: Any = method.config(**recipe.method.params)
    model = load_model(recipe.base, recipe.revision)
    check_apart(model.folder, output)
    check_against_base(model, registry, recipe)
    base_digest = weights_digest(model.folder)
    settings = {
        "base": recipe.base, "base_digest": base_digest, "registry_digest": registry.digest, "seed": recipe.seed,
        "method": recipe.method.name, "params": config.model_dump(mode="json"), "sampling": recipe.sampling.model_dump(),
        "probe": recipe.probe.model_dump(),
    }  # fmt: skip
    if recipe.half_variant:
        settings["half_variant"] = True
    if recipe.compute != ComputeSpec():
        settings["compute"] = recipe.compute.model_dump()
        compute_as(model, recipe.compute)
    bystanders, bystanders_digest = load_bystanders(model, recipe.bystanders)
    if bystanders_digest is not None:
        settings["bystanders_digest"] = bystanders_digest
    wanted = list(registry.subjects)
    if add_to is not None:
        earlier = earlier_run(add_to, registry, recipe.method.name, base_digest)
        settings["added_to"] = earlier["model_digest"]
        known = {name: place for place, name in enumerate(earlier["subjects"])}
        wanted.sort(key=lambda subject: known.get(subject.id, len(known)))  # their wires come first
        if output.resolve() == add_to.resolve():
            raise UserError(f"{output} is the run to add to; name another folder for the output.")
    with first_alone():
        if first_process():
            known_folder = read_settings(output) is not None
            if known_folder:
                only_run(output, held)
            prepare_output(output, settings, resume=resume, overwrite=overwrite)
            if not known_folder:
                only_run(output, held)
    record = output / "harden.json"
    if record.exists() and (output / "model").is_dir():
        if first_process():
            console.print(f"{output} is complete already.", markup=False, soft_wrap=True)
        done: dict[str, Any] = json.loads(record.read_text())
        return done

    began = time.monotonic()
    with first_alone():
        if first_process():
            try_saving(model, output, half_variant=recipe.half_variant)
    cache = output / "cache"
    with first_alone():  # the others find the pictures in the cache
        subjects = subject_data(model, recipe, wanted, config, cache)
        forwards = backwards = 0
        if getattr(config, "rehearsal_steps", 0):
            subjects, forwards, backwards = rehearsed_by(model, subjects, config, recipe.seed, cache)
        if getattr(config, "ideal_images", 0):
            subjects, forwards = imagined_by(model, subjects, config, recipe.seed, cache)
        ordinary = None
        if config.distillation_weight:
            ordinary, drawn_rows = ordinary_data(model, recipe, subjects, bystanders, config, cache)
            forwards += drawn_rows

    last = output / "checkpoints" / "last.safetensors"
    counter, spent = UNetCost(), output / "checkpoints" / "cost.jsonl"
    ran = 0

    def on_step(step: int, losses: dict[str, float]) -> None:
        nonlocal ran
        ran += 1
        if first_process():
            spent.parent.mkdir(exist_ok=True)
            with spent.open("a", encoding="utf-8") as lines:  # what a resumed run adds up
                lines.write(json.dumps([step, counter.forwards * world(), counter.backwards * world()]) + "\n")
        counter.forwards = counter.backwards = 0
        bar({key: losses[key] for key in list(losses)[:4]}, done=step + 1)
        report(step, losses)

    steps = method.steps(config)
    probes = Probes(model, subjects, recipe.probe, recipe.sampling, steps, output / "probes", recipe.seed)

    def probe(step: int, present: Callable[[], Any]) -> bool:
        with alone():
            enough = first_process() and probes(step, present)
        counter.forwards = counter.backwards = 0  # looking is no part of the method's cost
        return agreed(enough)

    told = {"base": recipe.base, "method": recipe.method.name, "seed": recipe.seed, "subjects": len(subjects)}
    told |= {key: value for key, value in settings["params"].items() if isinstance(value, int | float | str)}
    tracking = tracked(report_to if first_process() else (), output, told)
    with tracking as report, stage(f"hardening ({recipe.method.name})", steps) as bar, counter:
        hardened, history = method.run(
            model, subjects, ordinary, config, seed=recipe.seed, checkpoint=last, on_step=on_step, probe=probe,
            start=None if add_to is None else add_to / "state.safetensors",
        )  # fmt: skip
    if not first_process():
        with first_alone():
            finished: dict[str, Any] = json.loads(record.read_text())
            return finished
    parts = [name for name, network in hardened.networks.items() if network is not model.networks[name]]
    for network in hardened.networks.values():
        network.zero_grad(set_to_none=True)  # room for the copy that saving in another precision takes
    built = save_model(hardened, output / "model", parts, half_variant=recipe.half_variant)
    denoiser = model.family.denoiser
    changed = changed_fraction(model.folder / denoiser, output / "model" / denoiser)
    if changed == 0:
        shutil.rmtree(output / "model")
        raise UserError(
            "Hardening changed no stored weight: the learning rate is too small for the precision of the base."
        )
    leaks = [f"{file}: {what}" for file, what in base_weights_in(model.folder, output / "model", parts)]
    if leaks:
        remove_folder(output / "model")
        raise RunFailed(f"the hardened model would hold weights of the base ({in_words(leaks)}); it was not kept.")
    trained = _spent(spent, len(history))
    forwards += trained[0] + counter.forwards * world()  # what came after the last step is in the counter still
    backwards += trained[1] + counter.backwards * world()
    info = {
        "schema": 1,
        **settings,
        "base_revision": recipe.revision,
        "model_digest": weights_digest(output / "model"),
        "files": file_digests(output / "model"),
        "left_out": built.left_out,
        "nulled": built.nulled,
        "precision": {
            name: str(stored_dtype(output / "model", name)).removeprefix("torch.") for name in model.networks
        },
        "subjects": [subject.id for subject in wanted],
        "paper": method.paper,
        "resumed_after": len(history)
        - ran,  # steps of earlier sessions; the rows below include theirs, the seconds do not
        "seconds": round(time.monotonic() - began, 1),
        # pictures of the class and of ordinary prompts, which serve every run on this base, do not count
        "unet_forward_rows": forwards,
        "unet_backward_rows": backwards,
        "unet_forward_equivalents": forwards + 2 * backwards,
        "changed_weights": changed,
        "history": history,
        "stopped_early": len(history) < steps,
        "probes": probes.found(),
        "run": run_info(),
    }
    say_what_changed(built, info["precision"], model)
    save_modules(last, output / "state.safetensors")
    write_json(record, info)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    with first_alone():  # now the others may read it
        return info


def _spent(file: Path, steps: int) -> tuple[int, int]:
    """U-Net rows, forward and backward, of the first `steps` steps, whichever session took them."""
    cost: dict[int, tuple[int, int]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        step, forwards, backwards = json.loads(line)
        cost[step] = (forwards, backwards)  # a step that was taken again after a kill counts once
    return sum(cost[s][0] for s in range(steps)), sum(cost[s][1] for s in range(steps))
