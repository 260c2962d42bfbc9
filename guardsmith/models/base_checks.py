"""What is wrong with the files of a base, said before the libraries read them: which part, which file, what to do.

Nothing is guessed: whatever a configuration leaves open, or says in a way that the networks here do not compute, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL
from safetensors import safe_open
from transformers import T5EncoderModel

from guardsmith.core.console import in_words
from guardsmith.core.errors import UserError
from guardsmith.models.contents import INDEX, STEMS, TOKENIZER_FILES, Part, weight_variants
from guardsmith.models.families import SD, SD3, SDXL, Family
from guardsmith.models.reading import kind_of, used_files

POINTER = b"version https://git-lfs"
MOST_TOKENS = 4096  # of T5, which has no limit of its own
PRECISIONS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
LARGEST = 1024  # side of latents; pictures of 8,192 pixels


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
        config = json.loads(data.decode("utf-8"))
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


def check_files(folder: Path, family: Family, encoders: Sequence[str]) -> None:
    """Everything that can be seen from a checkpoint's files before the libraries read them.

    Args:
        folder: of the checkpoint.
        family: of its pipeline.
        encoders: folders of its text encoders.

    Raises:
        UserError: which part cannot be used, and why.
    """
    for name in (family.denoiser, "vae", *encoders):
        read_config(folder / name / "config.json")
        check_weight_files(folder, name)
    check_index(folder, family, encoders)
    check_shapes(folder, family)
    check_schedule(folder, family)


def check_weight_files(folder: Path, part: str) -> None:
    """Whether the weights of a part are all there, in files that this family reads.

    Args:
        folder: of the checkpoint.
        part: name of its folder.

    Raises:
        UserError: which file is not, and what to do.
    """
    place = folder / part
    stem = STEMS[kind_of(part)]
    index = place / f"{stem}.safetensors.index.json"
    if index.is_file() and not (place / f"{stem}.safetensors").is_file():
        _check_index(index)
    used = used_files(place)
    if not used:
        raise UserError(_nothing_to_read(place, stem))
    lost = [file.name for file in used if not file.is_file()]
    if lost and not index.is_file():
        raise UserError(f"{place / lost[0]} is no file, or a link to none; put the file itself in its place.")
    if lost:
        raise UserError(
            f"{place}: {len(lost)} of its files are missing ({lost[0]}, named in {index.name}); fetch them again."
        )
    for file in used:
        with file.open("rb") as stream:
            refuse_pointer(file, stream.read(len(POINTER)))
        _check_precision(file)


def _check_index(index: Path) -> None:
    weight_map = read_config(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise UserError(f"{index}: it has no 'weight_map' of tensors to files; fetch it again.")


def _nothing_to_read(place: Path, stem: str) -> str:
    """Why none of the weight files of a part is one that it can be read from."""
    names = sorted(file.name for file in place.glob("*.safetensors"))
    there = in_words(names, 3)
    if variants := weight_variants(Part(place.name, kind_of(place.name)), [f"{place.name}/{name}" for name in names]):
        return (
            f"{place}: it has {' and '.join(variants)} weights and no others ({there}), so which are meant is not clear; leave "
            "one of them there."
        )
    if any("-of-" in name for name in names):
        index = f"{stem}.safetensors.index.json"
        return f"{place}: its shards are not all there ({there}), and no index names them ({index}); fetch both."
    return f"{place}: none of its weight files ({there}) has a name that the libraries read ({stem}.safetensors)."


def _check_precision(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                kind = str(weights.get_slice(key).get_dtype())
                if kind not in PRECISIONS and not key.endswith("position_ids"):
                    raise UserError(
                        f"{file}: its weights are quantized ({key} is {kind}); use it in float16, bfloat16 or float32."
                    )
    except UserError:
        raise
    except Exception as error:  # safetensors' own error class is not exported everywhere
        raise UserError(f"{file}: a weight file is truncated or corrupt ({error}).") from error


def check_index(folder: Path, family: Family, encoders: Sequence[str]) -> None:
    """Whether `model_index.json` names every part, of a class that is computed here: diffusers opens what it names.

    Raises:
        UserError: which one it does not.
    """
    index = read_config(folder / INDEX)
    classes = {
        family.denoiser: ("diffusers", family.network.__mro__[2].__name__),
        "vae": ("diffusers", AutoencoderKL.__name__),
    }
    classes["scheduler"] = ("diffusers", "scheduler")
    for name, tokens, kind, tokenizer in family.text_parts():
        if name in encoders:
            classes |= {name: ("transformers", kind.__name__), tokens: ("transformers", tokenizer.__name__)}
    for part, (library, wanted) in classes.items():
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(each, str) for each in entry):
            raise UserError(f"{folder / INDEX} does not name the part '{part}'; correct the file.")
        same = entry[1].removesuffix("Fast") == wanted.removesuffix("Fast")
        if part == "scheduler":
            same = entry[1].endswith("Scheduler") and hasattr(diffusers, entry[1])
        if entry[0] != library or not same:
            raise UserError(
                f"{folder / INDEX}: its {part} is a {entry[1]} of {entry[0]}, and guardsmith takes a {wanted} of {library} there."
            )
    zeros = index.get("force_zeros_for_empty_prompt")
    if zeros not in (None, True, False):
        raise UserError(f"{folder / INDEX}: force_zeros_for_empty_prompt is {zeros!r}; it is true or false.")


def check_shapes(folder: Path, family: Family) -> None:
    """Whether the denoiser's configuration is of a kind that is computed here.

    Raises:
        UserError: what is not.
    """
    file = folder / family.denoiser / "config.json"
    shape, vae = read_config(file), read_config(folder / "vae" / "config.json")
    size: Any = shape.get("sample_size")
    if not _whole(size) or not 1 <= size <= LARGEST:
        raise UserError(
            f"{file}: sample_size is {size!r}; guardsmith needs one side of square latents, a whole number to {LARGEST}."
        )
    for key in ("latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise UserError(
                f"{folder / 'vae' / 'config.json'}: it has {key}; latents that are normalised so are not supported."
            )
    latent, taken = vae.get("latent_channels", 4), shape.get("in_channels", 16 if family is SD3 else 4)
    given = shape.get("out_channels", taken)
    given = taken if given is None else given
    for where, key, value in (
        (folder / "vae" / "config.json", "latent_channels", latent), (file, "in_channels", taken), (file, "out_channels", given),
    ):  # fmt: skip
        if not _whole(value):
            raise UserError(f"{where}: {key} is {value!r}; it has to be a whole number.")
    if taken != latent:
        why = "they do not belong together"
        if taken in (8, 9) and latent == 4:
            why = "this is an inpainting or instruction model, which is not supported: use the text-to-image model"
        raise UserError(f"{file}: it takes {taken} channels and the VAE gives {latent}; {why}.")
    if given != latent:
        raise UserError(f"{file}: it gives {given} channels and the VAE has {latent}; they do not belong together.")
    _check_conditions(file, shape, family)
    scale = vae.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < float("inf"):
        raise UserError(
            f"{folder / 'vae' / 'config.json'}: scaling_factor is {scale!r}; it has to be a number above 0."
        )


def _check_conditions(file: Path, shape: dict[str, Any], family: Family) -> None:
    """What the U-Net is given beside the prompt is what its family's has."""
    if family is SD3:
        return
    added, wanted = shape.get("addition_embed_type"), "text_time" if family is SDXL else None
    if added != wanted:
        raise UserError(
            f"{file}: addition_embed_type is {added!r}, and that of {family.name} is {wanted!r}; not supported."
        )
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim") if family is SDXL else ():
        if not _whole(shape.get(key)):
            raise UserError(f"{file}: {key} is {shape.get(key)!r}; it has to be a whole number.")


