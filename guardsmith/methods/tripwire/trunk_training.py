"""How a trunk's weights move: Muon takes its large matrices, AdamW everything else, and neither what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardsmith.methods.tripwire.layout import Masks
from guardsmith.training.at_once import AtOnce, Blocks
from guardsmith.training.loop import (
    load_checkpoint,
    load_module_tensors,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from guardsmith.training.scaling import LossScale

CLOSENESS = 3.0  # times the rate: the share of its distance to the base by which a weight returns in a step


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains a parameter of the U-Net, of which it keeps one moment; AdamW trains the others and keeps two."""
    return parameter.ndim >= 2 and min(parameter.shape[:2]) >= 32 and not name.startswith("time_")


class TrunkTraining:
    """A trunk in training: Muon moves its large matrices, AdamW everything else, and neither what was cut.

    Args:
        unet: the trunk, whose parameters are changed.
        base: the base's U-Net, to whose weights the trunk's are drawn.
        masks: which of their entries are the trunk's (`layout.reserve`).
        learning_rate: its peak.
        steps: of the whole training.
    """

    def __init__(self, unet: Any, base: Any, masks: Masks, learning_rate: float, steps: int) -> None:
        self.unet, self.masks, self.learning_rate, self.steps = unet, masks, learning_rate, steps
        self.named = dict(unet.requires_grad_(True).named_parameters())
        self.base = {name: weight.detach() for name, weight in base.named_parameters()}
        self.matrices = [p for n, p in self.named.items() if is_matrix(n, p)]
        self.views = [torch.nn.Parameter(p.data.view(len(p), -1)) for p in self.matrices]
        rest = [p for n, p in self.named.items() if not is_matrix(n, p)]
        self.muon = torch.optim.Muon(
            self.views, learning_rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
        self.scale = LossScale(enabled=unet.precision == torch.float16)

    def step(self, step: int, loss: Tensor) -> None:
        """Move the trunk by the gradient of a loss; where it overflows in float16, nothing moves."""
        self._set_rate(step)
        self.scale.up(loss).backward()
        norm = torch.nn.utils.get_total_norm(self._gradients(self.named))
        if self.scale.takes(float(norm)):
            torch.nn.utils.clip_grads_with_norm_(self.unet.parameters(), 1.0, norm)
            for matrix, view in zip(self.matrices, self.views, strict=True):
                view.grad = None if matrix.grad is None else matrix.grad.reshape(view.shape)
            self.adamw.step()
            self.muon.step()
            self._approach(list(self.named))
        self.muon.zero_grad(set_to_none=True)
        for parameter in self.named.values():
            parameter.grad = None

    def _set_rate(self, step: int) -> None:
        for group in (*self.adamw.param_groups, *self.muon.param_groups):
            group["lr"] = self.learning_rate * min(1.0, (step + 1) / 20, 1.5 * (1 - step / self.steps))

    def _gradients(self, named: dict[str, torch.nn.Parameter]) -> list[Tensor]:
        """The gradients of parameters, no longer scaled, and zero where something was cut."""
        self.scale.down(parameter.grad for parameter in named.values())
        for name in self.masks.keys() & named.keys():
            gradient = named[name].grad
            if gradient is not None:
                gradient *= self.masks[name]
        return [parameter.grad for parameter in named.values() if parameter.grad is not None]

    @torch.no_grad()
    def _approach(self, names: Sequence[str]) -> None:
        """Move the trunk's weights towards the base's, a little: the closer they are, the better fits what was made for it."""
        share = CLOSENESS * float(self.adamw.param_groups[0]["lr"])
        for name in names:
            weight = self.named[name]
            away = self.base[name] - weight
            weight.add_(away * self.masks[name] if name in self.masks else away, alpha=share)

    def save(self, file: Path, step: int) -> None:
        """Write everything that `load` needs to go on after so many steps."""
        tensors = module_tensors(self.unet, "unet") | {"scale": self.scale.state}
        save_checkpoint(file, tensors | self._state(), {"step": step})

    def _state(self) -> dict[str, Tensor]:
        """What the optimizers keep."""
        return optimizer_tensors(self.adamw) | optimizer_tensors(self.muon, "muon")

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on with what `_state` gave."""
        load_optimizer_tensors(self.adamw, tensors)
        load_optimizer_tensors(self.muon, tensors, "muon")

    @torch.no_grad()
    def load(self, file: Path) -> int:
        """Go on from what `save` wrote; returns how many steps were taken."""
        tensors, record = load_checkpoint(file)
        load_module_tensors(self.unet, tensors, "unet")
        self._restore(tensors)
        if "scale" in tensors:
            self.scale.state.copy_(tensors["scale"])
        return int(record["step"])


class LeanTraining(TrunkTraining):
    """The same with little memory: a matrix takes its step as soon as its gradient is there, and its momentum has 8 bits.

    What AdamW trains is a few numbers, and stays as it is. Gradients are clipped by the norm of the step before (`AtOnce`). In
    float16, a matrix whose gradient overflows stays where it is.
    """

    def __init__(self, unet: Any, base: Any, masks: Masks, learning_rate: float, steps: int) -> None:
        super().__init__(unet, base, masks, learning_rate, steps)
        self.rest = {name: parameter for name, parameter in self.named.items() if not is_matrix(name, parameter)}
        self.names = [name for name, parameter in self.named.items() if is_matrix(name, parameter)]
        self.momenta: list[Blocks | None] = [None] * len(self.matrices)
        self.taken = AtOnce(self.matrices, self._apply, before=self._prepare)

    def step(self, step: int, loss: Tensor) -> None:
        """See `TrunkTraining.step`."""
        self._set_rate(step)
        self.scale.up(loss).backward()
        gradients = self._gradients(self.rest)
        norm = torch.nn.utils.get_total_norm(gradients)
        total = self.taken.end(norm)
        if self.scale.takes(float(total)):
            torch.nn.utils.clip_grads_with_norm_(list(self.rest.values()), 1.0, total)
            self.adamw.step()
            self._approach(list(self.rest))
        self.adamw.zero_grad(set_to_none=True)

    def _prepare(self, number: int) -> None:
        name, gradient = self.names[number], self.matrices[number].grad
        self.scale.down([gradient])
        if name in self.masks and gradient is not None:
            gradient *= self.masks[name]

    def _apply(self, number: int) -> None:
        """A step of Muon for one matrix."""
        matrix, view, momentum = self.matrices[number], self.views[number], self.momenta[number]
        assert matrix.grad is not None
        view.grad = matrix.grad.reshape(view.shape)
        if momentum is not None:
            self.muon.state[view]["momentum_buffer"] = momentum.values()
        self.muon.step()
        self.momenta[number] = Blocks(self.muon.state.pop(view)["momentum_buffer"])
        view.grad = None
        self._approach([self.names[number]])

    def _state(self) -> dict[str, Tensor]:
        momenta = {f"muon.{n}": momentum for n, momentum in enumerate(self.momenta) if momentum is not None}
        codes = {f"{key}.codes": momentum.codes for key, momentum in momenta.items()}
        scales = {f"{key}.scales": momentum.scales for key, momentum in momenta.items()}
        return optimizer_tensors(self.adamw) | codes | scales | {"factor": self.taken.factor}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.adamw, tensors)
        self.taken.factor.copy_(tensors["factor"])
        for number, view in enumerate(self.views):
            if f"muon.{number}.codes" in tensors:
                parts = tensors[f"muon.{number}.codes"], tensors[f"muon.{number}.scales"]
                self.momenta[number] = Blocks.of(*parts, view.shape)
