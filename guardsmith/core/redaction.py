"""What must not be published: annotations where a field is declared, and the function that acts on them.

A field that holds the id of a subject is a `SubjectId`, one that holds the place of a model or file a `Place`, and so on. So the
declaration of a report's field decides what the public reads of it, and there is no list of keys elsewhere.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Model = TypeVar("Model", bound=BaseModel)


class Private(Enum):
    """What a string holds that the public may not read as it is."""

    SUBJECT = "id of a subject or control"
    UNIT = "name of a unit of the attack matrix, side/subject/attack/identifier/seed"
    PLACE = "model or file, perhaps with a path of this machine"
    REASON = "why something failed, which may name anything"
    WITHHELD = "nothing of it is for the public, who reads null"


SubjectId = Annotated[str, Private.SUBJECT]
UnitName = Annotated[str, Private.UNIT]
Place = Annotated[str, Private.PLACE]
Reason = Annotated[str, Private.REASON]

Rules = Mapping[Private, Callable[[str], str]]
"""What the public reads in the place of a string, by what it holds."""


def redacted(model: Model, rules: Rules) -> Model:
    """A copy in which every string that is annotated as private is replaced.

    Args:
        model: with annotated fields; models, dataclasses, lists, tuples and dicts in it are walked too. A private mark on a
            field that is no string counts for every string in it.
        rules: one for every mark but `WITHHELD`, which may stand on fields that can be null.
    """
    infos = type(model).model_fields
    return model.model_copy(
        update={name: _walk(getattr(model, name), _kind(info), rules) for name, info in infos.items()}
    )


def _kind(info: FieldInfo | None) -> Any:
    """The annotation of a field with its marks, which pydantic keeps apart; `None` if nothing is known."""
    if info is None or not info.metadata:
        return None if info is None else info.annotation
    return Annotated[(info.annotation, *info.metadata)]


def _walk(value: Any, kind: Any, rules: Rules, mark: Private | None = None) -> Any:
    while get_origin(kind) in (Annotated, Union, types.UnionType):
        if get_origin(kind) is Annotated:
            kind, *metadata = get_args(kind)
            mark = next((each for each in metadata if isinstance(each, Private)), mark)
        else:
            kind = next((each for each in get_args(kind) if _fits(value, each)), None)
    if mark is Private.WITHHELD:
        return None
    inner = get_args(kind)
    if isinstance(value, str):
        return value if mark is None else rules[mark](value)
    if isinstance(value, BaseModel):
        return redacted(value, rules)
    if is_dataclass(value) and not isinstance(value, type):
        infos = getattr(type(value), "__pydantic_fields__", {})
        of_fields = {field.name: _kind(infos.get(field.name)) for field in fields(value)}
        return replace(value, **{name: _walk(getattr(value, name), own, rules) for name, own in of_fields.items()})
    if isinstance(value, dict):
        of_keys, of_values = inner if len(inner) == 2 else (None, None)
        return {_walk(key, of_keys, rules, mark): _walk(each, of_values, rules, mark) for key, each in value.items()}
    if isinstance(value, list | tuple):
        kinds = (
            inner
            if isinstance(value, tuple) and len(inner) == len(value)
            else (inner[0] if inner else None,) * len(value)
        )
        return type(value)(_walk(each, own, rules, mark) for each, own in zip(value, kinds, strict=True))
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether one alternative of a union is about this value."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    kind = get_origin(kind) or kind
    return kind is Any or (isinstance(kind, type) and isinstance(value, kind))
