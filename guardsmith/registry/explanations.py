"""Pydantic's errors about a registry as sentences at their lines."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from guardsmith.core.errors import did_you_mean
from guardsmith.core.yaml_text import KeyPath, Problem, line_of
from guardsmith.registry.types import Consent, ImageEntry, Kind, RegistryFile, Split, SubjectEntry

_PATTERNS = {
    "id": "an id has only a-z, 0-9, - and _ and begins with a letter or digit",
    "class_noun": "a class noun is lowercase words of a-z, like person or teddy bear",
    "sha256": "a sha256 is 64 hexadecimal digits in lowercase; `sha256sum FILE` prints it",
}
_MODELS: dict[str, type[BaseModel]] = {
    "subjects": SubjectEntry,
    "controls": SubjectEntry,
    "consent": Consent,
    "images": ImageEntry,
}
NO_SUBJECTS = "the registry has no subjects: list at least one subject (`guardsmith registry add` writes one)"


def explain(
    error: ValidationError, data: Mapping[str, Any], lines: Mapping[KeyPath, int], problems: list[Problem]
) -> set[KeyPath]:
    """Add a problem for each of pydantic's errors.

    Args:
        error: pydantic's.
        data: what it was about.
        lines: see `yaml_text.parse`.
        problems: is added to.

    Returns:
        The missing keys for which a misspelt key probably stands.
    """
    details = error.errors(include_url=False)
    typos: set[KeyPath] = set()
    for detail in details:
        if detail["type"] == "extra_forbidden":
            *parent, key = detail["loc"]
            close = difflib.get_close_matches(str(key).lower(), _keys(parent), n=1)
            typos.update((*parent, match) for match in close)
    for detail in details:
        where: KeyPath = detail["loc"]
        if detail["type"] == "missing" and where in typos:
            continue  # the sentence about the unknown key says so
        if detail["type"] == "too_short" and detail["input"]:
            continue  # pydantic counts valid entries only, and has errors for the others
        sentence = _sentence(detail["type"], where, detail["input"], detail["msg"], detail.get("ctx", {}))
        label = label_of(data, where)
        problems.append(Problem(line_of(lines, where), f"{label}: {sentence}" if label else sentence))
    return typos


def _keys(parent: Sequence[str | int]) -> list[str]:
    names = [part for part in parent if isinstance(part, str)]
    return list((_MODELS.get(names[-1], SubjectEntry) if names else RegistryFile).model_fields)


def label_of(data: Mapping[str, Any], where: KeyPath) -> str:
    """The subject that a value belongs to, by its id or its place in the list, for messages; "" outside of subjects."""
    if len(where) < 2:
        return ""
    group, index = where[:2]
    try:
        return f"{str(group)[:-1]} {str(data[str(group)][index]['id'])!r}"
    except (KeyError, IndexError, TypeError):
        return f"{str(group)[:-1]} number {int(index) + 1}"


def _sentence(kind: str, where: KeyPath, value: object, message: str, context: Mapping[str, Any]) -> str:
    names = [part for part in where if isinstance(part, str)]
    key = names[-1] if names else "the registry"
    text = reprlib.repr(value)
    if where == ("subjects",) and (kind in ("missing", "too_short") or value is None):
        return NO_SUBJECTS
    if kind == "extra_forbidden":
        keys = _keys(where[:-1])
        return f"unknown key {key!r}{did_you_mean(key, keys) or '; known keys are ' + ', '.join(keys)}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind == "literal_error" and key == "version":
        return f"version is {text}, but this guardsmith reads version 1"
    if kind == "literal_error":
        choices = get_args(Kind if key == "kind" else Split)
        return f"{key} is {text}, not one of {', '.join(choices)}{did_you_mean(value, choices)}"
    if kind == "string_pattern_mismatch":
        return f"{key} is {text}, but {_PATTERNS[key]}"
    if kind == "string_type":
        return f"{key} is {text}, which YAML does not read as text: write it in quotes"
    if kind == "string_too_long":
        return f"{key} is {text}, but may have at most {context['max_length']} characters: shorten it"
    if kind == "string_too_short":
        return f"{key} is empty: fill it in or remove it"
    if kind == "tuple_type":
        return f"{key} must be a list (lines that begin with '- '), not {text}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        what = key if where[-1] == key else f"an entry of {key}"
        return f"{what} must be a mapping (`key: value`), not {text}"
    if kind == "value_error":
        reason = str(context["error"])
        return reason if isinstance(value, Mapping) else f"{key} is {text}, but {reason}"
    return f"{key} is {text}: {message}"
