"""The model families, and what makes later ones look like Stable Diffusion 1: a denoiser of (latents, timesteps, context).

Methods and attacks hand a network noisy latents, timesteps and one tensor that stands for the prompt. SDXL and Stable Diffusion 3
want more of a prompt (a pooled embedding), and SDXL the size of the picture. So the pooled embedding travels in the context, as
tokens behind the others, and the networks here take it apart again; sizes are those of an uncropped picture of the model's own.

    family               denoiser      text encoders     noise
    SD 1.x, 2.x          U-Net         CLIP              z_t = sqrt(ab_t) z + sqrt(1 - ab_t) eps; epsilon or velocity
    SDXL                 U-Net         CLIP, OpenCLIP    the same
    Stable Diffusion 3   MMDiT         two CLIPs, T5     z_t = (1 - s) z + s eps with s = t / 1000; eps - z (rectified flow)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

T5_TOKENS = 256  # what diffusers' pipeline gives the third encoder of Stable Diffusion 3


def pack(states: Tensor, pooled: Tensor) -> Tensor:
    """Token embeddings (n, tokens, width) with a pooled embedding (n, p) behind them, in as many tokens as it takes."""
    rows = -(-pooled.shape[1] // states.shape[2])
    behind = F.pad(pooled, (0, rows * states.shape[2] - pooled.shape[1]))
    return torch.cat([states, behind.unflatten(1, (rows, states.shape[2]))], 1)


def unpack(context: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Take a context of `pack` apart: token embeddings, and the pooled embedding of this size."""
    rows = -(-size // context.shape[2])
    return context[:, :-rows], context[:, -rows:].flatten(1)[:, :size]


def computed(network: Any, forward: Callable[..., Any], sample: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a network's own `forward` gives: computed in its `precision` where that is safe (autocast), and float32 again."""
    if network.precision == torch.float32:
        return forward(sample, *args, **kwargs)
    with torch.autocast(sample.device.type, dtype=network.precision):
        out = forward(sample, *args, **kwargs)
    if isinstance(out, tuple):
        return (out[0].float(), *out[1:])
    out.sample = out.sample.float()
    return out


class Denoiser:
    """What the denoisers of all families have in common.

    Attributes:
        precision: of what it computes, float32, bfloat16 or float16; its weights and predictions are float32 all the same.
    """

    precision = torch.float32

    def compute_in(self, precision: str) -> None:
        """Choose the precision of every forward pass from now on (`ComputeConfig.precision`); copies inherit it."""
        self.precision = getattr(torch, precision)


class SDUNet(Denoiser, UNet2DConditionModel):  # type: ignore[misc]
    """The U-Net of Stable Diffusion 1 and 2."""

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The prediction, float32."""
        return computed(self, super().forward, sample, timestep, encoder_hidden_states, *args, **kwargs)


class SDXLUNet(Denoiser, UNet2DConditionModel):  # type: ignore[misc]
    """SDXL's U-Net, called like Stable Diffusion's.

    Attributes:
        picture_size: side in pixels of the pictures, one of its inputs.
    """

    picture_size = 1024

    @property
    def pooled_size(self) -> int:
        """Numbers of the pooled embedding."""
        return int(self.config.projection_class_embeddings_input_dim - 6 * self.config.addition_time_embed_dim)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The prediction; the context is one of `pack`."""
        states, pooled = unpack(encoder_hidden_states, self.pooled_size)
        side = self.picture_size
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=pooled.dtype, device=pooled.device)
        conditions = {"text_embeds": pooled, "time_ids": sizes.expand(len(sample), 6)}
        return computed(self, super().forward, sample, timestep, states, *args, added_cond_kwargs=conditions, **kwargs)


class SD3Transformer(Denoiser, SD3Transformer2DModel):  # type: ignore[misc]
    """Stable Diffusion 3's MMDiT, called like a U-Net."""

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        """The prediction; the context is one of `pack`, timesteps are thousandths of noise."""
        states, pooled = unpack(encoder_hidden_states, int(self.config.pooled_projection_dim))
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        return computed(self, super().forward, sample, states, pooled, times, **kwargs)


DENOISERS = (UNet2DConditionModel, SD3Transformer2DModel)
"""Networks that predict, of every family."""


class FlowSchedule:
    """The training schedule of a rectified flow, called like a `DDPMScheduler`: z_t = (1 - s) z + s eps, s = t / 1000.

    Attributes:
        config: the stored settings, with `prediction_type` "flow".
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config: Any = SimpleNamespace(**settings | {"prediction_type": "flow"})

    @classmethod
    def from_pretrained(cls, folder: Path, subfolder: str) -> FlowSchedule:
        """Read `scheduler_config.json`."""
        return cls(dict(FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder=subfolder).config))

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the picture and of the noise there is, float32 (n, 1, 1, 1) each."""
        noise = (timesteps / float(self.config.num_train_timesteps)).reshape(-1, 1, 1, 1)
        return 1 - noise, noise

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t, (n, c, h, w)."""
        alpha, sigma = (share.to(latents) for share in self.alpha_sigma(timesteps))
        return alpha * latents + sigma * noise

    def solver(self) -> DPMSolverMultistepScheduler:
        """DPM-Solver++ (2M) for it; its noise levels are shifted as the checkpoint asks."""
        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.config.num_train_timesteps, algorithm_type="dpmsolver++", solver_order=2,
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=float(self.config.shift),
        )  # fmt: skip


class Family(NamedTuple):
    """What belongs to a checkpoint of one family.

    Attributes:
        name: as people call it.
        denoiser: folder of the network that predicts.
        network: its class.
        encoders: classes of `text_encoder`, `text_encoder_2` and so on; a T5 may be missing.
        tokenizers: of each.
        scheduler: the training schedule's class.
    """

    name: str
    denoiser: str
    network: Any
    encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any = DDPMScheduler

    def text_parts(self) -> list[tuple[str, str, Any, Any]]:
        """Folder of every text encoder and of its tokenizer, and the classes of both."""
        endings = ["", *(f"_{number}" for number in range(2, len(self.encoders) + 1))]
        return [
            (f"text_encoder{end}", f"tokenizer{end}", encoder, tokenizer)
            for end, encoder, tokenizer in zip(endings, self.encoders, self.tokenizers, strict=True)
        ]


SD = Family("Stable Diffusion 1.x and 2.x", "unet", SDUNet, (CLIPTextModel,), (CLIPTokenizer,))
SDXL = Family("SDXL", "unet", SDXLUNet, (CLIPTextModel, CLIPTextModelWithProjection), (CLIPTokenizer, CLIPTokenizer))
SD3 = Family(
    "Stable Diffusion 3", "transformer", SD3Transformer,
    (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel), (CLIPTokenizer, CLIPTokenizer, T5TokenizerFast),
    FlowSchedule,
)  # fmt: skip
PIPELINES = {"StableDiffusionPipeline": SD, "StableDiffusionXLPipeline": SDXL, "StableDiffusion3Pipeline": SD3}
"""Families by what `model_index.json` calls their pipeline."""


def token_ids(tokenizer: Any, prompts: Sequence[str], longest: int | None = None) -> Tensor:
    """Token ids, int64 (n, longest): padded to the full length (`model_max_length` if not given), truncated, no mask."""
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=longest or tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    ids: Tensor = batch.input_ids
    return ids


def packed_contexts(model: Any, prompts: Sequence[str]) -> Tensor:
    """Contexts of prompts for SDXL and Stable Diffusion 3 as diffusers' pipelines compute them, float32 (n, tokens, width).

    The layer before the last of every CLIP, side by side; for Stable Diffusion 3 padded to the transformer's width, with T5's
    states (zeros without T5) as further tokens. The pooled embeddings come behind (`pack`): of the second encoder for SDXL, of
    both CLIPs for Stable Diffusion 3.
    """
    texts = [(model.text_encoder, model.tokenizer), *model.further_text]
    clips = [(encoder, tokenizer) for encoder, tokenizer in texts if not isinstance(encoder, T5EncoderModel)]
    out = [encoder(token_ids(tokenizer, prompts), output_hidden_states=True) for encoder, tokenizer in clips]
    states = torch.cat([each.hidden_states[-2] for each in out], -1)
    if model.family is SDXL:
        context = pack(states, out[-1].text_embeds)
        if model.empty_is_zero:
            context = context * torch.tensor([float(prompt != "") for prompt in prompts]).reshape(-1, 1, 1)
        return context
    width = int(model.unet.config.joint_attention_dim)
    states = F.pad(states, (0, width - states.shape[-1]))
    t5 = [(encoder, tokenizer) for encoder, tokenizer in texts if isinstance(encoder, T5EncoderModel)]
    if t5:
        encoder, tokenizer = t5[0]
        more = encoder(token_ids(tokenizer, prompts, min(T5_TOKENS, tokenizer.model_max_length))).last_hidden_state
    else:
        more = states.new_zeros(len(states), T5_TOKENS, width)
    return pack(torch.cat([states, more], 1), torch.cat([each.text_embeds for each in out], -1))
