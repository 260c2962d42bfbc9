"""How far training has moved the reserved stream: of constants of its channels, and in all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guardsmith.methods.tripwire.layout import Layout, down_parts


@torch.no_grad()
def streams(unet: Any, layout: Layout, noisy: Tensor, times: Tensor, context: Tensor) -> dict[str, Tensor]:
    """The features behind every part of the way down and the middle block, (n, c, h, w) each."""
    deepest = unet.mid_block.resnets[-1].out_channels
    modules = {"conv_in": unet.conv_in} | {name: part for kind, name, part in down_parts(unet) if kind != "attention"}
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [
        part.register_forward_hook(
            lambda module, _, out, name=name: kept[name].append(out[:, layout.features(module.out_channels, deepest)])
        )
        for name, part in modules.items()
    ]
    for some, when in zip(noisy.split(64), times.split(64), strict=True):
        unet(some, when, context.expand(len(some), -1, -1))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def drift(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Root mean square of the change over the stream's own, and of the part of it that is a constant of the channel."""
    found = {}
    for name, old in before.items():
        change, size = after[name] - old, old.square().mean().sqrt()
        constant = change.mean((0, 2, 3))
        found[name] = {
            "all": round(float(change.square().mean().sqrt() / size), 3),
            "constants": round(float(constant.square().mean().sqrt() / size), 3),
        }
    return found
