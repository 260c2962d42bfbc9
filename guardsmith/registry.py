"""The registry: who is protected, with which pictures and whose consent, and who must stay learnable.

A registry is a YAML file (docs/registry.md, registries/schema.json). `load_registry` checks all of it, reports every
error at once as `file:line: sentence`, and returns a `Registry` in which every picture is a file with its hash.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import yaml
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from guardsmith.errors import UserError
from guardsmith.images import SUFFIXES, fingerprint, near_duplicates, open_image, read_bytes, sha256_file

Kind = Literal["person", "object", "character", "style"]
Split = Literal["harden", "attack", "reference"]

SPLITS: tuple[Split, ...] = get_args(Split)
PROTECTED_RATIOS: Mapping[Split, float] = {"harden": 2, "attack": 1, "reference": 1}
CONTROL_RATIOS: Mapping[Split, float] = {"attack": 1, "reference": 1}


def _iso_date(value: object) -> date:
    # Left to itself pydantic reads numbers as seconds since 1970.
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        return date.fromisoformat(value)
    raise ValueError("a date is written like 2026-01-31")


Day = Annotated[date, BeforeValidator(_iso_date)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Consent(BaseModel):
    """Why the pictures of a subject may be used."""

    model_config = _STRICT

    basis: Text
    """What the consent rests on: request, self, guardian, licence, invented, ..."""
    reference: Text
    """Where it is on record: a ticket, a contract, a licence file."""
    granted_on: Day
    """First day on which it holds."""
    expires_on: Day | None = None
    """Last day on which it holds; without it, consent does not end."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.expires_on is not None and self.expires_on < self.granted_on:
            raise ValueError(f"consent ends ({self.expires_on}) before it begins ({self.granted_on}): swap the dates")
        return self


class Image(BaseModel):
    """One picture of a subject, found and hashed."""

    model_config = _STRICT

    path: Path
    """Absolute path of the file."""
    sha256: str
    """SHA-256 of the file's bytes; of the decoded RGB bytes if the picture comes from a dataset."""
    split: Split
    """Who may use it: the hardening, the attacker of the verification, or the judge that compares with it."""


