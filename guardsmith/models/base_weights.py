"""Whether weights of a base survive in files that are to be released: by their values, whatever tensor they stand under.

Two tensors are taken for the same if they have the same values in any order (so in any shape, transposed or not) and in any of
the usual precisions. Values that were averaged, scaled, merged into others or cut into pieces are not recognised: against those,
only files and tensors with known names are released (`guardsmith.models.contents`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from guardsmith.models.tensor_files import TensorReader, read_header

FEWEST = 16  # values of a tensor: smaller ones may be equal by chance
ROUNDINGS: tuple[tuple[torch.dtype, ...], ...] = (
    (), (torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)
)  # fmt: skip
BLOCK = 1 << 22  # values at a time
_FACTORS = (-7046029254386353131, -4417276706812531889, 1609587929392839161)  # odd numbers that spread bits


def _mixed(bits: Tensor, first: int, second: int) -> int:
    bits = bits * first
    bits = (bits ^ (bits >> 31)) * second
    return int((bits ^ (bits >> 29)).sum())


def content_key(values: Tensor) -> tuple[int, int, int] | None:
    """The same for all tensors with the same float32 values in any order; `None` if they could be alike by chance.

    Args:
        values: any shape, floating point.
    """
    if not values.is_floating_point() or values.numel() < FEWEST:
        return None
    flat = values.reshape(-1)
    if not any(len(part.float().unique()) >= FEWEST // 2 for part in (flat[:FEWEST], flat[:4096], flat)):
        return None  # the first few values nearly always are enough to see that they differ
    first = second = 0
    for block in flat.split(BLOCK):
        bits = (block.float() + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes one zero of the two
        first += _mixed(bits, _FACTORS[0], _FACTORS[1])
        second += _mixed(bits, _FACTORS[1], _FACTORS[2])
    return values.numel(), first % (1 << 64), second % (1 << 64)


def rounded_keys(values: Tensor) -> set[tuple[int, int, int]]:
    """`content_key` of a tensor in every precision that it may be stored in."""
    keys = set()
    for roundings in ROUNDINGS:
        if roundings[:1] == (values.dtype,):  # the same as without this rounding
            continue
        rounded = values
        for dtype in roundings:
            rounded = rounded.to(dtype)
        key = content_key(rounded)
        keys |= set() if key is None else {key}
    return keys


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every floating-point tensor of a safetensors file, one after the other."""
    read = TensorReader()
    for name, entry in read_header(file).tensors.items():
        if entry["dtype"] in ("F64", "F32", "F16", "BF16"):
            yield name, read(file, name)


class ChangedWeights:
    """The tensors of a base that hardening changed, to be recognised in other files.

    Attributes:
        changed: how many tensors were changed.
        total: of how many.
    """

    def __init__(self) -> None:
        self.changed = self.total = 0
        self._names: dict[tuple[int, int, int], str] = {}
        self._own: set[tuple[torch.dtype, tuple[int, int, int] | None]] = set()

    def add(self, base: Iterable[tuple[str, Tensor]], hardened: Callable[[str], Tensor | None], part: str) -> int:
        """Take the tensors of one part.

        Args:
            base: name and values of the base's tensors.
            hardened: gives the released part's tensor of that name, if it has one.
            part: what to call it.

        Returns:
            How many of them differ.
        """
        differ = 0
        for name, values in base:
            if (key := content_key(values)) is None:  # then it has none in less precision either
                continue
            self.total += 1
            own = hardened(name)
            own_key = None if own is None else content_key(own)
            if own_key == key:
                continue
            keys = rounded_keys(values)
            if own_key in keys:  # stored in less precision a tensor is still the base's
                continue
            differ += 1
            if own is not None:
                self._own |= {(dtype, content_key(own.to(dtype))) for dtype in (torch.float16, torch.bfloat16)}
                self._own.add((own.dtype, own_key))
            self._names |= dict.fromkeys(keys, f"{part} {name}")
        self.changed += differ
        return differ

    def found_in(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
        """Name of every tensor that has the values of a changed one of the base, and which that is.

        Where a hardened tensor is the base's once it is rounded, its rounded copy is the hardened one's.
        """
        for name, values in tensors:
            key = content_key(values)
            if key is not None and key in self._names and (values.dtype, key) not in self._own:
                yield name, self._names[key]
