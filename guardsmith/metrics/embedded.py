"""Files of the embedded judges. The gate reads their levels without importing the networks, which takes a second."""

from pathlib import Path

JUDGES = Path(__file__).parent.parent / "builtin" / "judges"
"""Folder of the weights and of the levels that were measured with them."""