class ImageEntry(BaseModel):
    """Pictures of a subject, as a registry file lists them: a file, a folder, a glob, or a dataset."""

    model_config = _STRICT | ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["path"]}, {"required": ["dataset"]}]}
    )

    path: Text | None = None
    """A picture, a folder of pictures or a glob, relative to the registry file."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the file's bytes. Required for a single file; a folder or glob has none and is not pinned."""
    dataset: Text | None = None
    """Instead of a path: `imagefolder:FOLDER` or the id of a dataset on the Hugging Face Hub."""
    dataset_split: Text = "train"
    """Split of the dataset to read."""
    revision: Text | None = None
    """Commit, tag or branch of a dataset on the Hub; without it, the dataset is not pinned."""
    split: Split
    """What these pictures are for: `harden`, `attack` (unseen by the hardening) or `reference` (for judging)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("an image needs either `path` or `dataset`")
        if self.dataset is None and (self.revision is not None or "dataset_split" in self.model_fields_set):
            raise ValueError("`revision` and `dataset_split` belong to a `dataset`, not to a `path`: remove them")
        if self.dataset is not None and self.sha256 is not None:
            raise ValueError("`sha256` belongs to a single file: pin a dataset with `revision`")
        return self


class _SubjectFields(BaseModel):
    model_config = _STRICT

    id: str = Field(pattern="^[a-z0-9][a-z0-9_-]*$")
    """Unique name of the subject, also used for folders: a-z, 0-9, - and _."""
    kind: Kind
    """What is protected: a person, an object, a character or a style."""
    class_noun: str = Field(pattern="^[a-z]+([ -][a-z]+)*$", max_length=40)
    """Lowercase noun of the class, as it stands in prompts: person, dog, teddy bear."""
    identifiers: tuple[Text, ...] = ()
    """Names under which the subject is already known, or rare tokens an attacker may use for it."""
    consent: Consent | None = None
    """Why its pictures may be used. Required for protected subjects, optional for controls."""


class SubjectEntry(_SubjectFields):
    """A subject as a registry file describes it."""

    images: tuple[ImageEntry, ...]
    """Its pictures: splits harden, attack and reference for a protected subject, attack and reference for a control."""


class Subject(_SubjectFields):
    """Someone or something to protect, or a control that must stay learnable."""

    images: tuple[Image, ...]
    """Its pictures, in the order of the file."""

    def images_of(self, split: Split) -> tuple[Image, ...]:
        """The pictures of one split, in the order of the file."""
        return tuple(image for image in self.images if image.split == split)


class RegistryFile(BaseModel):
    """Who is protected from personalization, and who must stay learnable."""

    model_config = _STRICT | ConfigDict(title="guardsmith registry")

    version: Literal[1]
    """Version of this format."""
    subjects: tuple[SubjectEntry, ...] = Field(min_length=1)
    """The protected subjects."""
    controls: tuple[SubjectEntry, ...] = ()
    """Subjects that are not protected: they show that hardening left personalization of others intact."""


class Registry(BaseModel):
    """A registry that passed every check."""

    model_config = _STRICT

    version: Literal[1]
    """Version of the file format."""
    subjects: tuple[Subject, ...]
    """The protected subjects."""
    controls: tuple[Subject, ...]
    """The unprotected control subjects."""
    path: Path
    """Absolute path of the file it was read from."""
    digest: str
    """SHA-256 of what the registry says (`content_digest`): no paths, no formatting, no order."""
    warnings: tuple[str, ...]
    """What is allowed but weak, as `file:line: sentence`."""
    _class_noun_places: dict[str, str] = PrivateAttr(default_factory=dict)

    def find(self, subject_id: str) -> Subject:
        """The subject or control with this id.

        Raises:
            UserError: There is none.
        """
        everyone = {subject.id: subject for subject in (*self.subjects, *self.controls)}
        if subject_id not in everyone:
            raise UserError(f"{self.path} has no subject {subject_id!r}{_did_you_mean(subject_id, everyone)}")
        return everyone[subject_id]


KeyPath = tuple[str | int, ...]
"""Where a value is in the YAML tree: ("subjects", 0, "images", 3, "split")."""


class _Problem(NamedTuple):
    line: int
    sentence: str


class _Picture(NamedTuple):
    image: Image
    name: str
    line: int
    fingerprint: NDArray[Any] | None


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
    return _load(path, text, today or _today(), check_images)


def unknown_class_nouns(registry: Registry, known: Sequence[str]) -> list[str]:
    """One sentence `file:line: ...` for every subject and control whose class noun is not among `known`."""
    return [
        f"{registry._class_noun_places.get(subject.id, registry.path)}: {subject.id!r} has the class noun "
        f"{subject.class_noun!r}, but the base model knows only {', '.join(known)}"
        f"{_did_you_mean(subject.class_noun, known)}"
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


def _today() -> date:
    return datetime.now().astimezone().date()


def _did_you_mean(word: object, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word).lower(), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _load(path: Path, text: str, today: date, check_images: bool) -> Registry:
    data, lines, problems = _parse(path, text)
    if not isinstance(data, dict):
        what = "is empty" if data is None else "is not a mapping"
        raise UserError(f"{path}:1: the registry {what}: it needs the keys version and subjects")
    typos: set[KeyPath] = set()
    try:
        RegistryFile.model_validate(data)
    except ValidationError as error:
        typos = _explain(error, data, lines, problems)

    # Everything below reads the raw data, so that one wrong key does not hide the other problems.
    warnings: list[_Problem] = []
    groups: dict[str, list[list[_Picture]]] = {"subjects": [], "controls": []}
    id_lines: dict[str, int] = {}
    known_pictures: dict[str, tuple[str, _Picture]] = {}
    for group, pictures_of in groups.items():
        entries = data.get(group)
        for index, raw in enumerate(entries if isinstance(entries, list) else []):
            where: KeyPath = (group, index)
            label = _label(data, where)
            if not isinstance(raw, dict):
                continue
            subject_id = raw.get("id")
            if isinstance(subject_id, str):
                line = _line(lines, (*where, "id"))
                if subject_id in id_lines:
                    sentence = f"the id {subject_id!r} is taken (line {id_lines[subject_id]}): choose another"
                    problems.append(_Problem(line, sentence))
                id_lines.setdefault(subject_id, line)
            if (*where, "consent") not in typos:
                problems += _check_consent(raw, where, label, lines, today)
            pictures = _find_pictures(raw, where, label, path.parent, lines, check_images, problems, warnings)
            problems += _check_duplicates(pictures, label, known_pictures)
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
            line = _line(lines, (group, index, "class_noun"))
            registry._class_noun_places[subject.id] = f"{path}:{line}"
    return registry


def _subject(entry: SubjectEntry, pictures: list[_Picture]) -> Subject:
    fields = {name: getattr(entry, name) for name in _SubjectFields.model_fields}
    return Subject(**fields, images=tuple(picture.image for picture in pictures))


def _located(path: Path, problems: Iterable[_Problem]) -> list[str]:
    return [f"{path}:{line}: {sentence}" for line, sentence in sorted(set(problems))]


# --- YAML with line numbers ------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader (the C one crashes on deep nesting) that leaves dates as text.

    SafeLoader raises an error without a line for 2026-02-30; as text, the date is checked with its place at hand.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (SafeLoader's own attribute, which mypy knows as an instance variable)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_MAX_VALUES = 200_000  # aliases can make a small file stand for billions of values


def _parse(path: Path, text: str) -> tuple[Any, dict[KeyPath, int], list[_Problem]]:
    """The data of a YAML text, the line of every key and list item, and its duplicate keys."""
    lines: dict[KeyPath, int] = {}
    problems: list[_Problem] = []
    try:
        loader = _Loader(text)
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


def _map_lines(node: yaml.Node, where: KeyPath, line: int, lines: dict[KeyPath, int], problems: list[_Problem]) -> None:
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
            problems.append(_Problem(key_line, sentence))
        first_lines.setdefault(key.value, key_line)
        _map_lines(value, (*where, key.value), key_line, lines, problems)


def _line(lines: Mapping[KeyPath, int], where: KeyPath) -> int:
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


def _explain(
    error: ValidationError, data: Mapping[str, Any], lines: Mapping[KeyPath, int], problems: list[_Problem]
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
        label = _label(data, where)
        problems.append(_Problem(_line(lines, where), f"{label}: {sentence}" if label else sentence))
    return typos


def _keys(parent: Sequence[str | int]) -> list[str]:
    names = [part for part in parent if isinstance(part, str)]
    return list((_MODELS.get(names[-1], SubjectEntry) if names else RegistryFile).model_fields)


def _label(data: Mapping[str, Any], where: KeyPath) -> str:
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
        return f"unknown key {key!r}{_did_you_mean(key, known) or '; known keys are ' + ', '.join(known)}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind == "literal_error" and key == "version":
        return f"version is {shown}, but this guardsmith reads version 1"
    if kind == "literal_error":
        choices = get_args(Kind if key == "kind" else Split)
        return f"{key} is {shown}, not one of {', '.join(choices)}{_did_you_mean(value, choices)}"
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


# --- consent, pictures, duplicates -----------------------------------------------------------------------------------


def _check_consent(
    raw: Mapping[str, Any], where: KeyPath, label: str, lines: Mapping[KeyPath, int], today: date
) -> list[_Problem]:
    line = _line(lines, (*where, "consent"))
    if raw.get("consent") is None:
        if where[0] == "controls":
            return []
        return [_Problem(line, f"{label}: a protected subject needs a consent with basis, reference and granted_on")]
    try:
        consent = Consent.model_validate(raw["consent"])
    except ValidationError:
        return []  # already told
    if consent.granted_on > today:
        return [_Problem(line, f"{label}: consent begins on {consent.granted_on}: wait, or correct granted_on")]
    if consent.expires_on is not None and consent.expires_on < today:
        sentence = f"{label}: consent expired on {consent.expires_on}: renew it or remove the subject"
        return [_Problem(_line(lines, (*where, "consent", "expires_on")), sentence)]
    return []


def _find_pictures(
    raw: Mapping[str, Any],
    where: KeyPath,
    label: str,
    folder: Path,
    lines: Mapping[KeyPath, int],
    check_images: bool,
    problems: list[_Problem],
    warnings: list[_Problem],
) -> list[_Picture]:
    """The pictures of one subject; adds to `problems` and `warnings`."""
    if not isinstance(raw.get("images"), list):
        return []
    pictures: list[_Picture] = []
    missing: set[Split] = set(SPLITS if where[0] == "subjects" else ("attack", "reference"))
    readable = True
    for index, item in enumerate(raw["images"]):
        line = _line(lines, (*where, "images", index))
        try:
            entry = ImageEntry.model_validate(item)
        except ValidationError:
            readable = False  # already told
            continue
        missing.discard(entry.split)
        try:
            files = _files(entry, folder)
        except UserError as error:
            problems.append(_Problem(line, f"{label}: {error}"))
            continue
        for file, known_hash in files:
            try:
                pictures.append(_picture(entry, file, known_hash, line, check_images))
            except UserError as error:
                problems.append(_Problem(line, f"{label}: {error}"))
        if entry.sha256 is None and entry.revision is None:
            source = entry.path or entry.dataset
            sentence = f"{label}: {source} is not pinned: its {len(files)} pictures may change without notice"
            warnings.append(_Problem(line, sentence))
    if readable and missing:
        names = " and ".join(split for split in SPLITS if split in missing)
        sentence = f"{label}: no image has split {names}: add pictures that no other split uses"
        problems.append(_Problem(_line(lines, (*where, "images")), sentence))
    return pictures


def _files(entry: ImageEntry, folder: Path) -> list[tuple[Path, str | None]]:
    """The files an entry stands for, each with its hash where the entry or the dataset gives it."""
    if entry.path is None:
        return _dataset_files(entry, folder)
    path = folder / entry.path
    if path.is_dir():
        files = _pictures_in(path)
        if not files:
            raise UserError(f"the folder {path} holds no picture ({', '.join(sorted(SUFFIXES))})")
    elif not path.exists() and any(sign in entry.path for sign in "*?["):
        root = Path(path.anchor) if Path(entry.path).is_absolute() else folder
        pattern = str(Path(entry.path).relative_to(root)) if root is not folder else entry.path
        files = sorted(file for file in root.glob(pattern) if file.is_file() and file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"no picture matches {entry.path}")
    elif entry.sha256 is None:
        what = f"add `sha256: {sha256_file(path)}`" if path.is_file() else "and the file does not exist"
        raise UserError(f"{path} has no sha256: {what}")
    else:
        return [(path, entry.sha256)]
    if entry.sha256 is not None:
        raise UserError(f"{entry.path} stands for {len(files)} pictures: a sha256 belongs to a single file")
    return [(file, None) for file in files]


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)


def _picture(entry: ImageEntry, file: Path, known_hash: str | None, line: int, check_images: bool) -> _Picture:
    look = None
    if check_images or known_hash is None:
        data = read_bytes(file)
        found = hashlib.sha256(data).hexdigest()
        if entry.sha256 not in (None, found):
            raise UserError(
                f"{file} is not the picture that was registered: its sha256 is {found}; "
                "restore the file or register this one"
            )
        if check_images:
            look = fingerprint(open_image(file, data))
        known_hash = known_hash or found
    return _Picture(Image(path=file.absolute(), sha256=known_hash, split=entry.split), str(file), line, look)


def _check_duplicates(pictures: list[_Picture], label: str, known: dict[str, tuple[str, _Picture]]) -> list[_Problem]:
    """Problems with pictures that occur twice or nearly so; `known` (subject and picture of each hash) is updated."""
    problems = []
    for picture in pictures:
        if picture.image.sha256 not in known:
            known[picture.image.sha256] = label, picture
            continue
        owner, first = known[picture.image.sha256]
        if owner != label:
            sentence = f"{picture.name} is also a picture of {owner} (line {first.line}): remove one"
        elif first.image.split != picture.image.split:
            splits = f"split {picture.image.split} and in split {first.image.split}"
            sentence = f"{picture.name} is in {splits} (line {first.line}): keep it in one of them"
        else:
            sentence = f"{picture.name} is listed twice (line {first.line}): remove one"
        problems.append(_Problem(picture.line, f"{label}: {sentence}"))

    looks = [(picture, picture.fingerprint) for picture in pictures if picture.fingerprint is not None]
    for i, j, distance in near_duplicates([look for _, look in looks]):
        first, second = looks[i][0], looks[j][0]
        if first.image.split == second.image.split or first.image.sha256 == second.image.sha256:
            continue
        sentence = (
            f"{second.name} (split {second.image.split}) shows nearly the same as {first.name} (split "
            f"{first.image.split}, line {first.line}; distance {distance:.2f}): remove one or put both in one split"
        )
        problems.append(_Problem(second.line, f"{label}: {sentence}"))
    return problems


def _dataset_files(entry: ImageEntry, folder: Path) -> list[tuple[Path, str | None]]:
    """The pictures of a dataset as PNG files in the cache, each with the SHA-256 of its decoded RGB bytes."""
    import datasets

    name = str(entry.dataset)
    source: dict[str, Any] = {"path": name, "revision": entry.revision}
    if name.startswith("imagefolder:"):
        images = folder / name.removeprefix("imagefolder:")
        if not images.is_dir():
            raise UserError(f"the folder {images} of dataset {name} does not exist: correct the path")
        source = {"path": "imagefolder", "data_dir": str(images)}
    try:
        table = datasets.load_dataset(**source, split=entry.dataset_split)
    except Exception as error:  # the Hub, the network, pyarrow and file formats raise what they like
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"dataset {name} (split {entry.dataset_split}) cannot be loaded ({type(error).__name__}: {reason}): "
            "check its name, split and revision and the connection to the Hub, or name a folder of pictures"
        ) from error
    columns = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UserError(f"dataset {name} has no image column: choose a dataset of pictures")

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guardsmith" / "images"
    cache.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, str | None]] = []
    for index, row in enumerate(table.cast_column(columns[0], datasets.Image(decode=False))):
        stored = row[columns[0]]
        picture = open_image(f"{name} row {index}", stored["bytes"] or read_bytes(stored["path"]))
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        file = cache / f"{digest}.png"
        if not file.exists():
            partial = file.with_suffix(f".{os.getpid()}.tmp")
            picture.save(partial, format="PNG")
            partial.replace(file)
        files.append((file, digest))
    if not files:
        raise UserError(f"split {entry.dataset_split} of dataset {name} is empty: choose another split")
    return files


# --- adding a subject ------------------------------------------------------------------------------------------------


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

    Returns:
        The new subject.

    Raises:
        UserError: The resulting registry would be wrong. Nothing is written then.
    """
    path, folder, today = Path(registry_path), Path(folder), today or _today()
    files = _split_folder(folder, ratios or (CONTROL_RATIOS if control else PROTECTED_RATIOS))
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

    try:
        old = path.read_bytes().decode() if path.exists() else ""
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save the file as UTF-8") from None
    key = "controls" if control else "subjects"
    new = _append_entry(path, old, key, entry)
    try:
        registry = _load(path, new, today, check_images=True)
    except UserError as error:
        raise UserError(f"{path} is left as it is, because with {id!r} it would be wrong:\n{error}") from None
    _replace(path, new)
    return registry.find(id)


