"""APDM, anti-personalized diffusion models (Kwon et al., NeurIPS 2025; hf.co/papers/2511.01307).

Learning to Protect (Algorithm 1): follow the path a DreamBooth attacker would take, and at every point of it collect the
gradient that would have spoilt the result; then move the model once by their sum.

    for j = 1 .. N_protect:
        theta' <- theta;  G <- 0
        for i = 1 .. N_per:
            theta' <- theta' - g_per grad L_per(theta')            L_per     = L_simple(X_p, c_v) + L_ppl
            G      <- G + grad_{theta'} L_protect(theta')          L_protect = L_DPO + L_ppl
        theta <- theta - g_protect G

L_DPO prefers a picture x+ that the base model drew of the class over the subject's picture x-, both under the identifier
prompt c_v (`losses.dpo_loss`); L_ppl keeps class pictures under the class prompt. First order: nothing is unrolled.

Differences from the paper are options that start switched off: several subjects (one per outer step, in turn), several
identifiers, a distillation term at theta, other pairs, mirrored pictures, a path of adapters (LoRA), a text encoder that is
hardened too (the paper has a switch for it whose code does nothing). `leak=True` adds the personalization gradients to G, as the
released code does by never clearing them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guardsmith.attacks.lora import adapter_parameters, add_adapters
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import NoisedSamples, noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods.apdm.config import ApdmConfig
from guardsmith.methods.apdm.losses import (
    draw_step,
    personalization_loss,
    prepare_subject,
    protection_loss,
    reference_errors,
)
from guardsmith.methods.apdm.overlap import SecondThread
from guardsmith.methods.base import (
    HardeningContext,
    HardeningMethod,
    HardeningResult,
    MemoryFootprint,
    Preparation,
    Prepared,
)
from guardsmith.models.checkpoint import with_own_unet
from guardsmith.runtime.device import CPU, chosen_device, outputs_stay
from guardsmith.runtime.distributed import world_size
from guardsmith.training.loop import Snapshot, add_gradients, generator, optimizer_step, reset_optimizer


def hardened_parameters(unet: Any, which: str) -> list[torch.nn.Parameter]:
    """The weights of a U-Net that may change for good, `which` of `ApdmConfig.parameters`."""
    keys = {"unet": "", "attention": "attn", "cross_attention": "attn2"}[which]
    return [p for name, p in unet.named_parameters() if keys in name]


class Apdm(HardeningMethod[ApdmConfig]):
    """APDM, see the module."""

    name = "apdm"
    title = "APDM, anti-personalized diffusion models"
    paper = "hf.co/papers/2511.01307"
    shown = "does not protect on the embedded base; not run on a real base yet, where the paper reports that it does"
    config = ApdmConfig
    checkpoint_every = 10

    def steps(self, config: ApdmConfig) -> int:
        """Outer steps."""
        return config.outer_steps

    def cost(self, config: ApdmConfig, class_nouns: Sequence[str]) -> int:
        """The same for any number of subjects, which take turns: per inner step 5 rows with gradients and 2 without."""
        rows = 3 * (2 + 3) + 2
        benign = 4 * (3 + 1) if config.distillation_weight else 0
        return config.outer_steps * config.batch_size * (config.inner_steps * rows + benign)

    def memory(self, config: ApdmConfig, unet: Any) -> MemoryFootprint:
        """Gradients, AdamW and start of the path; summed gradients and AdamW of the hardened weights; a second thread's copy."""
        hardened = sum(parameter.numel() for parameter in hardened_parameters(unet, config.parameters))
        path = sum(parameter.numel() for parameter in unet.parameters())
        if config.path == "lora":
            path = adapter_parameters(unet, config.path_rank)
        rows = (4 if config.distillation_weight else 3) * config.batch_size
        numbers = 2 * path + hardened
        if config.overlap:
            numbers, rows = numbers + path + (hardened if config.leak else 0), 5 * config.batch_size
        return MemoryFootprint(numbers, 2 * path + 2 * hardened, rows)

    def trains_text_encoder(self, config: ApdmConfig) -> bool:
        """Where the parameters say so."""
        return config.train_text_encoder

    def prepare(self, preparation: Preparation[ApdmConfig]) -> Prepared:
        """Draw the x+ where they have a prompt of their own."""
        template = preparation.config.positive_prompt
        if template is None:
            return Prepared(preparation.subjects, preparation.benign)
        subjects = [
            replace(subject, instead_images=preparation.draw(template.format(class_noun=subject.class_noun)))
            for subject in preparation.subjects
        ]
        return Prepared(subjects, preparation.benign)

    def run(self, context: HardeningContext[ApdmConfig]) -> HardeningResult:
        """Harden a copy of the model; the base is the frozen reference phi.

        Raises:
            RunFailed: the training diverged; the last checkpoint is the last good state.
        """
        if self.needs_benign(context.config) and context.benign is None:
            raise ValueError("distillation needs benign pictures")
        return _Training(context).run()


