"""Where the networks run: on the CPU, or on an accelerator while everything around them stays on the CPU.

What goes into a diffusion model is small (a latent of 64 x 64 x 4, a context of 77 x 768), so it travels: a network that was put
on a device takes its inputs there and gives its outputs back on the CPU, with their gradients. Rows, schedules and everything
random stay on the CPU, which is why the same seed gives the same rows wherever the networks run. In a training step, predictions
and losses stay on the accelerator (`outputs_stay`), and only scalars come back: copying a tensor back makes the CPU wait for it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from guardsmith.core.console import launched
from guardsmith.core.errors import UserError

VARIABLE = "GUARDSMITH_DEVICE"
"""Environment variable with the device's name, which processes inherit; without it the first accelerator that there is."""
CPU = torch.device("cpu")
DETERMINISTIC = "GUARDSMITH_DETERMINISTIC"
"""Environment variable that is 1 where the same seed has to give the same bits."""
_staying: ContextVar[bool] = ContextVar("staying", default=False)
LARGE = 4 * 2**20
"""Bytes from which on a block of memory is given back to the system as soon as it is free."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt (malloc.h)


def give_memory_back() -> None:
    """Keep glibc from holding on to large blocks that are free, which it does by itself up to 32 MiB each.

    They do not fit together again: a step of three rows of Stable Diffusion 1.5 with gradient checkpointing held 2.8 GiB where it
    now holds 1.7 (not committed). Small networks have smaller blocks. What the environment says is left alone.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if adjust:
        adjust(MMAP_THRESHOLD, LARGE)
        adjust(TRIM_THRESHOLD, 16 * LARGE)


def settle() -> None:
    """How this process computes: with `give_memory_back`, and as `DETERMINISTIC` says.

    That is one thread, and only operations that give the same bits every time: sums of several threads are rounded in another
    order on another number of cores.
    """
    give_memory_back()
    if os.environ.get(DETERMINISTIC) == "1":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this only
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)


def chosen_device() -> torch.device:
    """Where networks are put: what `VARIABLE` says, else an accelerator if there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    usual = torch.accelerator.current_accelerator(check_available=True) or CPU
    name = os.environ.get(VARIABLE)
    if launched() > 1:  # one for each process of a machine
        kind, number, _ = (name or usual.type).partition(":")
        if kind not in ("cpu", "meta") and not number:
            name = f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"
    if name is None:
        return usual
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "meta"):
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: there is no such device here; cpu is one, and so is {usual}") from error
    return device


def moved(value: Any, device: torch.device) -> Any:
    """The same with every tensor in it on a device: in tuples, lists, dictionaries and the libraries' outputs."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(each, device) for each in value)
    if isinstance(value, OrderedDict):  # the libraries' outputs, which have their entries as attributes too
        for key in list(value):
            value[key] = moved(value[key], device)
        return value
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    return value


@contextmanager
def outputs_stay() -> Iterator[None]:
    """Inside, networks that were `put` on an accelerator leave their outputs there."""
    token = _staying.set(True)
    try:
        yield
    finally:
        _staying.reset(token)


def concatenated(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors one after the other: on the accelerator if one of them is there, else on the CPU."""
    place = next((part.device for part in parts if part.device != CPU), CPU)
    return torch.cat([part.to(place) for part in parts])


def put(network: torch.nn.Module, device: torch.device) -> None:
    """Move a network to a device; from outside it still takes and gives tensors on the CPU (but see `outputs_stay`).

    On the CPU nothing happens.

    A VAE's parts are put there one by one, for it is called by `encode` and `decode`.
    """
    if device.type == "cpu":
        return
    network.to(device)

    def take(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return moved(args, device), moved(kwargs, device)

    def give(_: Any, args: tuple[Any, ...], out: Any) -> Any:
        return out if _staying.get() else moved(out, CPU)

    parts = network.children() if hasattr(network, "encode") else [network]
    for part in parts:
        part.register_forward_pre_hook(take, with_kwargs=True)
        part.register_forward_hook(give)
