"""The attacks by name. Adding one: a file with a config and `attack`, and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel
from torch import Tensor

from guardsmith.attacks import custom_diffusion, dreambooth, lora, textual_inversion
from guardsmith.attacks.dreambooth import AttackData
from guardsmith.models import DiffusionModel
from guardsmith.prompts import sample_prompts
from guardsmith.sampling import generate

SAMPLE_SEED = 30_000  # of the pictures that a personalized model draws; no other pictures use these seeds


def _words(identifier: str, class_noun: str) -> tuple[str, str]:
    return identifier, class_noun


class Attack(NamedTuple):
    """One entry of the table.

    Attributes:
        run: (model, data, config, seed=...) -> the personalized model, and the loss of every step.
        config: its settings.
        paper: where it comes from.
        called: (identifier, class noun) -> the same as the personalized model is asked for them.
    """

    run: Callable[..., Any]
    config: type[BaseModel]
    paper: str
    called: Callable[[str, str], tuple[str, str]] = _words

    def prompts(self, identifier: str, class_noun: str, count: int) -> list[str]:
        """What the personalized model is asked for."""
        return sample_prompts(*self.called(identifier, class_noun), count)


ATTACKS: dict[str, Attack] = {
    "dreambooth": Attack(dreambooth.attack, dreambooth.DreamBoothConfig, "hf.co/papers/2208.12242"),
    "lora": Attack(lora.attack, lora.LoraConfig, "hf.co/papers/2106.09685"),
    "textual_inversion": Attack(
        textual_inversion.attack,
        textual_inversion.TextualInversionConfig,
        "hf.co/papers/2208.01618",
        textual_inversion.called,
    ),
    "custom_diffusion": Attack(
        custom_diffusion.attack,
        custom_diffusion.CustomDiffusionConfig,
        "hf.co/papers/2212.04488",
        custom_diffusion.called,
    ),
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
        count: how many pictures (`Attack.prompts`).
        sampling: arguments of `generate`.

    Returns:
        The pictures, float32 (count, 3, h, w) in [-1, 1], and the attack's loss at every step.
    """
    chosen = ATTACKS[attack]
    personalized, losses = chosen.run(model, data, chosen.config(**params), seed=seed)
    prompts = chosen.prompts(data.identifier, data.class_noun, count)
    return generate(personalized, prompts, range(SAMPLE_SEED, SAMPLE_SEED + count), **sampling), losses


__all__ = ["ATTACKS", "Attack", "AttackData", "draw_after_attack"]
