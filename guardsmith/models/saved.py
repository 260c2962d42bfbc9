"""Around saving a hardened model: whether it can be saved, before training; what is in it and what is not, afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from guardsmith.core.console import in_words
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.progress import console
from guardsmith.models.base_weights import ChangedWeights, tensors_of
from guardsmith.models.building import Built, remove_folder
from guardsmith.models.checkpoint import DiffusionModel, save_model, stored_dtype
from guardsmith.models.contents import list_files, weight_files
from guardsmith.models.tensor_files import weights_reader


def try_saving(model: DiffusionModel, output: Path, *, half_variant: bool = False) -> None:
    """Save the base as the hardened model will be saved, and delete it: what could fail then, fails before training.

    Raises:
        UserError: diffusers cannot open what is written; see `save_model`.
        OSError: there is no room, or no right to write.
    """
    trial = output / "model.trial"
    try:
        save_model(model, trial, half_variant=half_variant)
    except RunFailed as error:
        raise UserError(f"{model.source}: a hardened copy of it could not be used: {error}") from error
    finally:
        remove_folder(trial)


def base_weights_in(
    base: Path, folder: Path, parts: Iterable[str], files: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Weights of a base that are in another checkpoint although they were changed there in their own place.

    Args:
        base: diffusers folder.
        folder: the checkpoint.
        parts: of both; those that do not differ are passed over.
        files: to look into, relative to the folder; by default every safetensors file.

    Returns:
        File of every such tensor, and which tensor of the base it is, in words.
    """
    weights = ChangedWeights()
    for part in parts:
        stored = (item for file in weight_files(base / part) for item in tensors_of(file))
        weights.add(stored, weights_reader(folder / part), part)
    if files is None:
        files = [name for name in list_files(folder) if name.endswith(".safetensors")]
    return [
        (file, f"{name} is the base's {of}")
        for file in sorted(files)
        for name, of in weights.found_in(tensors_of(folder / file))
    ]


def say_what_changed(contents: Built, precision: dict[str, str], model: DiffusionModel) -> None:
    """Name on the console what of the base the hardened model does not have, and what is stored in another precision."""
    lines = []
    if contents.left_out:
        lines.append(f"left out of the model, for it is no part of it: {in_words(contents.left_out)}")
    lines += [f"{part} is null in the hardened model: {why}" for part, why in contents.nulled.items()]
    for part, dtype in precision.items():
        before = str(stored_dtype(model.folder, part)).removeprefix("torch.")
        if before != dtype:
            lines.append(f"{part} is stored in {dtype} (the base in {before}): a weight does not fit that")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
