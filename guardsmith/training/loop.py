"""What every training loop here shares: seeds, one optimizer step, in-place snapshots, checkpoints in safetensors."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from guardsmith.core.atomic_io import read_kept, whole_file
from guardsmith.core.console import first_process
from guardsmith.core.errors import RunFailed
from guardsmith.models.families import DENOISERS
from guardsmith.runtime.distributed import all_reduce
from guardsmith.training.scaling import LossScale


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that depends only on `seed` and the numbers after it (step, subject, ...).

    Drawing from a fresh stream per step, not from one long stream, is what makes a resumed run equal an unbroken one.
    """
    state = 0x9E3779B97F4A7C15
    for number in (seed, *stream):
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


@contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Inside, torch's global generator starts at `seed` (for libraries that draw from it); afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    *,
    max_grad_norm: float | None = 1.0,
    scale: LossScale | None = None,
) -> float:
    """Sum the gradients over the processes, clip them, take a step and clear them.

    Args:
        optimizer: over these parameters.
        parameters: with their gradients.
        max_grad_norm: largest norm of all gradients together; `None` does not clip.
        scale: of the losses that the gradients are of. Where gradients overflowed in float16, no step is taken.

    Returns:
        The gradient norm before clipping (inf or nan when the training diverged; 0 where no step was taken).

    Raises:
        RunFailed: see `LossScale.takes`.
    """
    all_reduce(parameter.grad for parameter in parameters)
    if scale is not None:
        scale.down(parameter.grad for parameter in parameters)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    length = float(norm)
    if scale is None or scale.takes(length):
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizer.step()
    else:
        length = 0.0
    optimizer.zero_grad(set_to_none=True)
    return length


def add_gradients(loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter], sums: Sequence[torch.Tensor]) -> None:
    """Add the gradients of a loss to sums of earlier ones while the backward pass runs, so that they need no memory of their own.

    Args:
        loss: a scalar.
        parameters: to differentiate by; their `grad` is `None` before and afterwards.
        sums: one for each of them, of its shape; changed in place.
    """
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total
    loss.backward(inputs=list(parameters))
    for parameter in parameters:
        parameter.grad = None


