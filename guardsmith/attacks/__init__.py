"""The attacks by name. Adding one: a file with a config and `attack`, and a line here."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from torch import Tensor

from guardsmith.attacks import cdl, custom_diffusion, dreambooth, lora, textual_inversion
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
        run: (model, data, config, seed=..., on_step=...) -> the personalized model, and the loss of every step.
        config: its settings.
        paper: where it comes from.
        called: (identifier, class noun) -> the same as the personalized model is asked for them.
        suffix: what its prompts end in.
        negative_prompt: what it is asked not to draw.
    """

    run: Callable[..., Any]
    config: type[BaseModel]
    paper: str
    called: Callable[[str, str], tuple[str, str]] = _words
    suffix: str = ""
    negative_prompt: str = ""

    def steps(self, params: dict[str, Any]) -> int:
        """How many steps these settings ask for."""
        return int(self.config(**params).model_dump()["steps"])

    def prompts(self, identifier: str, class_noun: str, count: int) -> list[str]:
        """What the personalized model is asked for."""
        return [prompt + self.suffix for prompt in sample_prompts(*self.called(identifier, class_noun), count)]


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
    "cdl": Attack(
        cdl.attack,
        cdl.CdlConfig,
        "hf.co/papers/2406.18944",
        suffix=cdl.SUFFIX,
        negative_prompt=cdl.NEGATIVE_PROMPT,
    ),
}


def draw_during_attack(
    model: DiffusionModel,
    attack: str,
    params: dict[str, Any],
    data: AttackData,
    *,
    looks: Sequence[int],
    seed: int,
    count: int,
    sampling: dict[str, Any],
    enough: Callable[[int, Tensor], bool] | None = None,
) -> tuple[dict[int, Tensor], list[float]]:
    """Personalize a copy of the model, and ask it for pictures of the subject on the way.

    Drawing does not disturb the training: its seeds are its own, and every step of an attack draws from a generator of that
    step. So the pictures after k steps are those of an attack that ends there.

    Args:
        model: the model under attack; it stays as it is.
        attack: a name in `ATTACKS`.
        params: values of that attack's config.
        data: what the attacker has.
        looks: after how many steps to draw, each at least 1 and at most the attack's steps.
        seed: of the attack.
        count: how many pictures each time (`Attack.prompts`).
        sampling: arguments of `generate`.
        enough: told the steps so far and the pictures of a look; true ends the attack.

    Returns:
        For each look that was reached the pictures, float32 (count, 3, h, w) in [-1, 1], and the loss of every step.
    """
    chosen = ATTACKS[attack]
    prompts = chosen.prompts(data.identifier, data.class_noun, count)
    drawn: dict[int, Tensor] = {}

    def look(step: int, _: float, personalized: DiffusionModel) -> bool:
        if step + 1 not in looks:
            return False
        seeds = range(SAMPLE_SEED, SAMPLE_SEED + count)
        images = generate(personalized, prompts, seeds, negative_prompt=chosen.negative_prompt, **sampling)
        drawn[step + 1] = images
        return enough is not None and enough(step + 1, images)

    _, losses = chosen.run(model, data, chosen.config(**params), seed=seed, on_step=look)
    return drawn, losses


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
    """The same with one look, at the end."""
    steps = ATTACKS[attack].steps(params)
    drawn, losses = draw_during_attack(
        model, attack, params, data, looks=[steps], seed=seed, count=count, sampling=sampling
    )
    return drawn[steps], losses


__all__ = ["ATTACKS", "Attack", "AttackData", "draw_after_attack", "draw_during_attack"]
