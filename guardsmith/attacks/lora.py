"""DreamBooth with LoRA (Hu et al. 2022; hf.co/papers/2106.09685) as in diffusers' `train_dreambooth_lora.py`.

Low-rank adapters on every attention projection of the U-Net (self and cross), through peft; the loop is DreamBooth's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from pydantic import Field

from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig, train_on_subject
from guardsmith.models import DiffusionModel, with_own_unet
from guardsmith.training import torch_seed

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class LoraConfig(DreamBoothConfig):
    """Settings of diffusers' script: rank 4, alpha = rank, Gaussian start, no dropout."""

    learning_rate: float = Field(1e-4, gt=0)
    """AdamW's rate, constant."""
    steps: int = Field(500, gt=0)
    """Optimizer steps."""
    rank: int = Field(4, gt=0)
    """Rank of every adapter."""
    train_text_encoder: Literal[False] = False
    """Not with adapters: they sit on the U-Net only."""


def add_adapters(unet: Any, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Put adapters on a frozen U-Net's attention projections, Gaussian from this seed; returns their parameters."""
    with torch_seed(seed):
        unet.add_adapter(PeftLoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS))
    return [p for p in unet.parameters() if p.requires_grad]


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: LoraConfig,
    *,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Train adapters on a copy of the model; returns it with the adapters in place, and the loss of every step."""
    own = with_own_unet(model)
    parameters = add_adapters(own.unet, config.rank, seed)
    losses = train_on_subject(own, data, config, parameters, seed=seed, on_step=on_step)
    own.unet.requires_grad_(False)
    return own, losses
