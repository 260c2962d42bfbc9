"""A registry file as text: YAML with the line of every value, and pydantic's errors as sentences at their lines."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError

from guardsmith.core.errors import UserError, did_you_mean
from guardsmith.registry.types import Consent, ImageEntry, Kind, RegistryFile, Split, SubjectEntry

KeyPath = tuple[str | int, ...]
"""Where a value is in the YAML tree: ("subjects", 0, "images", 3, "split")."""


class Problem(NamedTuple):
    """Something wrong, or weak, at a line of the file."""

    line: int
    sentence: str


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader (the C one crashes on deep nesting) that leaves dates as text.

    SafeLoader raises an error without a line for 2026-02-30; as text, the date is checked with its place at hand.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (SafeLoader's own attribute, which mypy knows as an instance variable)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_MAX_VALUES = 200_000  # aliases can make a small file stand for billions of values


def parse(path: Path, text: str) -> tuple[Any, dict[KeyPath, int], list[Problem]]:
    """The data of a YAML text, the line of every key and list item, and its duplicate keys."""
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines, problems
        _map_lines(node, (), node.start_mark.line + 1, lines, problems)
        if len(lines) > _MAX_VALUES:
            raise UserError(f"{path} stands for more than {_MAX_VALUES} values: remove its nested aliases")
        return loader.construct_document(node), lines, problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(
            f"{path}:{line}: this is not valid YAML ({reason}): correct the line or the one before"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}:1: this is not valid YAML ({reason})") from None
    except RecursionError:
        raise UserError(f"{path}:1: the YAML is nested too deeply or refers to itself") from None


def _map_lines(node: yaml.Node, where: KeyPath, line: int, lines: dict[KeyPath, int], problems: list[Problem]) -> None:
    lines[where] = line
    if len(lines) > _MAX_VALUES:
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _map_lines(item, (*where, index), item.start_mark.line + 1, lines, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _map_lines(merged, where, line, lines, problems)
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        key_line = key.start_mark.line + 1
        if key.value in first_lines:
            sentence = f"the key {key.value!r} is already given on line {first_lines[key.value]}: remove one of them"
            problems.append(Problem(key_line, sentence))
        first_lines.setdefault(key.value, key_line)
        _map_lines(value, (*where, key.value), key_line, lines, problems)


def line_of(lines: Mapping[KeyPath, int], where: KeyPath) -> int:
    """The line of a value, or of the nearest thing around it that the file has."""
    while where not in lines:
        where = where[:-1]
    return lines[where]


# --- pydantic's errors as sentences ----------------------------------------------------------------------------------

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
_NO_SUBJECTS = "the registry protects nobody: list at least one subject (`guardsmith registry add` writes one)"


def explain(
    error: ValidationError, data: Mapping[str, Any], lines: Mapping[KeyPath, int], problems: list[Problem]
) -> set[KeyPath]:
    """Add a sentence for each of pydantic's errors; returns the keys that a misspelt key probably stands for."""
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
            continue  # the unknown key already tells
        if detail["type"] == "too_short" and detail["input"]:
            continue  # pydantic counts valid entries only, and tells about the others
        sentence = _sentence(detail["type"], where, detail["input"], detail["msg"], detail.get("ctx", {}))
        label = label_of(data, where)
        problems.append(Problem(line_of(lines, where), f"{label}: {sentence}" if label else sentence))
    return typos


def _keys(parent: Sequence[str | int]) -> list[str]:
    names = [part for part in parent if isinstance(part, str)]
    return list((_MODELS.get(names[-1], SubjectEntry) if names else RegistryFile).model_fields)


def label_of(data: Mapping[str, Any], where: KeyPath) -> str:
    """How to call the subject that holds a value: its id, or its place in the list; nothing outside of subjects."""
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
    shown = reprlib.repr(value)
    if where == ("subjects",) and (kind in ("missing", "too_short") or value is None):
        return _NO_SUBJECTS
    if kind == "extra_forbidden":
        known = _keys(where[:-1])
        return f"unknown key {key!r}{did_you_mean(key, known) or '; known keys are ' + ', '.join(known)}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind == "literal_error" and key == "version":
        return f"version is {shown}, but this guardsmith reads version 1"
    if kind == "literal_error":
        choices = get_args(Kind if key == "kind" else Split)
        return f"{key} is {shown}, not one of {', '.join(choices)}{did_you_mean(value, choices)}"
    if kind == "string_pattern_mismatch":
        return f"{key} is {shown}, but {_PATTERNS[key]}"
    if kind == "string_type":
        return f"{key} is {shown}, which YAML does not read as text: write it in quotes"
    if kind == "string_too_short":
        return f"{key} is empty: fill it in or remove it"
    if kind == "tuple_type":
        return f"{key} must be a list (lines that begin with '- '), not {shown}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        what = key if where[-1] == key else f"an entry of {key}"
        return f"{what} must be a mapping (`key: value`), not {shown}"
    if kind == "value_error":
        reason = str(context["error"])
        return reason if isinstance(value, Mapping) else f"{key} is {shown}, but {reason}"
    return f"{key} is {shown}: {message}"