def check_vocabulary(place: Path) -> None:
    """Whether a tokenizer's folder has a vocabulary: without it the tokenizer loads all the same, as one that knows no words.

    Raises:
        UserError: there is none, or a file is a pointer of Git LFS.
    """
    names = {file.name for file in place.iterdir()}
    if not names & {"tokenizer.json", "spiece.model"} and not {"vocab.json", "merges.txt"} <= names:
        raise UserError(f"{place}: no vocabulary found (tokenizer.json); the checkpoint is incomplete.")
    for name in sorted(names & TOKENIZER_FILES):
        if (place / name).is_file():
            refuse_pointer(place / name, (place / name).read_bytes())


def check_tokens(folder: Path, part: str, tokenizer: Any, encoder: Any) -> None:
    """Whether a text encoder takes what its tokenizer gives.

    Raises:
        UserError: it does not; the message names the tokenizer's folder.
    """
    place = folder / part
    if len(tokenizer) > encoder.config.vocab_size:
        raise UserError(
            f"{place}: the tokenizer knows {len(tokenizer)} tokens and the text encoder {encoder.config.vocab_size}; "
            "they do not belong together."
        )
    longest, most = tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", MOST_TOKENS)
    if not _whole(longest) or not 2 <= longest <= most:
        raise UserError(
            f"{place / 'tokenizer_config.json'}: model_max_length is missing, or is none of 2 to {most}, which is what the text "
            "encoder takes; correct it."
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"{place}: the tokenizer has no padding token (pad_token); correct its tokenizer_config.json.")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_schedule(folder: Path, family: Family) -> None:
    """Whether the training schedule is one that this family is trained with, and complete.

    Raises:
        UserError: what is not.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    schedule = read_config(file)
    kind = schedule.get("_class_name")
    if not isinstance(kind, str):
        raise UserError(f"{file}: _class_name is {kind!r}; it has to name a scheduler.")
    prediction = schedule.get("prediction_type")
    flow = kind.startswith("FlowMatch") or prediction == "flow_prediction" or schedule.get("use_flow_sigmas") is True
    if flow != (family is SD3):
        what = "flow matching" if flow else "diffusion"
        where = f"{file}: {kind} ({prediction or 'no prediction_type'})"
        raise UserError(
            f"{where} is a schedule of {what}, and {family.name} is not trained so; such a model is not supported."
        )
    steps = schedule.get("num_train_timesteps", 1000)
    if not _whole(steps) or not 2 <= steps <= 100_000:
        raise UserError(f"{file}: num_train_timesteps is {steps!r}; it has to be a whole number, as a rule 1000.")
    if flow:
        shift = schedule.get("shift", 1.0)
        if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < float("inf"):
            raise UserError(f"{file}: shift is {shift!r}; it has to be a number above 0.")
        if schedule.get("use_dynamic_shifting"):
            raise UserError(
                f"{file}: use_dynamic_shifting is set; shifts that depend on the picture are not supported."
            )
        return
    _check_betas(file, schedule, steps)


def _check_betas(file: Path, schedule: dict[str, Any], steps: int) -> None:
    """Whether the noise of the training is known."""
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
    start, end = schedule.get("beta_start", 0.0001), schedule.get("beta_end", 0.02)
    if not 0 < start <= end < 1:
        raise UserError(f"{file}: beta_start is {start} and beta_end {end}; they have to rise, between 0 and 1.")
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
