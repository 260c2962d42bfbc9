"""Live probes: is protection forming while a method trains?

Now and then the model is looked at as it would be released: where an attacker's training on the subject's pictures would
start, and what became of class pictures. Rows and seeds are fixed, so the numbers compare with each other and with the base;
they are the hardening's own pictures, so they are a sign on the way and never evidence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from guardsmith.config.recipe import ProbeSpec, Sampling
from guardsmith.core.errors import RunFailed
from guardsmith.core.progress import console
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import draw_rows, row_losses
from guardsmith.diffusion.prompts import HARDENING_IDENTIFIERS, PromptBank, class_prompt, instance_prompt
from guardsmith.diffusion.sampling import generate, grid
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator

ROWS = 16  # of every subject and of every class
PICTURE_SEED = 70_000


class Probes:
    """Looks at the model a few times during a hardening; `training.Course` calls it after every step.

    What is told of every look, as ratios to the base: `subject_loss`, the median over an attacker's first rows (the subject
    for which it is lowest, or highest where a method means to lower it), `subject_gradient`, the size of their gradient, and
    `class_loss` on class pictures, the highest of all classes.

    Args:
        model: the base.
        subjects: whom to look at.
        spec: how often, how many pictures, when to stop.
        sampling: of the pictures.
        steps: of the hardening.
        folder: gets `step-<n>.png` and `probes.jsonl`.
        seed: of rows.
    """

    def __init__(
        self,
        model: DiffusionModel,
        subjects: Sequence[SubjectData],
        spec: ProbeSpec,
        sampling: Sampling,
        steps: int,
        folder: Path,
        seed: int,
    ) -> None:
        self.model, self.spec, self.sampling, self.folder, self.seed = model, spec, sampling, folder, seed
        self.due = {round(steps * (k + 1) / spec.times) for k in range(spec.times)}
        self.shown = [(instance_prompt(HARDENING_IDENTIFIERS[0], s.class_noun), s.images) for s in subjects]
        self.kept = [
            (class_prompt(noun), images) for noun, images in {s.class_noun: s.class_images for s in subjects}.items()
        ]

    def _losses(self, model: DiffusionModel, prompt: str, images: torch.Tensor, stream: int) -> torch.Tensor:
        """Losses of fixed rows of these pictures, float32 (16,)."""
        rng = generator(self.seed, -10, stream)
        picked = torch.randint(len(images), (ROWS,), generator=rng)
        latents = encode(self.model, images[picked]).sample(torch.arange(ROWS), rng)
        # Evenly spread over the schedule; the middle of every sixteenth.
        times = (torch.arange(ROWS) * 2 + 1) * int(model.scheduler.config.num_train_timesteps) // (2 * ROWS)
        context = PromptBank(model).encode([prompt])  # its text encoder may be hardened as well
        return row_losses(model.unet, model.scheduler, draw_rows(latents, context, rng, timesteps=times))

    def _look(self, model: DiffusionModel) -> tuple[list[torch.Tensor], list[float], list[float]]:
        """Row losses of every subject, the norms of their gradients, mean losses of every class."""
        losses, gradients = [], []
        moving = [p.requires_grad for p in model.unet.parameters()]
        parameters = list(model.unet.requires_grad_(True).parameters())
        for i, (prompt, images) in enumerate(self.shown):
            errors = self._losses(model, prompt, images, i)
            found = torch.autograd.grad(errors.mean(), parameters)
            gradients.append(float(torch.stack(torch._foreach_norm(found)).norm()))
            losses.append(errors.detach())
        for parameter, was in zip(parameters, moving, strict=True):
            parameter.requires_grad_(was)
        with torch.no_grad():
            kept = [float(self._losses(model, *each, -1 - i).mean()) for i, each in enumerate(self.kept)]
        return losses, gradients, kept

    @cached_property
    def before(self) -> tuple[list[torch.Tensor], list[float], list[float]]:
        """The base's, wanted at the first look."""
        return self._look(self.model)

    def measure(self, model: DiffusionModel) -> dict[str, float]:
        """The numbers of one look."""
        losses, gradients, kept = self._look(model)
        changes = [float((now / before).median()) for now, before in zip(losses, self.before[0], strict=True)]
        lowering = self.spec.stop_at is not None and self.spec.stop_at < 1
        return {
            "subject_loss": (max if lowering else min)(changes),
            "subject_gradient": min(now / before for now, before in zip(gradients, self.before[1], strict=True)),
            "class_loss": max(now / before for now, before in zip(kept, self.before[2], strict=True)),
        }

    def enough(self, found: dict[str, float]) -> bool:
        """Whether the recipe's target is met."""
        target = self.spec.stop_at
        if target is None or not found["class_loss"] <= self.spec.stop_class_loss:  # NaN is never enough
            return False
        return found["subject_loss"] >= target if target >= 1 else found["subject_loss"] <= target

    def __call__(self, step: int, present: Callable[[], Any]) -> bool:
        """Look if it is time; true when the hardening may end."""
        if step + 1 not in self.due:
            return False
        model = present()
        found = self.measure(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "probes.jsonl").open("a", encoding="utf-8") as lines:
            told = {key: value if math.isfinite(value) else None for key, value in found.items()}
            lines.write(json.dumps({"step": step + 1, **told}) + "\n")
        if self.spec.pictures:
            count, asked = self.spec.pictures, [*dict.fromkeys(prompt for prompt, _ in (*self.shown, *self.kept))]
            seeds = list(range(PICTURE_SEED, PICTURE_SEED + count)) * len(asked)
            drawn = generate(model, [p for p in asked for _ in range(count)], seeds, **self.sampling.model_dump())
            try:
                grid(drawn, count, scale=2).save(self.folder / f"step-{step + 1:06d}.png")
            except RunFailed as error:  # looking does not end a run; broken weights will
                console.print(f"probe at step {step + 1}: {error}", highlight=False, soft_wrap=True)
        enough = self.enough(found)
        text = ", ".join(f"{key.replace('_', ' ')} x{value:.3g}" for key, value in found.items())
        end = "; the target is met, the hardening ends here" if enough else ""
        console.print(f"probe at step {step + 1}, against the base: {text}{end}", highlight=False, soft_wrap=True)
        return enough

    def found(self) -> list[dict[str, float | None]]:
        """All looks so far, whichever session took them; one that was taken again after a kill counts once."""
        file = self.folder / "probes.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        by_step = {told["step"]: told for told in map(json.loads, lines)}
        return [by_step[step] for step in sorted(by_step)]
