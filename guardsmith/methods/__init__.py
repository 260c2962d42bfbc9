"""The hardening methods by name. Adding one: a file with a `MethodConfig` and a `HardeningMethod`, and a line here.

One of your own, without changing guardsmith, is an instance of `HardeningMethod` in any module, which a recipe or `--method`
names as `module:NAME`. What surrounds a method (loading, drawing, checkpoints, saving) is in `guardsmith.hardening`.
"""

from typing import Any

from guardsmith.core.plugins import find_entry
from guardsmith.methods.apdm import Apdm
from guardsmith.methods.base import (
    HardeningContext,
    HardeningMethod,
    HardeningResult,
    MemoryFootprint,
    MethodConfig,
    Preparation,
    Prepared,
)
from guardsmith.methods.imma import Imma
from guardsmith.methods.persguard import PersGuard
from guardsmith.methods.tripwire.method import Tripwire

Method = HardeningMethod[Any]

METHODS: dict[str, Method] = {
    "apdm": Apdm(),
    "imma": Imma(),
    "persguard": PersGuard(),
    "tripwire": Tripwire(),
}


def find_method(name: str) -> Method:
    """An entry of `METHODS`, or a `HardeningMethod` in any module that Python can import, `module:NAME`.

    Raises:
        UserError: there is no such method.
    """
    return find_entry(METHODS, name, HardeningMethod, "a method")  # type: ignore[type-abstract]


__all__ = [
    "METHODS",
    "HardeningContext",
    "HardeningMethod",
    "HardeningResult",
    "MemoryFootprint",
    "Method",
    "MethodConfig",
    "Preparation",
    "Prepared",
    "find_method",
]
