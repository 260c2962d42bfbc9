"""How far an attack moves a model: the norm of the change of its weights, block by block, and what its optimizer allows.

Change is the L2 norm of (weight after - weight before), in the units of the weights. An adapter counts with what it adds to the
weights that it belongs to. A trained word counts with the change of its embedding since its first value, as a block of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from guardsmith.models.checkpoint import DiffusionModel

PREFIXES = {"down_blocks.": "down", "mid_block.": "mid", "up_blocks.": "up"}
REST, TEXT, WORDS = "rest", "text_encoder", "words"
"""Blocks beside those of `PREFIXES`: the rest of the denoiser (all of Stable Diffusion 3's transformer), the text encoder, and
new words."""
BOUNDED = ("adamw", "adamw8bit")
"""Optimizers whose step moves a weight by about the learning rate at most, whatever the size of the gradient."""


@dataclass(frozen=True)
class Movement:
    """How far an attack has moved a model.

    Attributes:
        allowed: sum of the learning rates of all steps so far, which is the largest possible change of one trained weight (of an
            adapter: of one weight of its factors), but for weight decay and for gradients that grow suddenly; `None` for
            optimizers that are not in `BOUNDED`.
        largest: largest absolute change of one weight.
        change: block -> L2 norm of the change of its weights.
        norm: block -> L2 norm of its weights before the attack.
    """

    allowed: float | None
    largest: float
    change: dict[str, float]
    norm: dict[str, float]

    def record(self) -> dict[str, Any]:
        """For JSON; `Movement(**record)` is the same again."""
        return asdict(self)


class OptimizerSteps:
    """Counts what the optimizer steps of attacks allow while it is active (`with OptimizerSteps() as steps:`).

    Attributes:
        rates: sum of their learning rates.
        bounded: whether all of them were by optimizers of `BOUNDED`.
    """

    def __init__(self) -> None:
        self.rates = 0.0
        self.bounded = True

    @property
    def allowed(self) -> float | None:
        """See `Movement.allowed`; also `None` where no step was counted: an attack has a training loop of its own."""
        return self.rates if self.bounded and self.rates else None

    def __enter__(self) -> OptimizerSteps:
        self._token = _active.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.reset(self._token)


_active: ContextVar[OptimizerSteps | None] = ContextVar("active", default=None)


def count_step(optimizer: str, rate: float) -> None:
    """Called by the training loop of attacks after every step.

    Args:
        optimizer: its name.
        rate: its learning rate in this step.
    """
    steps = _active.get()
    if steps is not None:
        steps.rates += rate
        steps.bounded = steps.bounded and optimizer in BOUNDED


def merged_weights(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a network by its name before adapters were put in, with what they add, in float64 where they add something.

    The network stays as it is.
    """
    adapted = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in adapted.items():
        own = copy.deepcopy(layer).cpu().double()  # in float32 large weights would round small updates away
        own.merge()
        for part, weight in own.get_base_layer().named_parameters():
            yield f"{name}.{part}", weight
    for name, weight in module.named_parameters():
        if not any(name.startswith(f"{layer}.") for layer in _parents(name, adapted)):
            yield name, weight


def _parents(name: str, layers: Mapping[str, Any]) -> Iterator[str]:
    """The layers of a mapping that a parameter lies in."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            yield name


def block_of(name: str) -> str:
    """The block of a denoiser that a weight belongs to: down, mid, up or rest."""
    return next((block for prefix, block in PREFIXES.items() if name.startswith(prefix)), REST)


def weight_norms(model: DiffusionModel) -> dict[str, float]:
    """Block -> L2 norm of its weights, of denoiser and text encoder."""
    squares: dict[str, float] = {}
    weights = [(block_of(name), weight) for name, weight in model.unet.named_parameters()]
    weights += [(TEXT, weight) for weight in model.text_encoder.parameters()]
    for block, weight in weights:
        squares[block] = squares.get(block, 0.0) + _square(weight.detach().cpu().double())
    return {block: math.sqrt(square) for block, square in squares.items()}


def _square(values: Tensor) -> float:
    return float(values.square().sum())


def _differences(before: DiffusionModel, after: DiffusionModel) -> Iterator[tuple[str, Tensor]]:
    """(block, change) for every weight of denoiser and text encoder, without those of new words, float64, on the CPU.

    Raises:
        KeyError: one of the models has a weight that the other does not have.
    """
    words = len(before.tokenizer)  # rows of later tokens are new words, or nothing's
    for mine, theirs, text in ((before.unet, after.unet, False), (before.text_encoder, after.text_encoder, True)):
        if mine is theirs:
            continue
        table = mine.get_input_embeddings().weight if text else None
        old = dict(mine.named_parameters())
        for name, weight in merged_weights(theirs):
            before_it = old.pop(name)
            first, last = before_it.detach().cpu().double(), weight.detach().cpu().double()
            if before_it is table:
                first, last = first[:words], last[:words]
            if first.shape != last.shape:
                raise KeyError(name)
            yield TEXT if text else block_of(name), last - first
        if old:
            raise KeyError(*old)


def _word_changes(before: DiffusionModel, after: DiffusionModel) -> tuple[Tensor, Tensor]:
    """Change and first value of the embeddings of words that an attack added, float64 (n, width) each, on the CPU.

    While words are trained, the table keeps their first values, and the embedding layer gives the present ones.
    """
    layer = after.text_encoder.get_input_embeddings()
    tokens = torch.arange(len(before.tokenizer), len(after.tokenizer), device=layer.weight.device)
    first = layer.weight[tokens].cpu().double()
    return layer(tokens).cpu().double() - first, first


@torch.no_grad()
def movement(before: DiffusionModel, after: DiffusionModel, allowed: float | None) -> Movement | None:
    """How far a model is from another one that it was trained from.

    Args:
        before: the model under attack.
        after: the personalized one, while it is trained; with adapters in it or without.
        allowed: see `Movement`.

    Returns:
        `None` where the two have different weights, which no attack of the table leads to.
    """
    norms = weight_norms(before)
    changes, largest = dict.fromkeys(norms, 0.0), 0.0
    try:
        for block, change in _differences(before, after):
            changes[block] += _square(change)
            largest = max(largest, float(change.abs().max())) if change.numel() else largest
    except KeyError:
        return None
    if len(after.tokenizer) > len(before.tokenizer):
        change, first = _word_changes(before, after)
        changes[WORDS], norms[WORDS] = _square(change), math.sqrt(_square(first))
        largest = max(largest, float(change.abs().max()))
    return Movement(allowed, largest, {block: math.sqrt(square) for block, square in changes.items()}, norms)


def relative(change: Mapping[str, float], norm: Mapping[str, float], blocks: Iterable[str]) -> float:
    """Relative norm of a change over several blocks together.

    Args:
        change: block -> norm of the change.
        norm: block -> norm of the weights that it is relative to.
        blocks: which ones.
    """
    blocks = list(blocks)
    below = math.hypot(*(norm[block] for block in blocks))
    return math.hypot(*(change[block] for block in blocks)) / below if below else 0.0


def displacement(change: Mapping[str, float], norm: Mapping[str, float]) -> float:
    """Relative norm of a change of the model's weights: of the denoiser's, and of the text encoder's too where they changed.

    New words are no weights of the model and do not count.

    Args:
        change: block -> norm of the change.
        norm: block -> norm of the weights that it is relative to.
    """
    return relative(change, norm, [block for block in change if block != WORDS and (block != TEXT or change[TEXT])])
