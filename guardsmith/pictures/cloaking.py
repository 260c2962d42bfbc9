"""Cloaking pictures: copies that look the same, and that a model is not meant to learn a subject from.

    <output>/NAME.png                 the cloaked copy of NAME.*, as large as it was
    <output>/report/cloak.json        settings, and how far the pictures changed
    <output>/report/before-after.png  some of them beside what they were, and the difference

A model sees pictures of one size. A picture is scaled so that its short side has that size and covered with squares along the
long one, the squares are cloaked together, and the change is scaled back to the picture (which keeps it within the budget) and
averaged where squares overlap. So what is cloaked is what people get who scale and crop it for that model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks import find_cloak
from guardsmith.cloaks.pixels import load_bases
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import whole_folder, write_json
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.images import open_each, open_image, sha256_file, to_tensor
from guardsmith.core.progress import stage
from guardsmith.core.seeds import CLOAKING_CLASS
from guardsmith.diffusion.cache import drawn_by
from guardsmith.diffusion.prompts import class_prompt
from guardsmith.metrics.perceptual import perceptual_distance, psnr
from guardsmith.models.checkpoint import DiffusionModel, weights_digest

SHOWN = 6


class SquareCuts(NamedTuple):
    """A picture and the squares that cover it at a model's size.

    Attributes:
        picture: as it was opened.
        squares: (k, 3, size, size) in [-1, 1].
        places: top and left of each square in the scaled picture.
        scaled: height and width of the scaled picture.
    """

    picture: Image.Image
    squares: Tensor
    places: list[tuple[int, int]]
    scaled: tuple[int, int]


def check_names(files: Sequence[Path]) -> None:
    """Each picture's copy needs a name of its own.

    Raises:
        UserError: two would have one.
    """
    names: dict[str, Path] = {}
    for file in files:
        if file.stem in names:
            raise UserError(f"{file} and {names[file.stem]} would have one name as PNG; rename one of them")
        names[file.stem] = file


def cut_squares(picture: Image.Image, size: int) -> SquareCuts:
    """Scale a picture to a model's size and cover it with squares, evenly spread."""
    share = size / min(picture.size)
    width, height = (max(size, round(side * share)) for side in picture.size)
    scaled = to_tensor(picture.resize((width, height), Image.Resampling.LANCZOS))

    def starts(side: int) -> list[int]:
        count = math.ceil(side / size - 1e-9)
        return [0] if count == 1 else [round(i * (side - size) / (count - 1)) for i in range(count)]

    places = [(top, left) for top in starts(height) for left in starts(width)]
    squares = torch.stack([scaled[:, top : top + size, left : left + size] for top, left in places])
    return SquareCuts(picture, squares, places, (height, width))


def join_squares(parts: SquareCuts, cloaked: Tensor, budget: float) -> Image.Image:
    """The picture with the change that its squares got, at its own size and within the budget (of 255)."""
    change, count = torch.zeros(3, *parts.scaled), torch.zeros(1, *parts.scaled)
    size = cloaked.shape[-1]
    for (top, left), before, after in zip(parts.places, parts.squares, cloaked, strict=True):
        change[:, top : top + size, left : left + size] += after - before
        count[:, top : top + size, left : left + size] += 1
    change = change / count
    target = (parts.picture.height, parts.picture.width)
    if target != parts.scaled:
        change = F.interpolate(change[None], target, mode="bicubic", align_corners=False, antialias=True)[0]
    before = np.asarray(parts.picture, dtype=np.int16)
    steps = np.round(change.permute(1, 2, 0).numpy() * 127.5)
    whole = math.floor(budget + 1e-6)
    after = np.clip(before + np.clip(steps, -whole, whole), 0, 255).astype(np.uint8)
    return Image.fromarray(after)


def largest_change(before: Image.Image, after: Image.Image) -> int:
    """Largest difference of two pictures of one size in any pixel and channel, of 255."""
    return int(np.abs(np.asarray(before, dtype=np.int16) - np.asarray(after, dtype=np.int16)).max())


def metadata_of(file: Path) -> dict[str, Any]:
    """What a picture's file says besides pixels, as PNG takes it; upright, since `open_image` turns it."""
    with Image.open(file) as raw:
        exif = raw.getexif()
        metadata: dict[str, Any] = {}
        exif.pop(0x0112, None)
        if len(exif):
            metadata["exif"] = exif.tobytes()
        if raw.mode in ("RGB", "RGBA", "P") and raw.info.get("icc_profile"):
            metadata["icc_profile"] = raw.info["icc_profile"]
        if raw.info.get("dpi"):
            metadata["dpi"] = raw.info["dpi"]
        xmp = raw.info.get("xmp") or raw.info.get("XML:com.adobe.xmp")
        if xmp:
            text = PngImagePlugin.PngInfo()
            text.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp))
            metadata["pnginfo"] = text
        return metadata


