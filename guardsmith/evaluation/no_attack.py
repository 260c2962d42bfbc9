"""What the released weights draw of protected subjects before anyone attacks.

A hardening sees the subjects' pictures, and may leave them in the weights: under the names that it used, or as what half-finished
pictures of the class are drawn towards. So the model under test is asked for every protected subject, by the names that it is
known under and those that attackers pick: half of the pictures from noise, half from class pictures that are noised half-way and
drawn again (SDEdit, Meng et al. 2022; hf.co/papers/2108.01073).

    <root>/released/<subject>/<digest>/000.png ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import folder_digest, whole_folder
from guardsmith.core.console import warn
from guardsmith.core.images import is_whole_png, open_pictures, to_pil
from guardsmith.core.seeds import RELEASED
from guardsmith.diffusion.prompts import instance_prompt
from guardsmith.diffusion.sampling import generate, redraw
from guardsmith.evaluation.loaded import model_at
from guardsmith.evaluation.planning import TargetModel, class_file
from guardsmith.metrics import Judge
from guardsmith.registry.loader import Subject

STRENGTH = 0.5


def _prompts(recipe: Recipe, subject: Subject) -> list[str]:
    names = list(dict.fromkeys((*subject.identifiers, *recipe.verify.identifiers)))
    count = recipe.verify.images_per_unit
    return [instance_prompt(names[i // 2 % len(names)], subject.class_noun) for i in range(count)]


def released_folder(target: TargetModel, recipe: Recipe, subject: Subject) -> Path:
    """Where the pictures are, or will be."""
    sampling, class_images = recipe.sampling.model_dump(), recipe.verify.class_images
    digest = folder_digest(target.digest, _prompts(recipe, subject), sampling, class_images, STRENGTH, RELEASED.start)
    return target.root / "released" / subject.id / digest


def released_pictures(target: TargetModel, recipe: Recipe, subject: Subject) -> list[Path]:
    """The pictures, drawn unless they are there; the folder appears whole."""
    count = recipe.verify.images_per_unit
    seeds = RELEASED.seeds(count)
    prompts = _prompts(recipe, subject)
    sampling, class_images = recipe.sampling.model_dump(), recipe.verify.class_images
    folder = released_folder(target, recipe, subject)
    unreadable = [file for file in folder.glob("*.png") if not is_whole_png(file)]
    if unreadable:
        warn(f"{unreadable[0]} cannot be read; the pictures of {folder} are generated again")
    if unreadable or not folder.is_dir():
        # Every name is prompted both ways: even pictures from noise, odd ones from class pictures where there are any.
        again = range(1, count, 2) if class_images else range(0)
        afresh = [i for i in range(count) if i not in again]
        images = generate(target.model, [prompts[i] for i in afresh], [seeds[i] for i in afresh], **sampling)
        pictures = dict(zip(afresh, images, strict=True))
        if again:
            class_pictures = load_file(class_file(target, subject.class_noun, recipe))["images"]
            before = class_pictures[[i % len(class_pictures) for i in again]]
            theirs = [prompts[i] for i in again], [seeds[i] for i in again]
            images = redraw(target.model, before, *theirs, strength=STRENGTH, **sampling)
            pictures |= zip(again, images, strict=True)
        with whole_folder(folder) as place:
            for i, image in pictures.items():
                to_pil(image).save(place / f"{i:03d}.png")
    return sorted(folder.glob("*.png"))


@dataclass(frozen=True)
class ReleasedPictures:
    """Job: `released_pictures` of one subject by the model at a place."""

    place: str
    digest: str
    root: Path
    recipe: Recipe
    subject: Subject

    def run(self) -> None:
        """Draw them unless they are there."""
        released_pictures(TargetModel(model_at(self.place), self.digest, self.root), self.recipe, self.subject)


def likeness_of(files: Sequence[Path], subject: Subject, judge: Judge, size: int) -> list[float | None]:
    """Similarity of each of these pictures to the subject's real ones, by a judge who sees them at a size."""
    references = open_pictures([image.path for image in subject.images_of("reference")], size)
    return judge.similarity(open_pictures(files, size), references)