class Snapshot:
    """A copy of parameter values that can be written back in place; it needs less memory than a copy of the model.

    Args:
        parameters: the tensors to remember; the same objects are restored, so optimizers keep pointing at them.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def take(self) -> None:
        """Remember the current values (no new memory)."""
        torch._foreach_copy_(self.values, [p.detach() for p in self.parameters])

    @torch.no_grad()
    def restore(self) -> None:
        """Write the remembered values back."""
        torch._foreach_copy_([p.detach() for p in self.parameters], self.values)


def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Clear an Adam-like optimizer's moments and step counts, as if it had just been made."""
    inner: Any = getattr(optimizer, "optim", optimizer)  # of a sharded one, what it has here
    inner.state.clear()


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """An optimizer's state as flat tensors `prefix.<index>.<name>`, ready for `save_checkpoint`."""
    tensors: dict[str, torch.Tensor] = {}
    for i, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            parts = value if isinstance(value, dict) else {key: value}  # bitsandbytes wraps what belongs to its blocks
            tensors |= {f"{prefix}.{i}.{name}": torch.as_tensor(part) for name, part in parts.items()}
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], prefix: str = "optimizer"
) -> None:
    """Restore what `optimizer_tensors` returned in a fresh optimizer over the same parameters."""
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            _, index, name = key.rsplit(".", 2)
            # bitsandbytes counts its steps in whole numbers, torch in tensors.
            state.setdefault(int(index), {})[name] = int(value) if value.dtype == torch.int64 else value
    numbers = itertools.count()
    groups = [group | {"params": [next(numbers) for _ in group["params"]]} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def module_tensors(module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """A module's parameters as `prefix.<name>`, ready for `save_checkpoint`."""
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def load_module_tensors(module: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Copy what `module_tensors` returned into the same parameters, in place."""
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors[f"{prefix}.{name}"])


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Write tensors and a JSON-able `info` to one safetensors file, atomically: the old file stays until the new is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storages: set[int] = set()
    separate = {}  # safetensors refuses tensors that share memory
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # Not copied otherwise: with optimizers it is three times the weights, for which there may be no room.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        separate[key] = tensor
    with whole_file(path) as temporary:
        save_file(separate, temporary, metadata={"info": json.dumps(info)})


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote."""
    with safe_open(path, framework="pt") as file:
        info = json.loads((file.metadata() or {})["info"])
        return {k: file.get_tensor(k) for k in file.keys()}, info  # noqa: SIM118 (not a dict)


def save_modules(checkpoint: Path, path: Path) -> None:
    """Write the modules' tensors of a checkpoint, without the optimizers', to a file that another run may start from.

    The training is over by then, so what its gradients and optimizers took is more than these tensors need.
    """
    with safe_open(checkpoint, framework="pt") as file:
        modules = json.loads((file.metadata() or {})["info"])["modules"]
        names = [name for name in file.keys() if name.split(".")[0] in modules]  # noqa: SIM118 (not a dict)
        save_checkpoint(path, {name: file.get_tensor(name) for name in names}, {})


@torch.no_grad()
def _load_start(module: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Like `load_module_tensors`, but rows and parameters that the file does not have (a new subject's) stay as they are."""
    for name, parameter in module.named_parameters():
        old = tensors.get(f"{prefix}.{name}")
        if old is not None:
            parameter[: len(old)] = old


OnStep = Callable[[int, dict[str, float]], None]
"""Called after every step with its number and its losses."""
Probe = Callable[[int, Callable[[], Any]], bool]
"""Called after every step with its number and a function that gives the model as it would be released; true ends the training."""


class TrainingLoop:
    """Counts the steps of a training, checks and records their losses, saves and resumes.

        loop = TrainingLoop("PersGuard", steps, modules={"unet": unet}, optimizers={"optimizer": optimizer}, ...)
        for step in loop:
            ...
            loop.finish_step(step, losses)

    Args:
        name: what is trained, for messages.
        steps: how many there are.
        modules: whose parameters are saved and restored, by their name in the file.
        optimizers: whose state is saved and restored, likewise.
        tensors: further ones that the loop changes in place.
        start: what a finished run left (`save_modules`), to begin from; its tensors may have fewer rows than the parameters.
        checkpoint: file to resume from if it exists, and to save to.
        checkpoint_every: steps between two saves.
        on_step: see `OnStep`.
        probe: see `Probe`.
        released: gives the model as it would be released now.

    Attributes:
        history: the losses of every step.
        ended: whether the probe ended the training early.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        *,
        modules: Mapping[str, torch.nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        tensors: Mapping[str, torch.Tensor] | None = None,
        start: Path | None = None,
        checkpoint: Path | None = None,
        checkpoint_every: int = 50,
        on_step: OnStep | None = None,
        probe: Probe | None = None,
        released: Callable[[], Any] | None = None,
    ) -> None:
        self.name, self.steps = name, steps
        self.modules, self.optimizers, self.tensors = modules, optimizers, tensors or {}
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.on_step, self.probe, self.released = on_step, probe, released
        self.history: list[dict[str, float]] = []
        self.ended = False
        last = None
        if checkpoint is not None:
            last = read_kept(checkpoint, load_checkpoint, "the training starts again")
        if last is not None:
            saved, info = last
            for prefix, module in modules.items():
                load_module_tensors(module, saved, prefix)
            for prefix, optimizer in optimizers.items():
                load_optimizer_tensors(optimizer, saved, prefix)
            for key, tensor in self.tensors.items():
                tensor.copy_(saved[key])
            self.history, self.ended = info["history"], info["ended"]
        elif start is not None:
            saved, _ = load_checkpoint(start)
            for prefix, module in modules.items():
                _load_start(module, saved, prefix)

    def __iter__(self) -> Iterator[int]:
        while len(self.history) < self.steps and not self.ended:
            yield len(self.history)

    def finish_step(self, step: int, losses: dict[str, float], *, finite_weights: bool = True) -> None:
        """Record a step, report it, let the probe look, and save where it is time.

        Args:
            step: its number.
            losses: its losses and other numbers.
            finite_weights: false if a weight is not finite any more, which losses show one step later only.

        Raises:
            RunFailed: the training diverged; what was saved last is the last good state.
        """
        if not (finite_weights and all(map(math.isfinite, losses.values()))):
            is_saved = self.checkpoint is not None and self.checkpoint.exists()
            good = f"the last good state is {self.checkpoint}; " if is_saved else ""
            halved = any(getattr(module, "precision", None) == torch.float16 for module in self.modules.values())
            advice = "compute in bfloat16 or float32, or " if halved else ""
            raise RunFailed(
                f"{self.name} diverged at step {step + 1}: a loss is not finite; {good}{advice}lower the learning rate."
            )
        self.history.append(losses)
        if self.on_step is not None:
            self.on_step(step, losses)
        if self.probe is not None and self.released is not None:
            self.ended = self.probe(step, self.released)
        last = self.ended or step + 1 == self.steps
        if last or (step + 1) % self.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        for optimizer in self.optimizers.values():
            if hasattr(optimizer, "consolidate_state_dict"):  # sharded: every process sends its part to the first
                optimizer.consolidate_state_dict(to=0)
        if not first_process():
            return
        state = dict(self.tensors)
        for prefix, module in self.modules.items():
            state |= module_tensors(module, prefix)
        for prefix, optimizer in self.optimizers.items():
            state |= optimizer_tensors(optimizer, prefix)
        info = {"history": self.history, "ended": self.ended, "modules": list(self.modules)}
        save_checkpoint(self.checkpoint, state, info)


class UNetCost:
    """Counts rows of U-Nets (or of Stable Diffusion 3's transformer) while it is active, those with gradients twice.

    A backward pass with weight gradients costs two forwards, so forward equivalents = forwards + 2 x backwards.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0
        self._lock = Lock()  # two threads may compute (APDM's `overlap`)

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, DENOISERS) and inputs:
            with self._lock:
                self.forwards += len(inputs[0])
                self.backwards += len(inputs[0]) if torch.is_grad_enabled() else 0

    def __enter__(self) -> UNetCost:
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
