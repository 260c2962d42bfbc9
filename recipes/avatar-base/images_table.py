"""Cloaks, hardened models and what undoes them, side by side: who can still be learnt from what. `images.sh` runs all of it.

python images_table.py FOLDER --write-registry                    FOLDER/registry.yaml: the subjects and controls asked for
python images_table.py FOLDER --budget 32 --model tripwire=OUT/model ...      resumes; writes docs/results/images.json and .jpg
python images_table.py FOLDER --cloaks mist --conditions purified --attacks lora     adds these rows to images.json
python images_table.py FOLDER ... --tell                          the same of the units that are there, without running any
python images_table.py FOLDER --plot                              docs/results/images.svg of images.json; needs matplotlib
python images_table.py FOLDER --markdown                          images.json as tables, for docs/results/images.md

Every cloak of recipes/avatar-images.yaml is put on the `attack` pictures of some protected subjects of registries/avatars.yaml.
Attackers then have all of them cloaked, one of them clean, only one of them cloaked, or all of them purified; on hardened models
they have the clean ones, of the protected subjects and of controls. They train for 150 steps, half of what verifications take,
which is enough on the base. A unit is a file in FOLDER/units; what is there is not run again, and rows of images.json that were
not asked for stay. Similarity is to the subject's `reference` pictures; distance says how well pictures are drawn: how far they
are from the base's pictures of the class, by features that know no cloak, where those are 1 from each other.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from concurrent.futures import as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from evaluate import RESULTS
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from guardsmith.attacks import AttackData, draw_after_attack
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import PixelSpec, Recipe
from guardsmith.core.atomic_io import folder_digest, write_json
from guardsmith.core.images import open_pictures, to_tensor
from guardsmith.diffusion.cache import drawn_by
from guardsmith.diffusion.prompts import class_prompt
from guardsmith.diffusion.sampling import grid
from guardsmith.gate.statistics import interval
from guardsmith.metrics.fidelity import features
from guardsmith.metrics.identity import similarity
from guardsmith.models.checkpoint import DiffusionModel, load_model, weights_digest
from guardsmith.pictures.cloaking import cloak_pictures
from guardsmith.purifiers import purified
from guardsmith.registry.loader import Subject, load_registry
from guardsmith.runtime.processes import processes

REGISTRY = Path(__file__).parent.parent.parent / "registries" / "avatars.yaml"
IDENTIFIER = "zwx"
COUNT = 12
SHOWN = (
    8  # of them are on a unit's sheet, behind the four that the attacker had; how well they are drawn is told of these
)
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dreambooth": ("dreambooth", {"learning_rate": 3e-4, "steps": 150, "batch_size": 2}),
    "lora": ("lora", {"learning_rate": 2e-3, "steps": 150, "batch_size": 2, "rank": 4}),
    "textual-inversion": ("textual_inversion", {"learning_rate": 2e-2, "steps": 150, "batch_size": 4, "vectors": 4}),
    "cdl": ("cdl", {"learning_rate": 3e-4, "steps": 150, "batch_size": 2, "train_text_encoder": False}),
}
SWEPT = ("dreambooth", "lora", "textual-inversion")  # those that RID's paper has


class Unit(NamedTuple):
    """One attack on one person, by its place in the table.

    Attributes:
        guard: "none", a cloak of the recipe ("aspl", or "aspl at 8" with another budget) or the name of a hardened model.
        attack: of `ATTACKS`.
        condition: what the attacker has.
        who: id of the person.
    """

    guard: str
    attack: str
    condition: str
    who: str


def changed(spec: PixelSpec, budget: float) -> PixelSpec:
    """A cloak with another budget, and steps that are the same share of it; or a purifier that counts on it."""
    params = {"budget": budget}
    if "step" in spec.params:
        params["step"] = spec.params["step"] * budget / spec.params["budget"]
    return spec.model_copy(update={"params": spec.params | params})


def with_budgets(recipe: Recipe, budget: float, swept: list[str], sweep: list[float]) -> Recipe:
    """The recipe with this budget, and some cloaks with others beside it."""
    cloaks = {name: changed(spec, budget) for name, spec in recipe.cloaks.items()}
    cloaks |= {f"{name} at {other:g}": changed(recipe.cloaks[name], other) for name in swept for other in sweep}
    purifiers = {
        name: changed(spec, budget) if "budget" in spec.params else spec for name, spec in recipe.purifiers.items()
    }
    return recipe.model_copy(update={"cloaks": cloaks, "purifiers": purifiers})


@lru_cache
def everyone() -> dict[str, Subject]:
    """Subjects and controls of the registry by id."""
    registry = load_registry(REGISTRY)
    return {each.id: each for each in (*registry.subjects, *registry.controls)}


@lru_cache(maxsize=8)
def model_at(source: str) -> tuple[DiffusionModel, str]:
    """A model and its digest, read once by a process; attacks leave it as it is."""
    model = load_model(source)
    return model, weights_digest(model.folder)


def write_registry(
    file: Path, subjects: list[str], controls: list[str] | None = None, registry: Path = REGISTRY
) -> Path:
    """A registry of some of the subjects of another one, and of some of its controls (or all of them)."""
    told = yaml.safe_load(registry.read_text())
    for role, ids in (("subjects", subjects), ("controls", controls)):
        told[role] = [each for each in told[role] if ids is None or each["id"] in ids]
        for each in told[role]:
            for image in each["images"]:
                image["path"] = str(registry.parent / image["path"])
    file.write_text(yaml.safe_dump(told, sort_keys=False))
    return file


def given(
    folder: Path, model: DiffusionModel, recipe: Recipe, clean: Tensor, cloaked: Tensor, condition: str, noun: str
) -> Tensor:
    """The attacker's pictures; purified ones are kept, for every attack takes the same."""
    if condition == "one clean":
        return torch.cat([clean[:1], cloaked[1:]])
    if condition == "one cloaked":
        return torch.cat([cloaked[:1], clean[1:]])
    if not condition.startswith("purified by "):
        return cloaked
    spec = recipe.purifiers[condition.removeprefix("purified by ")]
    file = folder / "purified" / f"{folder_digest(spec.model_dump(), cloaked.tolist())}.safetensors"
    if file.exists():
        return load_file(file)["images"]
    pure = purified(spec.name, spec.params, model, cloaked, class_noun=noun, seed=0)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    save_file({"images": pure.contiguous()}, temporary)
    temporary.replace(file)
    return pure


