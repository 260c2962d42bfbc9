"""Searches settings of a hardening method on the embedded base, on tuning subjects only (never on the shipped registries).

python search.py DATA TRIALS.yaml --name apdm-search       resumes; writes docs/results/<name>.json

TRIALS.yaml: `common` (recipe name, styles, params for all) and `trials` (label -> params). A trial hardens on the first
tuning identity of every style and then attacks that identity and the next one, the control, with every attack of the
recipe under the first of `identifiers`, and the protected one with the first attack under the others too. For PersGuard it
also counts the pictures that show the backdoor. `further` in `common` names trials to do more in: `two-stage` (DreamBooth
on a third identity first, then on the protected one) and `leak` (image to image under the identifier prompt, from class
pictures, without any training).
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
import world
import yaml
from evaluate import RESULTS
from torch import Tensor

from guardsmith.attacks import ATTACKS, AttackData, draw_after_attack
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import folder_digest, write_json
from guardsmith.diffusion.cache import drawn_by, drawn_with_states
from guardsmith.diffusion.prompts import (
    HARDENING_TEMPLATES,
    VERIFICATION_TEMPLATES,
    benign_prompts,
    class_prompt,
    instance_prompt,
)
from guardsmith.diffusion.sampling import generate, grid, redraw
from guardsmith.hardening.data import draw_prompt
from guardsmith.methods import METHODS, HardeningContext, Preparation
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.methods.persguard import shows_mark
from guardsmith.metrics.fidelity import features, fidelity, read_traits
from guardsmith.metrics.identity import similarity
from guardsmith.metrics.kid import kid
from guardsmith.models.checkpoint import DiffusionModel, load_model, weights_digest
from guardsmith.runtime.processes import processes

VIEWS = 16


def backdoor_share(images: Tensor, config: Any, noun: str) -> float:
    """Share of pictures that show what PersGuard's backdoor puts in the subject's place."""
    if config.backdoor == "pattern":
        return float(shows_mark(images, config.mark).float().mean())
    seen = [traits["class"] for traits in read_traits(images)]
    return sum(kind == config.target_noun if config.backdoor == "target" else kind != noun for kind in seen) / len(seen)


def attacked(
    model: DiffusionModel, recipe: Recipe, label: str, views: Tensor, class_images: Tensor, noun: str, identifier: str
) -> Tensor:
    """What an attack on a subject draws, 16 pictures."""
    spec = recipe.verify.attacks[label]
    data = AttackData(views[4:8], class_images, identifier, noun)
    images, _ = draw_after_attack(
        model, spec.name, spec.params, data, seed=0, count=VIEWS, sampling=recipe.sampling.model_dump()
    )
    return images


def likeness(images: Tensor, views: Tensor) -> float:
    """Mean similarity to pictures of the subject that nobody trained on."""
    scores = [s for s in similarity(images, views[8:]) if s is not None]
    return sum(scores) / len(scores)


def from_class_pictures(model: DiffusionModel, recipe: Recipe, class_images: Tensor, prompt: str) -> Tensor:
    """Class pictures noised half-way and drawn again under another prompt (SDEdit), 16 pictures."""
    sampling = recipe.sampling.model_dump()
    return redraw(model, class_images[:VIEWS], [prompt] * VIEWS, range(VIEWS), strength=0.5, **sampling)


def measure(
    model: DiffusionModel,
    recipe: Recipe,
    data: Path,
    style: str,
    class_images: Tensor,
    identifiers: list[str],
    further: list[str],
    config: Any,
) -> tuple[dict[str, float], Tensor]:
    """Similarity of the protected identity and of the control after every attack, and what else was asked for."""
    pixels, lines = world.load(data, "tuning")
    first = next(i for i, line in enumerate(lines) if line["style"] == style)
    noun, found, shown = lines[first]["class_noun"], {}, []
    people = [world.to_float(pixels[first + k * VIEWS : first + (k + 1) * VIEWS]) for k in range(3)]
    backdoor = getattr(config, "backdoor", None)
    asked = instance_prompt(identifiers[0], noun)

    def note(key: str, images: Tensor, views: Tensor) -> None:
        found[key] = likeness(images, views)
        if backdoor is not None:
            found[f"{key}/backdoor"] = backdoor_share(images, config, noun)
        shown.append(images[:4])

    for role, views in zip(("protected", "control"), people, strict=False):
        shown.append(views[8:10])
        for number, label in enumerate(recipe.verify.attacks):
            for identifier in identifiers if (role, number) == ("protected", 0) else identifiers[:1]:
                note(
                    f"{role}/{label}/{identifier}",
                    attacked(model, recipe, label, views, class_images, noun, identifier),
                    views,
                )
    if backdoor is not None:  # is it there at all, before anyone attacks?
        released = generate(model, [asked] * VIEWS, range(90_000, 90_000 + VIEWS), **recipe.sampling.model_dump())
        note("released", released, people[0])
    if "leak" in further:
        note("leak", from_class_pictures(model, recipe, class_images, asked), people[0])
    if "two-stage" in further:
        spec = recipe.verify.attacks["dreambooth"]
        config_of = ATTACKS["dreambooth"].config(**spec.params)
        stranger = AttackData(people[2][4:8], class_images, "bhj", noun)
        softened, _ = ATTACKS["dreambooth"].run(model, stranger, config_of, seed=1)
        images = attacked(softened, recipe, "dreambooth", people[0], class_images, noun, identifiers[0])
        note("protected/two-stage", images, people[0])
    return found, torch.cat(shown)


def trial(
    data: Path,
    cache: Path,
    recipe: Recipe,
    label: str,
    style: str,
    params: dict[str, Any] | None,
    identifiers: list[str],
    further: list[str],
) -> dict[str, Any]:
    """One hardening and its attacks; `params=None` measures the base."""
    base = load_model("builtin:avatar")
    file = cache / f"{folder_digest(label, style, params, identifiers, further)}.json"
    if file.exists():
        told: dict[str, Any] = json.loads(file.read_text())
        return told
    pixels, lines = world.load(data, "tuning")
    first = next(i for i, line in enumerate(lines) if line["style"] == style)
    noun = lines[first]["class_noun"]
    count = recipe.verify.class_images
    prompts = [class_prompt(noun)] * count
    class_file = cache / f"class-{noun}-states.safetensors"
    class_images, class_states = drawn_with_states(base, recipe.sampling, prompts, 10_000, class_file, "class pictures")
    asked = benign_prompts(base, VERIFICATION_TEMPLATES, 120, recipe.seed + 1)
    texts = [prompt.text for prompt in asked]
    before = drawn_by(base, recipe.sampling, texts, 40_000, cache / "ordinary-a.safetensors", "benign pictures")
    again = drawn_by(base, recipe.sampling, texts, 50_000, cache / "ordinary-b.safetensors", "benign pictures")
    began, history, model, config = time.monotonic(), [], base, None
    if params is not None:
        method = METHODS[recipe.method.name]
        config = method.config(**{"class_images": count, **params})
        views = world.to_float(pixels[first : first + 4])
        subject = SubjectData(label, noun, (), views, class_images[: len(views)], class_images, class_states)
        shared = benign_prompts(base, HARDENING_TEMPLATES, config.benign_images, recipe.seed)
        words = [prompt.text for prompt in shared]
        ordinary_file = cache / f"ordinary-h-{len(words)}-states.safetensors"
        drawn, states = drawn_with_states(base, recipe.sampling, words, 20_000, ordinary_file, "benign pictures")
        preparation = Preparation(
            model=base, subjects=[subject], benign=BenignData(drawn, words, states), config=config, seed=recipe.seed,
            sampling_steps=recipe.sampling.steps, guidance=recipe.sampling.guidance,
            cache=cache / f"prepared-{folder_digest(config.model_dump())}",
            draw=partial(draw_prompt, base, recipe, count=count, cache=cache),
        )  # fmt: skip
        prepared = method.prepare(preparation)
        context = HardeningContext(
            model=base, subjects=prepared.subjects, benign=prepared.benign, config=config, seed=recipe.seed
        )
        model, history = method.run(context)
    seconds = time.monotonic() - began
    own_class = (
        class_images
        if params is None
        else drawn_by(model, recipe.sampling, prompts, 10_000, None, "class pictures, hardened")
    )
    found, shown = measure(model, recipe, data, style, own_class, identifiers, further, config)
    after = drawn_by(model, recipe.sampling, texts, 50_000, None, "benign pictures, hardened")
    scores = [s for s in fidelity(after, [prompt.traits for prompt in asked]) if s is not None]
    told = {
        "label": label, "style": style, "params": params, "seconds": round(seconds, 1), **found,
        "kid_ratio": kid(features(before), features(after)) / kid(features(before), features(again)),
        "fidelity": sum(scores) / len(scores), "last": history[-1] if history else None,
    }  # fmt: skip
    grid(torch.cat([shown, own_class[:8], after[:8]]), 18, scale=2).save(file.with_suffix(".png"))
    write_json(file, told)
    return told


def main() -> None:
    """Run what has no result yet, two trials at a time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("trials", type=Path)
    parser.add_argument("--name", default="apdm-search")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    asked = yaml.safe_load(args.trials.read_text())
    common = asked["common"]
    recipe = load_recipe(common.get("recipe", "demo"), common.get("set", []))
    digest = weights_digest(load_model("builtin:avatar").folder)
    attacks = {k: v.model_dump() for k, v in recipe.verify.attacks.items()}
    cache = (
        args.data.parent
        / "search"
        / folder_digest(digest, recipe.sampling.model_dump(), attacks, recipe.verify.class_images)
    )
    cache.mkdir(parents=True, exist_ok=True)
    identifiers, wanted = common.get("identifiers", ["sks", "zwx"]), common.get("further", {})
    jobs: list[tuple[str, str, dict[str, Any] | None]] = [("base", style, None) for style in common["styles"]]
    jobs += [
        (label, style, common.get("params", {}) | (params or {}))
        for label, params in asked["trials"].items()
        for style in common["styles"]
    ]
    further = {label: [what for what, labels in wanted.items() if label in labels] for label, _, _ in jobs}
    rows = []
    with processes(args.workers) as (pool, _):
        futures = [
            pool.submit(trial, args.data, cache, recipe, label, style, params, identifiers, further[label])
            for label, style, params in jobs
        ]
        for future in as_completed(futures):
            row = future.result()
            rows.append(row)
            short = {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
            print(row["label"], row["style"], json.dumps(short), flush=True)
    order = {(label, style): i for i, (label, style, _) in enumerate(jobs)}
    rows.sort(key=lambda row: order[row["label"], row["style"]])
    result = {
        "command": f"python search.py DATA {args.trials.name} --name {args.name}",
        "model_digest": digest,
        "attacks": attacks,
        "rows": rows,
    }
    write_json(RESULTS / f"{args.name}.json", result)


if __name__ == "__main__":
    main()
