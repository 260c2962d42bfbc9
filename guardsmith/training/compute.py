"""How the denoiser computes while it is hardened: precision, gradient checkpointing, and the kind of AdamW.

Nothing heavy is imported here, because recipes contain this configuration.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["float32", "bfloat16", "float16"]
OptimizerKind = Literal["adamw", "adamw8bit", "offloaded", "sharded"]


class ComputeConfig(BaseModel):
    """How the denoiser computes while it is hardened. Attacks and pictures that are judged are float32 whatever this says."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    precision: Precision = "float32"
    """bfloat16, float16: products and convolutions in it (autocast), in float16 with scaled losses; weights, gradients and
    optimizer stay float32. What `--mixed_precision bf16` and `fp16` are in diffusers' scripts."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them, and keep the base's denoiser in the half precision
    of its files, where that is exact: less memory, a third more time."""
    optimizer: OptimizerKind = "adamw"
    """Where AdamW's two moments of every weight are: beside the weights; there in 8 bits (extra `8bit`), where the tripwire also
    applies every gradient as soon as it is there; in the machine's memory and not the accelerator's; or shared by the processes
    of `accelerate launch`."""


def configure_denoiser(network: Any, compute: ComputeConfig) -> None:
    """Set a denoiser's precision and gradient checkpointing, in place; copies of it compute in the same way.

    Args:
        network: one of the denoisers of `guardsmith.models.families`.
        compute: which precision, and whether to checkpoint. The optimizer is the business of `guardsmith.training.optimizers`.
    """
    network.compute_in(compute.precision)
    if compute.gradient_checkpointing:
        network.enable_gradient_checkpointing()