@contextmanager
def _at_work(network: Any, offload: bool) -> Iterator[Any]:
    """Inside, a network that is kept in the machine's memory is where networks run."""
    if offload:
        network.to(chosen_device())
    yield network
    if offload:
        network.to(CPU)


def _at_once(task: Callable[[], None]) -> None:
    task()


class _Training:
    """The networks, optimizers and latents of one run.

    `theta` is what is released, `path` the network that follows the attacker: theta itself, which is restored after every path,
    or one that shares its weights and has adapters on them.
    """

    def __init__(self, context: HardeningContext[ApdmConfig]) -> None:
        config, model = context.config, context.model
        self.context, self.config = context, config
        self.reference, self.scheduler = model.unet, model.scheduler
        self.timesteps = int(model.scheduler.config.num_train_timesteps)
        self.own = with_own_unet(model)
        theta = self.own.unet.requires_grad_(True)
        if config.offload_reference:
            self.reference.to(CPU)
        self.trained = {"unet": theta}
        if config.train_text_encoder:
            self.own.text_encoder = copy.deepcopy(model.text_encoder).requires_grad_(True)
            self.trained["text_encoder"] = self.own.text_encoder
        self.bank = PromptBank(model)
        self.subjects = [prepare_subject(model, self.bank, subject, config) for subject in context.subjects]
        self.benign = None
        if config.distillation_weight and context.benign is not None:
            self.benign = encode(model, context.benign.images), context.benign.prompts
            self.bank.encode(context.benign.prompts)  # now, and not in the steps
        self._choose_parameters(theta)
        self.path_optimizer = context.adamw(self.path_parameters, lr=config.personalization_learning_rate)
        self.optimizer = context.adamw(self.hardened, lr=config.learning_rate)
        self.path_scale, self.scale = context.loss_scale(), context.loss_scale()
        self.snapshot = Snapshot(self.path_parameters)

    def _choose_parameters(self, theta: Any) -> None:
        config = self.config
        self.path, self.path_parameters = theta, [p for part in self.trained.values() for p in part.parameters()]
        self.hardened = hardened_parameters(theta, config.parameters)
        if config.train_text_encoder:
            self.hardened += list(self.own.text_encoder.parameters())
        if config.path == "lora":
            self.path = copy.deepcopy(theta, {id(parameter): parameter for parameter in theta.parameters()})
            self.path_parameters = add_adapters(self.path, config.path_rank, self.context.seed)
            theta.requires_grad_(True)
        # Where the gradients of the protection loss are taken.
        self.thread = None
        self.protected, self.protected_parameters = self.path, self.hardened
        if config.overlap and world_size() == 1:
            self.thread = SecondThread(self.path, self.path_parameters, self.hardened)
            self.protected, self.protected_parameters = self.thread.network, self.thread.differentiated

    def run(self) -> HardeningResult:
        """All steps."""
        loop = self.context.training_loop(
            "APDM", self.config.outer_steps, modules=self.trained, optimizers={"optimizer": self.optimizer},
            released=lambda: self.own, scales=[self.path_scale, self.scale],
        )  # fmt: skip
        self.snapshot.take()
        for j in loop:
            losses: dict[str, float] = {}
            gradients = self._follow_path(j, losses)
            self.snapshot.restore()
            self._distill(j, gradients, losses)
            for parameter, gradient in zip(self.hardened, gradients, strict=True):
                parameter.grad = gradient
            losses["gradient_norm"] = optimizer_step(
                self.optimizer, self.hardened, max_grad_norm=self.config.max_grad_norm, scale=self.scale
            )
            # Infinite also where only a sum overflows.
            norms = torch.stack(torch._foreach_norm([p.detach() for p in self.hardened]))
            self.snapshot.take()
            loop.finish_step(j, losses, finite_weights=bool(torch.isfinite(norms).all()))
        for module in self.trained.values():
            module.requires_grad_(False)
        if self.config.offload_reference:
            self.reference.to(chosen_device())
        return HardeningResult(self.own, loop.history)

    def _follow_path(self, j: int, losses: dict[str, float]) -> list[Tensor]:
        """Personalize from theta on; returns the sum of the protection gradients on the way, for each hardened weight."""
        config, subject = self.config, self.subjects[j % len(self.subjects)]
        reset_optimizer(self.path_optimizer)
        gradients = [torch.zeros_like(p) for p in self.hardened]
        # With a second thread, sums of their own, so that neither waits for the other.
        leaked = [torch.zeros_like(p) for p in self.hardened] if self.thread and config.leak else gradients
        rng = generator(self.context.seed, j)
        name = int(torch.randint(len(subject.instance), (1,), generator=rng))
        tokens, prompt = subject.instance_tokens[name : name + 1], subject.instance[name : name + 1]
        steps = [
            draw_step(subject, prompt, config, generator(self.context.seed, j, i), self.timesteps)
            for i in range(config.inner_steps)
        ]
        with _at_work(self.reference, config.offload_reference):
            errors = reference_errors(self.context.model, [pairs for _, _, pairs, _ in steps])
        with self.thread.running() if self.thread else nullcontext(_at_once) as submit:
            for i, (instance, prior, pairs, protection_prior) in enumerate(steps):
                rows = self._embed(instance, tokens), self._embed(prior, subject.class_tokens)
                loss = personalization_loss(self.path, self.scheduler, *rows, config.prior_weight)
                self.path_scale.up(loss).backward(inputs=self.path_parameters)
                if i == 0:
                    losses["personalization"] = loss.item()
                if config.leak:
                    found = [p.grad for p in self.hardened if p.grad is not None]
                    torch._foreach_add_(leaked, found, alpha=self.scale.value / self.path_scale.value)
                optimizer_step(self.path_optimizer, self.path_parameters, max_grad_norm=None, scale=self.path_scale)
                rows = self._embed(pairs, tokens), self._embed(protection_prior, subject.class_tokens)
                submit(partial(self._add_protection, gradients, losses, *rows, errors[i]))
        if leaked is not gradients:
            torch._foreach_add_(gradients, leaked)
        return gradients

    def _add_protection(
        self,
        gradients: list[Tensor],
        losses: dict[str, float],
        pairs: NoisedSamples,
        prior: NoisedSamples,
        reference: Tensor,
    ) -> None:
        """Add the gradients of L_protect where the path has come to, and its terms to the means of this path."""
        loss, terms = protection_loss(self.protected, self.scheduler, pairs, prior, reference, self.config)
        add_gradients(self.scale.up(loss), self.protected_parameters, gradients)
        for key, value in terms.items():
            losses[key] = losses.get(key, 0.0) + value / self.config.inner_steps

    def _distill(self, j: int, gradients: list[Tensor], losses: dict[str, float]) -> None:
        """Add the gradients of the distillation term at theta, as often as those of the other terms."""
        if self.benign is None:
            return
        config, (latents, prompts) = self.config, self.benign
        rng = generator(self.context.seed, j, -1)
        picked = torch.randint(len(latents), (4 * config.batch_size,), generator=rng)
        texts = [prompts[index] for index in picked.tolist()]
        rows = noise_samples(latents.sample(picked, rng), self.bank.encode(texts), rng, steps=self.timesteps)
        with torch.no_grad(), _at_work(self.reference, config.offload_reference):
            teacher = predict(self.reference, self.scheduler, rows)
        student = predict(self.own.unet, self.scheduler, self._embed(rows, self.bank.tokens(texts)))
        distance = (student - teacher).square().mean()
        loss = config.distillation_weight * config.inner_steps * distance
        add_gradients(self.scale.up(loss), self.hardened, gradients)
        losses["distillation"] = distance.item()

    def _embed(self, rows: NoisedSamples, tokens: Tensor) -> NoisedSamples:
        """The rows with their prompts as the text encoder has them now, if it is trained."""
        if not self.config.train_text_encoder:
            return rows
        with outputs_stay():
            context = self.own.text_encoder(tokens).last_hidden_state
        return replace(rows, context=context.expand(len(rows), -1, -1))
