"""What can be uploaded: pictures, an adapter (LoRA), a checkpoint; and the pictures by which each is judged.

Adapters and checkpoints are asked for their trigger words, with the class nouns of the registry behind them.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.core.images import SUFFIXES
from guardsmith.core.seeds import SCREENING
from guardsmith.diffusion.prompts import sample_prompts
from guardsmith.diffusion.sampling import generate
from guardsmith.models.checkpoint import DiffusionModel, load_model, with_own_unet
from guardsmith.models.families import SD
from guardsmith.models.single_file import read_single_file

Kind = Literal["pictures", "adapter", "checkpoint"]
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
MOST_TRIGGERS = 4


@dataclass(frozen=True)
class Upload:
    """One upload.

    Attributes:
        name: what reports call it.
        kind: pictures, adapter or checkpoint.
        files: the pictures; or the one file or folder of an adapter or checkpoint.
    """

    name: str
    kind: Kind
    files: tuple[Path, ...]


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no safetensors file ({error}): upload weights as safetensors") from None


def is_adapter(file: Path) -> bool:
    """Whether a safetensors file holds low-rank adapters, by the names of its tensors.

    Raises:
        UserError: it cannot be read.
    """
    return any(re.search(r"lora[_.]|lokr_|hada_", name) for name in _tensor_names(file))


def read_upload(paths: Sequence[Path]) -> Upload:
    """What these paths are together: pictures or folders of pictures, or one adapter or checkpoint.

    Raises:
        UserError: there is nothing there, or nothing that can be screened.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: check the path")
    first, name = paths[0], str(paths[0])
    if len(paths) == 1 and first.is_dir():
        if (first / "model_index.json").is_file():
            return Upload(name, "checkpoint", (first,))
        adapters = [first / file for file in ADAPTER_FILES if (first / file).is_file()]
        if adapters:
            return Upload(name, "adapter", (adapters[0],))
    if len(paths) == 1 and first.suffix.lower() == ".safetensors":
        return Upload(name, "adapter" if is_adapter(first) else "checkpoint", (first,))
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if file.is_file() and file.suffix.lower() in SUFFIXES]
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is neither a picture nor a safetensors file: screening cannot look into it")
    if not files:
        raise UserError(f"there is no picture, adapter or checkpoint in {name}: name an upload")
    return Upload(name, "pictures", tuple(files))


def holds_model(path: Path) -> bool:
    """Whether a path is an adapter or a checkpoint, and not pictures; without reading it."""
    names = ("model_index.json", *ADAPTER_FILES)
    return path.suffix.lower() == ".safetensors" or any((path / name).is_file() for name in names)


def read_batch(folder: Path) -> list[Path]:
    """The uploads of a batch: every folder in it, and every file that is not in one; by name.

    Raises:
        UserError: it is no folder, or empty.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: a batch is a folder with one folder or file for each upload")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if not entries:
        raise UserError(f"{folder} is empty: a batch is a folder with one folder or file for each upload")
    return entries


def trigger_words(file: Path) -> list[str]:
    """Trigger words that an adapter names: in its metadata, or as the `instance_prompt` of a README beside it; may be none."""
    words: list[str] = []
    if file.is_file():
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
        words += [metadata[key] for key in ("modelspec.trigger_phrase", "instance_prompt") if metadata.get(key)]
        try:
            counts: dict[str, int] = {}
            for tags in json.loads(metadata.get("ss_tag_frequency") or "{}").values():
                counts |= {tag.strip(): int(count) for tag, count in tags.items()}
            words += sorted(counts, key=lambda tag: -counts[tag])[:MOST_TRIGGERS]
        except (ValueError, AttributeError, TypeError):  # metadata is whatever its writer put there
            pass
    readme = (file if file.is_dir() else file.parent) / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        words += [match.strip().strip("'\"") for match in re.findall(r"^instance_prompt:(.+)$", text, re.MULTILINE)]
    return list(dict.fromkeys(word for word in words if word))


def with_adapter(base: DiffusionModel, file: Path) -> DiffusionModel:
    """A copy of the base with an adapter on it, in the layout of diffusers, peft or kohya.

    Raises:
        UserError: the base is of a family that adapters are not loaded onto here, or the file does not fit it.
    """
    from diffusers import StableDiffusionPipeline

    if base.family is not SD:
        raise UserError(f"{base.source} is {base.family.name}: adapters are screened on {SD.name} only")
    own = with_own_unet(base)
    own.text_encoder = copy.deepcopy(base.text_encoder)
    pipeline: Any = StableDiffusionPipeline(
        vae=own.vae, text_encoder=own.text_encoder, tokenizer=own.tokenizer, unet=own.unet, scheduler=own.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    before = {name for name, _ in own.unet.named_parameters()}
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{file}: the adapter does not fit {base.source} ({reason}): name its base with --base"
        ) from None
    changed = {name for name, _ in own.unet.named_parameters()} != before
    if not changed and {name for name, _ in own.text_encoder.named_parameters()} == {
        name for name, _ in base.text_encoder.named_parameters()
    }:
        raise UserError(f"{file}: nothing of the adapter fits {base.source}: name its base with --base")
    own.unet.requires_grad_(False)
    own.text_encoder.requires_grad_(False)
    return own


def uploaded_model(upload: Upload, base: DiffusionModel) -> DiffusionModel:
    """The model of an uploaded adapter or checkpoint.

    Raises:
        UserError: it cannot be read or does not fit the base.
    """
    place = upload.files[0]
    if upload.kind == "adapter":
        return with_adapter(base, place)
    if place.is_dir():
        return load_model(str(place))
    with tempfile.TemporaryDirectory() as folder:
        read_single_file(place, Path(folder) / "model", str(base.folder))
        return load_model(str(Path(folder) / "model"))


def drawn_pictures(
    model: DiffusionModel, triggers: Sequence[str], nouns: Sequence[str], count: int, sampling: dict[str, Any]
) -> Tensor:
    """Pictures that a model draws for its trigger words, `count` for each word and class noun, float32 (n, 3, h, w).

    Args:
        model: uploaded.
        triggers: words or whole prompts; without any, the class nouns alone are asked for.
        nouns: class nouns of the registry.
        count: pictures for each.
        sampling: arguments of `generate`.
    """
    prompts: list[str] = []
    for trigger in triggers or ("",):
        for noun in nouns:
            prompts += sample_prompts(trigger, "" if noun in trigger.split() else noun, count)
    seeds = SCREENING.seeds(len(prompts))
    return generate(model, [" ".join(prompt.split()) for prompt in prompts], seeds, **sampling)
