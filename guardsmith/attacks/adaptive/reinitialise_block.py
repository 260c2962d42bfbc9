"""Open weights: give one block new random weights and teach it, on class pictures, what the whole model did with the old ones.

What the block does only on other pictures than those is not taught. The model under attack is its own teacher, so that no other
model is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig, class_pictures
from guardsmith.attacks.base import AttackData, train
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank, class_prompt
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import generator, torch_seed


class ReinitialiseBlockConfig(RemovalConfig):
    """Which block, and how it is taught."""

    block: str = "mid_block"
    """Name of a part of the denoiser."""
    steps: int = Field(150, gt=0)
    """Optimizer steps."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's rate."""
    batch_size: int = Field(8, gt=0)
    """Noised class pictures per step."""


def part_of(network: Any, name: str) -> Any:
    """A part of a network by name.

    Raises:
        ValueError: there is no such part.
    """
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the denoiser has no part {name!r}; name one such as mid_block") from None


def reinitialise_block(
    model: DiffusionModel,
    data: AttackData,
    config: ReinitialiseBlockConfig,
    *,
    seed: int,
    base: DiffusionModel | None = None,
) -> DiffusionModel:
    """A copy of the model whose block was trained anew.

    Raises:
        ValueError: there is no such block, or there are no class pictures.
        RunFailed: the distillation diverged.
    """
    own = with_own_unet(model)
    block = part_of(own.unet, config.block)
    with torch_seed(seed):
        for layer in block.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    store = encode(model, class_pictures(data))
    contexts = PromptBank(model).encode([class_prompt(data.class_noun), ""])
    timesteps = int(model.scheduler.config.num_train_timesteps)

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, step)
        context = contexts[torch.arange(config.batch_size) % 2]
        rows = noise_samples(store.draw(config.batch_size, rng), context, rng, steps=timesteps)
        with torch.no_grad():
            target = predict(model.unet, model.scheduler, rows)
        return (predict(own.unet, model.scheduler, rows) - target).square().mean()

    parameters = list(block.requires_grad_(True).parameters())
    train(own, loss_at, parameters, steps=config.steps, learning_rate=config.learning_rate, max_grad_norm=1.0)
    block.requires_grad_(False)
    return own


REMOVAL = Removal(reinitialise_block, ReinitialiseBlockConfig, pictures=lambda data: len(data.class_images))