def class_pictures(model: DiffusionModel, class_noun: str, count: int, recipe: Recipe) -> Tensor:
    """`count` pictures of the class generated by a base, for prior preservation; float32 (count, 3, h, w) in [-1, 1]."""
    if not count:
        return torch.empty(0, 3, model.image_size, model.image_size)
    return drawn_by(
        model, recipe.sampling, [class_prompt(class_noun)] * count, CLOAKING_CLASS.start, None, "class pictures"
    )


def sheet(before: Sequence[Image.Image], after: Sequence[Image.Image], budget: float, side: int = 192) -> Image.Image:
    """Pictures, their cloaked copies, and the difference, enlarged so that the budget fills the range; in three rows."""
    page = Image.new("RGB", (side * len(before), side * 3), "white")
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        apart = (np.asarray(other, np.float32) - np.asarray(one, np.float32)) / budget
        difference = Image.fromarray(np.clip(127.5 + 127.5 * apart, 0, 255).astype(np.uint8))
        for j, picture in enumerate((one, other, difference)):
            smooth = Image.Resampling.LANCZOS if max(picture.size) > side else Image.Resampling.NEAREST
            page.paste(ImageOps.contain(picture, (side, side), smooth), (i * side, j * side))
    return page


def save_cloaked(
    file: Path, picture: Image.Image, cloaked: Image.Image, target: Path, model: DiffusionModel, budget: float
) -> dict[str, Any]:
    """Write a cloaked picture and measure what is in the file.

    Args:
        file: the picture's own file, whose metadata are kept.
        picture: as it was opened.
        cloaked: the copy.
        target: PNG file to write.
        model: whose VAE measures the perceptual distance.
        budget: largest change of a pixel, of 255.

    Returns:
        Its entry in `cloak.json`.

    Raises:
        RunFailed: what was saved has another size, or differs by more than the budget.
    """
    cloaked.save(target, **metadata_of(file))
    copy = open_image(target)
    change = largest_change(picture, copy)
    if copy.size != picture.size or change > budget:
        raise RunFailed(f"{target.name} was changed by {change} of 255, the budget is {budget:g}")
    both = [cut_squares(each, model.image_size).squares for each in (picture, copy)]
    with torch.no_grad():
        distance = float(perceptual_distance(model, *both).mean())
    ratio = float(psnr(to_tensor(picture)[None], to_tensor(copy)[None]))
    return {
        "from": file.name, "file": target.name, "sha256": sha256_file(target), "largest_change": change,
        "psnr_db": None if math.isinf(ratio) else ratio, "perceptual_distance": distance,
    }  # fmt: skip


def cloak_pictures(
    files: Sequence[Path],
    output: Path,
    *,
    bases: Sequence[str],
    method: str,
    params: dict[str, Any],
    class_noun: str,
    identifier: str,
    class_images: int,
    recipe: Recipe,
    seed: int = 0,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Cloak pictures of one subject together; the folder appears whole.

    Args:
        files: pictures of one subject.
        output: a folder that is not there yet.
        bases: models that the pictures are cloaked against; all of one size.
        method: a name in `CLOAKS`.
        params: values of that cloak's config.
        class_noun: what the subject is.
        identifier: how attackers may call it.
        class_images: pictures of the class for surrogates.
        recipe: says how those are drawn.
        seed: of everything random.
        left_out: sentences about pictures that are not among the files, for the record.

    Returns:
        The content of `cloak.json`.

    Raises:
        UserError: a picture or a base cannot be used; the output is there already.
        RunFailed: it diverged, or a saved picture is not within the budget.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name another folder")
    check_names(files)
    entry = find_cloak(method)
    config: Any = entry.config(**params)
    pictures = open_each(files, lambda image: image)
    models = load_bases(bases)
    size = models[0].image_size
    parts = [cut_squares(picture, size) for picture in pictures]
    squares = torch.cat([each.squares for each in parts])
    prior = class_pictures(models[0], class_noun, class_images if entry.learns else 0, recipe)
    data = AttackData(squares, prior, identifier, class_noun)
    began = time.monotonic()
    with stage(f"cloaking ({method})", config.total(len(models), len(squares))) as bar:
        cloaked = entry.run(models, data, config, seed=seed, on_step=lambda value: bar({"loss": value}))
    seconds = time.monotonic() - began
    after = [
        join_squares(each, part, config.budget)
        for each, part in zip(parts, cloaked.split([len(each.squares) for each in parts]), strict=True)
    ]
    with whole_folder(output) as place:
        (place / "report").mkdir()
        changes = [
            save_cloaked(file, picture, changed, place / f"{file.stem}.png", models[0], config.budget)
            for file, picture, changed in zip(files, pictures, after, strict=True)
        ]
        sheet(pictures[:SHOWN], after[:SHOWN], config.budget).save(place / "report" / "before-after.png")
        record = {
            "method": method, "paper": entry.paper, "params": config.model_dump(mode="json"), "seed": seed,
            "class_noun": class_noun, "identifier": identifier, "class_images": len(prior), "seconds": seconds,
            "bases": [{"base": base, "digest": weights_digest(model.folder)} for base, model in zip(bases, models, strict=True)],
            "pictures": changes, "left_out": list(left_out),
        }  # fmt: skip
        write_json(place / "report" / "cloak.json", record)
    return record
