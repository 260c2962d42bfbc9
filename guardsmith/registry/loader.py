"""The registry: who is protected, with which pictures and whose consent, and who are the controls.

A registry is a YAML file (docs/how-to/registry.md, registries/schema.json). `load_registry` checks all of it, reports every
error at once as `file:line: sentence`, and returns a `Registry` in which every picture is a file with its hash.

Beside it: `types` (the data), `explanations` (pydantic's errors as sentences), `images` (the pictures), `reserved` (ids that
cannot be hidden later) and `add` (writing a new entry).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from guardsmith.core.errors import UserError, did_you_mean
from guardsmith.core.yaml_text import KeyPath, Problem, line_of, parse, read_text
from guardsmith.registry.explanations import explain, label_of
from guardsmith.registry.images import Picture, check_duplicates, find_pictures
from guardsmith.registry.reserved import is_reserved
from guardsmith.registry.types import (
    SPLITS,
    Consent,
    Image,
    Kind,
    Registry,
    RegistryFile,
    Split,
    Subject,
    SubjectEntry,
    SubjectFields,
)


def load_registry(path: str | Path, *, today: date | None = None, check_images: bool = True) -> Registry:
    """Read and check a registry.

    Args:
        path: The YAML file.
        today: The day on which consent must hold; by default the present day.
        check_images: Open every picture, compare its hash and look for near-duplicates. Without it, pictures with a
            `sha256` need not exist; folders, globs and datasets are read in any case.

    Raises:
        UserError: One line `file:line: sentence` for every problem of the file, its pictures and its consents.
    """
    path = Path(path)
    text = read_text(path, "the registry file", "create it with `guardsmith registry add`")
    return check_registry(path, text, today or present_day(), check_images)


def unknown_class_nouns(registry: Registry, classes: Sequence[str]) -> list[str]:
    """One sentence `file:line: ...` for every subject and control whose class noun is not among `known`."""
    return [
        f"{registry._class_noun_places.get(subject.id, registry.path)}: {subject.id!r} has the class noun "
        f"{subject.class_noun!r}, but the base model knows only {', '.join(classes)}"
        f"{did_you_mean(subject.class_noun, classes)}"
        for subject in (*registry.subjects, *registry.controls)
        if subject.class_noun not in classes
    ]


NEED_CONTROLS = ("control learnable", "everyday use (adapters)", "everyday use (merges)")
"""Rules of the gate that are never passed without an unprotected subject, by their titles."""


def missing_controls(registry: Registry) -> str | None:
    """What a registry without controls leads to, in a sentence; `None` where there are some."""
    if registry.controls:
        return None
    rules = ", ".join(f"'{title}'" for title in NEED_CONTROLS)
    return (
        f"{registry.path} has no controls: no verification with it can pass, because rules of the gate need an unprotected "
        f"subject ({rules}); add one with `guardsmith registry add --control`"
    )


def json_schema() -> dict[str, Any]:
    """The JSON schema of a registry file, for editors and other tools (committed as registries/schema.json)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RegistryFile.model_json_schema()}