def class_pictures(folder: Path, recipe: Recipe, source: str, noun: str) -> Tensor:
    """What a model draws of a class; kept."""
    model, weights = model_at(source)
    prompts = [class_prompt(noun)] * recipe.verify.class_images
    digest = folder_digest(weights, prompts, recipe.sampling.model_dump())
    return drawn_by(model, recipe.sampling, prompts, 10_000, folder / f"class-{digest}.safetensors", "class pictures")


def class_distance(images: Tensor, known: Tensor) -> list[float]:
    """Of every picture: how far its nearest class picture is, as a multiple of how far those are from each other."""
    seen, others = features(images), features(known)
    apart = torch.cdist(others, others).fill_diagonal_(torch.inf).amin(1).mean()
    found: list[float] = (torch.cdist(seen, others).amin(1) / apart).tolist()
    return found


def cloaked_files(folder: Path, recipe: Recipe, cloak: str, subject: str) -> dict[str, Any]:
    """Cloak a subject's pictures, unless they are there; returns the record."""
    spec, who = recipe.cloaks[cloak], everyone()[subject]
    place = folder / "cloaked" / f"{cloak.replace(' ', '-')}-{folder_digest(spec.model_dump())}" / subject
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        cloak_pictures(
            [image.path for image in who.images_of("attack")], place, bases=[recipe.base], method=spec.name,
            params=spec.params, class_noun=who.class_noun, identifier="sks", class_images=recipe.verify.class_images,
            recipe=recipe,
        )  # fmt: skip
    told: dict[str, Any] = json.loads((place / "report" / "cloak.json").read_text())
    return told | {"folder": str(place)}


