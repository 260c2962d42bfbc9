"""Attacks that personalize a model on a subject: one file each, and the table that lists them.

Verdicts on what an attack achieved are not here but in `gate`. An attack of your own, without changing guardsmith, is an `Attack`
in any module, which a recipe names as `module:NAME`.
"""

from guardsmith.attacks.base import Attack, AttackData, OnStep
from guardsmith.attacks.generation import FIRST_STAGE_SEED, SAMPLE_SEED, draw_after_attack, draw_during_attack
from guardsmith.attacks.table import ATTACKS, find_attack

__all__ = [
    "ATTACKS",
    "FIRST_STAGE_SEED",
    "SAMPLE_SEED",
    "Attack",
    "AttackData",
    "OnStep",
    "draw_after_attack",
    "draw_during_attack",
    "find_attack",
]
