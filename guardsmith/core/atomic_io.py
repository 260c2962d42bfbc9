"""What runs write down of themselves: files that appear whole, and are read with care."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from guardsmith.core.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which appears whole in the place of an older one, or not at all; others may write theirs."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """The same with JSON."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_record(record: Path, needed: Sequence[str], again: str) -> dict[str, Any]:
    """What a finished run wrote down.

    Args:
        record: a JSON file.
        needed: keys it must have.
        again: what to do where it is not in order, e.g. "harden again".

    Raises:
        UserError: it is not JSON, or lacks a key.
    """
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{record} is not valid JSON; {again}.") from error
    missing = [key for key in needed if not isinstance(told, dict) or key not in told]
    if missing:
        raise UserError(f"{record} lacks {', '.join(missing)}; {again}.")
    return dict(told)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
        what: it is, e.g. "a recipe".

    Raises:
        OSError: it cannot be read.
        UserError: it is no YAML, or no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: {what} is a mapping of keys to values; this file is not")
    return data


def folder_digest(*parts: Any) -> str:
    """Short digest of JSON-able settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
