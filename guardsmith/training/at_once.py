"""Gradients that are applied as soon as they are there, and freed: there is never room taken for those of all weights.

A large network's gradients take as much memory as its weights. The backward pass gives them one after the other, so each weight
takes its step at once and its gradient goes (as in LOMO, Lv et al. 2023; hf.co/papers/2306.09782). The norm to which gradients
are clipped is that of all of them, which is known only when the last is there: so the factor is the previous step's, and in the
first step every gradient is clipped by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guardsmith.training.optimizers import eight_bits


class AtOnce:
    """Takes the gradients of parameters as a backward pass gives them.

    Args:
        parameters: whose gradients.
        apply: called with the number of a parameter, whose clipped gradient is in `grad` and is freed afterwards.
        max_norm: of the gradients of all parameters together.
        before: likewise, before the gradient counts and is clipped.

    Attributes:
        factor: what the next step's gradients are multiplied by, float32 (), changed in place; 0: not known yet.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        apply: Callable[[int], None],
        *,
        max_norm: float = 1.0,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.parameters, self.apply, self.before, self.max_norm = list(parameters), apply, before, max_norm
        self.factor, self.squares = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        for number, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._take, number))

    @torch.no_grad()
    def _take(self, number: int, parameter: Tensor) -> None:
        if self.before is not None:
            self.before(number)
        gradient = parameter.grad
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient)
        if torch.isfinite(norm):  # in float16 one may overflow; then its weight stays where it is
            gradient *= self.factor if self.factor > 0 else (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            self.apply(number)
        self.squares += norm.double().cpu() ** 2
        parameter.grad = None

    def end(self, others: Tensor | None = None) -> Tensor:
        """End a step: the norm of its gradients, and of others that were not taken at once, from which the next factor follows.

        Args:
            others: norm of those, ().
        """
        squares = self.squares if others is None else self.squares + others.double().cpu() ** 2
        norm = squares.sqrt().float()
        if torch.isfinite(norm):
            self.factor.copy_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.squares.zero_()
        return norm


class AdamWAtOnce(torch.optim.Optimizer):
    """AdamW with moments of 8 bits, whose `step` only ends what the backward pass has done.

    Args:
        parameters: to train.
        learning_rate: the rate.
        weight_decay: the weight decay.
        max_norm: see `AtOnce`.

    Raises:
        UserError: bitsandbytes is not installed.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float = 1e-2,
        max_norm: float = 1.0,
    ) -> None:
        super().__init__(list(parameters), {"lr": learning_rate})
        kind = eight_bits()
        self.each = [kind([parameter], lr=learning_rate, weight_decay=weight_decay) for parameter in parameters]
        self.taken = AtOnce(parameters, self._apply, max_norm=max_norm)

    def _apply(self, number: int) -> None:
        self.each[number].step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """End a step."""
        self.taken.end()


class Blocks:
    """Numbers in 8 bits: blocks of 256 share a scale.

    Args:
        values: float32, any shape.

    Attributes:
        codes: int8 (blocks, 256).
        scales: float32 (blocks, 1).
    """

    SIZE = 256

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, shape: torch.Size) -> Blocks:
        """Those with these codes and scales, of values of this shape."""
        blocks = cls(torch.zeros(0))
        blocks.codes, blocks.scales, blocks.shape = codes, scales, shape
        return blocks

    def __init__(self, values: Tensor) -> None:
        self.shape = values.shape
        flat = values.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % self.SIZE)).view(-1, self.SIZE)
        self.scales = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.codes = (blocks / self.scales).round_().to(torch.int8)

    def values(self) -> Tensor:
        """The numbers again, float32."""
        count = self.shape.numel()
        return (self.codes * self.scales).flatten()[:count].view(self.shape)
