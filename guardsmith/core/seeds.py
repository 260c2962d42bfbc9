"""Seeds of everything that is drawn beside the user's own: one table, so that no two purposes draw from the same noise.

Two sets of pictures from the same seeds share their noise: a score of one would depend on the other. Every range has a start and
a length, a test holds that no two overlap, and a new purpose takes a new line.
"""

from __future__ import annotations

from typing import NamedTuple

from guardsmith.core.errors import UserError


class SeedRange(NamedTuple):
    """Consecutive seeds for one purpose.

    Attributes:
        start: the first seed.
        length: how many there are.
    """

    start: int
    length: int = 10_000

    @property
    def end(self) -> int:
        """The first seed that is not in the range any more."""
        return self.start + self.length

    def seeds(self, count: int, first: int = 0) -> range:
        """So many seeds, from the one at place `first` on.

        Raises:
            UserError: the range has fewer.
        """
        if first + count > self.length:
            raise UserError(
                f"{first + count:,} pictures of one kind are more than the {self.length:,} that have seeds; ask for fewer."
            )
        return range(self.start + first, self.start + first + count)


HARDENING_CLASS = SeedRange(10_000)
"""Class pictures that a hardening draws from the base."""
HARDENING_BENIGN = SeedRange(20_000)
"""Pictures of benign prompts that a hardening draws from the base."""
ATTACK_SAMPLES = SeedRange(30_000)
"""What a personalized model draws of its subject, at every evaluation point."""
BENIGN_BASE = SeedRange(40_000)
"""The base's pictures of benign prompts, that others are compared with."""
BENIGN_AGAIN = SeedRange(50_000)
"""Pictures of the same prompts by the base with other seeds, and by the hardened model."""
ATTACK_CLASS = SeedRange(60_000)
"""Class pictures for the attackers' prior preservation."""
CLOAKING_CLASS = SeedRange(70_000)
"""Class pictures for the surrogates of a cloak."""
RELEASED = SeedRange(90_000)
"""What the released weights draw of a protected subject without an attack."""
HARDENING_REPLACEMENT = SeedRange(100_000)
"""What a method draws in the place of its subjects."""
PROBE = SeedRange(110_000)
"""Pictures for people to look at while a model is hardened."""
SCREENING = SeedRange(120_000)
"""What uploaded adapters and checkpoints draw when they are screened."""
DEPLOYABILITY_REFERENCE = SeedRange(130_000)
"""The base's pictures in checks of everyday use, that others are compared with."""
DEPLOYABILITY = SeedRange(140_000)
"""Pictures of the same prompts by both models in every setting of those checks."""

FIRST_STAGE_OFFSET = 1_000_000
"""Added to the seed of an attack's training for its first stage on another subject: seeds of training, not of pictures."""
SECOND_MODEL_OFFSET = 2_000_000
"""Added to the seed of an attack's training for the second of two models whose weights are averaged."""


def picture_ranges() -> dict[str, SeedRange]:
    """Every range of this module by its name."""
    return {name: value for name, value in globals().items() if isinstance(value, SeedRange)}
