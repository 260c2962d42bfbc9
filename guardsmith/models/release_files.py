"""Which files of a model are on record, which are not, and which changed since."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from guardsmith.core.console import in_words
from guardsmith.core.errors import UserError
from guardsmith.core.images import sha256_file
from guardsmith.models.checkpoint import DiffusionModel, file_digests
from guardsmith.models.contents import expected_files, list_files, summary
from guardsmith.models.saved import base_weights_in


def surplus_files(folder: Path, names: Collection[str]) -> list[str]:
    """Files, links and (with a slash) whole folders in a folder that are not among the known ones."""
    files = list_files(folder)
    return summary([name for name in files if name not in names or files[name].is_symlink()], names)


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Files that are not there or are others than the digests say (`sha256:<hex>`)."""
    wrong = []
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or f"sha256:{sha256_file(file)}" != digest:
            wrong.append(name)
    return wrong


def known_in(folder: Path) -> set[str]:
    """Those of a checkpoint's files that belong into a released one.

    Raises:
        UserError: see `expected_files`.
    """
    return expected_files(list_files(folder), lambda name: (folder / name).read_bytes())


def check_hardened_files(folder: Path, record: Mapping[str, Any], base: DiffusionModel) -> dict[str, str]:
    """The digest of every file of a hardened model, once it is certain that it holds nothing else.

    Args:
        folder: the hardened model.
        record: its `harden.json`; one of an earlier guardsmith, which copied the base's whole folder, has no digests.
        base: what it was made from.

    Raises:
        UserError: there are other files in it; a file was changed; the base's weights are still in it.
    """
    digests = record.get("files")
    surplus = surplus_files(folder, known_in(folder) if digests is None else digests)
    if surplus:
        raise UserError(
            f"{folder} holds what is no part of the hardened model ({in_words(surplus)}); "
            + ("delete it." if digests is not None else "an earlier guardsmith copied it from the base: harden again.")
        )
    if digests is not None:
        if wrong := changed_files(folder, digests):
            raise UserError(f"{folder} was changed after hardening ({in_words(wrong)}); harden again.")
        return dict(digests)
    if leaks := base_weights_in(base.folder, folder, base.networks):
        file, what = leaks[0]
        raise UserError(f"{folder} still holds weights of the base ({len(leaks)}; {file}: {what}); harden again.")
    return file_digests(folder)


def surplus_of(folder: Path, base: DiffusionModel) -> list[str]:
    """What a checkpoint carries that is no part of it: files, and tensors with values of the base that it changed elsewhere."""
    names = known_in(folder)
    weights = [name for name in names if name.endswith(".safetensors")]
    leaks = base_weights_in(base.folder, folder, base.networks, weights)
    # Links are no surplus here: the cache of the Hub's client consists of them.
    surplus = summary([name for name in list_files(folder) if name not in names], names)
    return [*surplus, *(f"{file}: {what}" for file, what in leaks)]