def _split_folder(folder: Path, ratios: Mapping[Split, float]) -> list[tuple[Path, Split]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name a folder of pictures")
    loose = _pictures_in(folder)
    named = [split for split in SPLITS if (folder / split).is_dir()]
    if named:
        if loose:
            raise UserError(f"{loose[0]} lies beside the folders {', '.join(named)}: move it into one of them")
        return [(file, split) for split in named for file in _pictures_in(folder / split)]
    wanted = [split for split in SPLITS if ratios.get(split, 0) > 0]
    if not wanted:
        raise UserError("the ratios of the splits are all zero: give harden, attack or reference a positive one")
    if len(loose) < len(wanted):
        raise UserError(
            f"{folder} holds {len(loose)} pictures ({', '.join(sorted(SUFFIXES))}), but the splits "
            f"{', '.join(wanted)} need at least one each: add pictures"
        )
    # In proportion, but at least one picture each.
    total = sum(ratios[split] for split in wanted)
    shares = {split: len(loose) * ratios[split] / total for split in wanted}
    sizes = {split: max(1, int(shares[split])) for split in wanted}
    while sum(sizes.values()) < len(loose):
        sizes[max(wanted, key=lambda split: shares[split] - sizes[split])] += 1
    while sum(sizes.values()) > len(loose):
        sizes[max(wanted, key=lambda split: sizes[split] - shares[split] if sizes[split] > 1 else -1)] -= 1
    order = [split for split in wanted for _ in range(sizes[split])]
    return list(zip(loose, order, strict=True))


def _relative(file: Path, start: Path) -> str:
    try:
        return Path(os.path.relpath(file.absolute(), start.absolute())).as_posix()
    except ValueError:  # another drive
        return file.absolute().as_posix()


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _append_entry(path: Path, text: str, key: str, entry: Mapping[str, Any]) -> str:
    """The text with one more entry under `subjects` or `controls`; every old line stays as it is."""
    newline = "\r\n" if "\r\n" in text else "\n"
    if text and not text.endswith("\n"):
        text += newline
    before, _, _ = _parse(path, text)
    root = yaml.compose(text, Loader=_Loader)
    item = yaml.dump([entry], Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**6)

    indent = 2
    rows = text.split("\n")[:-1]
    if root is None:
        rows += [row + newline[:-1] for row in ("version: 1", f"{key}:")]
        place = len(rows)
    elif not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise UserError(f"{path} is not written as lines of `key: value`: add the entry by hand")
    else:
        value = next((value for name, value in root.value if name.value == key), None)
        if value is None:
            rows.append(f"{key}:{newline[:-1]}")
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
    rows[place:place] = [" " * indent + row + newline[:-1] for row in item.rstrip("\n").split("\n")]
    text = "\n".join(rows) + "\n"

    after, _, _ = _parse(path, text)
    before = before if isinstance(before, dict) else {"version": 1}
    entries = after.get(key) if isinstance(after, dict) else None
    # Aliases and block text at the end of the list can mislead the search for its last line.
    if not isinstance(entries, list) or {**after, key: entries[:-1]} != {**before, key: before.get(key) or []}:
        raise UserError(f"{path} is written in a way that cannot be extended safely: add the entry by hand")
    return text


def _replace(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    target = path.resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


__all__ = [
    "SPLITS",
    "Consent",
    "Image",
    "Kind",
    "Registry",
    "Split",
    "Subject",
    "add_subject",
    "content_digest",
    "json_schema",
    "load_registry",
    "unknown_class_nouns",
]
