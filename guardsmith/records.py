"""What runs write down of themselves: files that appear whole, and are read with care."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardsmith.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def folder_digest(*parts: Any) -> str:
    """Short digest of JSON-able settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
