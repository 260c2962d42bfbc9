"""How much memory a hardening will take, from the shapes of the networks alone: nothing is loaded and nothing computed.

    weights       all networks of the base, and one more denoiser that is hardened, float32; with gradient checkpointing the
                  base's denoiser in the half precision of its files
    training      what the method keeps of the size of the weights: gradients, optimizers, snapshots (`HardeningMethod.memory`)
    activations   what the largest batch with gradients keeps for its backward pass
    pictures      what the VAE keeps of one picture on its way through, and the process of it afterwards
    rest          this process as it is, with its libraries

Activations are counted by calling the denoiser with tensors that have shapes and no contents (torch's fake tensors), which choose
the same kernels as on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from guardsmith.config.recipe import Recipe
from guardsmith.methods import Method, MethodConfig
from guardsmith.models.checkpoint import family_of, resolve, text_parts
from guardsmith.models.contents import weight_files
from guardsmith.models.families import SD, SD3, T5_TOKENS, Family
from guardsmith.training.compute import configure_denoiser
from guardsmith.training.optimizers import MOMENTS

BYTES = 4  # of a float32
LAYERS = 8  # of the VAE's largest activations at once (measured at 512 pixels)
GIB = 2**30


def stored_numbers(folder: Path) -> int:
    """How many numbers are stored in a part's safetensors files, read from their headers; variants do not count."""
    total = 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                total += torch.Size(weights.get_slice(key).get_shape()).numel()
    return total


def _is_half(folder: Path) -> bool:
    """Whether every tensor of a part is stored in half precision."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            dtypes = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 (not a dict)
        if not dtypes <= {"F16", "BF16"}:
            return False
    return True


def saved_bytes(network: Any, *inputs: Tensor) -> int:
    """What one call keeps for its backward pass, beside the network's own weights.

    With gradient checkpointing, that and what the largest of the parts that are computed again keeps meanwhile.
    """
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def save_to(saved: list[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def size(saved: list[Tensor]) -> int:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in saved}
        return sum(storage.nbytes() for key, storage in storages.items() if key not in own)

    between: list[Tensor] = []
    again = [0]

    def part(module: Any, *args: Any) -> Any:
        inside: list[Tensor] = []
        with save_to(inside):
            out = module(*args)
        between.extend(arg for arg in args if isinstance(arg, Tensor))
        again.append(size(inside))
        return out

    if network.is_gradient_checkpointing:
        network.enable_gradient_checkpointing(part)
    with save_to(between):
        network(*inputs, return_dict=False)[0].square().mean()
    if network.is_gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return size(between) + max(again)


def _tokens(folder: Path, family: Family) -> int:
    settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    longest = int(settings.get("model_max_length", 77))
    return longest + T5_TOKENS if family is SD3 else longest


def estimate(recipe: Recipe, method: Method, config: MethodConfig, *, loaded: int = 0) -> dict[str, float]:
    """Peak memory of a hardening in GiB: `weights`, `training`, `activations`, `pictures`, `rest`, and their sum, `together`.

    Args:
        recipe: base and `compute`.
        method: the hardening method.
        config: its parameters.
        loaded: bytes of the base's weights that this process has in memory already, and that are not its `rest`.

    Raises:
        UserError: there is no such base.
        RunFailed: the base is not on this machine.
    """
    rest = max(0, psutil.Process().memory_info().rss - loaded)
    folder = resolve(recipe.base, recipe.revision)
    family = family_of(folder)
    parts = ["vae", *(name for name, *_ in text_parts(folder, family))]
    stored = sum(stored_numbers(folder / part) for part in parts)
    shape = family.network.load_config(folder / family.denoiser)
    with FakeTensorMode():
        network = family.network.from_config(shape).eval().requires_grad_(True)
        configure_denoiser(network, recipe.compute)
        side, channels = int(network.config.sample_size), int(network.config.in_channels)
        width = int(network.config.joint_attention_dim if family is SD3 else network.config.cross_attention_dim)
        pooled = 0
        if family is not SD:
            pooled = int(network.config.pooled_projection_dim if family is SD3 else network.pooled_size)
        tokens = _tokens(folder, family) - (-pooled // width)
        inputs = (torch.zeros(1, channels, side, side), torch.zeros(1, dtype=torch.long), torch.zeros(1, tokens, width))
        row = saved_bytes(network, *inputs)
        numbers = sum(parameter.numel() for parameter in network.parameters())
        footprint = method.memory(config, network)
    kept = footprint.numbers - (footprint.at_once if recipe.compute.optimizer == "adamw8bit" else 0)
    training = kept * BYTES + footprint.moments * MOMENTS[recipe.compute.optimizer]
    narrow = recipe.compute.gradient_checkpointing and _is_half(folder / family.denoiser)
    weights = (stored + 2 * numbers) * BYTES - (numbers * BYTES // 2 if narrow else 0)
    activations = row * footprint.rows
    widths = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]
    pictures = LAYERS * widths[0] * (side << (len(widths) - 1)) ** 2 * BYTES
    by_use = {"weights": weights, "training": training, "activations": activations, "pictures": pictures, "rest": rest}
    return {key: value / GIB for key, value in (by_use | {"together": sum(by_use.values())}).items()}
