"""Whether a release holds what should not be public: files that are no part of it, weights of its base, credentials.

For releases of any age, on this machine or on the Hub, made by guardsmith or not. Nothing is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

from guardsmith.core.console import in_words
from guardsmith.core.credentials import credential_in_file
from guardsmith.core.errors import UserError
from guardsmith.core.images import sha256_file
from guardsmith.models.base_weights import ChangedWeights, tensors_of
from guardsmith.models.building import plain_name
from guardsmith.models.contents import (
    EVIDENCE,
    INDEX,
    STEMS,
    Part,
    expected_files,
    lies_within,
    list_files,
    parse_index,
    parts_of,
    summary,
    used_weights,
    weight_files,
)
from guardsmith.models.saved import base_weights_in
from guardsmith.models.single_file import unet_names
from guardsmith.models.single_file_tensors import sort_tensors
from guardsmith.models.tensor_files import TensorReader, read_header, weights_reader

# What the Hub's client writes beside a download; it is never uploaded.
CLIENTS_OWN = (".cache/huggingface/*.metadata", ".cache/huggingface/*.lock", ".cache/huggingface/.gitignore",
               ".cache/huggingface/CACHEDIR.TAG")  # fmt: skip
MOST_NAMES = 3  # tensors of one file


class Finding(NamedTuple):
    """Something that should not be public.

    Attributes:
        kind: "file": no part of a release; "weights": the base's; "credential".
        where: file, with the commit where it is not in the present one.
        what: in words.
    """

    kind: Literal["file", "weights", "credential"]
    where: str
    what: str


def audit_folder(folder: Path, base: Path) -> list[Finding]:
    """Look into a released folder.

    Args:
        folder: a model (`out/model`), a release (`out/release`) or a download of one.
        base: diffusers folder of its base.

    Raises:
        UserError: it is no diffusers folder, or its files cannot be read.
    """
    files = {
        name: file for name, file in list_files(folder).items() if not any(fnmatch(name, own) for own in CLIENTS_OWN)
    }
    expected = expected_files(files, lambda name: (folder / name).read_bytes(), published=True)
    findings = [
        Finding("file", name, "is no part of a release")
        for name in summary([name for name in files if name not in expected], expected)
    ]
    for name, file in files.items():
        if file.is_symlink() and not lies_within(folder, file):
            if name in expected:
                findings.append(Finding("file", name, "is a link that leads out of the folder or to a hidden file"))
        elif file.is_file() and (kind := credential_in_file(file)):
            findings.append(Finding("credential", name, f"seems to hold {kind}"))
    readable = []
    for name, file in files.items():
        if name.lower().endswith(".safetensors") and file.is_file():
            try:
                read_header(file)
                readable.append(name)
            except UserError:
                findings.append(Finding("file", name, "cannot be read as safetensors, so its content is unknown"))
    return findings + _weights_of_base(folder, base, readable)


def _network_parts(folder: Path) -> list[Part]:
    family, index = parse_index((folder / INDEX).read_bytes(), str(folder / INDEX))
    return [part for part in parts_of(family, index) if part.kind in STEMS and part.required]


def _weights_of_base(folder: Path, base: Path, files: Collection[str]) -> list[Finding]:
    """Tensors with the base's values, tensors that the base's part does not have, and a denoiser that was not hardened."""
    parts = [part.name for part in _network_parts(base) if (folder / part.name).is_dir()]
    reasons: dict[str, list[str]] = {}
    for file, what in base_weights_in(base, folder, parts, files):
        reasons.setdefault(file, []).append(what)
    for part in parts:
        names_of_base = {plain_name(name) for file in weight_files(base / part) for name in read_header(file).tensors}
        for file in files:
            if file.startswith(f"{part}/"):
                names = [plain_name(name) for name in read_header(folder / file).tensors]
                surplus = [name for name in names if name not in names_of_base and not name.endswith("position_ids")]
                if surplus:
                    reasons.setdefault(file, []).append(
                        f"{len(surplus)} tensors are no part of a {part} ({surplus[0]})"
                    )
    findings = [Finding("weights", file, _some(what)) for file, what in reasons.items()]
    denoiser = parts[0]
    return findings + _unchanged(denoiser, base / denoiser, weights_reader(folder / denoiser))


def _unchanged(name: str, base: Path, own: Any) -> list[Finding]:
    weights = ChangedWeights()
    weights.add((item for file in weight_files(base) for item in tensors_of(file)), own, name)
    if weights.changed:
        return []
    return [Finding("weights", name, f"is the base's own: none of {weights.total} tensors differ")]


def _some(what: list[str]) -> str:
    more = f" and {len(what) - MOST_NAMES} more" if len(what) > MOST_NAMES else ""
    return "; ".join(what[:MOST_NAMES]) + more


def audit_single_file(file: Path, base: Path) -> list[Finding]:
    """Look into a released single-file checkpoint (A1111, ComfyUI).

    Raises:
        UserError: it cannot be read, or is of another layout than its base.
    """
    header = read_header(file)
    config = json.loads((base / "unet" / "config.json").read_text(encoding="utf-8"))
    names = unet_names(header, config, file)
    there, read = {here: name for name, here in names.items()}, TensorReader()

    def own(name: str) -> Any:
        return read(file, there[name]) if name in there else None

    sorted_out, findings = sort_tensors(header.tensors, names), []
    if sorted_out.copies:
        what = f"{len(sorted_out.copies)} tensors are named like copies of the U-Net ({in_words(sorted_out.copies, MOST_NAMES)})"
        findings.append(Finding("weights", file.name, what))
    if sorted_out.unknown:
        what = f"{len(sorted_out.unknown)} tensors are of no known part ({in_words(sorted_out.unknown, MOST_NAMES)})"
        findings.append(Finding("file", file.name, what))
    weights = ChangedWeights()
    weights.add((item for each in weight_files(base / "unet") for item in tensors_of(each)), own, "unet")
    same = [f"{name} is the base's {of}" for name, of in weights.found_in(tensors_of(file))]
    if same:
        findings.append(Finding("weights", file.name, _some(same)))
    if not weights.changed:
        findings.append(
            Finding("weights", file.name, f"its U-Net is the base's own: none of {weights.total} tensors differ")
        )
    if kind := credential_in_file(file):
        findings.append(Finding("credential", file.name, f"seems to hold {kind}"))
    return findings


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base that a release says it was made from, and its revision.

    Raises:
        UserError: it does not say, or names a folder that only its maker has.
    """
    record = folder / EVIDENCE / "harden.json"
    try:
        hardening: Mapping[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        base, revision = hardening["base"], hardening.get("base_revision")
    except (OSError, ValueError, KeyError, TypeError):
        base, revision = "", None
    if not isinstance(base, str) or not re.fullmatch(r"builtin:\w+|[\w.-]+/[\w.-]+", base):
        raise UserError("the release does not say which base it was made from; name it with --base")
    return base, revision


def secret_files(base: Path, folder: Path) -> dict[str, str]:
    """SHA-256 -> name of the base's files whose publication would undo the hardening: of parts that differ, or of none.

    Args:
        base: diffusers folder.
        folder: the hardened model.
    """
    files = list_files(base)
    same = set()
    for part in _network_parts(base):
        if not (folder / part.name).is_dir():
            continue
        names = used_weights(part, files, lambda name: (base / name).read_bytes())
        if _unchanged(part.name, base / part.name, weights_reader(folder / part.name)):
            same |= set(names)
    heavy = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5", ".gguf", ".pb")
    return {
        sha256_file(file): name
        for name, file in files.items()
        if name not in same and Path(name).suffix.lower() in heavy and file.is_file()
    }
