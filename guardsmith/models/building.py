"""The folder of a hardened model but for its hardened weights: built from the base, file by file, not copied.

Only what `guardsmith.models.contents` names is taken, contents without file modes (a read-only base gives a folder that can be
written to), of every weight file only the tensors that its network has. What is left out is on record.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from guardsmith.core.atomic_io import write_text
from guardsmith.core.console import in_words
from guardsmith.core.credentials import credential_in, credential_in_file
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.models.contents import (
    EXTRA_NETWORKS,
    HALF,
    INDEX,
    LICENCE,
    README,
    STEMS,
    Part,
    is_named,
    lies_within,
    list_files,
    parse_index,
    part_names,
    parts_of,
    releasable_metadata,
    summary,
    unknown_parts,
    used_weights,
    weight_names,
)
from guardsmith.models.families import Family
from guardsmith.models.reading import index_of, renamed
from guardsmith.models.tensor_files import read_header, write_copy

OPENED_TOGETHER = 2**30
"""Bytes of the networks that `open_once` opens at the same time."""

LARGEST_TEXT = 1 << 20  # bytes of a licence or a README
OLD_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # of the attention in VAEs of 2022


class Built(NamedTuple):
    """What became of a base's files.

    Attributes:
        left_out: files, folders (with a slash at the end) and tensors of the base that the hardened model does not have.
        nulled: parts that the base's `model_index.json` names and the hardened one sets to null -> why.
    """

    left_out: list[str]
    nulled: dict[str, str]


def remove_folder(folder: Path) -> None:
    """Delete a folder, also one whose folders may not be written to; nothing happens if it is not there."""
    if folder.is_symlink() or not folder.exists():
        folder.unlink(missing_ok=True)
        return
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o700)
    shutil.rmtree(folder)


def build_folder(base: Path, networks: Mapping[str, Any], hardened: Collection[str], place: Path) -> Built:
    """Write everything of a model but the weights of its hardened parts into an empty folder.

    Args:
        base: diffusers folder.
        networks: every network in memory, by the folder that it is stored in.
        hardened: those whose weights the caller writes.
        place: where to.

    Raises:
        UserError: the base has what cannot be released as it is: a link out of it, a credential, a broken file.
    """
    files = list_files(base)

    def inside(name: str) -> Path:
        if not lies_within(base, files[name]):
            raise UserError(
                f"{files[name]}: a link out of the base, which is not followed; put the file itself in its place."
            )
        return files[name]

    def read(name: str) -> bytes:
        return inside(name).read_bytes()

    if INDEX not in files:
        raise UserError(f"{base} has no {INDEX}.")
    family, index = parse_index(read(INDEX), str(base / INDEX))
    names, nulls, notes = {INDEX}, _without(family, index, files, base), []
    for part in parts_of(family, index):
        if part.name in nulls:
            continue
        if part.name in files:
            raise UserError(f"{files[part.name]}: no folder, or a link to one; put the folder itself in its place.")
        weights = weight_names(part, files, read) if part.kind in STEMS else []
        used = used_weights(part, files, read) if part.kind in STEMS else []
        others = renamed(part, used, weights)
        names |= others.keys()
        for name in part_names(part, files, read):
            if others and name in weights:
                continue
            names.add(name)
            if name in weights and part.name in hardened:
                continue
            target = place / name
            target.parent.mkdir(exist_ok=True)
            if name.endswith(".safetensors"):
                notes += _copy_weights(inside(name), target, _known_names(part, networks, base), name)
            else:
                _check_text(name, read(name))
                shutil.copyfile(files[name], target)
        if others and part.name not in hardened:
            for name, new in others.items():
                (place / part.name).mkdir(exist_ok=True)
                notes += _copy_weights(inside(name), place / new, _known_names(part, networks, base), name)
            if len(others) > 1:
                stem = STEMS[part.kind]
                index_name, text = index_of({Path(new).name: place / new for new in others.values()}, stem)
                write_text(place / part.name / index_name, text)
        if part.kind in STEMS:
            names |= {name for name in weight_names(part, files, read, HALF) if part.name in networks}
    for name, file in files.items():
        if (name == README or LICENCE.fullmatch(name)) and _is_plain_text(base, file):
            shutil.copyfile(file, place / name)
            names.add(name)
    _write_index(base / INDEX, place / INDEX, index, nulls)
    return Built([*summary(files.keys() - names, names), *notes], nulls)


def _without(family: Family, index: dict[str, Any], files: Mapping[str, Path], base: Path) -> dict[str, str]:
    """Parts that cannot be taken -> why.

    Raises:
        UserError: it is one without which there is no model.
    """
    reasons = dict.fromkeys(unknown_parts(family, index), "no part of this kind of pipeline")
    for name in (*EXTRA_NETWORKS, "feature_extractor", *(part for pair in family.text_parts() for part in pair[:2])):
        if name in index and index[name] is None:  # which the pipeline would take for a part of no class
            reasons[name] = "it is null"
    required = {family.denoiser, "vae", "scheduler", "text_encoder", "tokenizer"}
    for name in required - {part.name for part in parts_of(family, index)}:
        raise UserError(f"{base / INDEX} does not name the part '{name}'; correct the file.")
    for part in parts_of(family, index):
        usable = {name: file for name, file in files.items() if part.required or lies_within(base, file)}
        names = part_names(part, usable, lambda name: files[name].read_bytes())
        weights = used_weights(part, usable, lambda name: files[name].read_bytes()) if part.kind in STEMS else []
        if part.required or (names and (weights or part.kind not in STEMS)):
            continue
        there = [name for name in files if name.startswith(f"{part.name}/")]
        pickled = any(Path(name).suffix.lower() in (".bin", ".ckpt", ".pt", ".pth") for name in there)
        reasons[part.name] = (
            "its weights are pickled" if pickled else "it has no files that can be read" if there else "absent"
        )
    if "safety_checker" in index and "feature_extractor" in reasons and "safety_checker" not in reasons:
        reasons["safety_checker"] = "its feature_extractor is missing"  # the pipeline takes both or neither
    return reasons


def _write_index(source: Path, target: Path, index: dict[str, Any], nulled: Mapping[str, str]) -> None:
    if not nulled:
        shutil.copyfile(source, target)
        return
    # A part that this kind of pipeline does not take is left out: the pipeline would not even take it as null.
    unknown = {name for name, why in nulled.items() if why.startswith("no part")}
    entries = {name: [None, None] if name in nulled else value for name, value in index.items() if name not in unknown}
    write_text(target, json.dumps(entries, indent=2) + "\n")


def _check_text(name: str, data: bytes) -> None:
    """Raises UserError for a text of a part that is broken or holds a credential."""
    text = data.decode("utf-8", errors="replace")
    if name.endswith(".json"):
        try:
            json.loads(data)
        except ValueError as error:
            raise UserError(f"{name} of the base is not valid JSON ({error}).") from error
    if kind := credential_in(text):
        raise UserError(f"{name} of the base seems to hold {kind}; take it out, for it would be published.")


def _is_plain_text(base: Path, file: Path) -> bool:
    """Whether a licence or README is a text of its own, of usual size, without anything like a credential."""
    if not lies_within(base, file) or file.stat().st_size > LARGEST_TEXT:
        return False
    try:
        file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return credential_in_file(file) is None


def _known_names(part: Part, networks: Mapping[str, Any], base: Path) -> set[str]:
    """Names of the tensors that a network has."""
    if part.name in networks:
        return set(networks[part.name].state_dict())
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPVisionModelWithProjection

    kind: Any = {"safety_checker": StableDiffusionSafetyChecker, "image_encoder": CLIPVisionModelWithProjection}[
        part.name
    ]
    try:
        config = kind.config_class.from_pretrained(base / part.name)
        with torch.device("meta"):
            return set(kind(config).state_dict())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{base / part.name}: its configuration cannot be read ({type(error).__name__}); set {part.name} to null in {INDEX}."
        ) from error


def plain_name(name: str) -> str:
    """A tensor's name without what differs between versions of the libraries."""
    name = re.sub(r"^(text_model\.|vision_model\.(?=vision_model\.))", "", name)  # the latter of safety checkers
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda match: f"{match[1]}.{OLD_NAMES[match[2]]}.", name
    )


