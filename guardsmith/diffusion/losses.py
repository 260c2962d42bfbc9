"""Denoising-loss rows: the maths that every method, attack and cloak shares.

A row is (latent, timestep, noise, context, target). All rows at one parameter point go through the U-Net in one batch;
what differs between methods is how the rows' errors are combined (a mean, a weighted sum, a DPO pair).

    z_t = a z + s eps            a = sqrt(ab_t), s = sqrt(1 - ab_t)     (rectified flow: s = t / 1000, a = 1 - s)
    y   = eps                    epsilon models
    y   = a eps - s z            v-prediction models
    y   = eps - z                rectified flow
    error = (prediction(z_t, t, context) - y)^2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.models.families import FlowSchedule
from guardsmith.runtime.device import concatenated, outputs_stay
from guardsmith.runtime.distributed import all_gather, own_rows

Reduction = Literal["mean", "element"]


@dataclass(frozen=True)
class NoisedSamples:
    """n rows for one U-Net call.

    Attributes:
        latents: clean scaled latents z, float32 (n, c, h, w).
        timesteps: int64 (n,).
        noise: eps, float32 (n, c, h, w).
        context: text embeddings, float32 (n, tokens, width).
        target: what the prediction is compared with, (n, c, h, w); `None` for the scheduler's own target y.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    context: Tensor
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


def join(*parts: NoisedSamples) -> NoisedSamples:
    """Rows of several kinds as one batch, in order (all with a target of their own, or none)."""
    targets = [p.target for p in parts if p.target is not None]
    if targets and len(targets) != len(parts):
        raise ValueError("rows with and without a target of their own cannot share a batch")
    return NoisedSamples(
        torch.cat([p.latents for p in parts]),
        torch.cat([p.timesteps for p in parts]),
        torch.cat([p.noise for p in parts]),
        concatenated([p.context for p in parts]),
        concatenated(targets) if targets else None,
    )


