"""float16 on a CPU: computed in float32, every result rounded to float16.

Without instructions for it a CPU computes in float16 some twenty times slower than in float32 (measured on the embedded base), so
a check in real float16 would take hours. Accelerators add products up in float32 and round what an operation writes to
memory; so does this. What differs: fused attention keeps its inner products unrounded, and the order of sums is the CPU's.
Values beyond 65,504 become infinite, and infinity minus infinity NaN, as on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def rounded(value: Tensor) -> Tensor:
    """The same in float32 with the precision and range of float16; other types are left alone."""
    return value.half().float() if value.dtype == torch.float32 else value


class HalfResults(TorchDispatchMode):
    """Inside, every operation that writes float32 numbers writes them rounded to float16."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, then round what it wrote; views write nothing."""
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        if func._schema.is_mutable:  # in place: other views of the memory have to be rounded too
            return tree_map_only(Tensor, lambda value: value.copy_(rounded(value)), out)
        return tree_map_only(Tensor, rounded, out)


class _AsHalf:
    """A network's forward under `HalfResults`; timesteps are embedded outside of it, in float32, as diffusers does."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda v: v if v.dim() < 2 else rounded(v), (args, kwargs))
        with HalfResults():  # type: ignore[no-untyped-call]
            return self.forward(*args, **kwargs)


def _unrounded(module: nn.Module) -> None:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            out = plain(*args, **kwargs)
        return rounded(out)

    module.forward = forward


def as_half(network: Any) -> Any:
    """Let a float32 network compute as float16 does on an accelerator, with weights rounded likewise; changed in place.

    Args:
        network: U-Net, transformer, ControlNet, text encoder, or a VAE (whose encoder and decoder compute so).
    """
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.dtype == torch.float32:
                value.copy_(value.half())
    if hasattr(network, "time_proj"):
        _unrounded(network.time_proj)
    if hasattr(network, "encode") and hasattr(network, "decode"):
        network.encode, network.decode = _AsHalf(network.encode), _AsHalf(network.decode)
    else:
        network.forward = _AsHalf(network.forward)
    return network
