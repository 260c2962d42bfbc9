"""Open weights: zero the channels that answer to the subject and not to others (fine-pruning).

Activations on the subject's photos and on class pictures, at the same timesteps and noise, are compared channel by channel; those
with the largest differences, relative to their deviation on class pictures, are cut (Liu et al. 2018; hf.co/papers/1805.12185
prunes by activations on clean data). Needs a few forward passes, the photos and class pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from guardsmith.attacks.adaptive.base import Removal, RemovalConfig, class_pictures, weight_layers
from guardsmith.attacks.base import AttackData
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank, class_prompt
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import generator


class PruneActivationsConfig(RemovalConfig):
    """How much is cut, and how it is found."""

    share: float = Field(0.01, gt=0, lt=1)
    """Share of all channels that are cut."""
    batches: int = Field(4, gt=0)
    """Batches of 16 rows of the subject, and as many of class pictures."""


@torch.no_grad()
def channel_statistics(
    model: DiffusionModel, store: LatentStore, noun: str, batches: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of every channel of every linear layer and convolution, float64 (k,) each, by the layer's name."""
    sums: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in weight_layers(model.unet).items():

        def keep(layer: torch.nn.Module, _: Any, output: Tensor, name: str = name) -> None:
            values = output.movedim(1, -1) if isinstance(layer, torch.nn.Conv2d) else output
            values = torch.nan_to_num(values.double().flatten(0, -2))
            new = [values.sum(0), values.square().sum(0), torch.tensor(float(len(values)))]
            sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new

        handles.append(layer.register_forward_hook(keep))
    try:
        context = PromptBank(model).encode([class_prompt(noun)])
        steps = int(model.scheduler.config.num_train_timesteps)
        for batch in range(batches):
            rng = generator(seed, batch)
            timesteps = torch.randint(steps // 2, (16,), generator=rng)  # where a subject can be recognised
            rows = noise_samples(store.draw(16, rng), context, rng, timesteps=timesteps)
            predict(model.unet, model.scheduler, rows)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (total / count, (squares / count - (total / count).square()).clamp(min=0).sqrt())
        for name, (total, squares, count) in sums.items()
    }


@torch.no_grad()
def prune_activations(
    model: DiffusionModel,
    data: AttackData,
    config: PruneActivationsConfig,
    *,
    seed: int,
    base: DiffusionModel | None = None,
) -> DiffusionModel:
    """A copy of the model without the channels that tell the subject from its class.

    Raises:
        ValueError: there are no class pictures.
    """
    subject, others = (
        channel_statistics(model, encode(model, images), data.class_noun, config.batches, seed)
        for images in (data.images, class_pictures(data))
    )
    last = [name for name in subject if name.endswith("conv_out")]
    apart = {
        name: (subject[name][0] - others[name][0]).abs() / (others[name][1] + 1e-6)
        for name in subject
        if name not in last  # its channels are the prediction itself
    }
    everything = torch.cat(list(apart.values()))
    limit = everything.sort(descending=True).values[max(1, round(config.share * len(everything))) - 1]
    own = with_own_unet(model)
    for name, layer in weight_layers(own.unet).items():
        if name in apart:
            prune = apart[name] >= limit
            layer.weight[prune] = 0
            if layer.bias is not None:
                layer.bias[prune] = 0
    return own


REMOVAL = Removal(
    prune_activations, PruneActivationsConfig, pictures=lambda data: len(data.images) + len(data.class_images)
)
