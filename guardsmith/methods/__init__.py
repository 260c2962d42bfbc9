"""The hardening methods by name. Adding one: a file with a config and `harden`, and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from guardsmith.methods import apdm


class Method(NamedTuple):
    """One entry of the table."""

    run: Callable[..., Any]
    config: type[BaseModel]
    cost: Callable[..., int]
    paper: str


METHODS: dict[str, Method] = {
    "apdm": Method(apdm.harden, apdm.ApdmConfig, apdm.cost, "hf.co/papers/2511.01307"),
}
