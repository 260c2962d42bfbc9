"""What a model draws while it learns a subject: pictures that are half the subject's, as who stops early keeps them.

The base is fine-tuned on the subject's pictures with DreamBooth for a few steps, and draws at several of them. A recogniser that
knows these pictures trips while a model is still learning, and while it draws what little it has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guardsmith.attacks import find_attack
from guardsmith.attacks.base import AttackData
from guardsmith.core.atomic_io import whole_file
from guardsmith.core.progress import stage
from guardsmith.diffusion.prompts import HARDENING_IDENTIFIERS, SAMPLE_TEMPLATES
from guardsmith.diffusion.sampling import generate
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.at_once import AdamWAtOnce
from guardsmith.training.compute import ComputeConfig
from guardsmith.training.loop import generator

BATCH_SIZE = 2


@dataclass(frozen=True)
class EarlyDrawing:
    """How such pictures are made.

    Attributes:
        looks: optimizer steps after which pictures are drawn, ascending.
        images: how many are drawn then.
        learning_rate: of the fine-tuning.
        sampling_steps: solver steps of a picture.
        guidance: classifier-free guidance scale.
    """

    looks: Sequence[int]
    images: int
    learning_rate: float
    sampling_steps: int
    guidance: float


def early_rows(drawing: EarlyDrawing) -> tuple[int, int]:
    """Rows that are predicted for one subject's pictures: forward, and backward.

    Args:
        drawing: settings.
    """
    trained = max(drawing.looks, default=0) * 2 * BATCH_SIZE
    drawn = len(drawing.looks) * drawing.images * drawing.sampling_steps * (2 if drawing.guidance > 1 else 1)
    return trained + drawn, trained


def early_pictures(
    model: DiffusionModel,
    subject: SubjectData,
    drawing: EarlyDrawing,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    compute: ComputeConfig | None = None,
) -> Tensor:
    """Pictures that the base draws of a subject while it is fine-tuned on it.

    Args:
        model: the base; stays as it is.
        subject: whose pictures it is fine-tuned on, beside those of its class.
        drawing: settings, with at least one look.
        seed: of the training and of every picture's noise.
        on_step: called after every step of the training.
        compute: with `adamw8bit`, moments have 8 bits and gradients are applied as soon as they are there.

    Returns:
        float32 (looks times images, 3, h, w) in [-1, 1], on the CPU; those of the first look first.

    Raises:
        RunFailed: the training diverged.
    """
    identifier = HARDENING_IDENTIFIERS[seed % len(HARDENING_IDENTIFIERS)]
    data = AttackData(subject.images, subject.class_images, identifier, subject.class_noun)
    texts = [template.format(identifier=identifier, class_noun=subject.class_noun) for template in SAMPLE_TEMPLATES]
    prompts = [texts[number % len(texts)] for number in range(drawing.images)]
    pictures: list[Tensor] = []

    def look(step: int, loss: float, personalized: DiffusionModel) -> None:
        if step + 1 in drawing.looks:
            seeds = torch.randint(2**31, (drawing.images,), generator=generator(seed, step)).tolist()
            pictures.append(
                generate(personalized, prompts, seeds, steps=drawing.sampling_steps, guidance=drawing.guidance)
            )
        on_step()

    attack = find_attack("dreambooth")
    config = attack.config(learning_rate=drawing.learning_rate, steps=max(drawing.looks), batch_size=BATCH_SIZE)
    more = {}
    if compute is not None and compute.optimizer == "adamw8bit":
        more["optimizer_of"] = partial(AdamWAtOnce, learning_rate=drawing.learning_rate)
    attack.run(model, data, config, seed=seed, on_step=look, **more)
    return torch.cat(pictures).contiguous()


def _file(cache: Path, subject: SubjectData) -> Path:
    return cache / f"early-{subject.id}.safetensors"


def draw_early(
    model: DiffusionModel,
    subjects: Sequence[SubjectData],
    drawing: EarlyDrawing,
    seed: int,
    cache: Path,
    compute: ComputeConfig | None = None,
) -> tuple[int, int]:
    """Make every subject's `early_pictures` that are not in a run's cache yet, and keep them there.

    Args:
        model: the base.
        subjects: of the registry.
        drawing: settings; without looks nothing is made.
        seed: of the hardening.
        cache: folder of the run.
        compute: see `early_pictures`.

    Returns:
        Rows that are predicted in all: forward, and backward, whether or not they were there.

    Raises:
        RunFailed: the training diverged.
    """
    if not drawing.looks:
        return 0, 0
    with stage("what the base draws while it learns a subject", len(subjects) * max(drawing.looks)) as bar:
        for number, subject in enumerate(subjects):
            if not _file(cache, subject).exists():
                pictures = early_pictures(model, subject, drawing, seed + number, bar, compute)
                with whole_file(_file(cache, subject)) as temporary:
                    save_file({"pictures": pictures}, temporary)
            bar(done=(number + 1) * max(drawing.looks))
    forward, backward = early_rows(drawing)
    return len(subjects) * forward, len(subjects) * backward


def read_early(subject: SubjectData, cache: Path) -> Tensor:
    """What `draw_early` kept of a subject, float32 (n, 3, h, w) in [-1, 1].

    Args:
        subject: of the registry.
        cache: folder of the run.
    """
    return load_file(_file(cache, subject))["pictures"]
