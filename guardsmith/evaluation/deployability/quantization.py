"""Quantization: weights stored in eight bits and read again, in the three ways that people run large models in little memory.

    int8     one scale for each output row of every linear layer, symmetric, as torchao's weight-only mode stores it
    float8   e4m3, by diffusers' own layerwise casting
    Q8_0     GGUF's blocks of 32 weights with a float16 scale each, on every weight of two dimensions or more

int8 and Q8_0 are this file's own round trips of the storage formats: neither library is needed, and the products are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guardsmith.evaluation.deployability.bench import SIDES, Bench, attempt, compared_difference, differences
from guardsmith.gate.deployability import Measurement

BLOCK = 32


def int8_rows(weight: Tensor) -> Tensor:
    """A matrix through int8 and back: each row has the scale of its largest weight."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / scale.clamp_min(torch.finfo(weight.dtype).tiny)).round().clamp(-127, 127).to(torch.int8)
    return stored.to(weight.dtype) * scale


def q8_0_blocks(weight: Tensor) -> Tensor:
    """Weights through GGUF's Q8_0 and back: blocks of 32 in the order of memory; what does not fill blocks stays as it is."""
    if weight.numel() % BLOCK:
        return weight
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    stored = torch.where(scale > 0, blocks / scale, 0.0).round().to(torch.int8)
    return (stored.to(weight.dtype) * scale.half().to(weight.dtype)).reshape(weight.shape)


def int8(network: Any) -> None:
    """Every linear layer, in place."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(int8_rows(module.weight))


def float8(network: Any) -> None:
    """Storage in float8, products in float32."""
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def q8_0(network: Any) -> None:
    """Every weight of two dimensions or more, in place."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.copy_(q8_0_blocks(weight))


FORMATS: dict[str, tuple[Callable[[Any], None], str]] = {
    "int8": (int8, "own round trip of the format, linear layers of the denoiser"),
    "float8": (float8, "diffusers' layerwise casting of the denoiser"),
    "GGUF Q8_0": (q8_0, "own round trip of the format, weights of the denoiser"),
}


def case(bench: Bench, name: str) -> Measurement:
    """One format on both sides."""
    change, how = FORMATS[name]

    def draw(side: str) -> Tensor:
        pipeline = bench.own_denoiser(side)
        change(pipeline.transformer if bench.flow else pipeline.unet)
        return bench.draw(pipeline)

    pictures = {side: bench.pictures(side, name, partial(draw, side)) for side in SIDES}
    away = {side: differences(images, bench.plain(side)) for side, images in pictures.items()}
    strip = bench.strip("quantization", name, pictures["base"], pictures["hardened"])
    return compared_difference("quantization", name, away["base"], away["hardened"], how=how, pictures=strip)


def run(bench: Bench) -> list[Measurement]:
    """Every format."""
    return [m for name in FORMATS for m in attempt("quantization", name, "difference", partial(case, bench, name))]
