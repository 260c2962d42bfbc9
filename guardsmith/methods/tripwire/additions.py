"""What people add to a base: adapters, residuals of a control network, words. The trunk learns to answer them as the base does.

Predicting what the base predicts is not enough: what was made for the base's weights has to move the trunk as it moves the base.
So in a part of its distillation both carry the same addition, none of which is about a protected subject:

    adapter     low-rank, on the attention or on every layer, that is trained on the base for one picture of nobody in particular
                after the other; at every stage of its training
    residuals   what moves the skip connections of one picture towards those of another, as a ControlNet does, or the ends of the
                way down's blocks, as a T2I-Adapter does
    words       prompts with a token whose embedding is none of the tokenizer's (`odd_contexts`)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guardsmith.attacks.lora import EVERYWHERE, TARGETS
from guardsmith.attacks.textual_inversion import add_words, with_embedding
from guardsmith.diffusion.latents import LatentStore
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import generator

ROUND = 100
"""Steps for which an adapter is trained before the next one begins."""
RANKS = (2, 4, 8)
RATES = (5e-4, 3e-3)
ADAPTER_ROWS = 4


class Adapter:
    """A low-rank adapter, trained on the base for one picture of the store.

    It hangs on hooks and is not peft's (`attacks.lora.add_adapters`), which belongs to one network and renames its parameters:
    base and trunk share this one, and the trunk's names are those of its masks and of its checkpoint.

    Args:
        model: the base.
        latents: pictures of nobody in particular.
        contexts: of prompts, (n, tokens, width).
        seed: of everything drawn.
        number: which adapter; each has its own picture, prompt, rank, rate and layers.
    """

    def __init__(self, model: DiffusionModel, latents: LatentStore, contexts: Tensor, seed: int, number: int) -> None:
        rng = generator(seed, -5, number)
        self.model, self.latents, self.rng = model, latents, rng
        self.picture = torch.randint(len(latents), (1,), generator=rng)
        self.context = contexts[torch.randint(len(contexts), (1,), generator=rng)]
        rank = RANKS[int(torch.randint(len(RANKS), (), generator=rng))]
        low, high = RATES
        self.rate = low * (high / low) ** float(torch.rand((), generator=rng))
        everywhere = bool(torch.rand((), generator=rng) < 0.4)
        if everywhere:
            self.rate *= 0.5
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in model.unet.named_modules():
            if name.endswith(EVERYWHERE if everywhere else TARGETS) and isinstance(layer, (nn.Linear, nn.Conv2d)):
                down = torch.randn((rank, *layer.weight.shape[1:]), generator=rng) / rank
                up = torch.zeros((len(layer.weight), rank, *[1] * (layer.weight.ndim - 2)))
                self.factors[name] = (
                    down.to(layer.weight.device).requires_grad_(),
                    up.to(layer.weight.device).requires_grad_(),
                )
        every = [factor for pair in self.factors.values() for factor in pair]
        self.optimizer = torch.optim.AdamW(every, self.rate)

    def train(self) -> None:
        """A step of DreamBooth with LoRA on the base."""
        latents = self.latents.sample(self.picture.expand(ADAPTER_ROWS), self.rng)
        with self.on(self.model.unet, learning=True), torch.enable_grad():
            rows = noise_samples(latents, self.context, self.rng)
            row_losses(self.model.unet, self.model.scheduler, rows).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def on(self, unet: Any, *, learning: bool = False) -> Iterator[None]:
        """Inside, a U-Net of the base's shape carries the adapter, to which gradients flow only while it is learning."""

        def add(factors: tuple[Tensor, Tensor], layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = ((factor if learning else factor.detach()).to(output.dtype) for factor in factors)
            if isinstance(layer, nn.Conv2d):
                assert isinstance(layer.padding, tuple)
                return output + F.conv2d(F.conv2d(inputs[0], down, None, layer.stride, layer.padding), up)
            return output + F.linear(F.linear(inputs[0], down), up)

        with ExitStack() as stack:
            for name, factors in self.factors.items():
                handle = unet.get_submodule(name).register_forward_hook(partial(add, factors))
                stack.callback(handle.remove)
            yield


def trainings(uses: int) -> int:
    """How many steps the adapters of a distillation are trained that uses them so many times."""
    last = max(0, uses - 1)
    return last - last // ROUND


class Adapters:
    """The adapters that follow each other during a distillation; after a resume they are where they were."""

    def __init__(self, model: DiffusionModel, latents: LatentStore, contexts: Tensor, seed: int) -> None:
        self.about = model, latents, contexts, seed
        self.step, self.current = 0, Adapter(*self.about, 0)

    def at(self, step: int) -> Adapter:
        """The adapter of a step of the distillation, trained as far as it is then; steps must not fall."""
        if step // ROUND != self.step // ROUND:
            self.current, self.step = Adapter(*self.about, step // ROUND), step // ROUND * ROUND
        while self.step < step:
            self.current.train()
            self.step += 1
        return self.current


@torch.no_grad()
def residuals(unet: Any, call: Sequence[Tensor], factors: Tensor, *, inside: bool) -> dict[str, Any]:
    """Arguments for a U-Net's call that move its features towards those of the row before.

    Args:
        unet: the base's.
        call: latents (n, c, h, w), timesteps (n,), contexts.
        factors: how far, of every row, (n, 1, 1, 1).
        inside: at the ends of the blocks on the way down (T2I-Adapter), not at the skip connections (ControlNet).
    """
    kept: list[Tensor] = []

    def of_block(_: Any, __: Any, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        kept.extend(output[1])

    def of_layer(_: Any, __: Any, output: Tensor) -> None:
        kept.append(output)

    with ExitStack() as stack:
        for module, hook in (
            (unet.conv_in, of_layer), *((block, of_block) for block in unet.down_blocks), (unet.mid_block, of_layer),
        ):  # fmt: skip
            stack.callback(module.register_forward_hook(hook).remove)
        latents, times, contexts = call
        unet(latents, times, contexts)
        own = list(kept)
        kept.clear()
        unet(latents.roll(1, 0), times, contexts.roll(1, 0))
    moves = [(other - mine) * factors.to(mine) for other, mine in zip(kept, own, strict=True)]
    if not inside:
        return {"down_block_additional_residuals": tuple(moves[:-1]), "mid_block_additional_residual": moves[-1]}
    ends, place = [], 0
    for block in unet.down_blocks:
        place += len(block.resnets)
        ends.append(moves[place])
        place += len(block.downsamplers or ())
    return {"down_intrablock_additional_residuals": ends}


@torch.no_grad()
def odd_contexts(model: DiffusionModel, prompts: Sequence[str], seed: int) -> Tensor:
    """Contexts of prompts with a word whose embedding is none of the tokenizer's, (n, tokens, width).

    Args:
        model: the base.
        prompts: `{}` is where the word stands.
        seed: of the embeddings: means of a few words', with noise of up to eight times their size, which is what
            those of textual inversion have.
    """
    word, own = "<odd>", copy.copy(model)
    (token,) = add_words(own, {word: "a"})
    table = model.text_encoder.get_input_embeddings().weight
    size, contexts = table.square().mean().sqrt(), []
    for number, prompt in enumerate(prompts):
        rng = generator(seed, -6, number)
        few = table[torch.randint(len(table), (3,), generator=rng)].mean(0)
        noise = torch.randn(few.shape, generator=rng).to(few) * size * 8 * torch.rand((), generator=rng)
        with with_embedding(own, token, few + noise):
            contexts.append(PromptBank(own).encode([prompt.format(word)]))
    return torch.cat(contexts)
