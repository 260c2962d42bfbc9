"""The hardening methods by name. Adding one: a file with a config and `harden`, and a line here.

What surrounds a method (loading, drawing, checkpoints, saving) is in `hardening`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from guardsmith.core.errors import entry_of
from guardsmith.methods import apdm, imma, persguard
from guardsmith.methods.tripwire import method as tripwire
from guardsmith.training.optimizers import Held


class Method(NamedTuple):
    """One entry of the table.

    Attributes:
        run: hardens a copy of a model.
        config: its parameters.
        steps: progress steps of a run with this config.
        memory: what a run holds beside the weights, given config and U-Net.
        cost: U-Net forward equivalents of a run with this config, given the class noun of every subject.
        paper: where it comes from.
        draws: the prompt of further pictures that it wants of the base for a class noun, if any.
        bystander_cost: what bystanders add to the cost, at most, given config, class nouns, their number and solver steps; `None`
            for a method that does not look at them.
        room: how many subjects a U-Net has room for; `None` for a method that has no such limit.
    """

    run: Callable[..., Any]
    config: type[BaseModel]
    steps: Callable[[Any], int]
    cost: Callable[[Any, list[str]], int]
    memory: Callable[[Any, Any], Held]
    paper: str
    draws: Callable[[Any, str], str | None] | None = None
    bystander_cost: Callable[[Any, list[str], int, int], int] | None = None
    room: Callable[[Any], int] | None = None


METHODS: dict[str, Method] = {
    "apdm": Method(
        apdm.harden,
        apdm.ApdmConfig,
        lambda c: c.outer_steps,
        apdm.cost,
        apdm.memory,
        "hf.co/papers/2511.01307",
        apdm.positive_prompt,
    ),
    "imma": Method(imma.harden, imma.ImmaConfig, lambda c: c.steps, imma.cost, imma.memory, "hf.co/papers/2311.18815"),
    "persguard": Method(
        persguard.harden,
        persguard.PersGuardConfig,
        lambda c: c.steps,
        persguard.cost,
        persguard.memory,
        "hf.co/papers/2502.16167",
        persguard.backdoor_prompt,
    ),
    "tripwire": Method(
        tripwire.harden,
        tripwire.TripwireConfig,
        lambda c: c.steps,
        tripwire.cost,
        tripwire.memory,
        "guardsmith, docs/explanation/methods.md",
        bystander_cost=tripwire.bystander_cost,
        room=tripwire.room,
    ),
}


def find_method(name: str) -> Method:
    """An entry of the table.

    Raises:
        UserError: there is no such method.
    """
    return entry_of(METHODS, name, "method")
