"""IMMA, immunizing text-to-image models against malicious adaptation (Zheng & Yeh, ECCV 2024; hf.co/papers/2311.18815).

Weights from which an adapter learns badly:

    max over theta_S  of  L_A(X_p; theta, phi*)      phi* = argmin over phi of L_A(X_p; theta, phi)

by turns, without unrolling: `inner_steps` steps that lower the attacker's loss over the adapter phi, then `outer_steps`
steps that raise it over theta_S, the attention weights. The adapter goes on through the whole run. It is LoRA, or a new
word for every subject (textual inversion), or with DreamBooth the whole U-Net: there theta_S is a part of phi, moved by
both, and only theta_S is released (as in the code that comes with the paper). About a hundredth of APDM's cost.

The objective has no upper end and says nothing about anyone else. `distillation_weight` adds what the paper lacks: the
released weights, without the adapter, are held to the base on class pictures and benign pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from guardsmith.attacks.lora import TARGETS, adapter_parameters, add_adapters
from guardsmith.attacks.textual_inversion import add_words, with_embedding
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import NoisedSamples, join, noise_samples, predict, row_losses
from guardsmith.diffusion.prompts import INVERSION_TEMPLATES, PromptBank, class_prompt, instance_prompt
from guardsmith.methods.base import HardeningContext, HardeningMethod, HardeningResult, MemoryFootprint, MethodConfig
from guardsmith.methods.data import SubjectData
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet
from guardsmith.runtime.device import outputs_stay
from guardsmith.training.loop import generator, optimizer_step


class ImmaConfig(MethodConfig):
    """Parameters. Defaults are those of the released code for LoRA."""

    adapter: Literal["lora", "textual_inversion", "dreambooth"] = "lora"
    """What the simulated attacker trains."""
    rank: int = Field(4, gt=0)
    """Rank of the adapters (`lora`)."""
    steps: int = Field(1000, gt=0)
    """Steps of both kinds together."""
    inner_steps: int = Field(1, gt=0)
    """Steps of the adapter before every turn of theta."""
    outer_steps: int = Field(1, gt=0)
    """Steps of theta before every turn of the adapter."""
    batch_size: int = Field(1, gt=0)
    """Rows of the subject per step."""
    learning_rate: float = Field(1e-5, gt=0)
    """AdamW's rate on theta."""
    adapter_learning_rate: float = Field(1e-4, gt=0)
    """AdamW's rate on the adapter."""
    parameters: Literal["attention", "cross_attention"] = "attention"
    """theta_S: the projections of all attention layers (the code), or of those that read the prompt (the paper's words)."""
    identifiers: tuple[str, ...] = Field(("sks",), min_length=1)
    """Identifiers of the adaptation prompt, one drawn per step; the subject's own are added (a new word has none)."""
    distillation_weight: float = Field(0.0, ge=0)
    """Weight of || e_theta - e_base ||^2 on class pictures and benign pictures, in theta's steps (0: the paper)."""

    @model_validator(mode="after")
    def _theta_moves(self) -> Self:
        if self.steps <= self.inner_steps:
            raise ValueError(
                f"steps ({self.steps}) has to be more than inner_steps ({self.inner_steps}): the first ones move the adapter "
                "only, and the model would stay as it is"
            )
        return self


def immunized_names(unet: Any, which: str) -> list[str]:
    """Names of the parameters of theta_S in a U-Net without adapters, `which` of `ImmaConfig.parameters`."""
    block = {"attention": "attn", "cross_attention": "attn2"}[which]
    return [n for n, _ in unet.named_parameters() if block in n and any(f".{target}." in n for target in TARGETS)]


