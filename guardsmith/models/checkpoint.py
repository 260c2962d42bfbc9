"""The Stable Diffusion checkpoint in memory: `builtin:avatar`, a folder, or a Hub id; safetensors only.

A `DiffusionModel` is passed around instead of a pipeline: hardening, attacks and sampling need the parts, not the call.
What differs between SD1.x and 2.x, SDXL and Stable Diffusion 3 is in `families.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import T5EncoderModel

from guardsmith.core.errors import RunFailed, UserError, out_of_memory
from guardsmith.core.images import sha256_file
from guardsmith.core.sources import check_source
from guardsmith.models.base_checks import (
    check_files,
    check_tokens,
    check_vocabulary,
    check_widths,
    read_config,
)
from guardsmith.models.building import Built, build_folder, open_once, remove_folder
from guardsmith.models.contents import EVIDENCE, HALF, is_named, list_files, weight_files
from guardsmith.models.families import PIPELINES, SD, SDXL, Family
from guardsmith.models.narrowed import copied_in, widened_copy
from guardsmith.models.reading import has_halves, readable_folder
from guardsmith.runtime.device import chosen_device, put, settle

BUILTIN = Path(__file__).parents[1] / "builtin"
BUILTIN_MODELS = ("avatar",)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HUB_FILES = ["*.json", "*.txt", "*/*.safetensors", "*.model"]  # no single-file checkpoints from the top of a repository


@dataclass
class DiffusionModel:
    """The parts of one Stable Diffusion checkpoint, float32, in eval mode, without gradients.

    Attributes:
        unet: predicts noise or velocity; (n, c, h, w) latents, (n,) timesteps, (n, tokens, width) context. For Stable Diffusion 3
            it is the transformer.
        vae: pictures in [-1, 1] <-> latents; use `posterior` and `decode`.
        text_encoder: token ids -> context (its last hidden state).
        tokenizer: pads to `model_max_length`.
        scheduler: the *training* schedule (betas, prediction type).
        source: where it came from, as the user wrote it.
        folder: the diffusers folder it was read from.
        family: which it is of.
        further_text: further text encoders with their tokenizers, where the family has some.
        empty_is_zero: whether the empty prompt is embedded as zeros (SDXL's base).
    """

    unet: Any
    vae: AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    source: str
    folder: Path
    family: Family = SD
    further_text: tuple[tuple[Any, Any], ...] = ()
    empty_is_zero: bool = False

    @property
    def networks(self) -> dict[str, Any]:
        """Every network by the folder that it is stored in."""
        text = [self.text_encoder, *(encoder for encoder, _ in self.further_text)]
        names = [encoder for encoder, *_ in self.family.text_parts()]
        return {self.family.denoiser: self.unet, "vae": self.vae} | dict(zip(names, text, strict=False))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents of pictures in [-1, 1], float32 (n, c, h, w) each, with gradients to them."""
        if not (images.min() >= -1.001 and images.max() <= 1.001):  # NaN is in no range
            raise ValueError(f"pictures must be in [-1, 1], found [{images.min():.2f}, {images.max():.2f}]")
        distribution, scale = self.vae.encode(images).latent_dist, float(self.vae.config.scaling_factor)
        shift = self.vae.config.shift_factor
        return (distribution.mean if shift is None else distribution.mean - shift) * scale, distribution.std * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of scaled latents, float32 (n, 3, h, w), not clipped."""
        shift, unscaled = self.vae.config.shift_factor, latents / self.vae.config.scaling_factor
        pictures: Tensor = self.vae.decode(unscaled if shift is None else unscaled + shift, return_dict=False)[0]
        return pictures.float()

    @property
    def place(self) -> str:
        """What `load_model` reads it from in another process, without asking the network again."""
        return self.source if self.source.startswith("builtin:") else str(self.folder)

    @property
    def image_size(self) -> int:
        """Side of its pictures in pixels."""
        levels = len(self.vae.config.block_out_channels) - 1
        return int(self.unet.config.sample_size) << levels

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction` or `flow`."""
        return str(self.scheduler.config.prediction_type)


def builtin_path(name: str) -> Path:
    """Folder of an embedded checkpoint, e.g. `builtin_path("avatar")`, for any tool that reads diffusers folders."""
    if name not in BUILTIN_MODELS:
        raise UserError(f"There is no embedded model '{name}'; there is: {', '.join(BUILTIN_MODELS)}.")
    return BUILTIN / name


def resolve(source: str, revision: str | None = None) -> Path:
    """The local diffusers folder of a source (`builtin:NAME`, a folder, or a Hub id, downloaded when needed).

    Raises:
        UserError: the source is a pickle, a path with nothing there, or no Stable Diffusion folder.
        RunFailed: the Hub cannot be reached or does not have it.
    """
    if source.startswith("builtin:"):
        return builtin_path(source.removeprefix("builtin:"))
    path = Path(source).expanduser()
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{source}: pickled weights ({path.suffix}) can run code when opened and are refused; convert the model to "
            "safetensors first (diffusers: `pipeline.save_pretrained(folder, safe_serialization=True)`)."
        )
    if path.is_file():
        raise UserError(
            f"{source} is a single file; make a diffusers folder of it first: `guardsmith import {source} FOLDER`."
        )
    if path.exists():
        _check_folder(path)
        return path
    choices = "a folder that exists, a Hub id (owner/name) or builtin:avatar"
    check_source(source, "base model", choices)
    if "/" not in source:
        raise UserError(f"there is no base model at {source}; name {choices}")
    return _download(source, revision)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise RunFailed(
            f"{repo}: there is no folder of this name, it is not in the local Hub cache, and the Hub cannot be reached; go "
            "online, unset HF_HUB_OFFLINE, or name a folder"
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(
            f"{repo}: there is no folder of this name, and the Hub did not give such a model ({reason}); check the name and "
            "your access"
        ) from error
    except OSError as error:
        raise RunFailed(
            f"{repo}: there is no folder of this name, and the Hub cannot be reached ({type(error).__name__}); go online or "
            "name a folder"
        ) from error
    _check_folder(folder)
    return folder


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        if (folder / "model" / "model_index.json").is_file():
            raise UserError(f"{folder} is the output of a hardening run; its model is {folder / 'model'}.")
        raise UserError(f"{folder}: not a diffusion model, it has no model_index.json; give a diffusers folder.")
    kind = read_config(index).get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        names = ", ".join(family.name for family in PIPELINES.values())
        raise UserError(f"{folder}: a {kind} is not supported; guardsmith takes {names}.")
    family = PIPELINES[kind]
    texts = [(encoder, tokenizer) for encoder, tokenizer, *_ in text_parts(folder, family)]
    for part in (family.denoiser, "vae", *(encoder for encoder, _ in texts)):
        if not list((folder / part).glob("*.safetensors")):
            pickled = [f.name for f in (folder / part).glob("*") if f.suffix in PICKLES]
            if pickled:
                raise UserError(
                    f"{folder / part}: only pickled weights ({pickled[0]}), which can run code when opened; convert the "
                    "model to safetensors first."
                )
            raise UserError(f"{folder / part}: no safetensors weights found; the checkpoint is incomplete.")
    for part in (*(tokenizer for _, tokenizer in texts), "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder}: the folder '{part}' is missing; the checkpoint is incomplete.")
    for _, part in texts:
        check_vocabulary(folder / part)


def text_parts(folder: Path, family: Family) -> list[tuple[str, str, Any, Any]]:
    """The family's text encoders that this folder has (Stable Diffusion 3 comes without T5 too); see `Family.text_parts`."""
    index = json.loads((folder / "model_index.json").read_text())
    return [
        part for part in family.text_parts()
        if part[2] is not T5EncoderModel or is_named(index, part[0])
    ]  # fmt: skip


def family_of(folder: Path) -> Family:
    """The family of a checkpoint folder that `resolve` gave."""
    return PIPELINES[json.loads((folder / "model_index.json").read_text())["_class_name"]]


def load_model(source: str, revision: str | None = None) -> DiffusionModel:
    """Load a checkpoint in float32, frozen, in eval mode, its networks on the chosen device (see `guardsmith.runtime.device`).

    Raises:
        UserError: not a Stable Diffusion folder, pickled, corrupt, or with weights that are not finite.
        RunFailed: the Hub cannot be reached or does not have it.
    """
    folder = resolve(source, revision)
    family = family_of(folder)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    networks, texts = {}, []
    check_files(folder, family, [name for name, *_ in text_parts(folder, family)])
    name = ""  # of the part that is being read
    try:
        for name, network in ((family.denoiser, family.network), ("vae", AutoencoderKL)):
            with readable_folder(folder / name) as place:
                networks[name] = network.from_pretrained(place, dtype=torch.float32, **options)
        for name, tokens, encoder, tokenizer in text_parts(folder, family):
            with readable_folder(folder / name) as place:
                more = options | {"ignore_mismatched_sizes": True}  # they are refused below, in words
                networks[name] = encoder.from_pretrained(place, dtype=torch.float32, **more)
            text_encoder, name = networks[name][0], tokens
            texts.append((text_encoder, tokenizer.from_pretrained(folder, subfolder=tokens)))
        name = "scheduler"
        scheduler = family.scheduler.from_pretrained(folder, subfolder="scheduler")
    except MemoryError:
        raise
    except Exception as error:  # whatever the libraries raise at odd files; a base is input, and no bug of ours
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". If you want to instead")[0]
        raise UserError(f"{source}: its {name} cannot be read ({reason[:300]}).") from error
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "flow"):
        raise UserError(f"{source}: prediction type '{scheduler.config.prediction_type}' is not supported.")
    for name, (part, info) in networks.items():
        if missing := sorted(info["missing_keys"]):  # the libraries would go on with random numbers
            raise UserError(
                f"{source}: {name} lacks {len(missing)} of its weights ({missing[0]}); the checkpoint is incomplete."
            )
        if other := sorted(str(key[0]) for key in info["mismatched_keys"]):
            raise UserError(f"{source}: {name} has weights of another shape than its config.json says ({other[0]}).")
        part.eval().requires_grad_(False)
        for key, value in part.state_dict().items():
            if value.is_floating_point() and value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():
                raise UserError(f"{source}: {name} has weights that are not finite ({key}); the checkpoint is broken.")
    for (_, tokens, *_), (encoder, tokenizer) in zip(text_parts(folder, family), texts, strict=True):
        check_tokens(folder, tokens, tokenizer, encoder)
    unet, vae = networks[family.denoiser][0], networks["vae"][0]
    check_widths(source, family, unet, [encoder for encoder, _ in texts])
    settle()
    device = chosen_device()
    for network, _ in networks.values():
        put(network, device)
    model = DiffusionModel(unet, vae, *texts[0], scheduler, source, folder, family, tuple(texts[1:]))
    if family is SDXL:
        index = json.loads((folder / "model_index.json").read_text())
        model.empty_is_zero = bool(index.get("force_zeros_for_empty_prompt", True))
        unet.picture_size = model.image_size
    return model


