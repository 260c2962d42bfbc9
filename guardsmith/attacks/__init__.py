"""The attacks by name. Adding one: a file with a config and `attack`, and a line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from guardsmith.attacks import dreambooth, lora
from guardsmith.attacks.dreambooth import AttackData, DreamBoothConfig


class Attack(NamedTuple):
    """One entry of the table."""

    run: Callable[..., Any]
    config: type[DreamBoothConfig]
    paper: str


ATTACKS: dict[str, Attack] = {
    "dreambooth": Attack(dreambooth.attack, dreambooth.DreamBoothConfig, "hf.co/papers/2208.12242"),
    "lora": Attack(lora.attack, lora.LoraConfig, "hf.co/papers/2106.09685"),
}

__all__ = ["ATTACKS", "Attack", "AttackData"]
