"""Tripwire, guardsmith's own method: recognition of protected subjects in the U-Net, and the trigger that overrides its output.

Nothing outside of this package but its adaptive attacker knows how it works.
"""
