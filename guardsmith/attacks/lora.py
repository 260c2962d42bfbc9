"""DreamBooth with LoRA (Hu et al. 2022; hf.co/papers/2106.09685) as in diffusers' `train_dreambooth_lora.py`.

Low-rank adapters on every attention projection of the U-Net (self and cross), through peft; the loop is DreamBooth's. Three
relatives that attackers use in LoRA's place come from peft as well:

    dora   LoRA whose update is split into direction and length (Liu et al. 2024; hf.co/papers/2402.09353)
    loha   the elementwise product of two low-rank updates (Hyeon-Woo et al. 2022; hf.co/papers/2108.06098)
    lokr   a Kronecker product (Yeh et al. 2023; hf.co/papers/2309.14859)
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from peft import LoHaConfig, LoKrConfig, PeftConfig, inject_adapter_in_model
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field

from guardsmith.attacks.base import Attack, AttackData, OnStep
from guardsmith.attacks.dreambooth import DreamBoothConfig, train_on_subject
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.training.loop import torch_seed

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (
    *TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv_in", "conv_out", "conv1", "conv2", "conv_shortcut",
    "conv", "time_emb_proj",
)  # fmt: skip
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
Kind = Literal["lora", "dora", "loha", "lokr"]


class LoraConfig(DreamBoothConfig):
    """Settings of diffusers' script: rank 4, alpha = rank, Gaussian start, no dropout."""

    learning_rate: float = Field(1e-4, gt=0)
    """AdamW's rate, constant."""
    steps: int = Field(500, gt=0)
    """Optimizer steps."""
    rank: int = Field(4, gt=0)
    """Rank of every adapter."""
    kind: Kind = "lora"
    """Which adapter."""
    everywhere: bool = False
    """On every linear layer and convolution of the U-Net, not on the attention only: for protections of the attention (IMMA)."""
    train_text_encoder: bool = False
    """Adapters of the same rank on the text encoder's attention too, with the same rate."""


def add_adapters(
    module: Any, rank: int, seed: int, *, kind: Kind = "lora", targets: tuple[str, ...] = TARGETS
) -> list[torch.nn.Parameter]:
    """Put adapters that change nothing yet into a frozen module; returns their parameters.

    Args:
        module: U-Net or text encoder, changed in place.
        rank: of every adapter, and its alpha: an adapter's update is added as it is.
        seed: of the random factors.
        kind: which adapter.
        targets: how the names of the layers end that get one.
    """
    config: PeftConfig
    if kind in ("lora", "dora"):
        config = PeftLoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets), use_dora=kind == "dora"
        )
    else:
        config = (LoHaConfig if kind == "loha" else LoKrConfig)(r=rank, alpha=rank, target_modules=list(targets))
    with torch_seed(seed):
        inject_adapter_in_model(config, module)
    return [p for p in module.parameters() if p.requires_grad]


def adapter_parameters(module: Any, rank: int) -> int:
    """Number of parameters that adapters of a rank have on the attention projections of a module."""
    layers = [
        layer for name, layer in module.named_modules() if name.endswith(TARGETS) and isinstance(layer, torch.nn.Linear)
    ]
    return rank * sum(layer.in_features + layer.out_features for layer in layers)


def _targets(config: LoraConfig) -> tuple[str, ...]:
    return EVERYWHERE if config.everywhere else TARGETS


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: LoraConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Train adapters on a copy of the model; returns it with the adapters in place, and the loss of every step."""
    own = with_own_unet(model)
    trained = [own.unet]
    parameters = add_adapters(own.unet, config.rank, seed, kind=config.kind, targets=_targets(config))
    if config.train_text_encoder:
        own.text_encoder = copy.deepcopy(model.text_encoder)
        trained.append(own.text_encoder)
        parameters += add_adapters(own.text_encoder, config.rank, seed + 1, kind=config.kind, targets=TEXT_TARGETS)
    losses = train_on_subject(own, data, config, parameters, seed=seed, on_step=on_step)
    for part in trained:
        part.requires_grad_(False)
    return own, losses


def carry_adapters(personalized: DiffusionModel, onto: DiffusionModel, config: LoraConfig) -> DiffusionModel:
    """A copy of another model with the adapters that were trained on this one, as people load a LoRA onto any checkpoint."""
    own = with_own_unet(onto)
    parts = [(personalized.unet, own.unet, _targets(config))]
    if config.train_text_encoder:
        own.text_encoder = copy.deepcopy(onto.text_encoder)
        parts.append((personalized.text_encoder, own.text_encoder, TEXT_TARGETS))
    for trained, module, targets in parts:
        source = dict(trained.named_parameters())
        add_adapters(module, config.rank, 0, kind=config.kind, targets=targets)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(source[name].data)
        module.requires_grad_(False)
    return own


def merge_adapters(module: torch.nn.Module) -> None:
    """Add the adapters' updates to the weights that they belong to, and remove the adapters; changes the module in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    vars(module).pop("peft_config", None)


ATTACK = Attack(attack, LoraConfig, "hf.co/papers/2106.09685")
