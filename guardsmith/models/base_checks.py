"""What is wrong with the files of a base, said before the libraries read them: which part, which file, what to do.

Nothing is guessed: whatever a configuration leaves open, or says in a way that the networks here do not compute, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import T5EncoderModel

from guardsmith.core.errors import UserError
from guardsmith.models.families import SD, SD3, Family

POINTER = b"version https://git-lfs"
PLAIN = ("diffusion_pytorch_model", "model")


def read_config(file: Path) -> dict[str, Any]:
    """A configuration of the libraries.

    Raises:
        UserError: it is not there, is a pointer of Git LFS, or no JSON mapping.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing; the checkpoint is incomplete.")
    data = file.read_bytes()
    refuse_pointer(file, data)
    try:
        config = json.loads(data)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}).") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: a mapping of settings is expected, and it holds something else.")
    return config


def refuse_pointer(file: Path, data: bytes) -> None:
    """Refuse a file that Git LFS has not fetched.

    Raises:
        UserError: it is one.
    """
    if data.startswith(POINTER):
        raise UserError(f"{file} is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`.")


def check_weight_files(folder: Path, part: str) -> None:
    """Whether the weights of a part are all there, in files that this family reads.

    Args:
        folder: of the checkpoint.
        part: name of its folder.

    Raises:
        UserError: which file is not, and what to do.
    """
    place = folder / part
    files = {file.name: file for file in sorted(place.glob("*.safetensors"))}
    for file in files.values():
        with file.open("rb") as stream:
            refuse_pointer(file, stream.read(len(POINTER)))
    plain = [name for name in files if name in {f"{stem}.safetensors" for stem in PLAIN}]
    indexes = [place / f"{stem}.safetensors.index.json" for stem in PLAIN]
    index = next((file for file in indexes if file.is_file()), None)
    if not plain and index is not None:
        _check_shards(index, files)
        plain = [name for name in files if name in set(_shards(index))]
    if not plain:
        there = ", ".join(list(files)[:3]) + (", ..." if len(files) > 3 else "")
        if any("-of-" in name for name in files):
            raise UserError(
                f"{place}: its weights are in shards ({there}) without an index ({indexes[0].name}); fetch the index too."
            )
        raise UserError(
            f"{place}: there are only variants of its weights ({there}); save the part without a variant, e.g. "
            "`pipeline.save_pretrained(folder)` after loading it with that variant."
        )
    for name in plain:
        _check_precision(files[name])


def _shards(index: Path) -> list[str]:
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: it has no 'weight_map' of tensors to files; fetch it again.")
    return list(dict.fromkeys(weight_map.values()))


def _check_shards(index: Path, files: Iterable[str]) -> None:
    missing = [name for name in _shards(index) if name not in set(files)]
    if missing:
        raise UserError(
            f"{index.parent}: {len(missing)} of its files are missing ({missing[0]}, named in {index.name}); fetch them again."
        )


