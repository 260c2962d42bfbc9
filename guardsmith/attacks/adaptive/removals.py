"""The removals by name: edits of open weights after which a training attack shows what came back."""

from __future__ import annotations

from guardsmith.attacks.adaptive import (
    clamp_activations,
    cut_channels,
    merge_weights,
    normalise_scales,
    prune_activations,
    prune_magnitude,
    quantize_weights,
    reinitialise_block,
)
from guardsmith.attacks.adaptive.base import Removal
from guardsmith.core.errors import entry_of

REMOVALS: dict[str, Removal] = {
    "cut_channels": cut_channels.REMOVAL,
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
