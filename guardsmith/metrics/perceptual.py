"""How different two pictures look: the formula of LPIPS (Zhang et al. 2018; hf.co/papers/1801.03924) on features at hand.

LPIPS itself needs a network trained on ImageNet and weights fitted to people's judgements. Here the features are those of the
model's own VAE encoder, and every layer counts the same, so the numbers are not comparable with published LPIPS; within one base
they order pictures by how much of their structure changed. They carry gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel


def encoder_features(model: DiffusionModel, pixels: Tensor) -> list[Tensor]:
    """Features of the VAE's encoder, (n, c, h, w) each: after its first convolution and after every block."""
    encoder = model.vae.encoder
    features = [encoder.conv_in(pixels.to(encoder.conv_in.weight.device))]
    for block in encoder.down_blocks:
        features.append(block(features[-1]))
    return [each.to(pixels.device) for each in features]


def perceptual_distance(model: DiffusionModel, first: Tensor, second: Tensor) -> Tensor:
    """Distance of pictures, one by one.

    Features are scaled to length 1 over channels; their squared difference is summed over channels and averaged over places
    and layers.

    Args:
        model: whose VAE encodes them.
        first: (n, 3, h, w) in [-1, 1].
        second: likewise.

    Returns:
        (n,), from 0 (the same) to 4.
    """
    layers = []
    for one, other in zip(encoder_features(model, first), encoder_features(model, second), strict=True):
        unit, reference = (each / (each.norm(dim=1, keepdim=True) + 1e-10) for each in (one, other))
        layers.append((unit - reference).square().sum(1).mean((1, 2)))
    return torch.stack(layers).mean(0)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [-1, 1], (n,) in dB; infinite where they are the same."""
    return 10 * torch.log10(4 / (first - second).square().mean((1, 2, 3)))
