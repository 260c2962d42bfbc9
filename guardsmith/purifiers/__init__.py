"""What attackers do to cloaked pictures, by name. Adding one: a file with a config and `purify`, and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from guardsmith.errors import UserError, did_you_mean
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
    if name in PURIFIERS:
        return PURIFIERS[name]
    hint = did_you_mean(name, PURIFIERS) or f"; there is: {', '.join(PURIFIERS)}"
    raise UserError(f"there is no purifier {name!r}{hint}")


__all__ = ["PURIFIERS", "Purifier", "find_purifier"]
