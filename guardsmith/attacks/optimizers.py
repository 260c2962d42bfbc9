"""The optimizers that attackers use: those of diffusers' scripts and of the common LoRA trainers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch

from guardsmith.core.errors import UserError

OptimizerName = Literal["adamw", "adamw8bit", "sgd", "adafactor", "prodigy"]

NEEDED = {
    "adamw8bit": ("bitsandbytes", "pip install guardsmith[8bit]"),
    "prodigy": ("prodigyopt", "pip install guardsmith[prodigy]"),
}
"""Optimizers of other packages, and how to install them."""


def check_optimizer(name: str) -> None:
    """Whether an optimizer can be used here.

    Raises:
        UserError: its package is not installed.
    """
    if name in NEEDED and find_spec(NEEDED[name][0]) is None:
        package, install = NEEDED[name]
        raise UserError(f"the optimizer {name} needs {package}: {install}")


def make_optimizer(
    name: str, parameters: Sequence[torch.nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer over an attacker's parameters.

    Args:
        name: one of `OptimizerName`. SGD has a momentum of 0.9; Prodigy multiplies its own estimate of the rate by the given one,
            which is usually 1.
        parameters: what is trained.
        learning_rate: its rate.
        weight_decay: decoupled from the gradient, except for SGD, which adds it to the gradient.

    Raises:
        UserError: its package is not installed.
    """
    check_optimizer(name)
    tensors = list(parameters)
    if name == "sgd":
        return torch.optim.SGD(tensors, lr=learning_rate, momentum=0.9, weight_decay=weight_decay)
    if name == "adafactor":
        return torch.optim.Adafactor(tensors, lr=learning_rate, weight_decay=weight_decay)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(tensors, lr=learning_rate, weight_decay=weight_decay)
        return eight_bit
    if name == "prodigy":
        from prodigyopt import Prodigy

        adaptive: torch.optim.Optimizer = Prodigy(tensors, lr=learning_rate, weight_decay=weight_decay)
        return adaptive
    return torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=weight_decay, fused=True)
