"""Live probes: is protection forming while a method trains?

Now and then the model is measured as it would be released: where an attacker's training on the subject's pictures would
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
from guardsmith.core.seeds import PROBE
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import HARDENING_IDENTIFIERS, PromptBank, class_prompt, instance_prompt
from guardsmith.diffusion.sampling import generate, grid
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.models.narrowed import is_narrow
from guardsmith.training.loop import generator

ROWS = 16  # of every subject and of every class


class Probes:
    """Measures the model a few times during a hardening; `training.loop.TrainingLoop` calls it after every step.

    Each time, as ratios to the base: `subject_loss`, the median over an attacker's first rows (the subject for which it is
    lowest, or highest where a method means to lower it), `subject_gradient`, the size of their gradient, and `class_loss` on
    class pictures, the highest of all classes.

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
        self.subjects = [(instance_prompt(HARDENING_IDENTIFIERS[0], s.class_noun), s.images) for s in subjects]
        self.classes = [
            (class_prompt(noun), images) for noun, images in {s.class_noun: s.class_images for s in subjects}.items()
        ]

    def _losses(self, model: DiffusionModel, prompt: str, images: torch.Tensor, stream: int) -> torch.Tensor:
        """Losses of fixed rows of these pictures, float32 (16,)."""
        rng = generator(self.seed, -10, stream)
        indices = torch.randint(len(images), (ROWS,), generator=rng)
        latents = encode(self.model, images[indices]).sample(torch.arange(ROWS), rng)
        # Evenly spread over the schedule; the middle of every sixteenth.
        times = (torch.arange(ROWS) * 2 + 1) * int(model.scheduler.config.num_train_timesteps) // (2 * ROWS)
        context = PromptBank(model).encode([prompt])  # its text encoder may be hardened as well
        return row_losses(model.unet, model.scheduler, noise_samples(latents, context, rng, timesteps=times))

    def _look(self, model: DiffusionModel) -> tuple[list[torch.Tensor], list[float], list[float]]:
        """Row losses of every subject, the norms of their gradients, mean losses of every class."""
        losses, gradients = [], []
        moving = [p.requires_grad for p in model.unet.parameters()]
        parameters = list(model.unet.requires_grad_(True).parameters())
        for i, (prompt, images) in enumerate(self.subjects):
            errors = self._losses(model, prompt, images, i)
            gradient = torch.autograd.grad(errors.mean(), parameters)
            gradients.append(float(torch.stack(torch._foreach_norm(gradient)).norm()))
            losses.append(errors.detach())
        for parameter, was in zip(parameters, moving, strict=True):
            parameter.requires_grad_(was)
        with torch.no_grad():
            class_losses = [float(self._losses(model, *each, -1 - i).mean()) for i, each in enumerate(self.classes)]
        return losses, gradients, class_losses

    @cached_property
    def before(self) -> tuple[list[torch.Tensor], list[float], list[float]]:
        """The same of the base, measured at the first probe."""
        model = with_own_unet(self.model) if is_narrow(self.model.unet) else self.model  # gradients are float32
        return self._look(model)

    def measure(self, model: DiffusionModel) -> dict[str, float]:
        """The numbers of one probe."""
        losses, gradients, class_losses = self._look(model)
        changes = [float((now / before).median()) for now, before in zip(losses, self.before[0], strict=True)]
        lowering = self.spec.stop_at is not None and self.spec.stop_at < 1
        return {
            "subject_loss": (max if lowering else min)(changes),
            "subject_gradient": min(now / before for now, before in zip(gradients, self.before[1], strict=True)),
            "class_loss": max(now / before for now, before in zip(class_losses, self.before[2], strict=True)),
        }

    def class_loss(self, model: DiffusionModel) -> float | None:
        """The loss on class pictures over the base's, of the class for which it is highest; `None` where it is not finite."""
        with torch.no_grad():
            ratios = [
                float(self._losses(model, *each, -1 - i).mean()) / float(self._losses(self.model, *each, -1 - i).mean())
                for i, each in enumerate(self.classes)
            ]
        highest = max(ratios, key=lambda ratio: ratio if math.isfinite(ratio) else math.inf)
        return highest if math.isfinite(highest) else None

    def target_met(self, measured: dict[str, float]) -> bool:
        """Whether the recipe's target is met."""
        target = self.spec.stop_at
        if target is None or not measured["class_loss"] <= self.spec.stop_class_loss:  # NaN is never enough
            return False
        return measured["subject_loss"] >= target if target >= 1 else measured["subject_loss"] <= target

    def __call__(self, step: int, released: Callable[[], Any]) -> bool:
        """Measure if it is time; true when the hardening may end."""
        if step + 1 not in self.due:
            return False
        model = released()
        measured = self.measure(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "probes.jsonl").open("a", encoding="utf-8") as lines:
            numbers = {key: value if math.isfinite(value) else None for key, value in measured.items()}
            lines.write(json.dumps({"step": step + 1, **numbers}) + "\n")
        if self.spec.pictures:
            count = self.spec.pictures
            prompts = [*dict.fromkeys(prompt for prompt, _ in (*self.subjects, *self.classes))]
            seeds = list(PROBE.seeds(count)) * len(prompts)
            samples = generate(model, [p for p in prompts for _ in range(count)], seeds, **self.sampling.model_dump())
            try:
                grid(samples, count, scale=2).save(self.folder / f"step-{step + 1:06d}.png")
            except RunFailed as error:  # a probe does not end a run; broken weights will
                console.print(f"probe at step {step + 1}: {error}", highlight=False, soft_wrap=True)
        end_now = self.target_met(measured)
        text = ", ".join(f"{key.replace('_', ' ')} x{value:.3g}" for key, value in measured.items())
        end = "; the target is met, the hardening ends here" if end_now else ""
        console.print(f"probe at step {step + 1}, against the base: {text}{end}", highlight=False, soft_wrap=True)
        return end_now

    def results(self) -> list[dict[str, float | None]]:
        """The numbers of all probes so far, of earlier sessions too; one that was taken again after a kill counts once."""
        file = self.folder / "probes.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        by_step = {result["step"]: result for result in map(json.loads, lines)}
        return [by_step[step] for step in sorted(by_step)]
