"""Adding a subject to a registry file: a folder of pictures becomes an entry, and every old line stays as it is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from guardsmith.core.atomic_io import whole_file
from guardsmith.core.errors import UserError
from guardsmith.core.images import KINDS, sha256_file
from guardsmith.core.picture_folders import list_pictures, skipped_sentence
from guardsmith.core.yaml_text import Loader, Problem, parse, read_text
from guardsmith.registry.explanations import NO_SUBJECTS
from guardsmith.registry.loader import SPLITS, RegistryError, Split, Subject, check_registry, present_day

PROTECTED_RATIOS: Mapping[Split, float] = {"harden": 2, "attack": 1, "reference": 1}
CONTROL_RATIOS: Mapping[Split, float] = {"attack": 1, "reference": 1}


def add_subject(
    registry_path: str | Path,
    folder: str | Path,
    id: str,
    kind: str,
    class_noun: str,
    *,
    identifiers: Sequence[str] = (),
    consent_basis: str | None = None,
    reference: str | None = None,
    granted_on: date | None = None,
    expires_on: date | None = None,
    control: bool = False,
    ratios: Mapping[Split, float] | None = None,
    today: date | None = None,
    on_warning: Callable[[str], object] = lambda sentence: None,
) -> Subject:
    """Hash a folder of pictures into a new entry of a registry file, which is created if it does not exist.

    Sub-folders named harden, attack and reference decide the splits. Without any, the pictures are split in the order
    of their names, in one piece each, so that pictures taken one after the other stay together.

    Args:
        registry_path: The registry file. Its text is kept as it is; the entry goes below the last one.
        folder: The pictures.
        id: Id of the subject.
        kind: person, object, character or style.
        class_noun: Lowercase class noun.
        identifiers: Names the subject is known under.
        consent_basis: What the consent rests on; required unless `control`.
        reference: Where the consent is on record.
        granted_on: First day of the consent; by default `today`.
        expires_on: Last day of the consent.
        control: Add an unprotected control instead of a protected subject.
        ratios: Relative sizes of the splits; by default harden 2, attack 1, reference 1 (a control has no harden).
        today: The day on which consent must hold; by default the present day.
        on_warning: Called with a sentence about files of the folder that were left out, and about splits that are too small.

    Returns:
        The new subject.

    Raises:
        UserError: The resulting registry would be wrong. Nothing is written then.
    """
    path, folder, today = Path(registry_path), Path(folder), today or present_day()
    files = _split_folder(folder, ratios or (CONTROL_RATIOS if control else PROTECTED_RATIOS), on_warning)
    _check_names([file for file, _ in files], path.parent)
    entry: dict[str, Any] = {"id": id, "kind": kind, "class_noun": class_noun}
    if identifiers:
        entry["identifiers"] = list(identifiers)
    if consent_basis is not None or reference is not None or granted_on is not None or expires_on is not None:
        consent = {"basis": consent_basis, "reference": reference, "granted_on": granted_on or today}
        entry["consent"] = {key: value for key, value in consent.items() if value is not None}
        if expires_on is not None:
            entry["consent"]["expires_on"] = expires_on
    entry["images"] = [
        {"path": _relative(file, path.parent), "sha256": sha256_file(file), "split": split} for file, split in files
    ]

    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder: create it, or name another place for the registry")
    old = read_text(path, "the registry file", "check the path") if path.exists() or path.is_symlink() else ""
    key = "controls" if control else "subjects"
    new, lines = _append_entry(path, old, key, entry)
    try:
        registry = check_registry(path, new, today, check_images=True)
    except RegistryError as error:
        state = "was not changed" if old else "was not written"
        sentences = _in_old_lines(path if old else None, lines, error.problems, f"{key[:-1]} {id!r}: ")
        raise UserError("\n".join([f"{path} {state}, because {id!r} cannot be added:", *sentences])) from None
    _replace(path, new)
    subject = registry.find(id)
    for sentence in small_splits(subject):
        on_warning(sentence)
    return subject


def _check_names(files: Sequence[Path], start: Path) -> None:
    """Refuse files whose names, from a folder on, cannot be written in a registry."""
    for file in files:
        try:
            _relative(file, start).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the name of {str(file)!r} is not UTF-8, so it cannot be written in a registry: rename it"
            ) from None


def small_splits(subject: Subject) -> list[str]:
    """A sentence for each split of a subject on which results say little, because it has a single picture."""
    why = {
        "harden": "hardening on one picture protects that picture rather than the subject",
        "attack": "an attacker with one picture achieves less than one with several",
        "reference": "similarity to one picture depends on its pose and light",
    }
    splits = [split for split in SPLITS if len(subject.images_of(split)) == 1]
    return [f"{subject.id}: {split} has one picture only, and {why[split]}: add pictures" for split in splits]


def _split_folder(
    folder: Path, ratios: Mapping[Split, float], on_warning: Callable[[str], object]
) -> list[tuple[Path, Split]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name a folder of pictures")
    split_folders = [split for split in SPLITS if (folder / split).is_dir()]
    loose, skipped = list_pictures(folder, but=split_folders)
    if split_folders and loose:
        raise UserError(f"{loose[0]} lies beside the folders {', '.join(split_folders)}: move it into one of them")
    if skipped:
        on_warning(skipped_sentence(folder, skipped))
    if split_folders:
        files = []
        for split in split_folders:
            inside, skipped = list_pictures(folder / split)
            files += [(file, split) for file in inside]
            if skipped:
                on_warning(skipped_sentence(folder / split, skipped))
        return files
    splits = [split for split in SPLITS if ratios.get(split, 0) > 0]
    if not splits:
        raise UserError("the ratios of the splits are all zero: give harden, attack or reference a positive one")
    if len(loose) < len(splits):
        raise UserError(
            f"{folder} holds {len(loose)} pictures ({KINDS}), but the splits "
            f"{', '.join(splits)} need at least one each: add pictures"
        )
    loose = sorted(loose, key=_numbered)
    # In proportion, but at least one picture each.
    total = sum(ratios[split] for split in splits)
    shares = {split: len(loose) * ratios[split] / total for split in splits}
    sizes = {split: max(1, int(shares[split])) for split in splits}
    while sum(sizes.values()) < len(loose):
        sizes[max(splits, key=lambda split: shares[split] - sizes[split])] += 1
    while sum(sizes.values()) > len(loose):
        sizes[max(splits, key=lambda split: sizes[split] - shares[split] if sizes[split] > 1 else -1)] -= 1
    order = [split for split in splits for _ in range(sizes[split])]
    return list(zip(loose, order, strict=True))


def _numbered(file: Path) -> list[tuple[int, str]]:
    """Sorts IMG_2 before IMG_10, so that pictures taken one after the other stay together."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", file.name)]