class Words:
    """Textual inversion as the adapter: a new word for every subject, which starts from its class noun.

    Attributes:
        vectors: the words' embeddings.
    """

    def __init__(self, model: DiffusionModel, subjects: Sequence[SubjectData]) -> None:
        self.model = copy.copy(model)
        words = {f"<subject-{i}>": subject.class_noun for i, subject in enumerate(subjects)}
        self.tokens = add_words(self.model, words)
        embedding = self.model.text_encoder.get_input_embeddings()
        self.vectors = torch.nn.ParameterList(embedding.weight[token].clone() for token in self.tokens)
        bank = PromptBank(self.model)
        self.prompts = [bank.tokens([template.format(word) for template in INVERSION_TEMPLATES]) for word in words]

    def contexts(self, which: int, count: int, rng: torch.Generator) -> Tensor:
        """Embeddings of prompts about a subject, (count, tokens, width), with a gradient to its word."""
        picked = self.prompts[which][torch.randint(len(self.prompts[which]), (count,), generator=rng)]
        with with_embedding(self.model, self.tokens[which], self.vectors[which]), outputs_stay():
            contexts: Tensor = self.model.text_encoder(picked).last_hidden_state
        return contexts


class Imma(HardeningMethod[ImmaConfig]):
    """IMMA, see the module."""

    name = "imma"
    title = "IMMA, immunizing text-to-image models against malicious adaptation"
    paper = "hf.co/papers/2311.18815"
    shown = "does not protect on the embedded base; not run on a real base yet"
    config = ImmaConfig

    def steps(self, config: ImmaConfig) -> int:
        """Steps of both kinds together."""
        return config.steps

    def cost(self, config: ImmaConfig, class_nouns: Sequence[str]) -> int:
        """The same for any number of subjects, which take turns."""
        turn = config.inner_steps + config.outer_steps
        raising = sum(step % turn >= config.inner_steps for step in range(config.steps))
        distillation = 2 * 4 * raising if config.distillation_weight else 0
        return config.batch_size * (3 * config.steps + distillation)

    def memory(self, config: ImmaConfig, unet: Any) -> MemoryFootprint:
        """Gradients and AdamW of the released weights and of the adapter (a new word is nothing beside them)."""
        released = immunized_names(unet, config.parameters)
        numbers = sum(unet.get_parameter(name).numel() for name in released)
        if config.adapter == "dreambooth":
            numbers += sum(parameter.numel() for parameter in unet.parameters())
        elif config.adapter == "lora":
            numbers += adapter_parameters(unet, config.rank)
        rows = 2 * config.batch_size if config.distillation_weight else config.batch_size
        return MemoryFootprint(numbers, 2 * numbers, rows)

    def trains_text_encoder(self, config: ImmaConfig) -> bool:
        """Where the simulated attacker learns new words."""
        return config.adapter == "textual_inversion"

    def run(self, context: HardeningContext[ImmaConfig]) -> HardeningResult:
        """Harden a copy of the model. In the history, `adaptation` is the attacker's loss, and `raising` whether theta moved.

        Raises:
            RunFailed: the training diverged; the last checkpoint is the last good state.
        """
        if self.needs_benign(context.config) and context.benign is None:
            raise ValueError("distillation needs benign pictures")
        return _Training(context).run()


