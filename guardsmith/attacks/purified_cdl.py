"""The red-teaming framework of hf.co/papers/2406.18944 as one attack: purify the pictures, then contrastive decoupling learning.

Prompts are those of CDL, "without" the noise token and with a negative prompt. Made against cloaked pictures; against a
hardened model, purification does nothing for the attacker but the prompts are not the usual ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator

from guardsmith.attacks import cdl
from guardsmith.attacks.base import Attack, AttackData, OnStep
from guardsmith.attacks.cdl import CdlConfig
from guardsmith.core.errors import UserError
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.purifiers import find_purifier, purified


class PurifiedCdlConfig(CdlConfig):
    """CDL's settings, and how the pictures are purified before."""

    purifier: str = "diffpure"
    """A key of `guardsmith list purifiers`. (The paper's CodeSR is a face restoration and a super-resolution model.)"""
    purifier_params: dict[str, Any] = Field({})
    """Its parameters; anything left out has its paper's default."""

    @field_validator("purifier")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            find_purifier(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name


def attack(
    model: DiffusionModel,
    data: AttackData,
    config: PurifiedCdlConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[DiffusionModel, list[float]]:
    """Personalize a copy of the model; returns it, frozen again, and the loss of every step.

    The purifier uses the model under attack, where it needs one.
    """
    pure = purified(config.purifier, config.purifier_params, model, data.images, class_noun=data.class_noun, seed=seed)
    return cdl.attack(model, replace(data, images=pure), config, seed=seed, on_step=on_step)


ATTACK = Attack(
    attack, PurifiedCdlConfig, "hf.co/papers/2406.18944", suffix=cdl.SUFFIX, negative_prompt=cdl.NEGATIVE_PROMPT
)
