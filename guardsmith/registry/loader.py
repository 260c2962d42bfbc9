"""The registry: who is protected, with which pictures and whose consent, and who must stay learnable.

A registry is a YAML file (docs/how-to/registry.md, registries/schema.json). `load_registry` checks all of it, reports every
error at once as `file:line: sentence`, and returns a `Registry` in which every picture is a file with its hash.

The parts: `registry_types` (what a registry says), `registry_yaml` (the file, its lines and its errors as sentences),
`registry_images` (the pictures), and `registry_add` (writing a new entry).
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
from guardsmith.registry.images import Picture, check_duplicates, find_pictures
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
from guardsmith.registry.yaml_lines import KeyPath, Problem, explain, label_of, line_of, parse


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
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: create it with `guardsmith registry add`") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name the registry file in it") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this is not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    return check_registry(path, text, today or present_day(), check_images)


def unknown_class_nouns(registry: Registry, known: Sequence[str]) -> list[str]:
    """One sentence `file:line: ...` for every subject and control whose class noun is not among `known`."""
    return [
        f"{registry._class_noun_places.get(subject.id, registry.path)}: {subject.id!r} has the class noun "
        f"{subject.class_noun!r}, but the base model knows only {', '.join(known)}"
        f"{did_you_mean(subject.class_noun, known)}"
        for subject in (*registry.subjects, *registry.controls)
        if subject.class_noun not in known
    ]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a registry file, for editors and other tools (committed as registries/schema.json)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RegistryFile.model_json_schema()}


def content_digest(subjects: Iterable[Subject], controls: Iterable[Subject]) -> str:
    """SHA-256 of who is protected: ids, kinds, class nouns, identifiers, consents, and hash and split of each picture.

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


def check_registry(path: Path, text: str, today: date, check_images: bool) -> Registry:
    """What `load_registry` does, on a text that may not be in the file at `path` yet."""
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
    known_pictures: dict[str, tuple[str, Picture]] = {}
    for group, pictures_of in groups.items():
        entries = data.get(group)
        for index, raw in enumerate(entries if isinstance(entries, list) else []):
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
            if (*where, "consent") not in typos:
                problems += _check_consent(raw, where, label, lines, today)
            pictures = find_pictures(raw, where, label, path.parent, lines, check_images, problems, warnings)
            problems += check_duplicates(pictures, label, known_pictures)
            pictures_of.append(pictures)
    if problems:
        raise UserError("\n".join(_located(path, problems)))

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
        return []  # already told
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
    "unknown_class_nouns",
]
