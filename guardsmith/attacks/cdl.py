"""Contrastive decoupling learning (CDL), from the red-teaming framework of hf.co/papers/2406.18944.

DreamBooth with a noise token, to which the perturbation of the attacker's pictures is attributed: instance prompts end in
"<noise>", class prompts in "without <noise>". Prompts for the personalized model end in "without <noise>", with a negative
prompt. Made against cloaked pictures; against a hardened model it is an attacker whose prompts are not the usual ones.

The wording is that of the paper's released code (the paper writes "with ... noisy pattern").
"""

from __future__ import annotations

from pydantic import Field

from guardsmith.attacks import dreambooth
from guardsmith.attacks.base import Attack, AttackData, OnStep
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.diffusion.prompts import class_prompt, instance_prompt
from guardsmith.models.checkpoint import DiffusionModel

NOISE = "bhj noisy pattern"
SUFFIX = f", without {NOISE}"
NEGATIVE_PROMPT = "noisy, abstract, pattern, low quality"


class CdlConfig(DreamBoothConfig):
    """Settings of the released code: a low learning rate, and the text encoder is trained too."""

    learning_rate: float = Field(5e-7, gt=0)
    """AdamW's rate, constant."""
    steps: int = Field(1000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(1, gt=0)
    """Instance pictures per step, and as many class pictures."""
    train_text_encoder: bool = True
    """Train the text encoder too, with the same rate."""


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: CdlConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model; returns it, frozen again, and the loss of every step."""
    prompts = (
        f"{instance_prompt(data.identifier, data.class_noun, config.template)}, {NOISE}",
        f"{class_prompt(data.class_noun)}{SUFFIX}",
    )
    return dreambooth.attack(model, data, config, seed=seed, on_step=on_step, prompts=prompts)


ATTACK = Attack(attack, CdlConfig, "hf.co/papers/2406.18944", suffix=SUFFIX, negative_prompt=NEGATIVE_PROMPT)
