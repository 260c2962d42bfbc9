"""Single-file checkpoints (the layout of A1111 and ComfyUI): read as a base, and written with a hardened U-Net.

Reading is diffusers' own conversion. In writing, only the U-Net's tensors are replaced; everything else is copied byte for byte,
in its order, with the file's metadata. Which tensor is which is read off diffusers' converter, so that there is no second table
of names here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from guardsmith.core.atomic_io import whole_folder
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.models.checkpoint import PICKLES, load_model
from guardsmith.models.families import SD
from guardsmith.models.tensor_files import Header, read_header, stored_tensor, stored_weights, write_copy

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CLOSE = 1e-3  # how far weights of one base may be apart in two files: half precision of weights around 1


def unet_names(header: Header, config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Name in the single file -> name in diffusers, of every tensor of the U-Net.

    Raises:
        UserError: there is no U-Net of this layout in the file.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        # Given names for tensors, the converter tells where each of them goes.
        found = convert_ldm_unet_checkpoint({name: name for name in header.tensors}, dict(config))
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{file} holds no Stable Diffusion U-Net in the layout of A1111; give one of the base"
        ) from error
    return {there: here for here, there in found.items() if there is not None}


def _bytes(tensor: Tensor) -> bytes:
    """As safetensors stores it."""
    stored = save({"": tensor.contiguous()})
    return stored[8 + int.from_bytes(stored[:8], "little") :]


def read_single_file(file: Path, folder: Path, config: str | None = None) -> None:
    """Write the diffusers folder of a single-file checkpoint, in the file's precision; it appears whole.

    Args:
        file: Stable Diffusion 1.x or 2.x, safetensors.
        folder: where to.
        config: diffusers folder or Hub id with the configurations and the tokenizer, which such a file does not hold; when not
            given, those that diffusers knows for this layout, from the Hub.

    Raises:
        UserError: the file is a pickle, not whole, or another model than the configurations say.
        RunFailed: the configurations cannot be had from the Hub.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if file.suffix.lower() in PICKLES:
        raise UserError(f"{file}: pickled weights can run code when opened and are refused; get it as safetensors")
    header = read_header(file)
    unet = [entry for name, entry in header.tensors.items() if name.startswith("model.diffusion_model.")]
    if not unet or unet[0]["dtype"] not in DTYPES:
        raise UserError(f"{file} holds no Stable Diffusion U-Net in the layout of A1111")
    dtype = DTYPES[unet[0]["dtype"]]
    if any(name.startswith("conditioner.") for name in header.tensors):
        raise UserError(
            f"{file} is SDXL as a single file; only {SD.name} can be imported: get a diffusers folder of it"
        )
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(file), config=config, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        raise RunFailed(
            f"{file}: the Hub did not give its configurations; go online, or name a diffusers folder of the same kind of model "
            "with --config"
        ) from error
    except SingleFileComponentError as error:
        raise UserError(f"{file} lacks a part of the model; get one with U-Net, VAE and text encoder in it") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not laid out as its configurations say; name those of its kind of model with --config"
        ) from error
    with whole_folder(folder) as place:
        pipeline.save_pretrained(place, safe_serialization=True)
        load_model(str(place))  # incomplete parts, or weights that are not finite, are told now


def write_single_file(like: Path, base: Path, hardened: Path, file: Path) -> int:
    """The single-file checkpoint of a base with a hardened U-Net; it appears whole.

    A tensor keeps the precision that it has in the file, or becomes float32 where a weight does not fit that.

    Args:
        like: the base's single-file checkpoint.
        base: the base's diffusers folder, to make sure that this is the same model.
        hardened: the hardened model's diffusers folder.
        file: where to.

    Returns:
        How many tensors were replaced.

    Raises:
        UserError: `like` cannot be read, or holds another model.
    """
    header = read_header(like)
    config = json.loads((hardened / "unet" / "config.json").read_text(encoding="utf-8"))
    names = unet_names(header, config, like)
    before, after = (stored_weights(folder / "unet") for folder in (base, hardened))
    missing = after.keys() - set(names.values())
    if missing:
        raise UserError(f"{like} is not laid out as this model (it has no {sorted(missing)[0]}); give one of its base")
    for there, here in names.items():
        entry = header.tensors[there]
        if here not in after or entry["dtype"] not in DTYPES or list(after[here].shape) != entry["shape"]:
            raise UserError(f"{like} is not laid out as this model ({there}); give one of its base")
        apart = (stored_tensor(like, there).float() - before[here].float()).abs()
        if float(apart.max()) > CLOSE * max(1.0, float(before[here].abs().max())):
            raise UserError(f"{like} holds another model than the base that was hardened (they differ in {here})")

    replaced: dict[str, tuple[str, bytes]] = {}
    for there, here in names.items():
        dtype = header.tensors[there]["dtype"]
        fits = after[here].to(DTYPES[dtype])
        if not torch.isfinite(fits).all():
            fits, dtype = after[here].float(), "F32"
        replaced[there] = (dtype, _bytes(fits))
    write_copy(like, header, file, replaced=replaced)
    return len(replaced)
