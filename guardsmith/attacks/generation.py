"""Running an attack and generating pictures with the personalized model, at the end or on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from guardsmith.attacks import sampling_tricks
from guardsmith.attacks.base import Attack, AttackData
from guardsmith.attacks.displacement import Movement, OptimizerSteps, movement
from guardsmith.attacks.lora import carry_adapters, merge_adapters
from guardsmith.attacks.table import find_attack
from guardsmith.core.seeds import ATTACK_SAMPLES, FIRST_STAGE_OFFSET
from guardsmith.models.checkpoint import DiffusionModel, with_own_unet

FIRST_STAGE_SEED = FIRST_STAGE_OFFSET
SAMPLE_SEED = ATTACK_SAMPLES.start


def _merged(personalized: DiffusionModel) -> DiffusionModel:
    """A copy with adapters added to the weights, so that it can be averaged with another."""
    own = with_own_unet(personalized)
    merge_adapters(own.unet)
    return own


def _after_first_stage(
    model: DiffusionModel, entry: Attack, params: dict[str, Any], first: AttackData | None, steps: int, seed: int
) -> DiffusionModel:
    """The model, or a copy of it that was personalized on another subject first; adapters are merged."""
    if first is None:
        return model
    model, _ = entry.run(model, first, entry.config(**params | {"steps": steps}), seed=seed + FIRST_STAGE_SEED)
    for part in (model.unet, model.text_encoder):
        merge_adapters(part)
    return model


def draw_during_attack(
    model: DiffusionModel,
    attack: str,
    params: dict[str, Any],
    data: AttackData,
    *,
    evaluate_at: Sequence[int],
    seed: int,
    count: int,
    sampling: dict[str, Any],
    stop: Callable[[int, Tensor], bool] | None = None,
    first: AttackData | None = None,
    first_steps: int = 0,
    onto: DiffusionModel | None = None,
    trick: str | None = None,
    hand_over: float = sampling_tricks.HAND_OVER,
    base: DiffusionModel | None = None,
    on_movement: Callable[[int, Movement | None], None] | None = None,
) -> tuple[dict[int, Tensor], list[float]]:
    """Personalize a copy of the model, and generate pictures of the subject at some of the steps.

    Its seeds are its own, and every step of an attack has a generator: pictures after k steps are those of an attack of k steps.

    Args:
        model: the model under attack; it stays as it is.
        attack: see `find_attack`.
        params: values of that attack's config.
        data: what the attacker has.
        evaluate_at: numbers of steps after which pictures are generated, each from 1 to the attack's steps.
        seed: of the attack.
        count: pictures each time, one per prompt of `Attack.prompts`.
        sampling: arguments of `generate`.
        stop: (steps so far, their pictures) -> true to end the attack.
        first: data of another subject that the model is personalized on before, with the same settings.
        first_steps: steps of that first stage.
        onto: another model, onto which the adapters are loaded before it generates.
        trick: how the personalized model is made to draw (`sampling_tricks`); `None` as usual.
        hand_over: share of the timesteps at which another model takes over, for tricks that do so.
        base: the public model that does.
        on_movement: called each time with the number of steps and how far the personalized model is from `model`.

    Returns:
        Number of steps -> pictures, float32 (count, 3, h, w) in [-1, 1], as far as the attack went; and the loss of every step.

    Raises:
        UserError: there is no such attack.
        RunFailed: a loss is not finite.
    """
    entry = find_attack(attack)
    config: Any = entry.config(**params)
    pictures: dict[int, Tensor] = {}
    partners: dict[int, DiffusionModel] = {}
    attacked, steps = model, OptimizerSteps()

    def keep_partner(step: int, _: float, personalized: DiffusionModel) -> None:
        if step + 1 in evaluate_at:
            partners[step + 1] = _merged(personalized)

    def evaluate(step: int, _: float, personalized: DiffusionModel) -> bool:
        if step + 1 not in evaluate_at:
            return False
        if on_movement is not None:
            on_movement(step + 1, movement(attacked, personalized, steps.allowed))
        if onto is not None:
            personalized = carry_adapters(personalized, onto, config)
        if step + 1 in partners:
            personalized = sampling_tricks.averaged(_merged(personalized), partners[step + 1])
        pictures[step + 1] = sampling_tricks.draw(
            personalized, trick, entry.prompts(data.identifier, data.class_noun, count), ATTACK_SAMPLES.seeds(count),
            base=base, hand_over=hand_over, negative_prompt=entry.negative_prompt, sampling=sampling,
        )  # fmt: skip
        return stop is not None and stop(step + 1, pictures[step + 1])

    with steps:
        model = _after_first_stage(model, entry, params, first, first_steps, seed)
    if trick == "average_two":
        entry.run(model, data, config, seed=seed + sampling_tricks.SECOND_SEED, on_step=keep_partner)
    with steps:
        _, losses = entry.run(model, data, config, seed=seed, on_step=evaluate)
    return pictures, losses


def draw_after_attack(
    model: DiffusionModel,
    attack: str,
    params: dict[str, Any],
    data: AttackData,
    *,
    seed: int,
    count: int,
    sampling: dict[str, Any],
) -> tuple[Tensor, list[float]]:
    """Personalize a copy of the model, and generate pictures of the subject after the last step.

    Args:
        model: the model under attack; it stays as it is.
        attack: see `find_attack`.
        params: values of that attack's config.
        data: what the attacker has.
        seed: of the attack.
        count: pictures, one per prompt of `Attack.prompts`.
        sampling: arguments of `generate`.

    Returns:
        float32 (count, 3, h, w) in [-1, 1], and the loss of every step.

    Raises:
        UserError: there is no such attack.
        RunFailed: a loss is not finite.
    """
    steps = find_attack(attack).steps(params)
    pictures, losses = draw_during_attack(
        model, attack, params, data, evaluate_at=[steps], seed=seed, count=count, sampling=sampling
    )
    return pictures[steps], losses
