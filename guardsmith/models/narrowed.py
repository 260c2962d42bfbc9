"""A frozen network whose weights stay in half precision and are widened, layer by layer, while it computes: the same numbers.

Published bases are stored in float16. Loaded in float32 they take twice the room for nothing: a float32 number that came from a
float16 one says no more than it. So where room counts, weights that a half precision holds exactly are kept in it, and a layer's
are float32 only while the layer computes. What it computes is the same to the bit.

What autograd needs of a widened weight it keeps, so a network with gradients saves memory only with gradient checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEPT = "_narrow_weights"
"""Attribute of a module that computes: its weights in half precision, by name."""


def _exactly(weight: Tensor) -> Tensor | None:
    """A float32 tensor in the first half precision that holds all of its numbers, or `None`."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = weight.to(dtype)
        if torch.equal(narrow.to(weight.dtype), weight):
            return narrow
    return None


def _widen(module: Any, _: Any) -> None:
    kept = {name: weight for name, weight in module._parameters.items() if weight is not None and _is_narrow(weight)}
    for name, weight in kept.items():
        module._parameters[name] = weight.float()
    setattr(module, _KEPT, kept)


def _narrow_again(module: Any, _: Any, __: Any) -> None:
    module._parameters.update(module.__dict__.pop(_KEPT, {}))


def _is_narrow(weight: Tensor) -> bool:
    return weight.dtype in (torch.float16, torch.bfloat16)


@torch.no_grad()
def narrow(network: Any) -> None:
    """Keep a frozen network's weights in half precision, in place; each that is not exact in one stays float32.

    Its `parameters()` are of either precision from then on. `widened_copy` gives a float32 copy to change.

    Args:
        network: float32, without gradients.
    """
    replaced: dict[int, torch.nn.Parameter] = {}  # by the identity of what they replace: layers may share weights
    for module in network.modules():
        if not module._parameters or _widen in module._forward_pre_hooks.values():
            continue
        for name, weight in module._parameters.items():
            if weight is None or weight.dtype != torch.float32:
                continue
            if id(weight) not in replaced:
                exact = _exactly(weight)
                replaced[id(weight)] = weight if exact is None else torch.nn.Parameter(exact, requires_grad=False)
            module._parameters[name] = replaced[id(weight)]
        module.register_forward_pre_hook(_widen)
        module.register_forward_hook(_narrow_again, always_call=True)


@torch.no_grad()
def widen(network: Any) -> None:
    """Undo `narrow`, in place."""
    replaced: dict[int, torch.nn.Parameter] = {}
    for module in network.modules():
        if _widen not in module._forward_pre_hooks.values():
            continue
        for hooks, ours in ((module._forward_pre_hooks, _widen), (module._forward_hooks, _narrow_again)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        for name, weight in module._parameters.items():
            if weight is not None and _is_narrow(weight):
                if id(weight) not in replaced:
                    replaced[id(weight)] = torch.nn.Parameter(weight.float(), requires_grad=False)
                module._parameters[name] = replaced[id(weight)]


@contextmanager
def resting(networks: Sequence[Any]) -> Iterator[None]:
    """Inside, networks that nobody calls are narrow, and as they were afterwards.

    Args:
        networks: float32, without gradients.
    """
    for network in networks:
        narrow(network)
    try:
        yield
    finally:
        for network in networks:
            widen(network)


def is_narrow(network: Any) -> bool:
    """Whether `narrow` was called on a network."""
    return any(_widen in module._forward_pre_hooks.values() for module in network.modules())


def widened_copy(network: Any) -> Any:
    """A copy whose weights are float32, whether or not the network is narrow.

    Args:
        network: float32 or narrow; stays as it is.
    """
    if not is_narrow(network):
        return copy.deepcopy(network)
    own = copied_in(network, torch.float32)
    widen(own)
    return own


def copied_in(network: Any, dtype: torch.dtype) -> Any:
    """A frozen copy of a network in another precision; meanwhile there is no further copy of it in its own.

    Args:
        network: stays as it is.
        dtype: of the copy's weights.
    """
    memo: dict[int, Any] = {
        id(weight): torch.nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
        for weight in network.parameters()
    }
    memo |= {id(b): b.to(dtype, copy=True) for b in network.buffers() if b.is_floating_point()}
    return copy.deepcopy(network, memo)