def content_digest(subjects: Iterable[Subject], controls: Iterable[Subject]) -> str:
    """SHA-256 of the registry's content: ids, kinds, class nouns, identifiers, consents, and hash and split of each picture.

    Paths, comments and the order of subjects and pictures do not change it.
    """

    def content(subject: Subject) -> dict[str, Any]:
        return {
            **subject.model_dump(mode="json", include={"id", "kind", "class_noun", "consent"}),
            "identifiers": sorted(subject.identifiers),
            "images": sorted([image.split, image.sha256] for image in subject.images),
        }

    everything = {
        "version": 1,
        "subjects": sorted(map(content, subjects), key=lambda subject: str(subject["id"])),
        "controls": sorted(map(content, controls), key=lambda subject: str(subject["id"])),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def present_day() -> date:
    """Today, where this machine is."""
    return datetime.now().astimezone().date()


class RegistryError(UserError):
    """A registry has problems; the message has one a line, with file and line.

    Attributes:
        problems: the same with their lines as numbers, in the order of the file.
    """

    def __init__(self, path: Path, problems: Iterable[Problem]) -> None:
        """Of problems in a file."""
        self.problems = sorted(set(problems))
        super().__init__("\n".join(_located(path, self.problems)))


def check_registry(path: Path, text: str, today: date, check_images: bool) -> Registry:
    """Check the text of a registry.

    Args:
        path: its file, which need not hold the text yet; relative paths begin beside it.
        text: YAML.
        today: the day on which consent must hold.
        check_images: see `load_registry`.

    Raises:
        RegistryError: it has problems.
        UserError: it is not YAML, or no mapping.
    """
    data, lines, problems = parse(path, text)
    if not isinstance(data, dict):
        what = "is empty" if data is None else "is not a mapping"
        raise UserError(f"{path}:1: the registry {what}: it needs the keys version and subjects")
    typos: set[KeyPath] = set()
    try:
        RegistryFile.model_validate(data)
    except ValidationError as error:
        typos = explain(error, data, lines, problems)

    # Everything below reads the raw data, so that one wrong key does not hide the other problems.
    warnings: list[Problem] = []
    groups: dict[str, list[list[Picture]]] = {"subjects": [], "controls": []}
    id_lines: dict[str, int] = {}
    labelled: list[tuple[str, list[Picture]]] = []
    nouns = _class_nouns(data)
    for group, pictures_of in groups.items():
        for index, raw in enumerate(_list(data.get(group))):
            where: KeyPath = (group, index)
            label = label_of(data, where)
            if not isinstance(raw, dict):
                continue
            subject_id = raw.get("id")
            if isinstance(subject_id, str):
                line = line_of(lines, (*where, "id"))
                if subject_id in id_lines:
                    sentence = f"the id {subject_id!r} is taken (line {id_lines[subject_id]}): choose another"
                    problems.append(Problem(line, sentence))
                id_lines.setdefault(subject_id, line)
                if is_reserved(subject_id, nouns) and not _is_invented(raw):
                    sentence = (
                        f"{label}: {subject_id!r} is also a word of the evidence, where it could not be hidden when the model is "
                        f"published: choose an id like {subject_id}-1"
                    )
                    problems.append(Problem(line, sentence))
            if (*where, "consent") not in typos:
                problems += _check_consent(raw, where, label, lines, today)
            pictures = find_pictures(raw, where, label, path.parent, lines, check_images, problems, warnings)
            labelled.append((label, pictures))
            pictures_of.append(pictures)
    problems += check_duplicates(labelled)
    if problems:
        raise RegistryError(path, problems)

    file = RegistryFile.model_validate(data)
    subjects = [_subject(e, pictures) for e, pictures in zip(file.subjects, groups["subjects"], strict=True)]
    controls = [_subject(e, pictures) for e, pictures in zip(file.controls, groups["controls"], strict=True)]
    registry = Registry(
        version=file.version,
        subjects=tuple(subjects),
        controls=tuple(controls),
        path=path.absolute(),
        digest=content_digest(subjects, controls),
        warnings=tuple(_located(path, warnings)),
    )
    for group, members in (("subjects", subjects), ("controls", controls)):
        for index, subject in enumerate(members):
            line = line_of(lines, (group, index, "class_noun"))
            registry._class_noun_places[subject.id] = f"{path}:{line}"
            registry._lines[subject.id] = line_of(lines, (group, index, "id"))
    return registry


def _class_nouns(data: Mapping[str, Any]) -> set[str]:
    entries = [
        entry for group in ("subjects", "controls") for entry in _list(data.get(group)) if isinstance(entry, dict)
    ]
    return {noun for entry in entries if isinstance(noun := entry.get("class_noun"), str)}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_invented(raw: Mapping[str, Any]) -> bool:
    """Whether the id stays in published evidence, because it is of no real person."""
    consent = raw.get("consent")
    return isinstance(consent, dict) and consent.get("basis") == "invented"


def _subject(entry: SubjectEntry, pictures: list[Picture]) -> Subject:
    fields = {name: getattr(entry, name) for name in SubjectFields.model_fields}
    return Subject(**fields, images=tuple(picture.image for picture in pictures))


def _located(path: Path, problems: Iterable[Problem]) -> list[str]:
    return [f"{path}:{line}: {sentence}" for line, sentence in sorted(set(problems))]


def _check_consent(
    raw: Mapping[str, Any], where: KeyPath, label: str, lines: Mapping[KeyPath, int], today: date
) -> list[Problem]:
    line = line_of(lines, (*where, "consent"))
    if raw.get("consent") is None:
        if where[0] == "controls":
            return []
        return [Problem(line, f"{label}: a protected subject needs a consent with basis, reference and granted_on")]
    try:
        consent = Consent.model_validate(raw["consent"])
    except ValidationError:
        return []  # `explain` has a sentence about it
    if consent.granted_on > today:
        return [Problem(line, f"{label}: consent begins on {consent.granted_on}: wait, or correct granted_on")]
    if consent.expires_on is not None and consent.expires_on < today:
        sentence = f"{label}: consent expired on {consent.expires_on}: renew it or remove the subject"
        return [Problem(line_of(lines, (*where, "consent", "expires_on")), sentence)]
    return []


__all__ = [
    "SPLITS",
    "Consent",
    "Image",
    "Kind",
    "Registry",
    "Split",
    "Subject",
    "content_digest",
    "json_schema",
    "load_registry",
    "missing_controls",
    "unknown_class_nouns",
]
