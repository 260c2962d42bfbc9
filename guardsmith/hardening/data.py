"""The pictures that a hardening works on: subjects, their classes, benign prompts, negatives.

Those that the base draws are kept in the run's cache, so that a resumed run finds them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import folder_digest
from guardsmith.core.console import warn
from guardsmith.core.errors import UserError
from guardsmith.core.images import fingerprint, near_duplicates, open_each, open_pictures, square, to_tensor
from guardsmith.core.picture_folders import list_pictures, opened, skipped_sentence
from guardsmith.core.seeds import HARDENING_BENIGN, HARDENING_CLASS, HARDENING_REPLACEMENT
from guardsmith.diffusion.cache import drawn_by, drawn_with_states
from guardsmith.diffusion.prompts import HARDENING_TEMPLATES, benign_prompts, class_prompt
from guardsmith.diffusion.states import States
from guardsmith.hardening.compatibility import check_class_pictures
from guardsmith.methods.base import MethodConfig
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.registry.images import files_of
from guardsmith.registry.loader import Split, Subject
from guardsmith.registry.types import ImageEntry


def load_pictures(model: DiffusionModel, subject: Subject, split: Split) -> Tensor:
    """A subject's pictures of one split at the model's size, float32 (n, 3, h, w) in [-1, 1]."""
    return open_pictures([image.path for image in subject.images_of(split)], model.image_size)


def negative_files(place: str) -> list[Path]:
    """Image files of unprotected people, which methods use as negatives.

    Args:
        place: a folder, a glob, `imagefolder:FOLDER`, `parquet:FILE` or `hub:ID` (`Recipe.negatives`).

    Raises:
        UserError: there are none.
    """
    kind, colon, rest = place.partition(":")
    arguments = {"dataset": rest if kind == "hub" else place} if colon else {"path": place}
    if not colon and not Path(place).is_dir() and not any(sign in place for sign in "*?["):
        raise UserError(f"negatives: there is no folder {place}; name a folder, a glob or a dataset of pictures.")
    entry = ImageEntry.model_validate(arguments | {"split": "harden"})
    try:
        return [file for file, _ in files_of(entry, Path())]
    except UserError as error:
        raise UserError(f"negatives: {error}") from error


def load_negatives(
    model: DiffusionModel, place: str | None, protected: Sequence[Path] = ()
) -> tuple[Tensor | None, str | None]:
    """Images of unprotected people, used as negatives.

    Files that cannot be used are left out, with a warning that names them.

    Args:
        model: the base, which gives their size.
        place: see `negative_files`; `None` gives neither.
        protected: pictures of protected subjects, none of which may be among them.

    Returns:
        float32 (n, 3, h, w) in [-1, 1], and their digest.

    Raises:
        UserError: there are none that can be used, or one shows the same as a protected picture.
    """
    if place is None:
        return None, None
    if Path(place).is_dir() and (skipped := list_pictures(Path(place)).skipped):
        warn(skipped_sentence(place, skipped))
    problems: list[str] = []
    files, pictures, prints = [], [], []
    for file, image in opened(negative_files(place), problems):
        files.append(file)
        pictures.append(square(image, model.image_size))
        if protected:
            prints.append(fingerprint(image))
    if not files:
        raise UserError("\n".join([*problems, f"negatives: there is no picture in {place} that can be used."]))
    for sentence in problems:
        warn(f"negatives: left out: {sentence}")
    for i, j, _ in near_duplicates([*open_each(protected, fingerprint), *prints]):
        if i < len(protected) <= j:
            raise UserError(
                f"negatives: {files[j - len(protected)]} shows the same as {protected[i]}, a picture of a protected subject; "
                "remove it."
            )
    return to_tensor(pictures), folder_digest([hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures])


def subject_data(
    model: DiffusionModel, recipe: Recipe, subjects: Sequence[Subject], config: MethodConfig, cache: Path
) -> list[SubjectData]:
    """The subjects with their `harden` pictures and pictures of their class, which the base draws where they are not cached.

    Args:
        model: the base.
        recipe: how it draws.
        subjects: whom to protect.
        config: how many class pictures.
        cache: folder of the run.
    """
    class_images: dict[str, Tensor] = {}
    class_states: dict[str, States] = {}
    for noun in dict.fromkeys(subject.class_noun for subject in subjects):
        file = cache / f"class-{noun.replace(' ', '-')}.safetensors"
        prompts = [class_prompt(noun)] * config.class_images
        class_images[noun], class_states[noun] = drawn_with_states(
            model, recipe.sampling, prompts, HARDENING_CLASS.start, file, f"class pictures: {noun}"
        )
        check_class_pictures(noun, class_images[noun], model.source)
    data = []
    for number, subject in enumerate(subjects):
        noun, images = subject.class_noun, load_pictures(model, subject, "harden")
        positives = class_images[noun].roll(-number * len(images), dims=0)[: len(images)]
        data.append(
            SubjectData(
                subject.id, noun, subject.identifiers, images, positives, class_images[noun], class_states[noun]
            )
        )
    return data


def benign_data(
    model: DiffusionModel, recipe: Recipe, negatives: Tensor | None, config: MethodConfig, cache: Path
) -> BenignData:
    """Pictures of benign prompts, which the base draws where they are not cached, with images of unprotected people.

    Args:
        model: the base.
        recipe: how it draws.
        negatives: images of unprotected people, float32 (n, 3, h, w) in [-1, 1], where there are any.
        config: how many pictures.
        cache: folder of the run.
    """
    texts = [p.text for p in benign_prompts(model, HARDENING_TEMPLATES, config.benign_images, recipe.seed)]
    images, states = drawn_with_states(
        model, recipe.sampling, texts, HARDENING_BENIGN.start, cache / "ordinary.safetensors", "benign pictures"
    )
    return BenignData(images, texts, states, negatives)


def draw_prompt(model: DiffusionModel, recipe: Recipe, prompt: str, count: int, cache: Path) -> Tensor:
    """Pictures of a method's own prompt, float32 (count, 3, h, w) in [-1, 1], which the base draws where they are not cached."""
    file = cache / f"instead-{folder_digest(prompt)}.safetensors"
    return drawn_by(
        model, recipe.sampling, [prompt] * count, HARDENING_REPLACEMENT.start, file, f"pictures of '{prompt}'"
    )
