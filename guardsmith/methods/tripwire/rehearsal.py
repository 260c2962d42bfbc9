"""Rehearsals: what models personalized on a protected subject draw of it, for a method to train against.

One with DreamBooth and one with LoRA for each subject, in processes of their own, kept so that a killed run goes on with those
that are missing. Only pictures that may be used for hardening go in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardsmith.attacks import dreambooth, lora
from guardsmith.attacks.base import AttackData, OnStep
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.core.progress import stage
from guardsmith.core.seeds import REHEARSAL
from guardsmith.diffusion.prompts import HARDENING_IDENTIFIERS, sample_prompts
from guardsmith.diffusion.sampling import generate
from guardsmith.diffusion.states import StateRecorder, States
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel, load_model
from guardsmith.runtime.processes import gather, processes, send
from guardsmith.training.loop import UNetCost, load_checkpoint, save_checkpoint

REHEARSALS = ("dreambooth", "lora")
REHEARSAL_SEED = REHEARSAL.start


def rehearse(
    model: DiffusionModel,
    subject: SubjectData,
    config: Any,
    kind: str,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[Tensor, States]:
    """What an attacker's model would draw of the subject, float32 (n, 3, h, w) in [-1, 1], and how.

    Only the pictures that may be used for hardening go in; identifier and seeds are none that verification uses.

    Args:
        model: the base.
        subject: whom to learn.
        config: a method's, with `rehearsal_steps` and what else begins so (see `TripwireConfig`).
        kind: one of `REHEARSALS`.
        seed: of the training, and it chooses the identifier.
        on_step: see `OnStep`.
    """
    name = HARDENING_IDENTIFIERS[1 + seed % (len(HARDENING_IDENTIFIERS) - 1)]
    data = AttackData(subject.images, subject.class_images, name, subject.class_noun)
    prompts = sample_prompts(name, subject.class_noun, config.rehearsal_images)
    given = {"steps": config.rehearsal_steps, "batch_size": 2}
    if kind == "lora":
        adapters = lora.LoraConfig(learning_rate=config.rehearsal_lora_learning_rate, **given)
        personalized, _ = lora.attack(model, data, adapters, seed=seed, on_step=on_step)
    else:
        whole = DreamBoothConfig(learning_rate=config.rehearsal_learning_rate, **given)
        personalized, _ = dreambooth.attack(model, data, whole, seed=seed, on_step=on_step)
    first = REHEARSAL_SEED + REHEARSALS.index(kind) * len(prompts)
    seeds, recorder = range(first, first + len(prompts)), StateRecorder()
    drawn = generate(personalized, prompts, seeds, steps=20, guidance=config.rehearsal_guidance, on_state=recorder)
    states = recorder.states()
    assert states is not None
    return drawn.contiguous(), states


def _rehearse(source: str, subject: SubjectData, config: Any, kind: str, seed: int, file: Path) -> None:
    model = load_model(source)
    with UNetCost() as counter:
        images, states = rehearse(model, subject, config, kind, seed=seed, on_step=lambda _, loss, __: send(loss))
    drawn = {"images": images, "states": states.latents, "timesteps": states.timesteps}
    save_checkpoint(file, drawn, {"forwards": counter.forwards, "backwards": counter.backwards})


def rehearsed_by(
    model: DiffusionModel, subjects: Sequence[SubjectData], config: Any, seed: int, cache: Path
) -> tuple[list[SubjectData], int, int]:
    """The subjects with what personalized copies of the base drew of them, and the U-Net rows, forward and backward.

    Every rehearsal runs in a process of its own and is kept in `cache`, so that a killed run goes on with those that are
    missing.

    Raises:
        RunFailed: a process was killed.
    """
    files = {(s.id, kind): cache / f"rehearsed-{s.id}-{kind}.safetensors" for s in subjects for kind in REHEARSALS}
    missing = [key for key, file in files.items() if not file.exists()]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        by_id = {subject.id: subject for subject in subjects}
        with stage("rehearsals", len(missing) * config.rehearsal_steps) as bar, processes() as (pool, told):
            running = [
                pool.submit(_rehearse, model.place, by_id[name], config, kind, seed, files[name, kind])
                for name, kind in missing
            ]
            gather(running, told, lambda loss: bar({"loss": loss}))
    found, forwards, backwards = [], 0, 0
    for subject in subjects:
        parts = [load_checkpoint(files[subject.id, kind]) for kind in REHEARSALS]
        images = torch.cat([tensors["images"] for tensors, _ in parts])
        states = States(torch.cat([tensors["states"] for tensors, _ in parts]), parts[0][0]["timesteps"])
        found.append(replace(subject, rehearsed=images, rehearsed_states=states))
        forwards += sum(rows["forwards"] for _, rows in parts)
        backwards += sum(rows["backwards"] for _, rows in parts)
    return found, forwards, backwards
