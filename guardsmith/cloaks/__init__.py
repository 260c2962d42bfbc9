"""The cloaks by name: what is added to pictures so that models cannot be personalized on them.

Adding one: a file with a config and `cloak`, and a line here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from guardsmith.cloaks import advdm, aspl, fsmg, glaze, metacloak, photoguard, rid
from guardsmith.core.errors import entry_of


class Cloak(NamedTuple):
    """One entry of the table.

    Attributes:
        run: (models, data, config, seed=..., on_step=...) -> pictures (n, 3, h, w) in [-1, 1].
        config: its settings; `budget` is among them, and `total(models, pictures)`, the number of its steps.
        paper: where it comes from.
        learns: whether it trains surrogates, which class pictures are needed for.
    """

    run: Callable[..., Any]
    config: type[BaseModel]
    paper: str
    learns: bool = False


CLOAKS: dict[str, Cloak] = {
    "aspl": Cloak(aspl.cloak, aspl.AsplConfig, "hf.co/papers/2303.15433", learns=True),
    "fsmg": Cloak(fsmg.cloak, fsmg.FsmgConfig, "hf.co/papers/2303.15433", learns=True),
    "metacloak": Cloak(metacloak.cloak, metacloak.MetaCloakConfig, "hf.co/papers/2311.13127", learns=True),
    "advdm": Cloak(advdm.cloak, advdm.AdvdmConfig, "hf.co/papers/2302.04578"),
    "photoguard": Cloak(photoguard.cloak, photoguard.PhotoguardConfig, "hf.co/papers/2302.06588"),
    "rid": Cloak(rid.cloak, rid.RidConfig, "hf.co/papers/2412.09844"),
    "glaze": Cloak(glaze.cloak, glaze.GlazeConfig, "hf.co/papers/2302.04222"),
}


def find_cloak(name: str) -> Cloak:
    """An entry of the table.

    Raises:
        UserError: there is no such cloak.
    """
    return entry_of(CLOAKS, name, "cloak")


__all__ = ["CLOAKS", "Cloak", "find_cloak"]