def cut(rows: NoisedSamples, size: int) -> list[NoisedSamples]:
    """The rows in batches of at most `size`."""
    parts = [[None] * -(-len(rows) // size) if p is None else p.split(size) for p in vars(rows).values()]
    return [NoisedSamples(*part) for part in zip(*parts, strict=True)]


def noise_samples(
    latents: Tensor, context: Tensor, generator: torch.Generator, *, timesteps: Tensor | None = None, steps: int = 1000
) -> NoisedSamples:
    """Rows for these latents with fresh noise and uniform timesteps (or the given ones).

    Args:
        latents: (n, c, h, w).
        context: (n, tokens, width), or (1, tokens, width) for all.
        generator: CPU generator.
        timesteps: int64 (n,), drawn uniformly from 0 .. steps - 1 when absent.
        steps: number of training timesteps of the schedule.
    """
    count = len(latents)
    if timesteps is None:
        timesteps = torch.randint(steps, (count,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return NoisedSamples(latents, timesteps, noise, context.expand(count, -1, -1))


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """z_t = a z + s eps."""
    noisy: Tensor = scheduler.add_noise(latents, noise, timesteps)
    return noisy


def alpha_sigma(scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the picture and how much of the noise is in z_t: a and s, float32 (n, 1, 1, 1) each."""
    if isinstance(scheduler, FlowSchedule):
        return scheduler.alpha_sigma(timesteps)
    alpha_bar = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def own_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The scheduler's target y, computed from the clean latents (never from a prediction)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    if kind == "flow":
        return noise - latents
    raise ValueError(f"prediction type '{kind}' is not supported")


def clean_coefficients(scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """What a prediction y says of the clean latents is z = p z_t - q y: p and q, float32 (n, 1, 1, 1) each.

    (1 / a, s / a) where it is the noise, (a, s) where it is a velocity, (1, s) for a flow.
    """
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return 1 / alpha, sigma / alpha
    return (alpha, sigma) if kind == "v_prediction" else (torch.ones_like(alpha), sigma)


def epsilon_of(scheduler: Any, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The noise that a prediction y says is in z_t: eps = a y + s z_t where it is a velocity, a y + z_t for a flow."""
    if scheduler.config.prediction_type == "epsilon":
        return prediction
    alpha, sigma = (share.to(noisy) for share in alpha_sigma(scheduler, timesteps))
    if scheduler.config.prediction_type == "flow":
        sigma = torch.ones_like(sigma)
    noise: Tensor = alpha * prediction + sigma * noisy
    return noise


def predict(unet: Any, scheduler: Any, rows: NoisedSamples) -> Tensor:
    """The U-Net's prediction for all rows, (n, c, h, w), on the device that it computes on.

    Each of several processes computes its part (`runtime.distributed`).
    """
    noisy = add_noise(scheduler, rows.latents, rows.noise, rows.timesteps)
    timesteps, context = rows.timesteps, rows.context
    own = own_rows(len(rows))
    if own is not None:
        noisy, timesteps, context = noisy[own], timesteps[own], context[own]
    with outputs_stay():
        out: Tensor = unet(noisy, timesteps, context, return_dict=False)[0]
    return all_gather(out, len(rows))


@torch.no_grad()
def score_residual(unet: Any, scheduler: Any, rows: NoisedSamples) -> Tensor:
    """eps_theta(z_t, t, c) - eps of every row, (n, c, h, w), without a graph: what score distillation moves latents by."""
    noisy = add_noise(scheduler, rows.latents, rows.noise, rows.timesteps)
    prediction = predict(unet, scheduler, rows).to(noisy.device)
    return epsilon_of(scheduler, prediction, noisy, rows.timesteps) - rows.noise


def squared_errors(unet: Any, scheduler: Any, rows: NoisedSamples) -> Tensor:
    """Element-wise squared errors of all rows, float32 (n, c, h, w), on the U-Net's device; average dims 1-3 for a row loss."""
    target = rows.target
    if target is None:
        target = own_target(scheduler, rows.latents, rows.noise, rows.timesteps)
    prediction = predict(unet, scheduler, rows).float()
    return (prediction - target.to(prediction.device).float()).square()


def row_losses(unet: Any, scheduler: Any, rows: NoisedSamples) -> Tensor:
    """Mean squared error per row, float32 (n,)."""
    return squared_errors(unet, scheduler, rows).mean(dim=(1, 2, 3))


def dpo_loss(
    positive: Tensor,
    negative: Tensor,
    reference_positive: Tensor,
    reference_negative: Tensor,
    *,
    beta: float,
    reduction: Reduction,
) -> Tensor:
    """Direct preference optimisation over a pair of denoising errors (Diffusion-DPO; APDM eq. for L_DPO).

        r+- = error_theta(x+-) - error_phi(x+-)          L = -mean log sigmoid(-beta (r+ - r-))

    Descending it makes theta denoise the positive better, and the negative worse, than the frozen phi does.

    Args:
        positive: theta's squared errors on the preferred rows, (n, c, h, w).
        negative: theta's squared errors on the rows to unlearn, same shape, same timesteps and noise.
        reference_positive: the frozen model's errors on the preferred rows.
        reference_negative: the frozen model's errors on the rows to unlearn.
        beta: how fast the preference saturates. It has meaning only together with `reduction`.
        reduction: "mean" applies the log-sigmoid to each row's mean error (the paper's per-sample norm, scaled by its
            number of elements); "element" applies it to each element and averages (the released code).

    Returns:
        A scalar.
    """
    margin = (positive - reference_positive) - (negative - reference_negative)
    if reduction == "mean":
        margin = margin.mean(dim=(1, 2, 3))
    return -F.logsigmoid(-beta * margin).mean()


def dpo_saturation(
    positive: Tensor,
    negative: Tensor,
    reference_positive: Tensor,
    reference_negative: Tensor,
    *,
    beta: float,
    reduction: Reduction,
) -> float:
    """Mean sigmoid weight of the DPO gradient: 0.5 at the start, towards 0 once the preference is satisfied."""
    margin = (positive - reference_positive) - (negative - reference_negative)
    if reduction == "mean":
        margin = margin.mean(dim=(1, 2, 3))
    return float(torch.sigmoid(beta * margin).mean())
