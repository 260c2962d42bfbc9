"""Pictures that a model draws, drawn once and kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from guardsmith.core.progress import stage
from guardsmith.diffusion.sampling import generate
from guardsmith.diffusion.states import StateRecorder, States
from guardsmith.models.checkpoint import DiffusionModel


class SamplingSettings(Protocol):
    """How pictures are drawn, as `Recipe.sampling` has it."""

    @property
    def steps(self) -> int:
        """Solver steps."""

    @property
    def guidance(self) -> float:
        """Classifier-free guidance scale."""

    @property
    def batch(self) -> int:
        """Pictures per U-Net call."""


def drawn_by(
    model: DiffusionModel, settings: SamplingSettings, prompts: list[str], seed: int, cache: Path | None, title: str
) -> Tensor:
    """Pictures of these prompts drawn by the model (seeds seed, seed + 1, ...), kept in `cache` if given."""
    return _drawn(model, settings, prompts, seed, cache, title, None)["images"]


def drawn_with_states(
    model: DiffusionModel, settings: SamplingSettings, prompts: list[str], seed: int, cache: Path | None, title: str
) -> tuple[Tensor, States]:
    """The same, and how they were drawn."""
    drawn = _drawn(model, settings, prompts, seed, cache, title, StateRecorder())
    return drawn["images"], States(drawn["states"], drawn["timesteps"])


def _drawn(
    model: DiffusionModel,
    settings: SamplingSettings,
    prompts: list[str],
    seed: int,
    cache: Path | None,
    title: str,
    recorder: StateRecorder | None,
) -> dict[str, Tensor]:
    if cache is not None and cache.exists():
        return load_file(cache)
    # Contiguous, as they come back from the file: the layout decides the last bits of what the VAE makes of them.
    calls = -(-len(prompts) // settings.batch) * settings.steps
    with stage(title, calls) as bar:
        images = generate(
            model, prompts, range(seed, seed + len(prompts)), steps=settings.steps, guidance=settings.guidance,
            batch=settings.batch, on_step=bar, on_state=recorder,
        ).contiguous()  # fmt: skip
    drawn = {"images": images}
    states = None if recorder is None else recorder.states()
    if states is not None:
        drawn |= {"states": states.latents, "timesteps": states.timesteps}
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}.tmp")  # two searches may draw the same pictures
        try:
            save_file(drawn, temporary)
            temporary.replace(cache)
        finally:
            temporary.unlink(missing_ok=True)
    return drawn
