"""The removals by name: edits of open weights after which a training attack shows what came back."""

from __future__ import annotations

from pydantic import Field

from guardsmith.attacks.adaptive import (
    clamp_activations,
    merge_weights,
    normalise_scales,
    prune_activations,
    prune_magnitude,
    quantize_weights,
    reinitialise_block,
)
from guardsmith.attacks.adaptive.base import Removal, RemovalConfig
from guardsmith.attacks.adaptive.cut_wire import zero_neurons
from guardsmith.attacks.base import AttackData
from guardsmith.core.errors import entry_of
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet


class CutConfig(RemovalConfig):
    """See `cut_wire`."""

    outlier: float = Field(1e4, gt=1)
    """How many times the median neuron's a trigger neuron's weights are."""


def _cut_wire(
    model: DiffusionModel, data: AttackData, config: CutConfig, *, seed: int = 0, base: DiffusionModel | None = None
) -> DiffusionModel:
    own = with_own_unet(model)
    zero_neurons(own.unet, config.outlier)
    return own


REMOVALS: dict[str, Removal] = {
    "cut_wire": Removal(_cut_wire, CutConfig),
    "clamp_activations": clamp_activations.REMOVAL,
    "normalise_scales": normalise_scales.REMOVAL,
    "prune_magnitude": prune_magnitude.REMOVAL,
    "prune_activations": prune_activations.REMOVAL,
    "reinitialise_block": reinitialise_block.REMOVAL,
    "merge_weights": merge_weights.REMOVAL,
    "quantize_weights": quantize_weights.REMOVAL,
}


def find_removal(name: str) -> Removal:
    """An entry of the table.

    Raises:
        UserError: there is no such removal.
    """
    return entry_of(REMOVALS, name, "removal")
