"""Safetensors files, tensor by tensor, and a digest of a network's tensors.

The library's `save_file` takes all tensors at once and puts them into an order of its own. Text encoders of up to 19 GB (T5) are
written while the whole model is in memory, so what does not change is copied from file to file, block by block, as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from guardsmith.core.errors import UserError
from guardsmith.models.contents import weight_files

KEPT_OPEN = 1 << 28  # bytes


class Header(NamedTuple):
    """What a safetensors file says of itself.

    Attributes:
        tensors: name -> dtype, shape, data_offsets; in the order of the file.
        metadata: its strings.
        start: where the data begin, in bytes.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int


def read_header(file: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        UserError: it is none, or is not whole.
    """
    with file.open("rb") as stream:
        try:
            size = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(size if size < os.fstat(stream.fileno()).st_size else 0))
            metadata = entries.pop("__metadata__", {})
            end = max(entry["data_offsets"][1] for entry in entries.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no safetensors file; give a single-file checkpoint of the base") from error
    if file.stat().st_size != 8 + size + end:
        raise UserError(f"{file} is not whole; download it again")
    tensors = dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
    return Header(tensors, metadata, 8 + size)


def write_copy(
    source: Path, header: Header, target: Path, *, replaced: Mapping[str, tuple[str, bytes]] | None = None
) -> None:
    """Write the tensors that the header names, in its order; the file appears whole or not at all.

    Args:
        source: the file that it was read from.
        header: of what is to be written; `start` and offsets are those of the source.
        target: where to.
        replaced: name -> dtype and data as safetensors stores them, in place of the source's.
    """
    replaced = replaced or {}
    entries: dict[str, dict[str, Any]] = {}
    place = 0
    for name, entry in header.tensors.items():
        size, dtype = entry["data_offsets"][1] - entry["data_offsets"][0], entry["dtype"]
        if name in replaced:
            dtype, size = replaced[name][0], len(replaced[name][1])
        entries[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(({"__metadata__": header.metadata} if header.metadata else {}) | entries).encode()
    text += b" " * (-len(text) % 8)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as out, source.open("rb") as data:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, entry in header.tensors.items():
                if name in replaced:
                    out.write(replaced[name][1])
                    continue
                data.seek(header.start + entry["data_offsets"][0])
                remaining = entry["data_offsets"][1] - entry["data_offsets"][0]
                while remaining:
                    block = data.read(min(remaining, 1 << 20))
                    out.write(block)
                    remaining -= len(block)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _files_of(folder: Path) -> dict[str, Path]:
    """In which of a folder's safetensors files a tensor is; only those count that the libraries read, not variants."""
    files: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            files |= dict.fromkeys(weights.keys(), file)
    return files


def stored_tensor(file: Path, key: str) -> torch.Tensor:
    """One tensor of a file; `TensorReader` is for many."""
    return TensorReader()(file, key)


class TensorReader:
    """Reads tensors of safetensors files one after the other.

    What was read of an open file stays in memory until it is closed, and opening one for every tensor takes longer than reading
    it. So the last file stays open, but not for more than `KEPT_OPEN` bytes.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._weights: Any = None
        self._bytes = 0

    def __call__(self, file: Path, key: str) -> torch.Tensor:
        """The tensor of that name."""
        if file != self._file or self._bytes > KEPT_OPEN:
            self._weights = safe_open(file, framework="pt")  # the one before is closed with its last reference
            self._file, self._bytes = file, 0
        tensor: torch.Tensor = self._weights.get_tensor(key)
        self._bytes += tensor.nbytes
        return tensor


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors files, by name; variants (fp16, non_ema) do not count."""
    read = TensorReader()
    return {key: read(file, key) for key, file in _files_of(folder).items()}


def weights_reader(folder: Path) -> Callable[[str], torch.Tensor | None]:
    """Gives a tensor of a folder of safetensors files by its name, read when it is wanted; `None` where there is none."""
    files, read = _files_of(folder), TensorReader()
    return lambda key: read(files[key], key) if key in files else None


def changed_fraction(before: Path, after: Path) -> float:
    """Share of stored weight entries that differ between two folders of safetensors files, in [0, 1].

    The guard against training that cannot move its weights (half-precision weights under a tiny learning rate).
    """
    old, new = _files_of(before), _files_of(after)
    read_old, read_new = TensorReader(), TensorReader()
    different = total = 0
    for key, file in old.items():  # one by one, for there may be no room for both models
        tensor = read_old(file, key)
        total += tensor.numel()
        different += int((tensor != read_new(new[key], key)).sum()) if key in new else 0
    return different / total


def weights_hash(network: Any) -> str:
    """SHA-256 over a network's weights as float32 numbers, whatever precision they are stored in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
