"""Live probes: is protection forming while a method trains?

Now and then the model is looked at as it would be released: where an attacker's training on the subject's pictures would
start, and what became of class pictures. Rows and seeds are fixed, so the numbers compare with each other and with the base;
they are the hardening's own pictures, so they are a sign on the way and never evidence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from guardsmith.errors import RunFailed
from guardsmith.latents import encode
from guardsmith.losses import Rows, draw_rows, row_losses
from guardsmith.methods.data import SubjectData
from guardsmith.models import DiffusionModel
from guardsmith.progress import console
from guardsmith.prompts import HARDENING_IDENTIFIERS, PromptBank, class_prompt, instance_prompt
from guardsmith.recipe import ProbeSpec, Sampling
from guardsmith.sampling import generate, grid
from guardsmith.training import generator

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
        self.model, self.spec, self.sampling, self.folder = model, spec, sampling, folder
        self.due = {round(steps * (k + 1) / spec.times) for k in range(spec.times)}
        self.nouns = list(dict.fromkeys(subject.class_noun for subject in subjects))
        bank, name = PromptBank(model), HARDENING_IDENTIFIERS[0]
        timesteps = int(model.scheduler.config.num_train_timesteps)
        # Evenly spread over the schedule; the middle of every sixteenth.
        times = (torch.arange(ROWS) * 2 + 1) * timesteps // (2 * ROWS)

        def rows(images: torch.Tensor, prompt: str, stream: int) -> Rows:
            rng = generator(seed, -10, stream)
            return draw_rows(encode(model, images).draw(ROWS, rng), bank.encode([prompt]), rng, timesteps=times)

        self.prompts = [instance_prompt(name, subject.class_noun) for subject in subjects]
        self.attacked = [
            rows(s.images, prompt, i) for i, (s, prompt) in enumerate(zip(subjects, self.prompts, strict=True))
        ]
        pictures = {subject.class_noun: subject.class_images for subject in subjects}
        self.kept = [rows(pictures[noun], class_prompt(noun), -1 - i) for i, noun in enumerate(self.nouns)]
        self.before = self._look(model)

    def _look(self, model: DiffusionModel) -> tuple[list[torch.Tensor], list[float], list[float]]:
        """Row losses of every subject, the norms of their gradients, mean losses of every class."""
        losses, gradients = [], []
        bank = PromptBank(model)  # its text encoder may be hardened as well
        moving = [p.requires_grad for p in model.unet.parameters()]
        parameters = list(model.unet.requires_grad_(True).parameters())
        for rows, prompt in zip(self.attacked, self.prompts, strict=True):
            asked = replace(rows, context=bank.encode([prompt]).expand(len(rows), -1, -1))
            errors = row_losses(model.unet, model.scheduler, asked)
            found = torch.autograd.grad(errors.mean(), parameters)
            gradients.append(float(torch.stack(torch._foreach_norm(found)).norm()))
            losses.append(errors.detach())
        for parameter, was in zip(parameters, moving, strict=True):
            parameter.requires_grad_(was)
        kept = []
        with torch.no_grad():
            for rows, noun in zip(self.kept, self.nouns, strict=True):
                asked = replace(rows, context=bank.encode([class_prompt(noun)]).expand(len(rows), -1, -1))
                kept.append(float(row_losses(model.unet, model.scheduler, asked).mean()))
        return losses, gradients, kept

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
            count, asked = self.spec.pictures, (*dict.fromkeys(self.prompts), *map(class_prompt, self.nouns))
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
