"""What attackers do to cloaked pictures, by name. Adding one: a file with a config and `purify`, and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel
from torch import Tensor

from guardsmith.core.errors import entry_of
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.purifiers import ddspure, diffpure, gaussian, gridpure, impress, jpeg, restore, tvm


class Purifier(NamedTuple):
    """One entry of the table.

    Attributes:
        run: (model, images, config, class_noun=..., seed=...) -> images; both (n, 3, h, w) in [-1, 1].
        config: its settings.
        paper: where it comes from.
    """

    run: Callable[..., Any]
    config: type[BaseModel]
    paper: str


PURIFIERS: dict[str, Purifier] = {
    "gaussian": Purifier(gaussian.purify, gaussian.GaussianConfig, "blur"),
    "jpeg": Purifier(jpeg.purify, jpeg.JpegConfig, "recompression"),
    "tvm": Purifier(tvm.purify, tvm.TvmConfig, "hf.co/papers/1711.00117"),
    "diffpure": Purifier(diffpure.purify, diffpure.DiffPureConfig, "hf.co/papers/2205.07460"),
    "gridpure": Purifier(gridpure.purify, gridpure.GridPureConfig, "hf.co/papers/2312.00084"),
    "ddspure": Purifier(ddspure.purify, ddspure.DdsPureConfig, "hf.co/papers/2206.10550"),
    "restore": Purifier(restore.purify, restore.RestoreConfig, "hf.co/papers/2406.18944"),
    "impress": Purifier(impress.purify, impress.ImpressConfig, "hf.co/papers/2310.19248"),
}


def find_purifier(name: str) -> Purifier:
    """An entry of the table.

    Raises:
        UserError: there is no such purifier.
    """
    return entry_of(PURIFIERS, name, "purifier")


def purified(
    name: str, params: dict[str, Any], model: DiffusionModel, images: Tensor, *, class_noun: str, seed: int
) -> Tensor:
    """Pictures after a purifier of the table with these settings, float32 (n, 3, h, w) in [-1, 1].

    Raises:
        UserError: there is no such purifier, or what it needs cannot be had.
    """
    entry = find_purifier(name)
    pure: Tensor = entry.run(model, images, entry.config(**params), class_noun=class_noun, seed=seed)
    return pure


__all__ = ["PURIFIERS", "Purifier", "find_purifier", "purified"]
