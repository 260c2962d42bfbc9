"""Which tensors of a single-file checkpoint (A1111, ComfyUI) may go into a hardened one: by their names, then by their values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Parts of the layout other than the U-Net, and the schedule's numbers. A structure below them is asked for, so that a second
# U-Net does not pass as part of a VAE.
KNOWN = re.compile(
    r"first_stage_model\.(encoder|decoder|quant_conv|post_quant_conv|loss|logvar)\b"
    r"|cond_stage_model\.(transformer|model|logit_scale)\b"
    r"|conditioner\.embedders\.\d+\.(transformer|model|logit_scale)\b"
    r"|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped"
    r"|posterior_mean_coef1|posterior_mean_coef2|lvlb_weights|logvar|scale_factor|v_pred|ztsnr|denoiser\.sigmas)$"
)
# What copies of a U-Net, and deltas to it, are called: EMA in its spellings (`model_ema.diffusion_modelinput_blocks00weight`), a
# second copy, ControlNets (which begin as one), adapters.
COPY = re.compile(
    r"(^|[._-])(non_?)?ema([._-]|\d|$)|ema_?model|model_?ema|diffusion_?model|input_?blocks|output_?blocks|middle_?block"
    r"|time_?embed(?!ding_type)|down_?blocks|up_?blocks|mid_?block|(^|[._-])unet|(^|[._-])transformer_blocks|control_?model"
    r"|(^|[._-])(lora|loha|lokr|lycoris|dora|hada|oft|ia3|locon)([._-]|$)|lora_(up|down|a|b)\b|hada_w|lokr_w|dora_scale"
    r"|(^|[._-])(delta|diff|backup|original|orig|base|old)([._-]|$)",
    re.IGNORECASE,
)


class SortedTensors(NamedTuple):
    """Tensors that are not the hardened part's own.

    Attributes:
        copied: of other parts; they are written as they are.
        copies: of a hardened part under another name; they are left out.
        unknown: of no known part.
    """

    copied: list[str]
    copies: list[str]
    unknown: list[str]


def sort_tensors(names: Iterable[str], replaced: Iterable[str]) -> SortedTensors:
    """What becomes of the tensors of a single-file checkpoint that are not replaced by hardened ones."""
    result = SortedTensors([], [], [])
    replaced_names = set(replaced)
    for name in names:
        if name in replaced_names:
            continue
        if COPY.search(name) or name.startswith("model."):
            result.copies.append(name)
        elif KNOWN.match(name):
            result.copied.append(name)
        else:
            result.unknown.append(name)
    return result
