"""The trunk: the base's U-Net, taught to do without the reserved channels. It never sees a protected subject."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from guardsmith.core.atomic_io import whole_file
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.progress import stage
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.prompts import (
    CLASS_TEMPLATE,
    HARDENING_IDENTIFIERS,
    PromptBank,
    class_prompt,
    instance_prompt,
)
from guardsmith.methods.base import MemoryFootprint
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.methods.tripwire.additions import ADAPTER_ROWS, Adapter, Adapters, odd_contexts, residuals, trainings
from guardsmith.methods.tripwire.layout import Layout, Masks, reserve
from guardsmith.methods.tripwire.training import noised
from guardsmith.methods.tripwire.trunk_training import LeanTraining, TrunkTraining, is_matrix
from guardsmith.models.checkpoint import BUILTIN, DiffusionModel, with_own_unet
from guardsmith.models.families import SD
from guardsmith.models.narrowed import is_narrow, resting
from guardsmith.models.tensor_files import weights_hash
from guardsmith.training.compute import ComputeConfig
from guardsmith.training.loop import generator

FORMAT = "guardsmith-trunk-1"
GUIDED = 3.0  # guidance under which predictions are compared as well
GUIDED_WEIGHT = 0.25
ODD = 64  # prompts with a word of their own
STEERED = {1: False, 3: True}
"""Which of five steps steer pictures by residuals, and whether inside of the blocks."""


@contextmanager
def _loss(
    model: DiffusionModel,
    unet: Any,
    latents: LatentStore,
    contexts: Tensor,
    empty: Tensor,
    rows: int,
    rng: torch.Generator,
    adapter: Adapter | None = None,
    inside: bool | None = None,
) -> Iterator[Tensor]:
    """Squared error of a trunk's predictions on `rows` noised pictures, with a prompt, without, and guided by both.

    `adapter` is on both, and where `inside` is given, some pictures are steered (`residuals`). The adapter stays on meanwhile:
    with gradient checkpointing, the backward pass computes the forward pass again.
    """
    times = torch.randint(int(model.scheduler.config.num_train_timesteps), (rows,), generator=rng)
    noisy = noised(model.scheduler, latents.draw(rows, rng), times, rng)
    prompts = contexts[torch.randint(len(contexts), (rows,), generator=rng)]
    call = (torch.cat([noisy, noisy]), torch.cat([times, times]), torch.cat([prompts, empty.expand(rows, -1, -1)]))
    with ExitStack() as stack:
        extra: dict[str, Any] = {}
        if adapter is not None:
            for one in (model.unet, unet):
                stack.enter_context(adapter.on(one))
        if inside is not None:
            # Half of the rows are left as they are; a picture is steered alike with its prompt and without.
            factors = (2 * torch.rand((rows, 1, 1, 1), generator=rng) - 1).clamp(min=0).repeat(2, 1, 1, 1)
            extra = residuals(model.unet, call, factors, inside=inside)
        with torch.no_grad():
            target = model.unet(*call, **_copied(extra), return_dict=False)[0]
        error = unet(*call, **_copied(extra), return_dict=False)[0] - target
        prompted, without = error.chunk(2)
        guided = without + GUIDED * (prompted - without)
        yield error.square().mean() + GUIDED_WEIGHT * guided.square().mean()


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The U-Net empties lists that it is given."""
    return {key: list(value) if isinstance(value, list) else value for key, value in arguments.items()}


