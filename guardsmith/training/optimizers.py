"""AdamW, and where the two moments are that it keeps of every weight (`ComputeConfig.optimizer`).

adamw      float32, beside the weights
adamw8bit  8 bits in blocks (Dettmers et al. 2022; hf.co/papers/2110.02861), by bitsandbytes: a quarter of the memory
offloaded  float32 in the machine's memory, where the step is taken too: nothing on the accelerator
sharded    float32, each process of `accelerate launch` with those of its own share of the weights (ZeRO, stage 1; Rajbhandari
           et al. 2020; hf.co/papers/1910.02054), by torch
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.runtime.distributed import world_size
from guardsmith.training.compute import OptimizerKind

MOMENTS = {"adamw": 4.0, "adamw8bit": 1.0 + 4 / 256, "offloaded": 4.0, "sharded": 4.0}
"""Bytes of one moment of one weight; a block of 256 has a scale beside it."""


class Offloaded(torch.optim.AdamW):
    """AdamW on copies of the weights in the machine's memory: gradients go there and weights come back, at every step.

    torchao's `CPUOffloadOptimizer` does not serve: it steps from its own copy of the weights, and so would undo it where a method
    writes weights back in place (`training.loop.Snapshot`); besides, it runs on some accelerators only.

    Args:
        groups: of parameters, as every optimizer takes them.
        settings: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.placed = [parameter for group in groups for parameter in group["params"]]
        copies = iter([torch.nn.Parameter(parameter.detach().to("cpu", copy=True)) for parameter in self.placed])
        super().__init__([group | {"params": [next(copies) for _ in group["params"]]} for group in groups], **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; what changed the weights since the last one counts."""
        copies = [parameter for group in self.param_groups for parameter in group["params"]]
        for copy, parameter in zip(copies, self.placed, strict=True):
            copy.copy_(parameter)
            copy.grad = None if parameter.grad is None else parameter.grad.to("cpu")
        result = super().step(closure)
        for copy, parameter in zip(copies, self.placed, strict=True):
            if copy.grad is not None:
                parameter.copy_(copy)
            copy.grad = None
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights themselves."""
        for parameter in self.placed:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()


def eight_bits() -> Any:
    """AdamW8bit of bitsandbytes.

    Raises:
        UserError: it is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("compute.optimizer adamw8bit needs bitsandbytes: pip install guardsmith[8bit]") from error
    return AdamW8bit


def adamw(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float = 1e-2,
    kind: OptimizerKind = "adamw",
) -> torch.optim.Optimizer:
    """AdamW of one of four kinds.

    Args:
        parameters: to train, or groups of them.
        lr: the learning rate, where a group has none of its own.
        weight_decay: likewise.
        kind: where the moments are; "sharded" is "adamw" where there is one process only.

    Raises:
        UserError: a library is missing.
    """
    entries: list[Any] = list(parameters)
    groups: list[dict[str, Any]] = entries if isinstance(entries[0], dict) else [{"params": entries}]
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if kind == "adamw8bit":
        quantized: torch.optim.Optimizer = eight_bits()(groups, **settings)
        return quantized
    if kind == "offloaded":
        return Offloaded(groups, fused=True, **settings)
    if kind == "sharded" and world_size() > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, fused=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
