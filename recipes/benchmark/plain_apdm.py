"""APDM's training loop as its authors published it, for comparison: the same losses as `guardsmith.methods.apdm`, done plainly.

Every inner step encodes its pictures and prompts again, sends every row through the network on its own, copies the model anew
for every path, and does one forward whose result nothing uses. Gradients of the personalization are not cleared before the
protection's, so they leak into it (`leak: true` in guardsmith). Written after the description of the released code in the paper's
repository (hf.co/papers/2511.01307); what is drawn at random is drawn in the order in which guardsmith draws it, so that both
see the same rows.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.diffusion.prompts import class_prompt, instance_prompt
from guardsmith.methods.apdm import ApdmConfig
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator


class Plain:
    """One run; `step` takes an outer step and tells its losses."""

    def __init__(self, model: DiffusionModel, subject: SubjectData, config: ApdmConfig, seed: int) -> None:
        self.model, self.subject, self.config, self.seed = model, subject, config, seed
        self.reference = copy.deepcopy(model.unet)
        self.unet = copy.deepcopy(model.unet).requires_grad_(True)
        self.outer = torch.optim.AdamW(self.unet.parameters(), lr=config.learning_rate, weight_decay=1e-2)
        self.steps = int(model.scheduler.config.num_train_timesteps)

    def latents(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """One picture, picked at random, through the VAE."""
        picked = int(torch.randint(len(images), (1,), generator=rng))
        return self.encoded(images[picked : picked + 1], rng)

    def encoded(self, image: Tensor, rng: torch.Generator) -> Tensor:
        """A picture's latents, drawn from its posterior."""
        with torch.no_grad():
            mean, deviation = self.model.posterior(image)
        return mean + deviation * torch.randn(mean.shape, generator=rng)

    def said(self, prompt: str) -> Tensor:
        """The prompt's embedding."""
        tokenizer = self.model.tokenizer
        ids = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            context: Tensor = self.model.text_encoder(ids).last_hidden_state
        return context

    def errors(self, unet: Any, latents: Tensor, noise: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Squared errors of one row."""
        scheduler = self.model.scheduler
        noisy = scheduler.add_noise(latents, noise, timestep)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timestep)
        found: Tensor = (unet(noisy, timestep, context).sample - target).square()
        return found

    def step(self, j: int) -> list[dict[str, float]]:
        """Follow a path, add up the gradients, move the model once; the losses and the seconds of every inner step."""
        subject, config = self.subject, self.config
        noun, told = subject.class_noun, []
        began = time.perf_counter()
        path = copy.deepcopy(self.unet)
        inner = torch.optim.AdamW(path.parameters(), lr=config.personalization_learning_rate, weight_decay=1e-2)
        self.outer.zero_grad()
        for i in range(config.inner_steps):
            rng = generator(self.seed, j, i)
            inner.zero_grad()
            latents = self.latents(subject.images, rng)
            timestep = torch.randint(self.steps, (1,), generator=rng)
            noise = torch.randn(latents.shape, generator=rng)
            prior = self.latents(subject.class_images, rng)
            prior_noise = torch.randn(prior.shape, generator=rng)
            instance = self.errors(path, latents, noise, timestep, self.said(instance_prompt("sks", noun))).mean()
            kept = self.errors(path, prior, prior_noise, timestep, self.said(class_prompt(noun))).mean()
            personalization = instance + config.prior_weight * kept
            personalization.backward()
            inner.step()

            unused = generator(self.seed, j, i, 1)
            wasted = self.latents(subject.images, unused)
            self.errors(
                path,
                wasted,
                torch.randn(wasted.shape, generator=unused),
                timestep,
                self.said(instance_prompt("sks", noun)),
            )

            picked = int(torch.randint(len(subject.images), (1,), generator=rng))
            negative = self.encoded(subject.images[picked : picked + 1], rng)
            timestep = torch.randint(self.steps, (1,), generator=rng)
            noise = torch.randn(negative.shape, generator=rng)
            positive = self.encoded(subject.positives[picked : picked + 1], rng)
            prior = self.latents(subject.class_images, rng)
            prior_noise = torch.randn(prior.shape, generator=rng)
            context = self.said(instance_prompt("sks", noun))
            with torch.no_grad():
                before = [self.errors(self.reference, z, noise, timestep, context) for z in (positive, negative)]
            after = [self.errors(path, z, noise, timestep, context) for z in (positive, negative)]
            margin = (after[0] - before[0]) - (after[1] - before[1])
            dpo = -F.logsigmoid(-config.beta * margin).mean()
            kept = self.errors(path, prior, prior_noise, timestep, self.said(class_prompt(noun))).mean()
            (dpo + config.prior_weight * kept).backward()
            with torch.no_grad():
                for parameter, moved in zip(self.unet.parameters(), path.parameters(), strict=True):
                    parameter.grad = moved.grad.clone() if parameter.grad is None else parameter.grad + moved.grad
            told.append({"personalization": personalization.item(), "dpo": dpo.item(), "prior": kept.item()})
        self.outer.step()
        told[-1]["seconds"] = time.perf_counter() - began
        return told