def prepare(
    model: DiffusionModel,
    layout: Layout,
    latents: LatentStore,
    contexts: Tensor,
    empty: Tensor,
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
    start: Path | None = None,
    checkpoint: Path | None = None,
    every: int = 50,
    on_step: Callable[[int, float, Any], None] | None = None,
    compute: ComputeConfig | None = None,
) -> tuple[Any, Masks]:
    """A U-Net without the reserved channels that predicts what the base predicts.

    Args:
        model: the base; stays as it is. Losses are scaled where its U-Net computes in float16.
        layout: of the reserved channels.
        latents: pictures of nobody in particular.
        contexts: of prompts, (n, tokens, width).
        empty: of the empty prompt, (1, tokens, width).
        steps: of training.
        rows: noised pictures of a step; each is predicted under a prompt and under the empty one.
        learning_rate: its peak; it falls to zero in the last two thirds.
        seed: of everything drawn.
        start: a trunk to begin from (`save_trunk`); else the base without the reserved channels.
        checkpoint: file to resume from if it exists, and to save to.
        every: steps between saves.
        on_step: called after every step with its number, loss and the U-Net.
        compute: with `adamw8bit`, see `LeanTraining`.

    Returns:
        The U-Net, its weights rounded to float16, and which entries are the trunk's (`layout.reserve`).

    Raises:
        RunFailed: gradients overflow in float16 at every scale.
    """
    unet = with_own_unet(model).unet
    if start is not None:
        load_trunk(start, unet)
    masks = reserve(unet, layout)
    lean = compute is not None and compute.optimizer == "adamw8bit"
    training, begin = (LeanTraining if lean else TrunkTraining)(unet, model.unet, masks, learning_rate, steps), 0
    if checkpoint is not None and checkpoint.exists():
        begin = training.load(checkpoint)
    adapters = Adapters(model, latents, contexts, seed)
    # Pictures and prompts are encoded by now.
    with resting([model.vae, model.text_encoder] if is_narrow(model.unet) else []):
        for step in range(begin, steps):
            adapter = adapters.at(step // 2) if step % 2 else None
            rng = generator(seed, step)
            with _loss(model, unet, latents, contexts, empty, rows, rng, adapter, STEERED.get(step % 5)) as loss:
                training.step(step, loss)
            if on_step is not None:
                on_step(step, loss.item(), unet)
            if checkpoint is not None and (step + 1) % every == 0:
                training.save(checkpoint, step + 1)
    unet.requires_grad_(False)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(parameter.half().float())
    return unet, masks


def trunk_of(
    model: DiffusionModel,
    layout: Layout,
    subjects: Sequence[SubjectData],
    benign: BenignData,
    file: Path,
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
    every: int = 200,
    compute: ComputeConfig | None = None,
) -> tuple[int, int]:
    """Prepare a trunk and write it, unless its file is there already; a killed preparation is resumed.

    Args:
        model: the base.
        layout: of the reserved channels.
        subjects: only their class pictures and class nouns are used.
        benign: pictures and prompts beside them.
        file: to write; a checkpoint stands beside it meanwhile.
        steps: see `prepare`.
        rows: see `prepare`.
        learning_rate: see `prepare`.
        seed: see `prepare`.
        every: see `prepare`.
        compute: see `prepare`.

    Returns:
        See `rows_predicted`.

    Raises:
        RunFailed: the distillation diverged.
    """
    if not file.exists():
        nouns = list(dict.fromkeys(subject.class_noun for subject in subjects))
        pictures = [*{subject.class_noun: subject.class_images for subject in subjects}.values(), benign.images]
        if benign.negatives is not None:
            pictures.append(benign.negatives)
        prompts = [instance_prompt(name, noun) for name in HARDENING_IDENTIFIERS for noun in nouns]
        prompts += [class_prompt(noun) for noun in nouns]
        # Half of what is drawn are prompts of people who want something else.
        prompts = prompts * max(1, len(benign.prompts) // len(prompts)) + list(benign.prompts)
        bank = PromptBank(model)
        checkpoint = file.with_name("trunk-checkpoint.safetensors")
        with stage("preparing the trunk", steps) as bar:

            def on_step(step: int, loss: float, _: Any) -> None:
                if not math.isfinite(loss):
                    raise RunFailed(
                        f"The trunk diverged at step {step + 1}: its loss is not finite; lower trunk_learning_rate."
                    )
                bar({"loss": loss}, done=step + 1)

            contexts = bank.encode(prompts)
            if model.family is SD:
                odd = odd_contexts(model, [CLASS_TEMPLATE.format(class_noun="{}")] * ODD, seed)
                contexts = torch.cat([contexts, odd])
            unet, _ = prepare(
                model, layout, encode(model, torch.cat(pictures)), contexts, bank.encode([""]), steps=steps,
                rows=rows, learning_rate=learning_rate, seed=seed, checkpoint=checkpoint, every=every, on_step=on_step,
                compute=compute,
            )  # fmt: skip
        save_trunk(unet, layout, model.unet, file)
        checkpoint.unlink(missing_ok=True)
    return rows_predicted(steps, rows)


def rows_predicted(steps: int, rows: int) -> tuple[int, int]:
    """Rows that base and trunk predict in a preparation, and rows of them with gradients."""
    steered = sum(step % 5 in STEERED for step in range(steps))
    adapters = trainings(steps // 2) * ADAPTER_ROWS
    return 4 * rows * (steps + steered) + adapters, 2 * rows * steps + adapters


def trunk_footprint(steps: int, rows: int, unet: Any) -> MemoryFootprint:
    """What a preparation keeps in memory beside base and trunk: gradients, moments, and a mask of every weight's first two axes.

    Args:
        steps: see `prepare`.
        rows: see `prepare`.
        unet: the base's; its tensors may have no contents.
    """
    named = dict(unet.named_parameters())
    numbers = sum(weight.numel() for weight in named.values())
    matrices = sum(weight.numel() for name, weight in named.items() if is_matrix(name, weight))
    masks = sum(weight.shape[:2].numel() for weight in named.values()) // 4
    most = max(2 * rows, ADAPTER_ROWS if trainings(steps // 2) else 0)
    return MemoryFootprint(numbers + masks, 2 * numbers - matrices, most, matrices)


def save_trunk(trunk: Any, layout: Layout, base: Any, file: Path) -> None:
    """Write a trunk in float16, with what says which base and how many groups it is of."""
    widths = base.config.block_out_channels
    groups = {"groups": str(layout.downward[widths[-1]]), "outer_groups": str(layout.downward[widths[0]])}
    tensors = {name: weight.detach().cpu().half().contiguous() for name, weight in trunk.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "base": weights_hash(base)} | groups)


def trunk_file(name: str) -> Path:
    """Where a trunk is stored: `builtin:avatar` is shipped with guardsmith, for its own base; anything else is a path."""
    if name.startswith("builtin:"):
        return BUILTIN / "trunks" / f"{name.removeprefix('builtin:')}.safetensors"
    return Path(name).expanduser()


def check_trunk(name: str, groups: int, outer_groups: int, base: Any) -> None:
    """Check whether a trunk fits.

    Args:
        name: see `trunk_file`.
        groups: how many are to be reserved at the deepest level.
        outer_groups: and at the others.
        base: its U-Net; where that has no contents, which base it is of is not looked at.

    Raises:
        UserError: there is no such file, it is no trunk, it has another number of groups or is of another base.
    """
    try:
        with safe_open(trunk_file(name), framework="pt") as opened:
            about = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The tripwire's trunk {name} cannot be read ({error}); leave 'trunk' out to prepare one."
        ) from error
    if about.get("format") != FORMAT:
        raise UserError(f"{name} is no trunk of the tripwire's; leave 'trunk' out to prepare one.")
    has = about["groups"], about.get("outer_groups", about["groups"])
    if has != (str(groups), str(outer_groups)):
        raise UserError(
            f"The trunk {name} has {' and '.join(has)} reserved groups, the recipe asks for {groups} and {outer_groups}; set "
            "'groups' and 'outer_groups' to those, or leave 'trunk' out."
        )
    known = not any(parameter.is_meta for parameter in base.parameters())
    if known and about["base"] != weights_hash(base):
        raise UserError(f"The trunk {name} was prepared for another base; leave 'trunk' out to prepare one for this.")


@torch.no_grad()
def load_trunk(file: Path, unet: Any) -> None:
    """Write a trunk's weights into a U-Net of the base's shape."""
    unet.load_state_dict({key: weight.float() for key, weight in load_file(file).items()})


@torch.no_grad()
def relative_error(model: DiffusionModel, unet: Any, latents: Tensor, contexts: Sequence[Tensor], seed: int) -> float:
    """Squared error of a U-Net's predictions over the base's squared size, on noised pictures under prompts."""
    rng, wrong, size = generator(seed, 1), 0.0, 0.0
    for part in latents.split(64):
        times = torch.randint(int(model.scheduler.config.num_train_timesteps), (len(part),), generator=rng)
        noisy = noised(model.scheduler, part, times, rng)
        picked = torch.randint(len(contexts), (len(part),), generator=rng)
        call = (noisy, times, torch.stack([contexts[i] for i in picked.tolist()]))
        target = model.unet(*call, return_dict=False)[0]
        wrong += float((unet(*call, return_dict=False)[0] - target).square().sum())
        size += float(target.square().sum())
    return wrong / size
