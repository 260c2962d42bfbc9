"""Single-file checkpoints (the layout of A1111 and ComfyUI): read as a base, and written with a hardened U-Net.

Reading is diffusers' own conversion. In writing, the tensors of hardened parts are replaced, copies of them under other names are
left out, and other known parts are copied byte for byte, in their order, with the file's metadata. Which tensor of the U-Net is
which is read off diffusers' converter, so that there is no second table of names here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from guardsmith.core.atomic_io import whole_folder
from guardsmith.core.console import in_words
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.sources import check_source
from guardsmith.models.base_checks import refuse_pointer
from guardsmith.models.base_weights import ChangedWeights
from guardsmith.models.building import plain_name
from guardsmith.models.checkpoint import PICKLES, load_model
from guardsmith.models.contents import releasable_metadata
from guardsmith.models.families import SD
from guardsmith.models.single_file_tensors import sort_tensors
from guardsmith.models.tensor_files import Header, TensorReader, read_header, stored_tensor, stored_weights, write_copy

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CLOSE = 1e-3  # how far weights of one base may be apart in two files: half precision of weights around 1


def unet_names(header: Header, config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Name in the single file -> name in diffusers, of every tensor of the U-Net.

    Raises:
        UserError: there is no U-Net of this layout in the file.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        # Given names in place of tensors, the converter returns where each of them goes.
        converted = convert_ldm_unet_checkpoint({name: name for name in header.tensors}, dict(config))
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{file} holds no Stable Diffusion U-Net in the layout of A1111; give one of the base"
        ) from error
    return {there: here for here, there in converted.items() if there is not None}


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

    if config is not None:
        check_source(config, "folder of configurations")
    if file.suffix.lower() in PICKLES:
        raise UserError(f"{file}: pickled weights can run code when opened and are refused; get it as safetensors")
    with file.open("rb") as stream:
        refuse_pointer(file, stream.read(64))
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
            str(file), config=config, dtype=dtype, safety_checker=None, requires_safety_checker=False
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
        try:  # incomplete parts, or weights that are not finite, are named now
            load_model(str(place))
        except UserError as error:  # the folder is gone when the message is read
            raise UserError(str(error).replace(str(place), str(file))) from error


class Exported(NamedTuple):
    """What was written.

    Attributes:
        replaced: how many tensors are the hardened model's.
        left_out: tensors of the base's file that are copies of a hardened part, and metadata that may not be released.
        widened: whether the hardened tensors are float32 where the file had less, for a weight does not fit.
    """

    replaced: int
    left_out: list[str]
    widened: bool


def write_single_file(like: Path, base: Path, hardened: Path, file: Path, *, keep_unknown: bool = False) -> Exported:
    """The single-file checkpoint of a base with the hardened parts; it appears whole.

    Hardened tensors keep the precision that they have in the file, or all become float32 where a weight does not fit that. Of
    the others, those of known parts are copied, and copies of a hardened part are left out (EMA weights, a second U-Net,
    adapters; by their names, and by their values).

    Args:
        like: the base's single-file checkpoint.
        base: the base's diffusers folder, to make sure that this is the same model.
        hardened: the hardened model's diffusers folder.
        file: where to.
        keep_unknown: copy tensors of no known part too, unless they have values of the base's hardened parts.

    Raises:
        UserError: `like` cannot be read, or holds another model, weights that are not finite, or unknown tensors.
    """
    header = read_header(like)
    config = json.loads((hardened / "unet" / "config.json").read_text(encoding="utf-8"))
    names = unet_names(header, config, like)
    before, after = (stored_weights(folder / "unet") for folder in (base, hardened))
    missing = after.keys() - set(names.values())
    if missing:
        raise UserError(f"{like} is not laid out as this model (it has no {sorted(missing)[0]}); give one of its base")
    for there, here in names.items():
        _check_same(like, header, there, here, before, after)
    replaced = _stored({there: after[here] for there, here in names.items()}, header)
    changed = ChangedWeights()
    changed.add(before.items(), after.get, "unet")
    replaced |= _other_parts(like, header, base, hardened, changed)

    sorted_out = sort_tensors(header.tensors, replaced)
    read = TensorReader()
    stored = ((name, read(like, name)) for name in (*sorted_out.copied, *sorted_out.unknown))
    left_out = {*sorted_out.copies}
    for name, values in stored:
        if values.is_floating_point() and not torch.isfinite(values.float()).all():
            raise UserError(f"{like} has weights that are not finite ({name}); give another file of the base")
        left_out |= {copy for copy, _ in changed.found_in([(name, values)])}
    unknown = [name for name in sorted_out.unknown if name not in left_out]
    if unknown and not keep_unknown:
        raise UserError(
            f"{like} has {len(unknown)} tensors of no known part ({in_words(unknown)}), which may be copies of the base's "
            "weights; take them out, or keep them with --keep-unknown"
        )
    tensors = {name: entry for name, entry in header.tensors.items() if name not in left_out}
    metadata = releasable_metadata(header.metadata, single_file=True)
    write_copy(like, header._replace(tensors=tensors, metadata=metadata), file, replaced=replaced)
    secrets = [f"metadata {key}" for key in header.metadata.keys() - metadata.keys()]
    widened = any(dtype == "F32" != header.tensors[name]["dtype"] for name, (dtype, _) in replaced.items())
    return Exported(len(replaced), [name for name in header.tensors if name in left_out] + sorted(secrets), widened)


def _check_same(
    like: Path, header: Header, there: str, here: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Raises UserError unless a tensor of the file is the base's."""
    entry = header.tensors[there]
    if (
        here not in after
        or here not in before
        or entry["dtype"] not in DTYPES
        or list(after[here].shape) != entry["shape"]
    ):
        raise UserError(f"{like} is not laid out as this model ({there}); give one of its base")
    apart = float((stored_tensor(like, there).float() - before[here].float()).abs().max())
    if not apart <= CLOSE * max(1.0, float(before[here].abs().max())):  # NaN is in no range
        raise UserError(f"{like} holds another model than the base that was hardened (they differ in {here})")