def run(folder: Path, recipe: Recipe, unit: Unit, source: str, tell: bool) -> tuple[Unit, Path | None]:
    """Run one attack, unless it was; returns its file.

    Args:
        folder: of everything.
        recipe: cloaks, purifiers and sampling.
        unit: which.
        source: the model.
        tell: return nothing instead of running it.
    """
    (model, digest), who = model_at(source), everyone()[unit.who]
    clean = open_pictures([image.path for image in who.images_of("attack")], model.image_size)
    sampling = recipe.sampling.model_dump()
    settings: list[Any] = [digest, sampling, ATTACKS[unit.attack], unit.condition, unit.who, COUNT]
    cloaked = clean
    if unit.guard in recipe.cloaks:
        record = cloaked_files(folder, recipe, unit.guard, unit.who)
        place = Path(record["folder"])
        cloaked = open_pictures([place / each["file"] for each in record["pictures"]], model.image_size)
        settings += [[each["sha256"] for each in record["pictures"]]]
    if unit.condition.startswith("purified by "):
        settings += [recipe.purifiers[unit.condition.removeprefix("purified by ")].model_dump()]
    file = folder / "units" / f"{folder_digest(*settings)}.json"
    if file.exists() or tell:
        return unit, file if file.exists() else None
    prior = class_pictures(folder, recipe, source, who.class_noun)
    name, params = ATTACKS[unit.attack]
    images = given(folder, model, recipe, clean, cloaked, unit.condition, who.class_noun)
    data = AttackData(images, prior, IDENTIFIER, who.class_noun)
    drawn, losses = draw_after_attack(model, name, params, data, seed=0, count=COUNT, sampling=sampling)
    scores = similarity(drawn, open_pictures([image.path for image in who.images_of("reference")], model.image_size))
    grid(torch.cat([images[:4], drawn[:SHOWN]]), 4 + SHOWN).save(file.with_suffix(".png"))
    write_json(file, {"scores": scores, "last_loss": losses[-1]})
    return unit, file


def units_of(
    recipe: Recipe, cloaks: list[str], washed: list[str], models: list[str], subjects: list[str], controls: list[str]
) -> list[Unit]:
    """Everything asked for, what matters most first."""
    main = [name for name in cloaks if " at " not in name]
    found = [
        Unit(guard, attack, "clean", who)
        for guard in ("none", *models) for attack in ATTACKS for who in (*subjects, *controls)
    ]  # fmt: skip
    for condition in ("all cloaked", "one clean", "one cloaked"):
        found += [Unit(guard, attack, condition, who) for guard in main for attack in ATTACKS for who in subjects]
    swept = [name for name in cloaks if " at " in name]
    found += [Unit(guard, attack, "all cloaked", who) for guard in swept for attack in SWEPT for who in subjects]
    return found + [
        Unit(guard, attack, f"purified by {name}", who)
        for attack in ATTACKS for guard in ("none", *washed) for name in recipe.purifiers for who in subjects
    ]  # fmt: skip


def distances(folder: Path, recipe: Recipe, unit: Unit, file: Path) -> list[float]:
    """`class_distance` of the drawn pictures that a unit's sheet shows."""
    with Image.open(file.with_suffix(".png")) as sheet:
        drawn = torch.stack(to_tensor(sheet).chunk(4 + SHOWN, 2)[4:])
    return class_distance(drawn, class_pictures(folder, recipe, recipe.base, everyone()[unit.who].class_noun))


def rows_of(
    folder: Path, recipe: Recipe, done: dict[Unit, Path], subjects: list[str], controls: list[str]
) -> list[dict[str, Any]]:
    """A row for every guard, attack and condition of which all subjects (or all controls) are there."""
    rows = []
    for people, ids in (("subjects", subjects), ("controls", controls)):
        for guard, attack, condition in dict.fromkeys(unit[:3] for unit in done if unit.who in ids):
            units = [Unit(guard, attack, condition, who) for who in ids]
            if not all(unit in done for unit in units):
                continue
            scores = [json.loads(done[unit].read_text())["scores"] for unit in units]
            seen, looks = interval(scores), interval([distances(folder, recipe, unit, done[unit]) for unit in units])
            rows.append({
                "guard": guard, "attack": attack, "condition": condition, "people": people,
                "similarity": seen and seen.ends, "distance": looks and looks.ends,
                "of": dict(zip(ids, scores, strict=True)),
            })  # fmt: skip
    return rows


