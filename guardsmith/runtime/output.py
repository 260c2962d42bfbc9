"""The output folder of a hardening (or of another long run): whose it is, what is in it, and that only one run writes there.

out/settings.json      what was asked; a resumed run must ask the same
out/cache/             class pictures and ordinary pictures drawn by the base
out/checkpoints/       training state
out/probes/            what the model drew on the way, and numbers
out/model/             appears whole, at the end
out/state.safetensors  what `--add-to` begins from; for Tripwire a model without its wires, so not for publication
out/harden.json        written last: its presence says that the run is complete
out/verify/            what `guardsmith verify` found
out/release/           what `guardsmith publish` would upload
out/logs/              what trackers that write files were told (`--report-to`)
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from guardsmith.core.atomic_io import write_json
from guardsmith.core.errors import UserError

WRITTEN = (
    "harden.json",
    "state.safetensors",
    "model",
    ".model.tmp",
    "model.trial",
    ".model.trial.tmp",
    "checkpoints",
    "cache",
    "probes",
    "verify",
    "release",
    "logs",
)


def read_settings(output: Path, mark: str = "registry_digest") -> dict[str, Any] | None:
    """What an earlier run was asked, if the folder's settings.json has the mark of that kind of run."""
    try:
        written = json.loads((output / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return written if isinstance(written, dict) and mark in written else None


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}" if key else section: value
        for section, content in json.loads(json.dumps(settings)).items()
        for key, value in (content if isinstance(content, dict) else {"": content}).items()
    }


def prepare_output(
    output: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool, mark: str = "registry_digest",
    written_here: Sequence[str] = WRITTEN,
) -> None:  # fmt: skip
    """Make the output folder, or agree to go on in it. Overwriting deletes what guardsmith wrote, and nothing else.

    Args:
        output: folder.
        settings: of the run.
        resume: go on in it.
        overwrite: start anew in it.
        mark: a key that only settings of this kind of run have.
        written_here: files and folders that this kind of run writes beside its settings.

    Raises:
        UserError: it exists and neither --resume nor --overwrite was given; it was made with other settings or not by
            guardsmith; it cannot be written to.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; name a folder for the output.")
    if output.exists() and any(output.iterdir()):
        if not (resume or overwrite):
            raise UserError(
                f"{output} exists already; go on with --resume, start anew with --overwrite, or name another folder."
            )
        written = read_settings(output, mark)
        if written is None:
            flag, what = ("--overwrite", "delete it") if overwrite else ("--resume", "write into it")
            raise UserError(f"{output} was not made by guardsmith, so {flag} will not {what}; name another folder.")
        if not overwrite:
            old, new = _flat(written), _flat(settings)
            changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            if changed:
                raise UserError(
                    f"{output} was made with other settings ({', '.join(changed)}); use --overwrite or name another "
                    "folder."
                )
            return
        for name in written_here:  # but not settings.json, so that a broken-off --overwrite can be repeated
            place = output / name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "settings.json", settings)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{output} cannot be written to ({error.strerror}); name another folder.") from error


def check_apart(base: Path, output: Path) -> None:
    """The base may not be what this run writes, nor around it.

    Raises:
        UserError: it is.
    """
    if base.resolve().is_relative_to((output / "model").resolve()):
        raise UserError(f"{base} is both the base and what would be written; name another folder for the output.")
    if output.resolve().is_relative_to(base.resolve()):
        raise UserError(f"{output} is inside of the base {base}; name a folder outside of it for the output.")


def only_run(output: Path, held: ExitStack) -> None:
    """Keep every other run out of a folder for as long as `held` is open; the system opens it if this process is killed.

    Raises:
        UserError: another one is in there.
    """
    place = output / ".lock"
    try:
        held.enter_context(FileLock(place).acquire(timeout=0))
    except Timeout:
        raise UserError(f"another run is writing into {output}; wait for it, or name another folder.") from None
    held.callback(place.unlink, missing_ok=True)
