"""What a hardening writes down of itself (`harden.json`), and what later runs read of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from guardsmith import __version__
from guardsmith.config.loading import checked_recipe
from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import read_record
from guardsmith.core.console import launched, warn
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.methods import METHODS, Method, MethodConfig
from guardsmith.registry.loader import Registry

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow")
NEEDED = ("base", "base_revision", "base_digest", "model_digest", "registry_digest", "method", "params", "seed", "subjects",
          "seconds", "unet_forward_equivalents")  # fmt: skip
"""Keys of `harden.json` that later runs need."""


def run_info() -> dict[str, Any]:
    """Versions, machine and time of a run, for its record."""
    return {
        "guardsmith": __version__,
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": launched(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_hardening(record: Path) -> dict[str, Any]:
    """The `harden.json` of a finished run, with every key of `NEEDED`.

    Raises:
        UserError: it is not JSON, lacks one, or is of a form of its method that is no more (`HardeningMethod.check_earlier`).
    """
    data: dict[str, Any] = read_record(record, NEEDED, "harden again")
    if (method := METHODS.get(data["method"])) is not None:
        _check_earlier(record, method, data)
    return data


def _check_earlier(place: Path, method: Method, record: Mapping[str, Any], config: MethodConfig | None = None) -> None:
    try:
        method.check_earlier(record["params"], config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def recorded_recipe(record: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a model was hardened with, with everything that it left to defaults; `None` in records of before 0.2.

    Raises:
        UserError: it is no recipe of this version.
    """
    data = record.get("recipe")
    return None if data is None else checked_recipe(dict(data), "the recipe in harden.json")


WRECKED = 10.0  # times the base's loss on class pictures; methods that work on some base stay below 2


def wrecked_sentence(record: Mapping[str, Any]) -> str | None:
    """What to say of a hardening that left a model which no longer draws its classes; `None` for any other.

    Args:
        record: `harden.json`; those of earlier versions do not have what it takes.
    """
    if "class_loss" not in record or (record["class_loss"] is not None and record["class_loss"] <= WRECKED):
        return None
    times = "not a number" if record["class_loss"] is None else f"{record['class_loss']:.3g} times the base's"
    return (
        f"the hardening wrecked the model: its loss on pictures of the subjects' classes is {times}; harden again with a lower "
        "learning rate or fewer steps"
    )


def check_not_wrecked(record: Mapping[str, Any], output: Path) -> None:
    """Refuse to go on with a model that no longer draws its classes.

    Raises:
        RunFailed: see `wrecked_sentence`.
    """
    if sentence := wrecked_sentence(record):
        raise RunFailed(f"{output}: {sentence} (--overwrite); what was written stays for you to look at")


def earlier_run(
    folder: Path, registry: Registry, method: Method, name: str, config: MethodConfig, base_digest: str
) -> dict[str, Any]:
    """The record of an earlier hardening to which the subjects of this registry can be added.

    Args:
        folder: output of the earlier run.
        registry: whom to protect now.
        method: to be used now.
        name: of it, in the recipe.
        config: its parameters.
        base_digest: of the base to be used now.

    Raises:
        UserError: it is not finished, was another base or method, is one that the method cannot begin from, or protects a subject
            that the registry does not name.
    """
    record, state = folder / "harden.json", folder / "state.safetensors"
    if not (record.is_file() and state.is_file()):
        raise UserError(f"{folder} holds no finished hardening to add to (no harden.json and state.safetensors).")
    earlier = read_hardening(record)
    for what, then, now in (("method", earlier["method"], name), ("base", earlier["base_digest"], base_digest)):
        if then != now:
            raise UserError(f"{folder} was hardened with another {what} ({then}); add to it with the same one.")
    _check_earlier(folder, method, earlier, config)
    ids = {subject.id for subject in registry.subjects}
    missing = [name for name in earlier["subjects"] if name not in ids]
    if missing:
        raise UserError(
            f"{folder} protects {', '.join(missing)}, whom {registry.path} does not name; subjects can be added to a hardened "
            "model but not taken out: harden again from the base, without --add-to."
        )
    return earlier


class StepCosts:
    """Denoiser rows of every step in a file, so that a resumed run counts those of earlier sessions.

    Args:
        file: JSON lines of step, forward rows and backward rows.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, step: int, forwards: int, backwards: int) -> None:
        """Write down a step."""
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([step, forwards, backwards]) + "\n")

    def total(self, steps: int) -> tuple[int, int]:
        """Forward and backward rows of the first `steps` steps; one that was taken again after a kill counts once."""
        rows: dict[int, tuple[int, int]] = {}
        for line in self.file.read_bytes().decode(errors="replace").splitlines() if self.file.exists() else ():
            try:
                step, forwards, backwards = map(int, json.loads(line))
            except (ValueError, TypeError):
                continue  # cut off by a power loss
            rows[step] = (forwards, backwards)
        counted = [rows[step] for step in range(steps) if step in rows]
        if len(counted) < steps:
            warn(f"{self.file} cannot be read everywhere; the cost of {steps - len(counted)} steps is not counted")
        return sum(forwards for forwards, _ in counted), sum(backwards for _, backwards in counted)
