"""Small networks of guardsmith's own in a file: half-precision weights, their shape, and the record of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from guardsmith.core.errors import UserError
from guardsmith.models.checkpoint import BUILTIN

Network = TypeVar("Network", bound=nn.Module)


def save_network(network: nn.Module, shape: dict[str, Any], file: Path, training: dict[str, Any]) -> None:
    """Write a network; the file appears whole.

    Args:
        network: its parameters and buffers are stored, as float16.
        shape: keyword arguments of its class.
        file: where to.
        training: record of its training; values that JSON has.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    tensors = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    # One entry only: safetensors writes several in any order, and the same network is to give the same file.
    metadata = {"network": json.dumps({"kind": type(network).__name__, "shape": shape, **training}, sort_keys=True)}
    try:
        temporary.write_bytes(save(tensors, metadata))  # `save_file` writes for the owner only
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def load_network(kind: type[Network], source: str, missing: str) -> Network:
    """A network from a file, or an embedded one (`builtin:NAME`), float32, in eval mode, without gradients.

    Args:
        kind: its class.
        source: file or `builtin:NAME`.
        missing: advice for the user where there is no such file.

    Raises:
        UserError: there is none, or the file is something else.
    """
    name, file = kind.__name__.lower(), Path(source).expanduser()
    if source.startswith("builtin:"):
        file = BUILTIN / f"{name}s" / f"{source.removeprefix('builtin:')}.safetensors"
    if not file.is_file():
        raise UserError(f"there is no {name} {source}; {missing}")
    try:
        with safe_open(file, framework="pt") as tensors:
            record = json.loads((tensors.metadata() or {})["network"])
            if record["kind"] != kind.__name__:
                raise ValueError(record["kind"])
            network = kind(**record["shape"])
            network.load_state_dict({key: tensors.get_tensor(key).float() for key in tensors.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{file} is no {name} of guardsmith's ({type(error).__name__}); {missing}") from error
    return network.eval().requires_grad_(False)
