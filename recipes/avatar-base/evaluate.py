"""Measures the embedded base and its judges on avatars that nothing was trained on; writes what the project claims of them.

python evaluate.py DATA judges          ~ 1 min    guardsmith/builtin/judges/calibration.json, docs/results/avatar-judges.json
python evaluate.py DATA base            ~ 4 min    docs/results/avatar-base.json, avatar-base.png
python evaluate.py DATA personalize     ~ 45 min   docs/results/avatar-personalization.json, .png (resumes)
"""

from __future__ import annotations

import argparse
import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import world
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_vae import psnr

import guardsmith
from guardsmith.attacks import AttackData, draw_after_attack
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import folder_digest, write_json
from guardsmith.diffusion.cache import drawn_by
from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, benign_prompts, class_prompt
from guardsmith.diffusion.sampling import generate, grid
from guardsmith.metrics.fidelity import TRAITS, features, fidelity, read_traits
from guardsmith.metrics.identity import embed, similarity
from guardsmith.metrics.kid import kid, kid_interval
from guardsmith.models.checkpoint import DiffusionModel, load_model, weights_digest
from guardsmith.runtime.processes import processes

ROOT = Path(guardsmith.__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
BUILTIN = ROOT / "guardsmith" / "builtin"


def through_vae(model: DiffusionModel, pixels: Tensor) -> Tensor:
    """Pictures (uint8) after encoding and decoding, float in [-1, 1]."""
    with torch.no_grad():
        out = [
            model.vae.decode(model.vae.encode(world.to_float(c)).latent_dist.mode()).sample for c in pixels.split(50)
        ]
    return torch.cat(out).clamp(-1, 1)


def pair_scores(embeddings: Tensor, lines: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Cosines of all same-identity pairs, and of all pairs of different identities of one style."""
    same, different = [], []
    for style in dict.fromkeys(line["style"] for line in lines):
        rows = [i for i, line in enumerate(lines) if line["style"] == style]
        names = torch.tensor([int(lines[i]["identity"].split("-")[1]) for i in rows])
        cosine = embeddings[rows] @ embeddings[rows].T
        equal = names[:, None] == names[None, :]
        upper = torch.ones_like(equal).triu(1)
        same.append(cosine[equal & upper])
        different.append(cosine[~equal & upper])
    return torch.cat(same), torch.cat(different)


def levels(embeddings: Tensor, lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Chance and genuine similarity per class noun: one subject's mean against another's references, as the gate compares."""
    found: dict[str, dict[str, list[float]]] = {}
    for style in dict.fromkeys(line["style"] for line in lines):
        rows = [i for i, line in enumerate(lines) if line["style"] == style]
        names = list(dict.fromkeys(lines[i]["identity"] for i in rows))
        views = torch.stack([embeddings[[i for i in rows if lines[i]["identity"] == name]] for name in names])
        half = views.shape[1] // 2
        cross = views[:, :half].mean(1) @ views[:, half:].mean(1).T  # mean over pictures x references
        place = found.setdefault(lines[rows[0]]["class_noun"], {"chance": [], "genuine": []})
        place["genuine"] += cross.diagonal().tolist()
        place["chance"] += cross[~torch.eye(len(names), dtype=torch.bool)].tolist()
    return {
        noun: {
            "chance": float(torch.tensor(v["chance"]).mean()),
            "chance_high": float(torch.tensor(v["chance"]).quantile(0.95)),
            "genuine": float(torch.tensor(v["genuine"]).mean()),
        }
        for noun, v in found.items()
    }


def judges(data: Path) -> None:
    """Identity encoder and trait classifier on identities they never saw, as rendered and through the VAE."""
    model = load_model("builtin:avatar")
    pixels, lines = world.load(data, "judge_test")
    result: dict[str, Any] = {"command": "python evaluate.py DATA judges", "identities": 500, "pictures": len(lines)}
    for name, images in (("renders", world.to_float(pixels)), ("through the VAE", through_vae(model, pixels))):
        same, different = pair_scores(embed(images), lines)
        threshold = (
            float(different.quantile(0.99))
            if len(different) < 2**24
            else float(different.sort().values[int(0.99 * len(different))])
        )
        result[name] = {
            "true_positives_at_1_percent_false_positives": float((same > threshold).float().mean()),
            "threshold": threshold, "same_mean": float(same.mean()), "different_mean": float(different.mean()),
        }  # fmt: skip
    pixels_held, lines_held = world.load(data, "heldout")
    colours = world.colour_names(data)
    for name, images in (
        ("renders", world.to_float(pixels_held)),
        ("through the VAE", through_vae(model, pixels_held)),
    ):
        seen = read_traits(images)
        right: dict[str, list[bool]] = {trait: [] for trait in TRAITS}
        for have, line in zip(seen, lines_held, strict=True):
            true = world.attributes(line, colours)
            for trait in TRAITS:
                value = (
                    {True: "yes", False: "no"}.get(true.get(trait), true.get(trait))
                    if trait == "glasses"
                    else true.get(trait)
                )
                if value is not None:
                    right[trait].append(have[trait] == value)
        result[name]["trait_accuracy"] = {trait: sum(v) / len(v) for trait, v in right.items()}
    calibrated = {
        "date": datetime.now(UTC).date().isoformat(),
        "measured_on": "500 identities of recipes/avatar-base (set judge_test), pictures through the VAE against renders",
        "classes": levels(embed(through_vae(model, pixels)), lines),
    }
    write_json(BUILTIN / "judges" / "calibration.json", calibrated)
    write_json(RESULTS / "avatar-judges.json", result | {"levels": calibrated["classes"]})
    print(json.dumps(result, indent=1))
    print(json.dumps(calibrated, indent=1))


def base(data: Path, count: int) -> None:
    """VAE, prompt fidelity, KID, and a picture to look at."""
    model = load_model("builtin:avatar")
    sampling = load_recipe("avatar-attacks").sampling.model_dump()
    pixels, _ = world.load(data, "heldout")
    asked = benign_prompts(model, VERIFICATION_TEMPLATES, count, seed=7)
    images = generate(model, [p.text for p in asked], range(70_000, 70_000 + count), **sampling)
    scores = fidelity(images, [p.traits for p in asked])
    seen = read_traits(images)
    per_trait = {
        trait: [have[trait] == p.traits[trait] for have, p in zip(seen, asked, strict=True) if trait in p.traits]
        for trait in TRAITS
    }
    # Generated pictures against renders of the same mix of styles as the prompts ask for.
    _, lines = world.load(data, "heldout")
    rng = random.Random(0)
    by_style: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        by_style.setdefault(world.STYLE_WORDS[line["style"]], []).append(i)
    rows = [rng.choice(by_style[p.traits["style"]]) for p in asked]
    again = [rng.choice(by_style[p.traits["style"]]) for p in asked]
    real, other = features(world.to_float(pixels[rows])), features(world.to_float(pixels[again]))
    reconstructed, drawn = features(through_vae(model, pixels[rows])), features(images)
    result = {
        "command": "python evaluate.py DATA base",
        "model_digest": weights_digest(model.folder),
        "sampling": sampling,
        "vae_psnr_db": psnr(model.vae, pixels),
        "vae_pictures": len(pixels),
        "prompt_fidelity": sum(s for s in scores if s is not None) / count,
        "prompt_fidelity_by_trait": {trait: sum(v) / len(v) for trait, v in per_trait.items()},
        "generated": count,
        "kid_features": "penultimate layer of the trait classifier",
        "kid_generated": kid(real, drawn), "kid_generated_interval": kid_interval(real, drawn),
        "kid_renders": kid(real, other), "kid_vae": kid(real, reconstructed),
    }  # fmt: skip
    write_json(RESULTS / "avatar-base.json", result)
    plain = [class_prompt(noun) for noun in world.CLASS_NOUNS for _ in range(12)]
    unconditional = generate(model, plain, range(80_000, 80_000 + len(plain)), **sampling)
    grid(torch.cat([images[:60], unconditional]), 12, scale=2).save(RESULTS / "avatar-base.png")
    print(json.dumps(result, indent=1))


def personalize_one(
    data: Path, set_name: str, row: int, label: str, spec: dict[str, Any], sampling: dict[str, Any], cache: Path
) -> dict[str, Any]:
    """Attack the base with one subject's first four pictures; similarity to its last eight."""
    file = cache / f"{label}-{row}.json"
    if file.exists():
        told: dict[str, Any] = json.loads(file.read_text())
        return told
    model = load_model("builtin:avatar")
    pixels, lines = world.load(data, set_name)
    line = lines[row]
    views = world.to_float(pixels[row : row + 16])
    noun = line["class_noun"]
    class_images = load_file(cache / f"class-{noun}.safetensors")["images"]
    given = AttackData(views[:4], class_images, "zwx", noun)
    images, losses = draw_after_attack(model, spec["name"], spec["params"], given, seed=0, count=16, sampling=sampling)
    scores = [s for s in similarity(images, views[8:]) if s is not None]
    genuine = [s for s in similarity(views[:4], views[8:]) if s is not None]
    told = {
        "identity": line["identity"], "label": label, "similarity": sum(scores) / 16, "genuine": sum(genuine) / 4,
        "scores": scores, "loss_end": sum(losses[-50:]) / 50,
    }  # fmt: skip
    save_file(
        {"images": images[:4].contiguous(), "real": views[8:10].contiguous()}, cache / f"{label}-{row}.safetensors"
    )
    write_json(file, told)
    return told


def draw_class_pictures(model: DiffusionModel, recipe: Recipe, cache: Path) -> None:
    """The attacker's class pictures, `class-<noun>.safetensors` in `cache`."""
    for noun in world.CLASS_NOUNS:
        prompts = [class_prompt(noun)] * recipe.verify.class_images
        drawn_by(
            model, recipe.sampling, prompts, 60_000, cache / f"class-{noun}.safetensors", f"class pictures: {noun}"
        )


def first_rows(data: Path, set_name: str, per_style: int) -> list[int]:
    """Where the views of the first `per_style` identities of every style begin, in a set of 16 views each."""
    _, lines = world.load(data, set_name)
    identities = len(lines) // 16 // len(world.STYLE_WORDS)
    return [16 * (style * identities + i) for i in range(per_style) for style in range(len(world.STYLE_WORDS))]


def personalize(
    data: Path, set_name: str, per_style: int, recipe_name: str, changes: list[str], name: str, workers: int
) -> None:
    """Every attack of a recipe on subjects of all styles."""
    recipe = load_recipe(recipe_name, changes)
    model = load_model("builtin:avatar")
    sampling = recipe.sampling.model_dump()
    settings = [
        weights_digest(model.folder),
        sampling,
        {k: v.model_dump() for k, v in recipe.verify.attacks.items()},
        set_name,
    ]
    cache = data.parent / "personalize" / folder_digest(settings)
    cache.mkdir(parents=True, exist_ok=True)
    draw_class_pictures(model, recipe, cache)
    rows = first_rows(data, set_name, per_style)
    jobs = [(row, label) for label in recipe.verify.attacks for row in rows]
    with processes(workers) as (pool, _):
        futures = [
            pool.submit(
                personalize_one, data, set_name, row, label, recipe.verify.attacks[label].model_dump(), sampling, cache
            )
            for row, label in jobs
        ]
        told = [future.result() for future in futures]
    result: dict[str, Any] = {
        "command": f"python evaluate.py DATA personalize --set-name {set_name} --per-style {per_style} --recipe {recipe_name}",
        "model_digest": settings[0], "sampling": sampling, "subjects": len(rows), "attacks": {},
    }  # fmt: skip
    for label, spec in recipe.verify.attacks.items():
        mine = [t for t in told if t["label"] == label]
        ratio = torch.tensor([t["similarity"] / t["genuine"] for t in mine])
        drawn = torch.randint(len(ratio), (2000, len(ratio)), generator=torch.Generator().manual_seed(0))
        bounds = ratio[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
        by_style = {
            s: sum(t["similarity"] / t["genuine"] for t in mine if t["identity"].startswith(s)) / per_style
            for s in world.STYLE_WORDS
        }
        result["attacks"][label] = {
            **spec.model_dump(), "similarity": sum(t["similarity"] for t in mine) / len(mine),
            "genuine": sum(t["genuine"] for t in mine) / len(mine), "share_of_genuine": float(ratio.mean()),
            "interval": bounds, "by_style": by_style,
        }  # fmt: skip
    write_json(RESULTS / f"{name}.json", result | {"runs": told})
    strips = []
    for row in rows[:10]:
        label = next(iter(recipe.verify.attacks))
        strips.append(load_file(cache / f"{label}-{row}.safetensors")["real"])
        strips += [load_file(cache / f"{each}-{row}.safetensors")["images"] for each in recipe.verify.attacks]
    grid(torch.cat(strips), 2 + 4 * len(recipe.verify.attacks), scale=2).save(RESULTS / f"{name}.png")
    print(json.dumps(result, indent=1))


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("judges", "base", "personalize"))
    parser.add_argument("--count", type=int, default=600, help="base: pictures to generate")
    parser.add_argument("--set-name", default="testing", choices=("testing", "tuning"))
    parser.add_argument("--per-style", type=int, default=4, help="personalize: subjects of each of the five styles")
    parser.add_argument("--recipe", default="avatar-attacks", help="personalize: its attacks and sampling are used")
    parser.add_argument("--set", action="append", default=[], help="personalize: change a value of the recipe")
    parser.add_argument("--name", default="avatar-personalization", help="personalize: name of the result")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.what == "judges":
        judges(args.data)
    elif args.what == "base":
        base(args.data, args.count)
    else:
        personalize(args.data, args.set_name, args.per_style, args.recipe, args.set, args.name, args.workers)


if __name__ == "__main__":
    main()