def _relative(file: Path, start: Path) -> str:
    try:
        return Path(os.path.relpath(file.absolute(), start.absolute())).as_posix()
    except ValueError:  # another drive
        return file.absolute().as_posix()


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _in_old_lines(path: Path | None, lines: range, problems: Sequence[Problem], own: str) -> Iterator[str]:
    """Problems of a registry that was not written, as sentences about the file that is there and the entry that is not.

    Args:
        path: of the file; `None` where there is none.
        lines: of the new entry in what would have been written.
        problems: at lines of the same.
        own: how sentences about the new entry begin.
    """

    def old(line: int) -> int:
        return line - len(lines) if line >= lines.stop else line

    def place(found: re.Match[str]) -> str:
        line = int(found[1])
        return "(the new entry)" if line in lines else f"(line {old(line)})"

    for problem in problems:
        sentence = re.sub(r"\(line (\d+)\)", place, problem.sentence)
        if sentence == NO_SUBJECTS:
            yield "the registry has no subjects yet: add a protected one before a control"
        elif problem.line in lines:
            yield f"the new entry: {sentence.removeprefix(own)}"
        elif (
            sentence.startswith("the id ") and "(the new entry)" in sentence
        ):  # it stands first, and is to choose another
            yield f"the new entry: {sentence.replace('(the new entry)', f'(line {old(problem.line)})')}"
        else:
            yield sentence if path is None else f"{path}:{old(problem.line)}: {sentence}"


def _append_entry(path: Path, text: str, key: str, entry: Mapping[str, Any]) -> tuple[str, range]:
    """The text with one more entry under `subjects` or `controls`, and the entry's lines, from 1; old lines stay as they are."""
    # The line ends of YAML, so that its line numbers are places in `rows`.
    rows = re.findall(r"[^\r\n\x85\u2028\u2029]*(?:\r\n|[\r\n\x85\u2028\u2029])|[^\r\n\x85\u2028\u2029]+", text)
    newline = next((row[len(row.rstrip("\r\n")) :] for row in rows if row.endswith(("\r", "\n"))), "\n")
    if rows and not rows[-1].endswith(("\r", "\n", "\x85", "\u2028", "\u2029")):
        rows[-1] += newline
    text = "".join(rows)
    before, _, _ = parse(path, text)
    root = yaml.compose(text, Loader=Loader)
    item = yaml.dump([entry], Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**6)

    indent = 2
    if root is None:
        rows += [f"version: 1{newline}", f"{key}:{newline}"]
        place = len(rows)
    elif not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise UserError(f"{path} is not written as lines of `key: value`: add the entry by hand")
    else:
        value = next((value for name, value in root.value if name.value == key), None)
        if value is None:
            rows.append(f"{key}:{newline}")
            place = len(rows)
        elif isinstance(value, yaml.SequenceNode) and not value.flow_style:
            indent = value.start_mark.column
            place = value.end_mark.line  # where the next key begins: comments above it stay with it
            while not rows[place - 1].strip() or rows[place - 1].lstrip().startswith("#"):
                place -= 1
        elif not value.value:  # `subjects:` or `subjects: []`
            start, end = value.start_mark, value.end_mark
            row = rows[start.line]
            rows[start.line] = row[: start.column].rstrip() + row[end.column :] if start.line == end.line else row
            place = start.line + 1
        else:
            raise UserError(
                f"{path}:{value.start_mark.line + 1}: {key} is written in brackets: put each entry on a line"
            )
    added = [" " * indent + row + newline for row in item.rstrip("\n").split("\n")]
    rows[place:place] = added
    text = "".join(rows)

    after, _, _ = parse(path, text)
    before = before if isinstance(before, dict) else {"version": 1}
    entries = after.get(key) if isinstance(after, dict) else None
    # Aliases and block text at the end of the list can mislead the search for its last line.
    if not isinstance(entries, list) or {**after, key: entries[:-1]} != {**before, key: before.get(key) or []}:
        raise UserError(f"{path} is written in a way that cannot be extended safely: add the entry by hand")
    return text, range(place + 1, place + 1 + len(added))


def _replace(path: Path, text: str) -> None:
    """Write a file completely or not at all; links to it and its permissions stay."""
    target = path.resolve()
    with whole_file(target) as partial:
        partial.write_bytes(text.encode())
        if target.exists():
            shutil.copymode(target, partial)
