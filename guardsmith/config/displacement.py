"""How far attackers move the weights: a grid over learning rates, and a just-enough attack (`verify.displacement`)."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

JUST_ENOUGH = "-just-enough"
"""End of the label of the attack that the search finds."""


class DisplacementSpec(BaseModel):
    """Further runs of some attacks, to measure up to which displacement of the weights protection holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    attacks: tuple[str, ...] = ()
    """Labels of the attacks that are run further, such as one DreamBooth and one LoRA."""
    rates: tuple[float, ...] = ()
    """Multiples of an attack's learning rate at which it runs too, on protected subjects, on base and hardened model."""
    just_enough: bool = False
    """Search the base for the smallest displacement at which each of these attacks still learns the subject, and add the attack
    that causes it as one more, `LABEL-just-enough`; without a search where the recipe has an attack of that label."""
    share: float = Field(0.9, gt=0, lt=1)
    """Share of what the attack as it is reaches on the base, counted from chance, that counts as learning the subject."""
    subjects: int = Field(2, gt=0)
    """Protected subjects that the search is made on, the first of those attacked."""

    @field_validator("rates")
    @classmethod
    def _multiples(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(rates)) < len(rates) or any(not 0 < rate < 1e4 or rate == 1 for rate in rates):
            raise ValueError("these have to be different multiples above 0, other than 1 (the attack as it is)")
        return rates

    @model_validator(mode="after")
    def _of_attacks(self) -> DisplacementSpec:
        if (self.rates or self.just_enough) and not self.attacks:
            raise ValueError("rates and just_enough need attacks, the labels of those that are run further")
        return self


def at_rate(label: str, multiple: float) -> str:
    """What scores and checks call an attack at a multiple of its learning rate."""
    return f"{label}, {multiple:g} x rate"


def attack_of(name: str) -> str:
    """The label in the recipe of what scores and checks call an attack; labels have no commas."""
    return name.partition(",")[0]


def names_of_attacks(labels: Iterable[str], spec: DisplacementSpec) -> dict[str, list[str]]:
    """Label -> every name under which that attack ran: as it is, at other rates, and the just-enough one.

    Args:
        labels: of the recipe's attacks.
        spec: which of them ran further.
    """
    labels = list(labels)
    names = {label: [label, *rate_names(label, spec)] for label in labels}
    for label in spec.attacks:
        names.get(label, []).extend(names.pop(f"{label}{JUST_ENOUGH}", []))
    return names


def rate_names(label: str, spec: DisplacementSpec) -> list[str]:
    """The names of an attack at other rates than its own."""
    return [at_rate(label, multiple) for multiple in sorted(spec.rates)] if label in spec.attacks else []
