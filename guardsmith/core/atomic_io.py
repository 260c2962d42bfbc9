"""Files and folders that appear whole or not at all, also after a power loss; and files of earlier runs, read with care."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from guardsmith.core.console import warn
from guardsmith.core.errors import RunFailed, UserError, out_of_memory

Value = TypeVar("Value")


def _sync(path: Path) -> None:
    """Have the disk keep a file's contents, or a folder's names. Without it, a renamed file can be empty after a power loss."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder, where the system opens none (Windows)
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems sync nothing
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file that appears whole, in place of an older one, or not at all.

    Yields:
        A path beside it, to write to. Each process has its own, so several may write the same file; the last one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder that appears whole, in place of an older one, or not at all.

    Yields:
        An empty folder beside it, to write into. Each process has its own, so several may write the same folder.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for inside, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(inside, name))
            _sync(Path(inside))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, keys sorted, that appears whole or not at all."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_record(record: Path, keys: Sequence[str], remedy: str) -> dict[str, Any]:
    """The record that a finished run left.

    Args:
        record: a JSON file.
        keys: those that it must have.
        remedy: advice where it does not, e.g. "harden again".

    Raises:
        OSError: there is no such file, or it cannot be read.
        UserError: it is not a mapping in JSON, or lacks a key.
    """
    try:
        data = json.loads(record.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{record} is not valid JSON; {remedy}.") from error
    missing = [key for key in keys if not isinstance(data, dict) or key not in data]
    if missing:
        raise UserError(f"{record} lacks {', '.join(missing)}; {remedy}.")
    return dict(data)


def read_kept(path: Path, reader: Callable[[Path], Value], consequence: str) -> Value | None:
    """A file that an earlier run kept to save time; one that cannot be read is deleted, and a warning names it.

    Args:
        path: the file.
        reader: reads it.
        consequence: what happens without it, e.g. "its pictures are generated again".

    Returns:
        What `read` gives; `None` where there is no such file, or it cannot be read.

    Raises:
        RunFailed: there is not enough memory.
    """
    if not path.exists():
        return None
    try:
        return reader(path)
    except Exception as error:  # a cut or empty file is anything to json, safetensors and Pillow
        if out_of_memory(error):
            raise RunFailed(f"out of memory while reading {path}: close other programs and run again") from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        warn(f"{path} cannot be read ({reason}); {consequence}")
        path.unlink(missing_ok=True)
        return None


def folder_digest(*parts: Any) -> str:
    """Short digest of JSON-able settings: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
