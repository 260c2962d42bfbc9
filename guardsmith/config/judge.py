"""Who measures similarity (`judge` in a recipe), and the file of levels that belongs to a judge (`guardsmith levels`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from guardsmith.core.errors import UserError
from guardsmith.core.redaction import Place
from guardsmith.core.yaml_text import read_yaml
from guardsmith.metrics import find_judge
from guardsmith.registry.types import Day

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class JudgeSpec(BaseModel):
    """Who measures similarity."""

    model_config = _STRICT

    name: str = "avatar"
    """`avatar`: the embedded encoder, for the embedded world only. `dino`, `clip`: vision transformers of the Hub. `face`: dlib's
    face recognition (`pip install guardsmith[face]`). `module:NAME`: one of your own."""
    model: Place | None = None
    """Folder or Hub id of the encoder, if not the usual one; for `face`, the DINO that compares pictures of benign prompts."""
    clip_t: Place | None = None
    """Folder or Hub id of a CLIP that measures how well pictures fit their benign prompts (CLIP-T); `null`: not measured."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            find_judge(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name


class ClassLevels(BaseModel):
    """What similarities mean for one class."""

    model_config = _STRICT

    chance: float = Field(ge=-1, le=1)
    """Mean similarity of two different subjects."""
    chance_high: float = Field(ge=-1, le=1)
    """What 95 % of such pairs stay below: the limit for protected subjects."""
    genuine: float = Field(ge=-1, le=1)
    """Mean similarity of two real pictures of one subject."""

    @model_validator(mode="after")
    def _in_order(self) -> ClassLevels:
        if not self.chance <= self.chance_high < self.genuine:
            raise ValueError("levels must rise from chance over chance_high to genuine")
        return self


class MeasuredLevels(BaseModel):
    """A file of levels: which judge, measured on what, and what its similarities mean."""

    model_config = _STRICT

    judge: str
    """The judge's name."""
    model: Place | None = None
    """Its encoder, where it is not the usual one."""
    dated: Day
    """Day of the measurement."""
    measured_on: str = ""
    """Pictures, in words: how many identities of which class."""
    classes: dict[str, ClassLevels] = Field(min_length=1)
    """Class noun -> levels."""


class RecipeJudge(JudgeSpec):
    """The judge of a recipe, with its levels."""

    levels: Place | None = None
    """File of `guardsmith levels`, relative to the recipe; its judge is the recipe's where none is named. When a recipe is read,
    its content takes the place of its name (`measured`)."""
    measured: MeasuredLevels | None = None
    """The levels themselves."""


def load_levels(file: Path) -> MeasuredLevels:
    """Read and check a file of levels.

    Raises:
        UserError: every problem, one sentence a line.
    """
    try:
        return MeasuredLevels.model_validate(read_yaml(file, "a file of levels"))
    except ValidationError as error:
        places = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
        raise UserError(
            "\n".join(f"{file}: {place}: {message[:1].lower()}{message[1:]}" for place, message in places)
        ) from None


def with_levels(judge: RecipeJudge, folder: Path, names_judge: bool) -> RecipeJudge:
    """The judge of a recipe with the content of its file of levels in place of the file's name.

    Args:
        judge: as the recipe has it.
        folder: of the recipe; a relative name of a file begins there.
        names_judge: whether the recipe names a judge; otherwise it is the one of the file.

    Raises:
        UserError: there is no such file, it has problems, or it is of another judge.
    """
    if judge.levels is None:
        return judge
    file = (folder / Path(judge.levels).expanduser()).resolve()
    if not file.is_file():
        raise UserError(
            f"judge.levels: there is no file {file}; measure one with `guardsmith levels FOLDER --judge NAME`"
        )
    levels = load_levels(file)
    if levels.judge == JudgeSpec().name:
        raise UserError(
            f"judge.levels: {file} is of the embedded judge, which has its own levels; leave it out, or measure another."
        )
    if names_judge and judge.name != levels.judge:
        raise UserError(
            f"judge.levels: {file} has the levels of {levels.judge}, and the recipe's judge is {judge.name}"
        )
    values: dict[str, Any] = {"name": levels.judge, "model": judge.model or levels.model, "clip_t": judge.clip_t}
    if judge.model is not None and judge.model != levels.model:
        raise UserError(
            f"judge.levels: {file} was measured with {levels.model or 'the usual encoder'}, and judge.model is {judge.model}"
        )
    try:
        return RecipeJudge.model_validate(values | {"measured": levels.model_dump(mode="json")})
    except ValidationError as error:
        raise UserError(f"judge.levels: {file}: {error.errors()[0]['msg']}") from None
