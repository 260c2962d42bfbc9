"""What removing a protection by editing weights is, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import UNetCost


class RemovalConfig(BaseModel):
    """Settings of a removal; every one has its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Removal(NamedTuple):
    """One entry of the table.

    Attributes:
        run: (model, data, config, seed=..., base=...) -> a copy of the model without its protection; `base` is a public model of
            the same architecture, or `None`.
        config: its settings.
        needs_base: whether it needs such a model.
        pictures: (data) -> how many pictures it uses.
    """

    run: Callable[..., DiffusionModel]
    config: type[RemovalConfig]
    needs_base: bool = False
    pictures: Callable[[AttackData], int] = lambda data: 0


@dataclass(frozen=True)
class RemovalCost:
    """What a removal took.

    Attributes:
        seconds: of wall clock.
        unet_forwards: rows that went through denoisers, in forward equivalents (a backward pass counts two).
        pictures: that the attacker needed for it.
        needs_base: whether a public model of the same architecture was needed.
        changed_weights: share of the denoiser's weights whose value changed, in [0, 1].
    """

    seconds: float
    unet_forwards: int
    pictures: int
    needs_base: bool
    changed_weights: float

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def changed_share(before: torch.nn.Module, after: torch.nn.Module) -> float:
    """Share of parameter values that differ between two networks of one architecture."""
    other = dict(after.named_parameters())
    total = different = 0
    for name, parameter in before.named_parameters():
        total += parameter.numel()
        different += int((parameter != other[name]).sum())
    return different / total


def run_removal(
    removal: Removal,
    model: DiffusionModel,
    data: AttackData,
    params: dict[str, Any],
    *,
    seed: int,
    base: DiffusionModel | None,
) -> tuple[DiffusionModel, RemovalCost]:
    """Run a removal and say what it cost.

    Args:
        removal: an entry of the table.
        model: the model under attack; it stays as it is.
        data: what the attacker has.
        params: values of the removal's config.
        seed: of everything random.
        base: a public model of the same architecture, where the attacker has one.

    Raises:
        ValueError: it needs a base or class pictures and there are none.
    """
    if removal.needs_base and base is None:
        raise ValueError("this removal needs the public base")
    began = time.perf_counter()
    with UNetCost() as cost:
        result = removal.run(model, data, removal.config(**params), seed=seed, base=base)
    seconds = time.perf_counter() - began
    return result, RemovalCost(
        seconds=round(seconds, 3), unet_forwards=cost.forwards + 2 * cost.backwards, pictures=removal.pictures(data),
        needs_base=removal.needs_base, changed_weights=changed_share(model.unet, result.unet),
    )  # fmt: skip


def class_pictures(data: AttackData) -> torch.Tensor:
    """The attacker's pictures of the class, float32 (n, 3, h, w).

    Raises:
        ValueError: there are none.
    """
    if not len(data.class_images):
        raise ValueError("this removal needs class pictures (verify.class_images)")
    return data.class_images


def weight_layers(module: torch.nn.Module) -> dict[str, Any]:
    """Every linear layer and convolution of a network, by name."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def beside_base(own: DiffusionModel, base: DiffusionModel | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Every weight of a denoiser with the one of the public base.

    Raises:
        ValueError: there is no base, or it has other weights.
    """
    if base is None:
        raise ValueError("this removal needs the public base")
    theirs = dict(base.unet.named_parameters())
    for name, parameter in own.unet.named_parameters():
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise ValueError(
                f"the base has no weight {name} of this shape; name the base that the model was hardened from"
            )
        yield parameter, theirs[name]
