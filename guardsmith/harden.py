"""Registry + base -> hardened model: `out/model` (a diffusers folder) and `out/harden.json` (how it came about).

out/settings.json      what was asked; a resumed run must ask the same
out/cache/             class pictures and ordinary pictures drawn by the base
out/checkpoints/       training state
out/model/             appears whole, at the end
out/harden.json        written last: its presence says that the run is complete
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guardsmith import __version__
from guardsmith.errors import UserError
from guardsmith.images import open_image, square, to_tensor
from guardsmith.methods import METHODS
from guardsmith.methods.apdm import OrdinaryData, SubjectData
from guardsmith.models import DiffusionModel, load_model, save_model, weights_digest
from guardsmith.progress import console, stage
from guardsmith.prompts import ORDINARY_HARDENING, class_prompt, lost_words, ordinary_prompts
from guardsmith.recipe import Recipe
from guardsmith.registry import Registry, Split, Subject, unknown_class_nouns
from guardsmith.sampling import generate
from guardsmith.training import UNetCost, changed_fraction

CLASSES_OF_AVATAR = ("person", "character", "robot")
ORDINARY_IMAGES = 128


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_output(output: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Make the output folder, or agree to go on in it.

    Raises:
        UserError: it exists and neither --resume nor --overwrite was given; it was made with other settings; it cannot
            be written to.
    """
    written = output / "settings.json"
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; name a folder for the output.")
    if output.exists() and any(output.iterdir()):
        if overwrite:
            if not written.exists() and not (output / "harden.json").exists():
                raise UserError(
                    f"{output} was not made by guardsmith, so --overwrite will not delete it; name another folder."
                )
            shutil.rmtree(output)
        elif not resume:
            raise UserError(
                f"{output} exists already; go on with --resume, start anew with --overwrite, or name another folder."
            )
        elif written.exists() and json.loads(written.read_text()) != json.loads(json.dumps(settings)):
            old, new = json.loads(written.read_text()), json.loads(json.dumps(settings))
            changed = ", ".join(sorted(k for k in {*old, *new} if old.get(k) != new.get(k)))
            raise UserError(
                f"{output} was made with other settings ({changed}); use --overwrite or name another folder."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(written, settings)
    except OSError as error:
        raise UserError(f"{output} cannot be written to ({error.strerror}); name another folder.") from error


def load_pictures(model: DiffusionModel, subject: Subject, split: Split) -> Tensor:
    """A subject's pictures of one split at the model's size, float32 (n, 3, h, w) in [-1, 1]."""
    return to_tensor([square(open_image(image.path), model.image_size) for image in subject.images_of(split)])


def drawn_by(
    model: DiffusionModel, recipe: Recipe, prompts: list[str], seed: int, cache: Path | None, title: str
) -> Tensor:
    """Pictures of these prompts drawn by the model (seeds seed, seed + 1, ...), kept in `cache` if given."""
    if cache is not None and cache.exists():
        return load_file(cache)["images"]
    calls = -(-len(prompts) // recipe.sampling.batch) * recipe.sampling.steps
    with stage(title, calls) as bar:
        images = generate(
            model, prompts, range(seed, seed + len(prompts)), steps=recipe.sampling.steps, guidance=recipe.sampling.guidance,
            batch=recipe.sampling.batch, on_step=bar,
        )  # fmt: skip
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"images": images.contiguous()}, cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").replace(cache)
    return images


def check_against_base(model: DiffusionModel, registry: Registry, recipe: Recipe) -> None:
    """What only the model can tell: class nouns it does not know, identifiers its tokenizer drops.

    Raises:
        UserError: every problem, one sentence a line.
    """
    problems = unknown_class_nouns(registry, CLASSES_OF_AVATAR) if model.source == "builtin:avatar" else []
    names = {name for subject in registry.subjects for name in subject.identifiers} | set(recipe.verify.identifiers)
    problems += [
        f"{registry.path}: the identifier '{word}' has no token in this model's tokenizer; choose another."
        for word in sorted(lost_words(model, names))
    ]
    if problems:
        raise UserError("\n".join(problems))


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
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def harden(
    registry: Registry, recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Harden the recipe's base on the registry's subjects; returns what `harden.json` says.

    Raises:
        UserError: bad input, see `prepare_output`, `load_model`, `check_against_base`.
        RunFailed: the training diverged; the last checkpoint stays.
    """
    method = METHODS[recipe.method.name]
    config: Any = method.config(**recipe.method.params)
    model = load_model(recipe.base, recipe.revision)
    check_against_base(model, registry, recipe)
    base_digest = weights_digest(model.folder)
    settings = {
        "base": recipe.base, "base_digest": base_digest, "registry_digest": registry.digest, "seed": recipe.seed,
        "method": recipe.method.name, "params": config.model_dump(mode="json"), "sampling": recipe.sampling.model_dump(),
    }  # fmt: skip
    prepare_output(output, settings, resume=resume, overwrite=overwrite)
    record = output / "harden.json"
    if record.exists() and (output / "model").is_dir():
        console.print(f"{output} is complete already.")
        done: dict[str, Any] = json.loads(record.read_text())
        return done

    began = time.monotonic()
    cache = output / "cache"
    class_images: dict[str, Tensor] = {}
    for noun in dict.fromkeys(subject.class_noun for subject in registry.subjects):
        file = cache / f"class-{noun.replace(' ', '-')}.safetensors"
        prompts = [class_prompt(noun)] * config.class_images
        class_images[noun] = drawn_by(model, recipe, prompts, 10_000, file, f"class pictures: {noun}")
    subjects = []
    for number, subject in enumerate(registry.subjects):
        images = load_pictures(model, subject, "harden")
        positives = class_images[subject.class_noun].roll(-number * len(images), dims=0)[: len(images)]
        subjects.append(
            SubjectData(
                subject.id, subject.class_noun, subject.identifiers, images, positives, class_images[subject.class_noun]
            )
        )
    ordinary = None
    if getattr(config, "distillation_weight", 0):
        asked = ordinary_prompts(model, ORDINARY_HARDENING, ORDINARY_IMAGES, recipe.seed)
        texts = [prompt.text for prompt in asked]
        images = drawn_by(model, recipe, texts, 20_000, cache / "ordinary.safetensors", "ordinary pictures")
        ordinary = OrdinaryData(images, texts)

    counter = UNetCost()
    with stage(f"hardening ({recipe.method.name})", config.outer_steps) as bar, counter:
        hardened, history = method.run(
            model, subjects, ordinary, config, seed=recipe.seed, checkpoint=output / "checkpoints" / "last.safetensors",
            on_step=lambda step, losses: bar({k: losses[k] for k in list(losses)[:4]}, done=step + 1),
        )  # fmt: skip
    save_model(hardened, output / "model")
    changed = changed_fraction(model.folder / "unet", output / "model" / "unet")
    if changed == 0:
        raise UserError(
            "Hardening changed no stored weight: the learning rate is too small for the precision of the base."
        )
    info = {
        "schema": 1,
        **settings,
        "base_revision": recipe.revision,
        "model_digest": weights_digest(output / "model"),
        "subjects": [subject.id for subject in registry.subjects],
        "paper": method.paper,
        "seconds": round(time.monotonic() - began, 1),
        "unet_forward_rows": counter.forwards,
        "unet_backward_rows": counter.backwards,
        "unet_forward_equivalents": counter.forwards + 2 * counter.backwards,
        "changed_weights": changed,
        "history": history,
        "run": run_info(),
    }
    write_json(record, info)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return info


def folder_digest(*parts: Any) -> str:
    """Short digest of JSON-able settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
