"""YAML as people write it: the data, the line of every value, and what is wrong with it in sentences.

PyYAML's nodes carry lines. ruamel.yaml has them too and writes files back, but it rewrites indentation other than the one it is
set to and Windows' line ends, reads `no` as text (YAML 1.2), and stops at the first key that is given twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from guardsmith.core.errors import UserError

KeyPath = tuple[str | int, ...]
"""Place of a value in the YAML tree: ("subjects", 0, "images", 3, "split")."""


class Problem(NamedTuple):
    """Something wrong, or weak, at a line (from 1) of a file."""

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


class _QuickLoader(Loader):
    """The same with the events of libyaml, which reads a long file in half the time, where PyYAML was built with it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._events = yaml.CSafeLoader(text) if yaml.__with_libyaml__ else yaml.SafeLoader(text)

    def check_event(self, *choices: Any) -> Any:
        return self._events.check_event(*choices)

    def peek_event(self) -> Any:
        return self._events.peek_event()

    def get_event(self) -> Any:
        return self._events.get_event()


_MAX_VALUES = 200_000  # beside one a character: aliases can make a small file stand for billions of values


def read_text(path: Path, what: str, remedy: str) -> str:
    """The text of a UTF-8 file, line ends as they are.

    Args:
        path: the file.
        what: its kind, e.g. "the registry file".
        remedy: advice where there is no such file, e.g. "create it with ...".

    Raises:
        UserError: there is no such file, it is a folder, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {remedy}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name {what} in it") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this is not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValueError:  # a zero byte in its name
        raise UserError(f"{str(path)!r} is no file name: {remedy}") from None


def parse(path: Path, text: str) -> tuple[Any, dict[KeyPath, int], list[Problem]]:
    """Read a YAML text.

    Args:
        path: its file, for messages.
        text: the YAML.

    Returns:
        The data (`None` of an empty text), the line of every key and list item, and a problem for every key that is given twice.

    Raises:
        UserError: it is not YAML, stands for too many values, or is nested too deeply.
    """
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        loader = _QuickLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines, problems
        most = _MAX_VALUES + len(text)
        _map_lines(node, (), node.start_mark.line + 1, lines, problems, most)
        if len(lines) > most:
            raise UserError(f"{path}:1: the file stands for more than {most} values: remove its nested aliases")
        return loader.construct_document(node), lines, problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(
            f"{path}:{line}: this is not valid YAML ({' '.join(reason.split())}): correct the line or the one before"
        ) from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:  # e.g. of a !!bool that is none
        reason = " ".join(str(error).split())
        raise UserError(f"{path}:1: this is not valid YAML ({reason})") from None
    except RecursionError:
        raise UserError(f"{path}:1: the YAML is nested too deeply or refers to itself") from None


def _map_lines(
    node: yaml.Node, where: KeyPath, line: int, lines: dict[KeyPath, int], problems: list[Problem], most: int
) -> None:
    lines[where] = line
    if isinstance(node, yaml.ScalarNode) or len(lines) > most:
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _map_lines(item, (*where, index), item.start_mark.line + 1, lines, problems, most)
        return
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _map_lines(source, where, line, lines, problems, most)
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        key_line = key.start_mark.line + 1
        if key.value in first_lines:
            sentence = f"the key {key.value!r} is already given on line {first_lines[key.value]}: remove one of them"
            problems.append(Problem(key_line, sentence))
        first_lines.setdefault(key.value, key_line)
        _map_lines(value, (*where, key.value), key_line, lines, problems, most)


def line_of(lines: Mapping[KeyPath, int], where: KeyPath) -> int:
    """The line of a value, or of the nearest thing around it that the file has."""
    while where not in lines:
        where = where[:-1]
    return lines[where]


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. Dates stay text.

    Args:
        path: the file.
        what: its kind, e.g. "a recipe".

    Raises:
        UserError: it cannot be read, is not YAML or no mapping, or gives a key twice; one sentence a line.
    """
    data, _, problems = parse(path, read_text(path, f"{what} file", "check the path"))
    if problems:
        raise UserError("\n".join(f"{path}:{line}: {sentence}" for line, sentence in problems))
    if not isinstance(data, dict):
        raise UserError(f"{path}: {what} is a mapping of keys to values; this file is not")
    return data


def odd_numbers(raw: Any, checked: Any, where: str = "") -> Iterator[str]:
    """Sentences about values that pydantic takes for numbers although they cannot be meant.

    Those are true and false, which YAML makes of `yes`, `no`, `on` and `off`, and numbers that are not finite.

    Args:
        raw: data of a YAML file.
        checked: the model, mapping or sequence that pydantic made of it.
        where: key of `raw`, for messages.
    """
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if isinstance(checked, Mapping):
                inside = checked.get(key)
            else:
                inside = getattr(checked, key, None) if isinstance(key, str) else None
            yield from odd_numbers(value, inside, f"{where}.{key}" if where else str(key))
    elif isinstance(raw, Sequence) and isinstance(checked, Sequence) and not isinstance(raw, str):
        for number, (value, inside) in enumerate(zip(raw, checked, strict=False)):
            yield from odd_numbers(value, inside, f"{where}.{number}")
    elif isinstance(checked, int | float) and not isinstance(checked, bool):
        if isinstance(raw, bool):
            yield f"{where}: YAML reads yes, no, on and off as true and false, which is no number; write a number"
        elif not math.isfinite(checked):
            yield f"{where}: {raw} is not finite; write a number"
