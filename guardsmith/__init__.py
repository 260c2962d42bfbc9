"""guardsmith hardens Stable Diffusion checkpoints against personalization on protected subjects, and measures the result.

    import guardsmith as gs

    registry = gs.load_registry("registry.yaml")
    hardened = gs.harden("builtin:avatar", registry, output="out")
    report = gs.verify(hardened, registry)

The functions and classes below are public; everything else may change between versions.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from guardsmith.api import Hardened, harden, load_hardened, load_recipe, load_registry, publish, verify
    from guardsmith.config.recipe import Recipe
    from guardsmith.core.errors import GuardsmithError, RunFailed, UserError
    from guardsmith.registry.loader import Registry
    from guardsmith.release.publish import Refused
    from guardsmith.reports.report import Report

_PUBLIC = {
    "Hardened": "guardsmith.api",
    "harden": "guardsmith.api",
    "load_hardened": "guardsmith.api",
    "load_recipe": "guardsmith.api",
    "load_registry": "guardsmith.api",
    "publish": "guardsmith.api",
    "verify": "guardsmith.api",
    "Recipe": "guardsmith.config.recipe",
    "GuardsmithError": "guardsmith.core.errors",
    "RunFailed": "guardsmith.core.errors",
    "UserError": "guardsmith.core.errors",
    "Registry": "guardsmith.registry.loader",
    "Refused": "guardsmith.release.publish",
    "Report": "guardsmith.reports.report",
}
"""Public name -> module. Imported when first used, so that `import guardsmith` and the command line start quickly."""

__all__ = [
    "GuardsmithError",
    "Hardened",
    "Recipe",
    "Refused",
    "Registry",
    "Report",
    "RunFailed",
    "UserError",
    "__version__",
    "harden",
    "load_hardened",
    "load_recipe",
    "load_registry",
    "publish",
    "verify",
]

# peft imports it wherever it is installed, and it then warns of kernels for networks in 4 bits, which are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'guardsmith' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
