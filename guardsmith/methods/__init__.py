"""The hardening methods by name. Adding one: a file with a config and `harden`, and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from guardsmith.methods import apdm, tripwire


class Method(NamedTuple):
    """One entry of the table.

    Attributes:
        run: hardens a copy of a model.
        config: its parameters.
        steps: progress steps of a run with this config.
        cost: U-Net forward equivalents of a run with this config, for so many subjects.
        paper: where it comes from.
    """

    run: Callable[..., Any]
    config: type[BaseModel]
    steps: Callable[[Any], int]
    cost: Callable[[Any, int], int]
    paper: str


METHODS: dict[str, Method] = {
    "apdm": Method(apdm.harden, apdm.ApdmConfig, lambda c: c.outer_steps, apdm.cost, "hf.co/papers/2511.01307"),
    "tripwire": Method(
        tripwire.harden, tripwire.TripwireConfig, lambda c: c.steps, tripwire.cost, "guardsmith, docs/methods.md"
    ),
}
