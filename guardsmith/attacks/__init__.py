"""The attacks by name. Adding one: a file with a config and `attack`, and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from guardsmith.attacks import dreambooth, lora
from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig
from guardsmith.models import DiffusionModel
from guardsmith.prompts import sample_prompts
from guardsmith.sampling import generate

SAMPLE_SEED = 30_000  # of the pictures that a personalized model draws; no other pictures use these seeds


class Attack(NamedTuple):
    """One entry of the table."""

    run: Callable[..., Any]
    config: type[DreamBoothConfig]
    paper: str


ATTACKS: dict[str, Attack] = {
    "dreambooth": Attack(dreambooth.attack, dreambooth.DreamBoothConfig, "hf.co/papers/2208.12242"),
    "lora": Attack(lora.attack, lora.LoraConfig, "hf.co/papers/2106.09685"),
}


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
    """Personalize a copy of the model and ask it for pictures of the subject.

    Args:
        model: the model under attack; it stays as it is.
        attack: a name in `ATTACKS`.
        params: values of that attack's config.
        data: what the attacker has.
        seed: of the attack.
        count: how many pictures (`sample_prompts`).
        sampling: arguments of `generate`.

    Returns:
        The pictures, float32 (count, 3, h, w) in [-1, 1], and the attack's loss at every step.
    """
    chosen = ATTACKS[attack]
    personalized, losses = chosen.run(model, data, chosen.config(**params), seed=seed)
    prompts = sample_prompts(data.identifier, data.class_noun, count)
    return generate(personalized, prompts, range(SAMPLE_SEED, SAMPLE_SEED + count), **sampling), losses


__all__ = ["ATTACKS", "Attack", "AttackData", "draw_after_attack"]