class _Training:
    """The networks, optimizers and latents of one run.

    `work` is the U-Net with the adapter, theta its parameters that are released, and `released` a U-Net without the adapter that
    shares theta with it.
    """

    def __init__(self, context: HardeningContext[ImmaConfig]) -> None:
        self.context, self.config = context, context.config
        config, model = context.config, context.model
        self.scheduler, self.timesteps = model.scheduler, int(model.scheduler.config.num_train_timesteps)
        self.work: Any = with_own_unet(model).unet
        self._choose_parameters()
        self.descent = context.adamw(self.adapter, lr=config.adapter_learning_rate)
        self.ascent = context.adamw(list(self.theta.values()), lr=config.learning_rate)
        self.descent_scale, self.ascent_scale = context.loss_scale(), context.loss_scale()

        self.bank = PromptBank(model)
        self.latents = [encode(model, subject.images) for subject in context.subjects]
        self.contexts = [
            self.bank.encode(
                [instance_prompt(n, s.class_noun) for n in dict.fromkeys((*config.identifiers, *s.identifiers))]
            )
            for s in context.subjects
        ]
        self.distilled = None
        if config.distillation_weight and context.benign is not None:
            classes = {s.class_noun: s.class_images for s in context.subjects}
            class_latents = {noun: encode(model, images) for noun, images in classes.items()}
            benign = context.benign
            self.distilled = (class_latents, encode(model, benign.images), self.bank.encode(benign.prompts))
            self.bank.encode([class_prompt(noun) for noun in classes])  # now, and not in the steps

        self.released = copy.deepcopy(model.unet, {id(p): p for p in model.unet.parameters()})
        for name, parameter in self.theta.items():
            place, _, leaf = name.rpartition(".")
            setattr(self.released.get_submodule(place), leaf, parameter)

    def _choose_parameters(self) -> None:
        config, work = self.config, self.work
        names = immunized_names(self.context.model.unet, config.parameters)
        if config.adapter == "lora":
            self.adapter = add_adapters(work, config.rank, self.context.seed)
            places = {
                name: name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
                for name in names
            }
        else:
            self.adapter = list(work.requires_grad_(config.adapter == "dreambooth").parameters())
            places = {name: name for name in names}
        self.theta = {name: work.get_parameter(place).requires_grad_(True) for name, place in places.items()}
        self.words = None
        if config.adapter == "textual_inversion":
            self.words = Words(self.context.model, self.context.subjects)
            self.adapter = list(self.words.vectors.parameters())
        self.parameters = [*work.parameters(), *self.adapter]

    def released_model(self) -> DiffusionModel:
        """The base with theta in the place of its own weights."""
        own = with_own_unet(self.context.model)
        with torch.no_grad():
            for name, value in self.theta.items():
                own.unet.get_parameter(name).copy_(value)
        return own

    def run(self) -> HardeningResult:
        """All steps."""
        config = self.config
        loop = self.context.training_loop(
            "IMMA", config.steps,
            modules={"unet": self.work} | ({} if self.words is None else {"words": self.words.vectors}),
            optimizers={"descent": self.descent, "ascent": self.ascent}, released=self.released_model,
            scales=[self.descent_scale, self.ascent_scale],
        )  # fmt: skip
        turn = config.inner_steps + config.outer_steps
        for j in loop:
            rng = generator(self.context.seed, j)
            subject, raising = j // turn % len(self.context.subjects), j % turn >= config.inner_steps
            adaptation = row_losses(self.work, self.scheduler, self._subject_rows(subject, rng)).mean()
            losses = {"adaptation": adaptation.item(), "raising": float(raising)}
            if raising:
                self.ascent_scale.up(-adaptation).backward()
                self._distill(subject, rng, losses)
                losses["gradient_norm"] = optimizer_step(
                    self.ascent, list(self.theta.values()), max_grad_norm=1.0, scale=self.ascent_scale
                )
            else:
                self.descent_scale.up(adaptation).backward()
                losses["gradient_norm"] = optimizer_step(
                    self.descent, self.adapter, max_grad_norm=1.0, scale=self.descent_scale
                )
            for parameter in self.parameters:
                parameter.grad = None
            loop.finish_step(j, losses)
        return HardeningResult(self.released_model(), loop.history)

    def _subject_rows(self, subject: int, rng: torch.Generator) -> NoisedSamples:
        """Rows of a subject's pictures under prompts with an identifier, or with its word."""
        count, contexts = self.config.batch_size, self.contexts[subject]
        if self.words is not None:
            context = self.words.contexts(subject, count, rng)
        else:
            context = contexts[torch.randint(len(contexts), (count,), generator=rng)]
        return noise_samples(self.latents[subject].draw(count, rng), context, rng, steps=self.timesteps)

    def _distill(self, subject: int, rng: torch.Generator, losses: dict[str, float]) -> None:
        """Add the gradients of the distillation term, which holds the released weights to the base."""
        if self.distilled is None:
            return
        (class_latents, latents, prompts), count = self.distilled, self.config.batch_size
        noun = self.context.subjects[subject].class_noun
        picked = torch.randint(len(latents), (count,), generator=rng)
        class_context = self.bank.encode([class_prompt(noun)])
        rows = join(
            noise_samples(class_latents[noun].draw(count, rng), class_context, rng, steps=self.timesteps),
            noise_samples(latents.sample(picked, rng), prompts[picked], rng, steps=self.timesteps),
        )
        with torch.no_grad():
            teacher = predict(self.context.model.unet, self.scheduler, rows)
        distance = (predict(self.released, self.scheduler, rows) - teacher).square().mean()
        self.ascent_scale.up(self.config.distillation_weight * distance).backward()
        losses["distillation"] = distance.item()
