"""The table of attacks. Adding one: a file with a config, `attack` and `ATTACK`, a line here, and a test of what it learns."""

from __future__ import annotations

from functools import cache

from guardsmith.attacks import (
    adversarial_prompt,
    cdl,
    custom_diffusion,
    dreambooth,
    lora,
    purified_cdl,
    textual_inversion,
)
from guardsmith.attacks.adaptive import cut_channels, unlearn_first, warm_restarts
from guardsmith.attacks.base import Attack
from guardsmith.core.console import warn
from guardsmith.core.plugins import find_entry

ATTACKS: dict[str, Attack] = {
    "dreambooth": dreambooth.ATTACK,
    "lora": lora.ATTACK,
    "textual_inversion": textual_inversion.ATTACK,
    "custom_diffusion": custom_diffusion.ATTACK,
    "cdl": cdl.ATTACK,
    "purified_cdl": purified_cdl.ATTACK,
    "adversarial_prompt": adversarial_prompt.ATTACK,
    # Adaptive ones, of attackers who know the protection.
    "warm_restarts": warm_restarts.ATTACK,
    "unlearn_first": unlearn_first.ATTACK,
    "cut_channels": cut_channels.ATTACK,
}

RENAMED = {"redteam": "purified_cdl"}
"""Former name -> name in the table; recipes may have either."""


@cache  # so that it warns once
def _present_name(name: str) -> str:
    if name not in RENAMED:
        return name
    warn(f"the attack {name!r} is called {RENAMED[name]!r} now; the old name will go")
    return RENAMED[name]


def find_attack(name: str) -> Attack:
    """An entry of the table by its name, or an `Attack` in any module that Python can import, `module:NAME`.

    Raises:
        UserError: there is no such attack.
    """
    return find_entry(ATTACKS, _present_name(name), Attack, "an attack")
