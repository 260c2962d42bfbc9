"""The parameters of APDM."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from guardsmith.diffusion.losses import Reduction
from guardsmith.methods.base import MethodConfig


class ApdmConfig(MethodConfig):
    """Parameters of APDM. Defaults are the paper's (SD1.5), not those of its argument parser."""

    learning_rate: float = Field(5e-6, gt=0)
    """g_protect: rate of the AdamW that moves theta."""
    personalization_learning_rate: float = Field(5e-6, gt=0)
    """g_per: rate of the AdamW that follows the attacker's path; its moments start anew on every path."""
    outer_steps: int = Field(800, gt=0)
    """N_protect: moves of theta."""
    inner_steps: int = Field(20, gt=0)
    """N_per: steps of every personalization path."""
    batch_size: int = Field(1, gt=0)
    """Rows of each kind per inner step."""
    beta: float = Field(1.0, gt=0)
    """Temperature of the DPO term. It means something only together with `reduction`."""
    reduction: Reduction = "mean"
    """Where DPO's log-sigmoid is taken: per sample on the mean error (paper), or per element (released code)."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of L_ppl in both losses."""
    pairing: Literal["paired", "random", "nearest"] = "paired"
    """Which x+ is preferred to a subject's picture: always the same one, any, or the class picture with the closest latents."""
    positive_prompt: str | None = None
    """Prompt with which the base draws the x+, e.g. "a photo of {class_noun} in the snow"; `null`: the class pictures serve."""
    mirror: bool = False
    """Take the subject's pictures mirrored as well (an attacker may train on those)."""
    train_text_encoder: bool = False
    """Harden the text encoder too, and let the path train it like an attacker who does."""
    identifiers: tuple[str, ...] = Field(("sks",), min_length=1)
    """Identifiers of the personalization path, one drawn per path; the subject's own are added."""
    parameters: Literal["unet", "attention", "cross_attention"] = "unet"
    """Which weights of the U-Net may change for good (a full path always moves all of them)."""
    path: Literal["full", "lora"] = "full"
    """What the attacker's path moves: all weights (DreamBooth), or adapters on the attention, which needs far less memory."""
    path_rank: int = Field(4, gt=0)
    """Rank of those adapters; an attacker's rate for them is some ten times the one for weights."""
    overlap: bool = False
    """Collect the protection gradients in a second thread, at a copy of the path's weights, while the path goes on: for CPUs
    with idle cores, which a small U-Net does not keep busy. Without an effect where several processes share the rows."""
    offload_reference: bool = False
    """Keep the frozen reference in the machine's memory, and bring it to the accelerator once a path, for all of its pairs."""
    distillation_weight: float = Field(0.0, ge=0)
    """Weight of || e_theta - e_base ||^2 on benign pictures, at theta, once per outer step (0: the paper)."""
    max_grad_norm: float | None = None
    """Clip the summed protection gradient (none in the paper)."""
    leak: bool = False
    """Also add the personalization gradients to G, like the released code."""

    @field_validator("positive_prompt")
    @classmethod
    def _known_places(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                value.format(class_noun="person")
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError("the only word in braces may be {class_noun}") from error
        return value

    @model_validator(mode="after")
    def _adapters_are_all_that_moves(self) -> Self:
        if self.path == "lora" and (self.leak or self.train_text_encoder):
            raise ValueError(
                "a path of adapters moves no weights: leave leak and train_text_encoder out, or set path to full"
            )
        return self

    @model_validator(mode="after")
    def _one_text_encoder(self) -> Self:
        if self.overlap and self.train_text_encoder:
            raise ValueError("overlap copies the denoiser only: leave overlap or train_text_encoder out")
        return self

    @model_validator(mode="after")
    def _one_source_of_positives(self) -> Self:
        if self.pairing == "nearest" and self.positive_prompt is not None:
            raise ValueError("pairing nearest picks among the class pictures; leave positive_prompt out")
        return self
