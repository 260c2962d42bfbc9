"""Cloaks, hardened models and what undoes them, side by side: who can still be learnt from what.

python images_table.py FOLDER                                     resumes; writes docs/results/images.json and images.png
python images_table.py FOLDER --model tripwire=OUT/model ...      hardened models beside the cloaks

Every cloak of recipes/avatar-images.yaml is put on the `attack` pictures of some protected subjects of registries/avatars.yaml.
Attackers then have all of them cloaked, one of them clean, only one of them cloaked, or all of them purified; on hardened models
they have the clean ones. A unit is a file in FOLDER/units; what is there is not run again. Similarity is to the subject's
`reference` pictures; quality is the share of pictures that are as near to one of the base's pictures of the class as those are to
each other.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch
from evaluate import RESULTS
from torch import Tensor

from guardsmith.attacks import AttackData, draw_after_attack
from guardsmith.cloak import cloak_pictures
from guardsmith.drawing import drawn_by
from guardsmith.gate import interval
from guardsmith.images import open_pictures
from guardsmith.metrics.fidelity import features
from guardsmith.metrics.identity import similarity
from guardsmith.models import DiffusionModel, load_model, weights_digest
from guardsmith.processes import processes
from guardsmith.prompts import class_prompt
from guardsmith.purifiers import purified
from guardsmith.recipe import PixelSpec, Recipe, load_recipe
from guardsmith.records import folder_digest, write_json
from guardsmith.registry import load_registry
from guardsmith.sampling import grid

REGISTRY = Path(__file__).parent.parent.parent / "registries" / "avatars.yaml"
IDENTIFIER = "zwx"
COUNT = 12
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dreambooth": ("dreambooth", {"learning_rate": 3e-4, "steps": 300, "batch_size": 2}),
    "lora": ("lora", {"learning_rate": 2e-3, "steps": 300, "batch_size": 2, "rank": 4}),
    "textual-inversion": ("textual_inversion", {"learning_rate": 2e-2, "steps": 300, "batch_size": 4, "vectors": 4}),
    "cdl": ("cdl", {"learning_rate": 3e-4, "steps": 300, "batch_size": 2, "train_text_encoder": False}),
}


def widened(spec: PixelSpec, budget: float) -> PixelSpec:
    """A cloak with another budget, and steps that are the same share of it."""
    changed = {"budget": budget}
    if "step" in spec.params:
        changed["step"] = spec.params["step"] * budget / spec.params["budget"]
    return spec.model_copy(update={"params": spec.params | changed})


def conditions(recipe: Recipe, attack: str) -> list[str]:
    """What the attacker has of cloaked pictures; purifiers with the two attacks of the red-teaming framework only."""
    pure = [f"purified by {name}" for name in recipe.purifiers] if attack in ("dreambooth", "cdl") else []
    return ["all cloaked", "one clean", "one cloaked", *pure]


def given(model: DiffusionModel, recipe: Recipe, clean: Tensor, cloaked: Tensor, condition: str, noun: str) -> Tensor:
    """The attacker's pictures."""
    if condition == "one clean":
        return torch.cat([clean[:1], cloaked[1:]])
    if condition == "one cloaked":
        return torch.cat([cloaked[:1], clean[1:]])
    if condition.startswith("purified by "):
        spec = recipe.purifiers[condition.removeprefix("purified by ")]
        return purified(spec.name, spec.params, model, cloaked, class_noun=noun, seed=0)
    return cloaked


def class_like(images: Tensor, known: Tensor) -> float:
    """Share of pictures whose nearest class picture is no further than that of almost every class picture."""
    seen, others = features(images), features(known)
    apart = torch.cdist(others, others).fill_diagonal_(torch.inf).amin(1)
    return float((torch.cdist(seen, others).amin(1) <= apart.quantile(0.99)).float().mean())


def cloaked_files(folder: Path, recipe: Recipe, cloak: str, subject: str) -> dict[str, Any]:
    """Cloak a subject's pictures, unless they are there; returns the record."""
    place = folder / "cloaked" / f"{cloak}-{folder_digest(recipe.cloaks[cloak].model_dump())}" / subject
    if not place.exists():
        who = next(s for s in load_registry(REGISTRY).subjects if s.id == subject)
        spec = recipe.cloaks[cloak]
        place.parent.mkdir(parents=True, exist_ok=True)
        cloak_pictures(
            [image.path for image in who.images_of("attack")], place, bases=[recipe.base], method=spec.name,
            params=spec.params, class_noun=who.class_noun, identifier="sks", class_images=recipe.verify.class_images,
            recipe=recipe,
        )  # fmt: skip
    told: dict[str, Any] = json.loads((place / "report" / "cloak.json").read_text())
    return told | {"folder": str(place)}