def _stored(tensors: Mapping[str, Tensor], header: Header) -> dict[str, tuple[str, bytes]]:
    """Hardened tensors as the file stores them: all in float32 if one does not fit, for readers take one precision for all."""
    dtypes = {name: header.tensors[name]["dtype"] for name in tensors}
    fits = all(bool(torch.isfinite(value.to(DTYPES[dtypes[name]])).all()) for name, value in tensors.items())
    stored_as = {name: dtype if fits else "F32" for name, dtype in dtypes.items()}
    return {name: (stored_as[name], _bytes(value.to(DTYPES[stored_as[name]]))) for name, value in tensors.items()}


def _other_parts(
    like: Path, header: Header, base: Path, hardened: Path, changed: ChangedWeights
) -> dict[str, tuple[str, bytes]]:
    """Tensors of other hardened parts in the place of the base's: the text encoder of Stable Diffusion 1.x.

    Raises:
        UserError: a part was hardened that cannot be replaced in this layout.
    """
    replaced: dict[str, tuple[str, bytes]] = {}
    for place in sorted(path.parent for path in hardened.glob("*/config.json") if path.parent.name != "unet"):
        before, after = (stored_weights(folder / place.name) for folder in (base, hardened))
        if not changed.add(before.items(), after.get, place.name):
            continue
        there = {
            name: [f"cond_stage_model.transformer.{prefix}{plain_name(name)}" for prefix in ("text_model.", "")]
            for name in after
        }
        stored_names = {
            name: next((each for each in names if each in header.tensors), "") for name, names in there.items()
        }
        if place.name != "text_encoder" or not all(stored_names.values()):
            raise UserError(f"the {place.name} was hardened too, which cannot be written in the layout of {like}")
        for name, where in stored_names.items():
            _check_same(like, header, where, name, before, after)
        replaced |= _stored({where: after[name] for name, where in stored_names.items()}, header)
    return replaced