def _check_precision(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                kind = str(weights.get_slice(key).get_dtype())
                if kind.startswith("F8") or kind.startswith("F4") or kind in ("I8", "U8"):
                    raise UserError(
                        f"{file}: its weights are quantized ({key} is {kind}); use it in float16, bfloat16 or float32."
                    )
    except UserError:
        raise
    except Exception as error:  # safetensors' own error class is not exported everywhere
        raise UserError(f"{file}: a weight file is truncated or corrupt ({error}).") from error


def check_shapes(folder: Path, family: Family) -> None:
    """Whether the denoiser's configuration is of a kind that is computed here.

    Raises:
        UserError: what is not.
    """
    file = folder / family.denoiser / "config.json"
    shape, vae = read_config(file), read_config(folder / "vae" / "config.json")
    size = shape.get("sample_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(
            f"{file}: sample_size is {size!r}; guardsmith needs one side of square latents, a whole number."
        )
    latent_channels, in_channels = vae.get("latent_channels", 4), shape.get("in_channels", 16 if family is SD3 else 4)
    if in_channels != latent_channels:
        what = (
            "an inpainting or instruction model, which is not supported"
            if in_channels in (8, 9) and latent_channels == 4
            else "another"
        )
        raise UserError(
            f"{file}: it takes {in_channels} channels and the VAE gives {latent_channels}; this is {what}: use the "
            "text-to-image model."
        )
    out_channels = shape.get("out_channels", in_channels)
    if out_channels not in (latent_channels, None):
        raise UserError(
            f"{file}: it gives {out_channels} channels and the VAE has {latent_channels}; they do not belong together."
        )
    scale = vae.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < float("inf"):
        raise UserError(
            f"{folder / 'vae' / 'config.json'}: scaling_factor is {scale!r}; it has to be a number above 0."
        )


def check_schedule(folder: Path, family: Family) -> None:
    """Whether the training schedule is one that this family is trained with, and complete.

    Raises:
        UserError: what is not.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    schedule = read_config(file)
    kind = str(schedule.get("_class_name"))
    prediction = schedule.get("prediction_type")
    flow = kind.startswith("FlowMatch") or prediction == "flow_prediction"
    if flow != (family is SD3):
        what = "flow matching" if flow else "diffusion"
        where = f"{file}: {kind} ({prediction or 'no prediction_type'})"
        raise UserError(
            f"{where} is a schedule of {what}, and {family.name} is not trained so; such a model is not supported."
        )
    steps = schedule.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 2 <= steps <= 100_000:
        raise UserError(f"{file}: num_train_timesteps is {steps!r}; it has to be a whole number, as a rule 1000.")
    if flow:
        return
    if (betas := schedule.get("trained_betas")) is not None:
        if not _numbers(betas) or len(betas) != steps:
            raise UserError(f"{file}: trained_betas has to be {steps} numbers.")
        return
    for key in ("beta_start", "beta_end"):
        if key in schedule and not _numbers([schedule[key]]):
            raise UserError(f"{file}: {key} is {schedule[key]!r}; it has to be a number between 0 and 1.")
    name = schedule.get("beta_schedule")
    if name not in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
        raise UserError(
            f"{file}: beta_schedule is {name!r}; without it the noise that the model was trained with is not known."
        )
    if name not in ("squaredcos_cap_v2", "laplace") and not {"beta_start", "beta_end"} <= schedule.keys():
        raise UserError(
            f"{file}: beta_start or beta_end is missing; without them the noise of the training is not known."
        )
    if schedule.get("rescale_betas_zero_snr") not in (None, True, False):
        raise UserError(
            f"{file}: rescale_betas_zero_snr is {schedule['rescale_betas_zero_snr']!r}; it is true or false."
        )


def _numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 for value in values
    )


def check_widths(source: str, family: Family, unet: Any, encoders: list[Any]) -> None:
    """What the text encoders give is what the denoiser takes.

    Raises:
        UserError: it is not.
    """
    network = "transformer" if family is SD3 else "U-Net"
    clips = [encoder for encoder in encoders if not isinstance(encoder, T5EncoderModel)]
    encoder_width = sum(encoder.config.hidden_size for encoder in clips)
    context_width = unet.config.joint_attention_dim if family is SD3 else unet.config.cross_attention_dim
    if encoder_width > context_width if family is SD3 else encoder_width != context_width:
        raise UserError(
            f"{source}: the text encoder gives {encoder_width} numbers per token and the {network} takes {context_width}; "
            "they do not belong together."
        )
    for t5 in encoders[len(clips) :]:
        if t5.config.d_model != context_width:
            raise UserError(
                f"{source}: T5 gives {t5.config.d_model} numbers per token and the {network} takes {context_width}; they do not "
                "belong together."
            )
    if family is not SD:
        pooled = sum(encoder.config.projection_dim for encoder in (clips if family is SD3 else clips[-1:]))
        pooled_width = unet.config.pooled_projection_dim if family is SD3 else unet.pooled_size
        if pooled != pooled_width:
            raise UserError(
                f"{source}: the text encoders give a pooled embedding of {pooled} numbers and the {network} takes "
                f"{pooled_width}; they do not belong together."
            )
