"""Red team: what can be learnt from pictures as they are, e.g. cloaked ones, by somebody who purifies them first.

Three attackers train on the same pictures of one subject with the same settings: DreamBooth on the pictures as they are,
DreamBooth on purified ones, and contrastive decoupling learning on purified ones (hf.co/papers/2406.18944). What they draw is
compared with reference pictures that nobody trained on.

    <output>/purified/NAME.png      the pictures as the second and third attacker have them
    <output>/ATTACKER/000.png ...   what they draw
    <output>/redteam.json           similarity of every picture, with intervals
    <output>/grid.png               all of it on a page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardsmith.attacks import AttackData, draw_after_attack
from guardsmith.cloaks.pixels import load_bases
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import whole_folder, write_json
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures, to_pil
from guardsmith.core.progress import stage
from guardsmith.diffusion.sampling import grid
from guardsmith.gate.statistics import interval
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import weights_digest
from guardsmith.pictures.cloaking import check_names, class_pictures
from guardsmith.purifiers import find_purifier, purified

ATTACKERS = ("dreambooth", "purified-dreambooth", "purified-cdl")


def redteam_pictures(
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
        files: what the attackers have of the subject.
        references: other pictures of the subject, clean; none of them among the files.
        output: a folder that is not there yet.
        base: the model that is personalized.
        purifier: a name in `PURIFIERS`.
        purifier_params: values of its config.
        params: values of DreamBooth's config, for all three.
        class_noun: what the subject is.
        identifier: what the attackers call it.
        class_images: for prior preservation.
        count: pictures that each attacker draws.
        recipe: says how everything is drawn.
        judge: see `load_judge`.
        judge_model: likewise.
        seed: of everything random.

    Returns:
        What `redteam.json` holds.

    Raises:
        UserError: a picture or the base cannot be used; the output is there already.
        RunFailed: an attack diverged.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name another folder")
    check_names(files)
    both = {file.resolve() for file in files} & {file.resolve() for file in references}
    if both:
        raise UserError(f"{sorted(both)[0]} is a reference and trained on; references are pictures nobody trains on")
    [model] = load_bases([base])
    size = model.image_size
    chosen = find_purifier(purifier)
    given = open_pictures(files, size)
    known = open_pictures(references, size)
    judged = load_judge(judge, judge_model)
    with stage(f"purifying ({purifier})", 1) as bar:
        pure = purified(purifier, purifier_params, model, given, class_noun=class_noun, seed=seed)
        bar()
    prior = class_pictures(model, class_noun, class_images, recipe)
    rows: dict[str, Any] = {}
    sampling = recipe.sampling.model_dump()
    drawn = {}
    with stage("attackers", len(ATTACKERS)) as bar:
        for name in ATTACKERS:
            data = AttackData(pure if name.startswith("purified") else given, prior, identifier, class_noun)
            attack = "cdl" if name.endswith("cdl") else "dreambooth"
            drawn[name], losses = draw_after_attack(
                model, attack, params, data, seed=seed, count=count, sampling=sampling
            )
            scores = judged.similarity(drawn[name], known)
            found = interval([scores])
            rows[name] = {
                "similarity": None if found is None else found.mean, "low": None if found is None else found.low,
                "high": None if found is None else found.high, "scores": scores, "last_loss": losses[-1],
            }  # fmt: skip
            bar()
    told = {
        "base": base, "base_digest": weights_digest(model.folder), "judge": judge, "purifier": purifier,
        "purifier_params": chosen.config(**purifier_params).model_dump(mode="json"), "params": params,
        "class_noun": class_noun, "identifier": identifier, "pictures": [file.name for file in files],
        "references": len(references), "seed": seed, "attackers": rows,
    }  # fmt: skip
    with whole_folder(output) as place:
        (place / "purified").mkdir()
        for file, image in zip(files, pure, strict=True):
            to_pil(image).save(place / "purified" / f"{file.stem}.png")
        for name, images in drawn.items():
            (place / name).mkdir()
            for i, image in enumerate(images):
                to_pil(image).save(place / name / f"{i:03d}.png")
        save_page(place / "grid.png", [known, given, pure, *drawn.values()], size)
        write_json(place / "redteam.json", told)
    return told


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
