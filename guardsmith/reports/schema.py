"""What `report.json` holds, for other tools: committed as docs/reference/report.schema.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from guardsmith.config.recipe import Recipe
from guardsmith.gate.rules import Status

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class CheckTold(BaseModel):
    """One line of the verdict."""

    model_config = _STRICT
    name: str
    """What is checked."""
    subject: str
    """Id of the subject or control; empty for the model as a whole."""
    attack: str
    """Label of the attack, with the share of its usual steps where it went on; empty for ordinary prompts."""
    status: Status
    """Its result."""
    sentence: str
    """What was found, in words."""
    value: float | None
    """What was measured; null if it could not be."""
    low: float | None
    """Lower end of its 95 % interval."""
    high: float | None
    """Upper end."""
    limit: float | None
    """What the unfavourable end is compared with."""


class IntervalTold(BaseModel):
    """A mean with its 95 % bootstrap interval."""

    model_config = _STRICT
    mean: float
    """Over units and their pictures."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Pictures scored."""
    unscored: int
    """Pictures that could not be."""


class LevelsTold(BaseModel):
    """What similarities mean for one class."""

    model_config = _STRICT
    chance: float
    """Mean similarity of two different subjects of the same style."""
    chance_high: float
    """What 95 % of such pairs stay below: the limit for protected subjects."""
    genuine: float
    """Mean similarity of two real pictures of one subject."""


class Scored(BaseModel):
    """What one attack reached on one subject at one look."""

    model_config = _STRICT
    side: Literal["base", "hardened"]
    """The model attacked."""
    subject: str
    """Id of the subject or control."""
    attack: str
    """Label of the attack in the recipe."""
    look: float = Field(gt=0)
    """Share of the attack's usual steps."""
    units: list[list[float | None]]
    """Per unit (identifier x seed) the similarity of each picture to the subject's real ones; null where none was measured."""
    interval: IntervalTold | None
    """Their mean with its 95 % interval; null where nothing was scored."""
    faceless: float | None = None
    """Share of the pictures in which no face is found (FDFR); null or absent unless the judge looks for faces."""


class StepsToBreak(BaseModel):
    """After how many steps an attack has learnt half of what it usually learns on the base."""

    model_config = _STRICT
    subject: str
    """Id of the protected subject."""
    attack: str
    """Label of the attack."""
    base: int | None
    """Steps on the base; null where no look showed it."""
    hardened: int | None
    """Steps on the hardened model; null where it held at every look."""
    tried: int
    """How far the attack went on the hardened model."""


class Attacked(BaseModel):
    """How many were attacked."""

    model_config = _STRICT
    protected: int
    """Protected subjects attacked."""
    of: int
    """Protected subjects in the registry."""
    controls: int
    """Controls."""


class Who(BaseModel):
    """A subject that was attacked."""

    model_config = _STRICT
    id: str
    """In the registry."""
    class_noun: str
    """Its class."""
    role: Literal["protected", "control"]
    """What is wanted of it."""


class Utility(BaseModel):
    """Ordinary prompts, hardened against base."""

    model_config = _STRICT
    kid_hardened: float | None
    """KID of the hardened model's pictures to the base's."""
    kid_base: float | None
    """KID of the base's with other seeds to the base's."""
    kid_ratio: float | None
    """The first over the second."""
    kid_ratio_low: float | None
    """Lower end of its 95 % interval."""
    kid_ratio_high: float | None
    """Upper end."""
    destroyed: int | None = None
    """How many of the hardened model's pictures are further from the base's than chance explains."""
    fidelity_hardened: float | None
    """Share of what the prompts ask for that the hardened model's pictures show."""
    fidelity_base: float | None
    """The same of the base's."""
    clip_t_hardened: list[float | None] | None = None
    """How well each of the hardened model's pictures fits its prompt (CLIP-T); null or absent where nobody was asked."""
    clip_t_base: list[float | None] | None = None
    """The same of the base's, in the same order."""
    n: int
    """Prompts."""


class PolicyTold(BaseModel):
    """The policy that judged."""

    model_config = _STRICT
    name: str
    """As its file says."""
    dated: str
    """As its file says, YYYY-MM-DD."""
    measured_on: str
    """Where its levels come from."""
    judge: dict[str, str | None]
    """Who measured similarity: name, and the encoder where it is not the usual one."""
    digest: str
    """Of judge, rules and levels."""


class Hardening(BaseModel):
    """What is on record of how the model came about; null where guardsmith did not make it."""

    model_config = _STRICT
    base: str
    """Name of the base."""
    base_digest: str
    """Of its weights."""
    model_digest: str
    """Of the weights that were judged."""
    registry_digest: str
    """Of who is protected."""
    method: str | None
    """Hardening method."""
    params: dict[str, Any] | None
    """Its parameters."""
    seed: int | None
    """Of everything random."""
    seconds: float | None
    """How long it took."""
    unet_forward_equivalents: int | None
    """What it cost."""
    files: dict[str, str] | None = None
    """File of the model that was judged -> its SHA-256; reports from before this was recorded have none."""
    carries: list[str] | None = None
    """Files and tensors that a checkpoint holds and that are no part of the model; null where it is not told."""


class Report(BaseModel):
    """`report.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, serialize_by_alias=True)
    version: Literal[1] = Field(alias="schema")
    """Version of this schema."""
    verdict: Status
    """The worst of the checks."""
    exit_code: Literal[0, 1, 3]
    """Of the command: pass, fail, inconclusive."""
    checks: list[CheckTold]
    """Every check of the gate."""
    scores: list[Scored]
    """What was measured."""
    released: dict[str, list[float | None]] | None = None
    """Protected subject -> similarity to it of every picture that the released weights draw of it without an attack."""
    steps_to_break: list[StepsToBreak]
    """Where attackers went on for longer than usual."""
    attacked: Attacked
    """How many were."""
    subjects: list[Who]
    """Who was."""
    utility: Utility
    """Ordinary prompts."""
    failed_units: dict[str, str]
    """Attacks that did not run -> why."""
    policy: PolicyTold | None = None
    """Whose rules and levels; reports from before there were policies have none."""
    calibration: dict[str, LevelsTold]
    """Class noun -> what similarities mean."""
    hardening: Hardening
    """Of the model."""
    recipe: Recipe
    """What was asked."""
    run: dict[str, Any]
    """Versions, machine, time."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of `report.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}
