"""Open weights: clamp every layer's output to what it is on benign pictures.

A trigger that works by activations far beyond the usual ones has no effect behind a clamp. The limits are the largest values of
every channel on the attacker's own class pictures, times a factor; no weight is changed and no picture of the subject is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig, class_pictures, weight_layers
from guardsmith.attacks.base import AttackData
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank, class_prompt
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import generator


class ClampActivationsConfig(RemovalConfig):
    """How the limits are found."""

    factor: float = Field(1.5, gt=0)
    """A channel's limit is so many times its largest absolute value on class pictures."""
    batches: int = Field(8, gt=0)
    """Batches of 16 noised class pictures that are looked at."""


def per_channel(layer: torch.nn.Module, output: Tensor) -> Tensor:
    """Largest absolute value of every channel, in a shape that broadcasts against the layer's output."""
    if isinstance(layer, torch.nn.Conv2d):
        return output.abs().amax(dim=(0, 2, 3), keepdim=True)
    return output.abs().flatten(0, -2).amax(dim=0)


@torch.no_grad()
def limits(model: DiffusionModel, data: AttackData, config: ClampActivationsConfig, *, seed: int) -> dict[str, Tensor]:
    """For every linear layer and convolution, by name, the largest absolute value of every output channel on class pictures."""
    largest: dict[str, Tensor] = {}
    handles = []
    for name, layer in weight_layers(model.unet).items():

        def keep(layer: torch.nn.Module, _: Any, output: Tensor, name: str = name) -> None:
            values = per_channel(layer, output)
            largest[name] = torch.maximum(largest[name], values) if name in largest else values

        handles.append(layer.register_forward_hook(keep))
    try:
        store = encode(model, class_pictures(data))
        contexts = PromptBank(model).encode([class_prompt(data.class_noun), ""])
        steps = int(model.scheduler.config.num_train_timesteps)
        for batch in range(config.batches):
            rng = generator(seed, batch)
            rows = noise_samples(store.draw(16, rng), contexts[torch.arange(16) % 2], rng, steps=steps)
            predict(model.unet, model.scheduler, rows)
    finally:
        for handle in handles:
            handle.remove()
    return largest


def clamp_activations(
    model: DiffusionModel,
    data: AttackData,
    config: ClampActivationsConfig,
    *,
    seed: int,
    base: DiffusionModel | None = None,
) -> DiffusionModel:
    """A copy of the model whose layers give nothing larger than `factor` times what they give on class pictures.

    Raises:
        ValueError: there are no class pictures.
    """
    bounds = limits(model, data, config, seed=seed)
    own = with_own_unet(model)
    for name, layer in weight_layers(own.unet).items():
        limit = config.factor * bounds[name]

        def clamp(_: Any, __: Any, output: Tensor, limit: Tensor = limit) -> Tensor:
            # Not a number becomes zero: saturated activations that cancel give it.
            return torch.nan_to_num(output).clamp(-limit, limit)

        layer.register_forward_hook(clamp)
    return own


REMOVAL = Removal(clamp_activations, ClampActivationsConfig, pictures=lambda data: len(data.class_images))
