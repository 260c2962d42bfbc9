"""The attacks by name. Adding one: a file with a config and `attack`, and a line here.

One of your own, without changing guardsmith, is an `Attack` in any module, which a recipe names as `module:NAME`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from torch import Tensor

from guardsmith.attacks import adversarial_prompt, cdl, custom_diffusion, dreambooth, lora, redteam, textual_inversion
from guardsmith.attacks.adaptive import cut_wire, unlearn_first, warm_restarts
from guardsmith.attacks.dreambooth import AttackData
from guardsmith.core.plugins import find_entry
from guardsmith.core.seeds import ATTACK_SAMPLES, FIRST_STAGE_OFFSET
from guardsmith.diffusion.prompts import sample_prompts
from guardsmith.diffusion.sampling import generate
from guardsmith.models.checkpoint import DiffusionModel

FIRST_STAGE = FIRST_STAGE_OFFSET
SAMPLE_SEED = ATTACK_SAMPLES.start


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
        new_words: whether it trains words of the text encoder, which only Stable Diffusion 1.x and 2.x have here.
        trains: whether it learns the subject. One that only asks need not succeed on the base, nor for controls.
        revision: to be raised when the same settings give other pictures than before, so that kept units are run again.
    """

    run: Callable[..., Any]
    config: type[BaseModel]
    paper: str
    called: Callable[[str, str], tuple[str, str]] = _words
    suffix: str = ""
    negative_prompt: str = ""
    new_words: bool = False
    trains: bool = True
    revision: int = 1

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
        new_words=True,
    ),
    "custom_diffusion": Attack(
        custom_diffusion.attack,
        custom_diffusion.CustomDiffusionConfig,
        "hf.co/papers/2212.04488",
        custom_diffusion.called,
        new_words=True,
    ),
    "cdl": Attack(
        cdl.attack,
        cdl.CdlConfig,
        "hf.co/papers/2406.18944",
        suffix=cdl.SUFFIX,
        negative_prompt=cdl.NEGATIVE_PROMPT,
    ),
    "redteam": Attack(
        redteam.attack,
        redteam.RedteamConfig,
        "hf.co/papers/2406.18944",
        suffix=cdl.SUFFIX,
        negative_prompt=cdl.NEGATIVE_PROMPT,
    ),
    "adversarial_prompt": Attack(
        adversarial_prompt.attack,
        adversarial_prompt.AdversarialPromptConfig,
        "hf.co/papers/2310.11868",
        adversarial_prompt.called,
        new_words=True,
        trains=False,
    ),
    # Adaptive ones, of attackers who know the protection.
    "warm_restarts": Attack(warm_restarts.attack, warm_restarts.WarmRestartsConfig, "hf.co/papers/1608.03983"),
    "unlearn_first": Attack(unlearn_first.attack, unlearn_first.UnlearnFirstConfig, "guardsmith"),
    "cut_wire": Attack(cut_wire.attack, cut_wire.CutWireConfig, "guardsmith"),
}


def find_attack(name: str) -> Attack:
    """An entry of `ATTACKS`, or an `Attack` in any module that Python can import, `module:NAME`.

    Raises:
        UserError: there is no such attack.
    """
    return find_entry(ATTACKS, name, Attack, "an attack")


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
    first: AttackData | None = None,
    first_steps: int = 0,
    onto: DiffusionModel | None = None,
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
        first: somebody else to personalize the model on before, with the same settings.
        first_steps: for how many steps.
        onto: another model, onto which the adapters are loaded before it draws.

    Returns:
        For each look that was reached the pictures, float32 (count, 3, h, w) in [-1, 1], and the loss of every step.
    """
    chosen = find_attack(attack)
    config: Any = chosen.config(**params)
    prompts = chosen.prompts(data.identifier, data.class_noun, count)
    drawn: dict[int, Tensor] = {}

    def look(step: int, _: float, personalized: DiffusionModel) -> bool:
        if step + 1 not in looks:
            return False
        seeds = ATTACK_SAMPLES.seeds(count)
        if onto is not None:
            personalized = lora.carry_adapters(personalized, onto, config)
        images = generate(personalized, prompts, seeds, negative_prompt=chosen.negative_prompt, **sampling)
        drawn[step + 1] = images
        return enough is not None and enough(step + 1, images)

    if first is not None:
        before = chosen.config(**params | {"steps": first_steps})
        model, _ = chosen.run(model, first, before, seed=seed + FIRST_STAGE)
        for part in (model.unet, model.text_encoder):
            lora.merge_adapters(part)
    _, losses = chosen.run(model, data, config, seed=seed, on_step=look)
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
    steps = find_attack(attack).steps(params)
    drawn, losses = draw_during_attack(
        model, attack, params, data, looks=[steps], seed=seed, count=count, sampling=sampling
    )
    return drawn[steps], losses


__all__ = ["ATTACKS", "Attack", "AttackData", "draw_after_attack", "draw_during_attack", "find_attack"]