def _copy_weights(source: Path, target: Path, network_tensors: Collection[str], name: str) -> list[str]:
    """Copy the tensors that a network has; byte for byte the file where it holds nothing else."""
    try:
        header = read_header(source)
    except UserError as error:
        part = name.partition("/")[0]
        raise UserError(
            f"{source} is no safetensors file, or not whole; get it again, or set {part} to null in {INDEX}."
        ) from error
    plain = {plain_name(each) for each in network_tensors}
    tensors = {
        each: entry
        for each, entry in header.tensors.items()
        if plain_name(each) in plain or (each.endswith("position_ids") and entry["dtype"].startswith("I"))
    }
    metadata = releasable_metadata(header.metadata)
    surplus = sorted(header.tensors.keys() - tensors.keys())
    if not surplus and len(metadata) == len(header.metadata):
        shutil.copyfile(source, target)
        return []
    write_copy(source, header._replace(tensors=tensors, metadata=metadata), target)
    notes = [f"{len(surplus)} tensors of {name} that its network does not have ({surplus[0]})"] if surplus else []
    further = sorted(header.metadata.keys() - metadata.keys())
    return [*notes, f"metadata of {name} ({in_words(further)})"] if further else notes


def _together(folder: Path, networks: Sequence[str]) -> list[list[str]]:
    """Networks in groups whose files have at most `OPENED_TOGETHER` bytes, or which are a single network."""
    groups: list[list[str]] = []
    room = -1
    for name in networks:
        size = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        if size > room:
            groups.append([])
            room = OPENED_TOGETHER
        groups[-1].append(name)
        room -= size
    return groups


