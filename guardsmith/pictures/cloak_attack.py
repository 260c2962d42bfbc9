"""Attacks on cloaked pictures: whether a model can be personalized on pictures as they are, purified, and purified with CDL.

Three attackers train on the same pictures of one subject with the same settings: DreamBooth on the pictures as they are,
DreamBooth on purified ones, and contrastive decoupling learning on purified ones (hf.co/papers/2406.18944). What they draw is
compared with reference pictures that were not trained on.

    <output>/purified/NAME.png      the pictures as the second and third attacker have them
    <output>/ATTACKER/000.png ...   what they draw
    <output>/redteam.json           similarity of every picture, with intervals
    <output>/grid.png               all of it on a page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from guardsmith.attacks import AttackData, draw_after_attack
from guardsmith.cloaks.pixels import load_bases
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import whole_folder, write_json
from guardsmith.core.errors import UserError
from guardsmith.core.images import fingerprint, near_duplicates, open_each, open_pictures, to_pil
from guardsmith.core.progress import stage
from guardsmith.diffusion.sampling import grid
from guardsmith.gate.statistics import interval
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import weights_digest
from guardsmith.pictures.cloaking import check_names, class_pictures
from guardsmith.purifiers import find_purifier, purified

ATTACKERS = ("dreambooth", "purified-dreambooth", "purified-cdl")


def attack_cloaked(
    files: Sequence[Path],
    references: Sequence[Path],
    output: Path,
    *,
    base: str,
    purifier: str,
    purifier_params: dict[str, Any],
    params: dict[str, Any],
    class_noun: str,
    identifier: str,
    class_images: int,
    count: int,
    recipe: Recipe,
    judge: str,
    judge_model: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the three attackers; the folder appears whole.

    Args:
        files: the attackers' pictures of the subject.
        references: other pictures of the subject, clean; none of them among the files.
        output: a folder that is not there yet.
        base: the model that is personalized.
        purifier: a name in `PURIFIERS`.
        purifier_params: values of its config.
        params: values of DreamBooth's config, for all three.
        class_noun: the subject's class.
        identifier: the attackers' word for it.
        class_images: for prior preservation.
        count: pictures that each attacker draws.
        recipe: its `sampling` counts.
        judge: see `load_judge`.
        judge_model: likewise.
        seed: of everything random.

    Returns:
        The content of `redteam.json`.

    Raises:
        UserError: a picture or the base cannot be used; the output is there already.
        RunFailed: an attack diverged.
    """
    check_inputs(files, references, output)
    [model] = load_bases([base])
    entry = find_purifier(purifier)
    originals, reference_images = (open_pictures(paths, model.image_size) for paths in (files, references))
    loaded_judge = load_judge(judge, judge_model)
    with stage(f"purifying ({purifier})", 1) as bar:
        pure = purified(purifier, purifier_params, model, originals, class_noun=class_noun, seed=seed)
        bar()
    prior = class_pictures(model, class_noun, class_images, recipe)
    rows: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    with stage("attackers", len(ATTACKERS)) as bar:
        for name in ATTACKERS:
            data = AttackData(pure if name.startswith("purified") else originals, prior, identifier, class_noun)
            attack = "cdl" if name.endswith("cdl") else "dreambooth"
            pictures[name], losses = draw_after_attack(
                model, attack, params, data, seed=seed, count=count, sampling=recipe.sampling.model_dump()
            )
            scores = loaded_judge.similarity(pictures[name], reference_images)
            rows[name] = judged_row(scores) | {"last_loss": losses[-1]}
            bar()
    record = {
        "base": base, "base_digest": weights_digest(model.folder), "judge": judge, "purifier": purifier,
        "purifier_params": entry.config(**purifier_params).model_dump(mode="json"), "params": params,
        "class_noun": class_noun, "identifier": identifier, "pictures": [file.name for file in files],
        "references": len(references), "seed": seed, "attackers": rows,
    }  # fmt: skip
    with whole_folder(output) as place:
        save_pictures(place / "purified", [file.stem for file in files], pure)
        for name, images in pictures.items():
            save_pictures(place / name, [f"{i:03d}" for i in range(len(images))], images)
        save_page(place / "grid.png", [reference_images, originals, pure, *pictures.values()], model.image_size)
        write_json(place / "redteam.json", record)
    return record


def check_inputs(files: Sequence[Path], references: Sequence[Path], output: Path) -> None:
    """Refuse an output that exists, two files of one name, and references that are trained on.

    Raises:
        UserError: one of these.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name another folder")
    check_names(files)
    check_references(files, references)


def check_references(files: Sequence[Path], references: Sequence[Path]) -> None:
    """References have to be other pictures than those that are trained on, and not copies of them.

    Raises:
        UserError: one is, or pictures cannot be used.
    """
    both = {file.resolve() for file in files} & {file.resolve() for file in references}
    if both:
        raise UserError(f"{sorted(both)[0]} is a reference and trained on; references must not be trained on")
    prints = open_each([*files, *references], fingerprint)
    for i, j, _ in near_duplicates(prints):
        if i < len(files) <= j:
            raise UserError(
                f"{references[j - len(files)]} shows the same as {files[i]}, which is trained on; references are pictures that "
                "nobody trains on"
            )


def judged_row(scores: list[float | None]) -> dict[str, Any]:
    """Scores with their mean and its 95 % interval, which are `None` where nothing could be scored."""
    level = interval([scores])
    mean, low, high = (None, None, None) if level is None else (level.mean, level.low, level.high)
    return {"similarity": mean, "low": low, "high": high, "scores": scores}


def save_pictures(folder: Path, names: Sequence[str], images: Tensor) -> None:
    """Write pictures (n, 3, h, w) in [-1, 1] into a new folder, as PNG files of these names."""
    folder.mkdir()
    for name, image in zip(names, images, strict=True):
        to_pil(image).save(folder / f"{name}.png")


def save_page(file: Path, parts: Sequence[Any], size: int, columns: int = 8) -> None:
    """References, given pictures, purified ones, and what each attacker draws: a row each."""
    from PIL import Image

    rows = [grid(part[:columns], columns, max(1, 128 // size)) for part in parts]
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        page.paste(row, (0, y))
        y += row.height
    page.save(file)