def unit(
    folder: Path, recipe: Recipe, source: str, guard: str, attack: str, condition: str, subject: str
) -> dict[str, Any]:
    """One attack on one subject."""
    model = load_model(source)
    size, who = model.image_size, next(s for s in load_registry(REGISTRY).subjects if s.id == subject)
    clean = open_pictures([image.path for image in who.images_of("attack")], size)
    settings: list[Any] = [
        weights_digest(model.folder),
        recipe.sampling.model_dump(),
        ATTACKS[attack],
        condition,
        subject,
    ]
    cloaked = clean
    if guard in recipe.cloaks:
        record = cloaked_files(folder, recipe, guard, subject)
        place = Path(record["folder"])
        cloaked = open_pictures([place / each["file"] for each in record["pictures"]], size)
        settings += [[each["sha256"] for each in record["pictures"]]]
    if condition.startswith("purified by "):
        settings += [recipe.purifiers[condition.removeprefix("purified by ")].model_dump()]
    file = folder / "units" / f"{folder_digest(*settings)}.json"
    if file.exists():
        told: dict[str, Any] = json.loads(file.read_text())
        return told | {"guard": guard}
    sampling = recipe.sampling.model_dump()
    prompts = [class_prompt(who.class_noun)] * recipe.verify.class_images
    kept = folder / f"class-{folder_digest(settings[0], prompts, sampling)}.safetensors"
    prior = drawn_by(model, recipe, prompts, 10_000, kept, "class pictures")
    name, params = ATTACKS[attack]
    images = given(model, recipe, clean, cloaked, condition, who.class_noun)
    drawn, losses = draw_after_attack(
        model,
        name,
        params,
        AttackData(images, prior, IDENTIFIER, who.class_noun),
        seed=0,
        count=COUNT,
        sampling=sampling,
    )
    scores = similarity(drawn, open_pictures([image.path for image in who.images_of("reference")], size))
    told = {
        "guard": guard, "attack": attack, "condition": condition, "subject": subject, "scores": scores,
        "quality": class_like(drawn, prior), "last_loss": losses[-1],
    }  # fmt: skip
    grid(torch.cat([images[:4], drawn[:8]]), 12, scale=2).save(file.with_suffix(".png"))
    write_json(file, told)
    return told


def main() -> None:
    """Cloak, attack what has no result yet, and write everything down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subjects", nargs="+", default=["mira", "lena", "tock"])
    parser.add_argument("--cloaks", nargs="+", default=None)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of a hardened model")
    parser.add_argument("--budget", type=float, help="of every cloak, of 255; its steps grow with it")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    recipe = load_recipe("avatar-images", args.set)
    if args.budget is not None:
        recipe = recipe.model_copy(
            update={"cloaks": {name: widened(spec, args.budget) for name, spec in recipe.cloaks.items()}}
        )
    (args.folder / "units").mkdir(parents=True, exist_ok=True)
    cloaks = args.cloaks or list(recipe.cloaks)
    hardened = dict(entry.split("=", 1) for entry in args.model)
    with processes(args.workers) as (pool, _):
        pending = {
            pool.submit(cloaked_files, args.folder, recipe, cloak, subject): (cloak, subject)
            for cloak in cloaks for subject in args.subjects
        }  # fmt: skip
        costs: dict[str, list[dict[str, Any]]] = {}
        for future in as_completed(pending):
            cloak, subject = pending[future]
            costs.setdefault(cloak, []).append(future.result())
            print("cloaked", cloak, subject, flush=True)
        jobs = [
            (recipe.base, guard, attack, condition, subject)
            for guard in ("none", *cloaks) for attack in args.attacks for subject in args.subjects
            for condition in (conditions(recipe, attack) if guard in recipe.cloaks else ["all cloaked"])
        ]  # fmt: skip
        jobs += [
            (source, name, attack, "all cloaked", subject)
            for name, source in hardened.items() for attack in args.attacks for subject in args.subjects
        ]  # fmt: skip
        futures = [pool.submit(unit, args.folder, recipe, *job) for job in jobs]
        found = []
        for future in as_completed(futures):
            told = future.result()
            found.append(told)
            known = [score for score in told["scores"] if score is not None]
            mean = sum(known) / len(known) if known else float("nan")
            print(told["guard"], told["attack"], told["condition"], told["subject"], f"{mean:.2f}", flush=True)
    rows = []
    for guard in ("none", *cloaks, *hardened):
        for attack in args.attacks:
            for condition in dict.fromkeys(told["condition"] for told in found if told["guard"] == guard):
                units = [t for t in found if (t["guard"], t["attack"], t["condition"]) == (guard, attack, condition)]
                if not units:
                    continue
                units.sort(key=lambda told: args.subjects.index(told["subject"]))
                what = interval([told["scores"] for told in units])
                rows.append({
                    "guard": guard, "attack": attack, "condition": "clean" if guard not in recipe.cloaks else condition,
                    "similarity": what and what[:3], "quality": sum(told["quality"] for told in units) / len(units),
                    "subjects": {told["subject"]: told["scores"] for told in units},
                })  # fmt: skip
    looks = {
        cloak: {
            "seconds_a_picture": sum(t["seconds"] for t in told) / sum(len(t["pictures"]) for t in told),
            "psnr_db": sum(p["psnr_db"] for t in told for p in t["pictures"]) / sum(len(t["pictures"]) for t in told),
            "perceptual_distance": sum(p["perceptual_distance"] for t in told for p in t["pictures"])
            / sum(len(t["pictures"]) for t in told),
            "params": recipe.cloaks[cloak].params,
        }
        for cloak, told in costs.items()
    }
    write_json(RESULTS / "images.json", {
        "command": f"python images_table.py FOLDER --subjects {' '.join(args.subjects)}"
        + (f" --budget {args.budget:g}" if args.budget is not None else "")
        + "".join(f" --model {name}=FOLDER" for name in hardened) + "".join(f" --set {change}" for change in args.set),
        "base_digest": weights_digest(load_model(recipe.base).folder), "attacks": ATTACKS,
        "purifiers": {name: spec.model_dump() for name, spec in recipe.purifiers.items()}, "cloaks": looks, "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