def _opened_as(folder: Path) -> torch.dtype:
    """The precision to open a written network in: half if all of its weights are stored so."""
    with safe_open(next(folder.glob("*.safetensors")), framework="pt") as weights:
        kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 (not a dict)
    return torch.float16 if kinds <= {"F16", "I64"} else torch.float32


def open_once(folder: Path, networks: Sequence[str]) -> None:
    """Open a written model as diffusers' own pipeline; large networks one at a time, so that it needs little memory.

    Raises:
        RunFailed: it cannot be opened.
    """
    import diffusers
    from diffusers.utils import logging

    family, index = parse_index((folder / INDEX).read_bytes(), str(folder / INDEX))
    # Of Stable Diffusion 3 without T5: diffusers opens it only if its index says so.
    missing = {part: None for pair in family.text_parts() for part in pair[:2] if not is_named(index, part)}
    kind = getattr(diffusers, index["_class_name"])
    extra = [name for name in EXTRA_NETWORKS if is_named(index, name)]
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # that a part was left out on purpose is no news
    logging.disable_progress_bar()
    try:
        for some in _together(folder, (*networks, *extra)):
            others = {other: None for other in (*networks, *extra) if other not in some}
            dtype = {name: _opened_as(folder / name) for name in some}
            pipeline = kind.from_pretrained(
                folder, use_safetensors=True, dtype=dtype, local_files_only=True, **missing, **others
            )
            for name in some:
                if getattr(pipeline, name) is None:
                    raise RunFailed(f"{folder}: diffusers finds no {name} in the written model")
            del pipeline
    except RunFailed:
        raise
    except Exception as error:  # whatever the libraries raise: this is the check that they can read it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunFailed(f"diffusers cannot open the model that was written ({reason}); it was not kept") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