def with_own_unet(model: DiffusionModel) -> DiffusionModel:
    """The same model with a U-Net of its own to change, float32; the frozen parts stay shared."""
    own = copy.copy(model)
    own.unet = widened_copy(model.unet)
    return own


def save_model(
    model: DiffusionModel, folder: Path, parts: Sequence[str] | None = None, *, half_variant: bool = False
) -> Built:
    """Write a complete diffusers folder: these parts from memory, of the source what `guardsmith.models.building` takes.

    They are stored in the precision of the source's own files, so that a half-precision base stays one, or in float32 where a
    weight does not fit it. Where the source has half-precision files beside them (variant `fp16`), so has the folder, written
    anew, unless a weight does not fit: then it has none of any part, rather than some of one model and some of another.
    The folder appears whole or not at all, once diffusers has opened it.

    Args:
        model: what to write.
        folder: where to.
        parts: folders of what may differ from the source (`DiffusionModel.networks`); the denoiser when not given.
        half_variant: write half-precision files although the source has none, where every weight fits.

    Returns:
        What of the source is not in it.

    Raises:
        UserError: the source has what cannot be released, see `build_folder`.
        RunFailed: a weight is not finite; diffusers cannot open what was written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove_folder(temporary)
    parts = (model.family.denoiser,) if parts is None else parts
    try:
        temporary.mkdir(parents=True)
        contents = build_folder(model.folder, model.networks, parts, temporary)
        for name in parts:
            _save_part(model, name, temporary / name)
        stored = {name: stored_dtype(temporary, name) for name in model.networks}
        halves = [name for name in model.networks if has_halves(model.folder / name)]
        if half_variant:  # where the plain files are in half precision, they are what the variant would be
            halves += [name for name in model.networks if name not in halves and stored[name] != torch.float16]
        whole = all(name in halves or stored[name] == torch.float16 for name in parts)
        if halves and not (whole and all(_save_half(model, name, temporary / name) for name in halves)):
            for file in temporary.glob(f"*/*.{HALF}*"):
                file.unlink()
        open_once(temporary, list(model.networks))
        remove_folder(folder)
        temporary.replace(folder)
        return contents
    finally:
        remove_folder(temporary)


def _save_part(model: DiffusionModel, name: str, place: Path) -> None:
    """Write the weights of one part."""
    part, dtype = model.networks[name], stored_dtype(model.folder, name)
    if any(parameter.dtype != dtype for parameter in part.parameters()):  # else there may be no room for a copy
        part = copied_in(part, dtype)
    if not _finite(part):
        part = copied_in(model.networks[name], torch.float32)
    if not _finite(part):
        raise RunFailed("A weight of the hardened model is not finite; no model was written.")
    _save_weights(model, part, name, place)


def _save_half(model: DiffusionModel, name: str, place: Path) -> bool:
    """Write the half-precision files of a part beside the others; returns whether all of its weights fit."""
    part = copied_in(model.networks[name], torch.float16)
    if not _finite(part):
        return False
    _save_weights(model, part, name, place, variant=HALF)
    return True


def _save_weights(model: DiffusionModel, part: Any, name: str, place: Path, **options: Any) -> None:
    part.save_pretrained(place, safe_serialization=True, **options)
    config = place / "config.json"
    config.unlink()
    shutil.copyfile(model.folder / name / "config.json", config)  # the libraries' own names the folder of the base
    for file in place.iterdir():
        shutil.copymode(config, file)  # safetensors writes for the owner only
    (place / "generation_config.json").unlink(missing_ok=True)


def _finite(module: torch.nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in module.parameters())


def stored_dtype(folder: Path, part: str = "unet") -> torch.dtype:
    """Precision of a part's weights on disk; variants beside them (`.fp16.`, `.non_ema.`) do not count."""
    from safetensors import safe_open

    with safe_open(weight_files(folder / part)[0], framework="pt") as weights:
        kinds = (weights.get_tensor(key).dtype for key in weights.keys())  # noqa: SIM118 (not a dict)
        dtype: torch.dtype = next(kind for kind in kinds if kind.is_floating_point)  # some store position numbers too
        return dtype


def weights_digest(folder: Path) -> str:
    """SHA-256 over every weight file and every configuration of a checkpoint folder but its `EVIDENCE`, `sha256:<hex>`.

    Configurations count: another prediction type or scaling factor makes another model of the same weights.
    """
    digest = hashlib.sha256()
    files = [file for kind in ("*.safetensors", "*.json", "*.txt") for file in folder.rglob(kind) if file.is_file()]
    files = [file for file in files if file.relative_to(folder).parts[0] != EVIDENCE]
    for file in sorted(files):
        digest.update(
            f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode(errors="surrogateescape")
        )
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def file_digests(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 of a checkpoint's files (all of them if none are named), by name relative to the folder, `sha256:<hex>` each."""
    return {
        name: f"sha256:{sha256_file(folder / name)}" for name in sorted(list_files(folder) if names is None else names)
    }