def in_order(rows: list[dict[str, Any]], guards: list[str]) -> list[dict[str, Any]]:
    """The rows of these guards first, in their order, then those of others as they came."""
    place = {name: number for number, name in enumerate(guards)}
    return sorted(rows, key=lambda row: place.get(row["guard"], len(place)))


def looks_of(recipe: Recipe, costs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What every cloak did to the pictures, and what it took."""
    found = {}
    for cloak, told in costs.items():
        pictures = [each for record in told for each in record["pictures"]]
        mean = {key: sum(each[key] for each in pictures) / len(pictures) for key in ("psnr_db", "perceptual_distance")}
        seconds = sum(record["seconds"] for record in told) / len(pictures)
        found[cloak] = {"seconds_a_picture": seconds, **mean, "params": recipe.cloaks[cloak].params}
    return found


def sheet(done: dict[Unit, Path], who: str, file: Path) -> None:
    """What DreamBooth was given and drew, a line for every guard: four pictures and eight."""
    shown = [
        unit for unit in done
        if unit.attack == "dreambooth" and unit.condition in ("clean", "all cloaked") and unit.who == who
    ]  # fmt: skip
    pictures = [Image.open(done[unit].with_suffix(".png")) for unit in shown if " at " not in unit.guard]
    out = Image.new("RGB", (pictures[0].width, sum(each.height for each in pictures)))
    top = 0
    for each in pictures:
        out.paste(each, (0, top))
        top += each.height
    out.save(file, quality=88)


def in_turn(conditions: Iterable[str]) -> list[str]:
    """Each condition once, those of washed pictures behind the others."""
    return sorted(dict.fromkeys(conditions), key=lambda condition: condition.startswith("purified"))


def plot(told: dict[str, Any], file: Path) -> None:
    """Similarity of what attackers draw: every guard, what they have of the pictures, and budgets."""
    import matplotlib.pyplot as plt

    rows = [row for row in told["rows"] if row["people"] == "subjects" and row["similarity"]]
    at = {(row["guard"], row["attack"], row["condition"]): row for row in rows}
    guards = [g for g in dict.fromkeys(row["guard"] for row in rows) if " at " not in g]
    models = [guard for guard in guards if guard in told["hardened"]]
    cloaks = [guard for guard in guards if guard not in ("none", *models)]
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=plt.colormaps["tab20"].colors)
    figure, axes = plt.subplots(3, 2, figsize=(18, 15), constrained_layout=True)

    def points(axis: Any, labels: list[str], found: list[Any], name: str, shift: float) -> None:
        here = [(i, row["similarity"]) for i, row in enumerate(found) if row is not None]
        low = [[mean - low for _, (mean, low, _) in here], [high - mean for _, (mean, _, high) in here]]
        axis.errorbar([i + shift for i, _ in here], [s[0] for _, s in here], low, fmt="o", label=name, capsize=2)
        axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right")

    order = ["none", *cloaks, *models]
    for number, attack in enumerate(ATTACKS):
        found = [at.get((g, attack, "all cloaked" if g in cloaks else "clean")) for g in order]
        points(axes[0, 0], order, found, attack, 0.16 * (number - 1.5))
    conditions = in_turn(row["condition"] for row in rows if row["guard"] in cloaks)
    for axis, attack in zip(axes.flat[1:], ATTACKS, strict=False):
        shown = [c for c in cloaks if any((c, attack, f) in at for f in conditions if f.startswith("purified"))]
        for number, cloak in enumerate(shown):
            found = [at.get((cloak, attack, condition)) for condition in conditions]
            points(axis, conditions, found, cloak, 0.7 * (number / max(len(shown) - 1, 1) - 0.5))
        axis.axhline(at["none", attack, "clean"]["similarity"][0], color="grey", linestyle=":")
        axis.set_title(f"what {attack} has of cloaked pictures (dotted: clean)")
    for name in dict.fromkeys(row["guard"].partition(" at ")[0] for row in rows if " at " in row["guard"]):
        for attack in SWEPT:
            line = {0.0: at["none", attack, "clean"]["similarity"][0]}
            for (guard, which, condition), row in at.items():
                if guard.partition(" at ")[0] == name and which == attack and condition == "all cloaked":
                    line[float(guard.partition(" at ")[2] or told["budget"])] = row["similarity"][0]
            axes[2, 1].plot(sorted(line), [line[b] for b in sorted(line)], marker="o", label=f"{name}, {attack}")
    axes[2, 1].set(title="budgets", xlabel="largest change of a pixel, of 255")
    axes[0, 0].set_title("all pictures cloaked, or clean ones on hardened models")
    for axis in axes.flat:
        axis.set_ylabel("similarity to the subject")
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plt.rcParams["svg.hashsalt"] = "guardsmith"
    figure.savefig(file, metadata={"Date": None})


def markdown(told: dict[str, Any]) -> str:
    """The rows as tables: guards by attacks, what attackers have by cloaks, budgets."""
    at = {(r["guard"], r["attack"], r["condition"], r["people"]): r for r in told["rows"]}
    guards = list(dict.fromkeys(row["guard"] for row in told["rows"]))
    cloaks = [guard for guard in guards if guard in told["cloaks"] and " at " not in guard]
    models = [guard for guard in guards if guard in told["hardened"]]

    def cell(guard: str, attack: str, condition: str, people: str = "subjects", distance: bool = True) -> str:
        row = at.get((guard, attack, condition, people))
        if row is None or row["similarity"] is None:
            return ""
        mean, low, high = row["similarity"]
        looks = f"; {row['distance'][0]:.2f}" if distance and row["distance"] else ""
        return f"{mean:z.2f} [{low:z.2f}, {high:z.2f}]{looks}"

    def table(heading: list[str], lines: list[list[str]]) -> list[str]:
        return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *lines)] + [""]

    out = table(["", *ATTACKS], [["nothing", *(cell("none", attack, "clean") for attack in ATTACKS)]]
                + [[cloak, *(cell(cloak, attack, "all cloaked") for attack in ATTACKS)] for cloak in cloaks]
                + [[model, *(cell(model, attack, "clean") for attack in ATTACKS)] for model in models])  # fmt: skip
    out += table(["controls", *ATTACKS], [[guard, *(cell(guard, attack, "clean", "controls") for attack in ATTACKS)]
                                          for guard in ("none", *models)])  # fmt: skip
    shown = {name: told["cloaks"][name] for name in cloaks}
    lines = [
        [name, f"{look['psnr_db']:.1f}", f"{look['perceptual_distance']:.3f}", f"{look['seconds_a_picture']:.3g}"]
        for name, look in shown.items()
    ]
    out += table(["", "PSNR, dB", "perceptual distance", "seconds a picture"], lines)
    conditions = in_turn(row["condition"] for row in told["rows"] if row["guard"] in (*cloaks, "none"))
    columns = ["none", *cloaks]
    for attack in ATTACKS:
        lines = [
            [condition, *(cell(cloak, attack, condition, distance=False) for cloak in columns)]
            for condition in conditions
        ]
        out += table([attack, *columns], [line for line in lines if any(line[1:])])
    swept = [guard for guard in guards if " at " in guard]
    out += table(
        ["budget", *SWEPT], [[guard, *(cell(guard, attack, "all cloaked") for attack in SWEPT)] for guard in swept]
    )
    return "\n".join(out)


def main() -> None:
    """Cloak, attack what has no result yet, and write everything down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subjects", nargs="+", default=["mira", "lena"])
    parser.add_argument("--controls", nargs="+", default=["nora", "sven"])
    parser.add_argument("--cloaks", nargs="+", help="of the recipe; all by default")
    parser.add_argument("--washed", nargs="*", help="cloaks that are purified; all by default")
    parser.add_argument("--conditions", nargs="+", help="only what begins like this, and only of the cloaks asked for")
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS, help="all by default")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of a hardened model")
    parser.add_argument("--budget", type=float, default=32, help="of every cloak, of 255; its steps grow with it")
    parser.add_argument("--sweep", type=float, nargs="*", default=[], help="other budgets")
    parser.add_argument("--swept", nargs="*", default=["aspl", "rid"], help="cloaks that have those, too")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--workers", type=int, default=2)
    for name in ("write-registry", "tell", "plot", "markdown"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    file = RESULTS / "images.json"
    if args.plot or args.markdown:
        told = json.loads(file.read_text())
        if args.markdown:
            print(markdown(told))
        else:
            plot(told, file.with_suffix(".svg"))
        return
    (args.folder / "units").mkdir(parents=True, exist_ok=True)
    if args.write_registry:
        write_registry(args.folder / "registry.yaml", args.subjects, args.controls)
        return
    asked = load_recipe("avatar-images", args.set)
    main_cloaks = args.cloaks if args.cloaks is not None else list(asked.cloaks)
    recipe = with_budgets(asked, args.budget, args.swept, args.sweep)
    cloaks = [name for name in recipe.cloaks if name.partition(" at ")[0] in main_cloaks]
    washed = args.washed if args.washed is not None else main_cloaks
    sources = {"none": recipe.base, **dict(entry.split("=", 1) for entry in args.model)}
    units = units_of(recipe, cloaks, washed, list(sources)[1:], args.subjects, args.controls)
    whole = args.conditions is None and args.attacks == list(ATTACKS)
    if args.conditions is not None:
        begins = tuple(args.conditions)
        units = [unit for unit in units if unit.condition.startswith(begins) and unit.guard in ("none", *cloaks)]
    units = [unit for unit in units if unit.attack in args.attacks]
    costs: dict[str, list[dict[str, Any]]] = {}
    done: dict[Unit, Path] = {}
    with processes(args.workers) as (pool, _):
        pending = {pool.submit(cloaked_files, args.folder, recipe, c, who): c for c in cloaks for who in args.subjects}
        for future in as_completed(pending):
            costs.setdefault(pending[future], []).append(future.result())
            print("cloaked", pending[future], flush=True)
        running = [
            pool.submit(run, args.folder, recipe, unit, sources.get(unit.guard, recipe.base), args.tell)
            for unit in units
        ]
        for ended in as_completed(running):
            unit, place = ended.result()
            if place is None:
                continue
            done[unit] = place
            scores = [score for score in json.loads(place.read_text())["scores"] if score is not None]
            print(*unit, f"{sum(scores) / len(scores):.2f}" if scores else "-", flush=True)
    done = {unit: done[unit] for unit in units if unit in done}
    rows = rows_of(args.folder, recipe, done, args.subjects, args.controls)
    known = json.loads(file.read_text()) if file.exists() else {"rows": [], "cloaks": {}, "hardened": {}}
    keys = ("guard", "attack", "condition", "people")
    new = {tuple(row[key] for key in keys) for row in rows}
    rows += [row for row in known["rows"] if tuple(row[key] for key in keys) not in new]
    looks = looks_of(recipe, costs)
    # Seconds are compared within one run only: those of cloaks that were made again for more rows are not.
    looks = known["cloaks"] | looks if whole else looks | known["cloaks"]
    hardened = {}
    for name, source in list(sources.items())[1:]:
        told = json.loads((Path(source).parent / "harden.json").read_text())
        hardened[name] = {key: told[key] for key in ("seconds", "unet_forward_equivalents", "params", "model_digest")}
    write_json(file, {
        "command": "recipes/avatar-base/images.sh FOLDER", "base_digest": model_at(recipe.base)[1],
        "budget": args.budget, "attacks": ATTACKS, "pictures": COUNT,
        "purifiers": {name: spec.model_dump() for name, spec in recipe.purifiers.items()},
        "cloaks": looks, "hardened": known["hardened"] | hardened,
        "rows": in_order(rows, ["none", *recipe.cloaks]),
    })  # fmt: skip
    if whole:
        sheet(done, args.subjects[0], file.with_suffix(".jpg"))


if __name__ == "__main__":
    main()
