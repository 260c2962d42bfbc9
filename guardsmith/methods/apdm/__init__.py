"""APDM: its parameters, losses and training, one module each.

What it shares with other methods is in `guardsmith.training` and `guardsmith.diffusion`.
"""

from guardsmith.methods.apdm.config import ApdmConfig
from guardsmith.methods.apdm.method import Apdm

__all__ = ["Apdm", "ApdmConfig"]
