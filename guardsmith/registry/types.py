"""A registry as pydantic types: the content of a file (`RegistryFile`), and the result of all checks (`Registry`)."""

from __future__ import annotations

import re
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, StringConstraints, model_validator

from guardsmith.core.errors import UserError, did_you_mean

Kind = Literal["person", "object", "character", "style"]
Split = Literal["harden", "attack", "reference"]

SPLITS: tuple[Split, ...] = get_args(Split)


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
    """Basis of the consent: request, self, guardian, licence, invented, ..."""
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
    """One picture of a subject: its file and its hash."""

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
    """Instead of a path: `imagefolder:FOLDER`, `parquet:FILE` or the id of a dataset on the Hugging Face Hub."""
    dataset_split: Text = "train"
    """Split of the dataset to read."""
    revision: Text | None = None
    """Commit, tag or branch of a dataset on the Hub; without it, the dataset is not pinned."""
    split: Split
    """Use of these pictures: `harden`, `attack` (unseen by the hardening) or `reference` (for judging)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("an image needs either `path` or `dataset`")
        if self.dataset is None and (self.revision is not None or "dataset_split" in self.model_fields_set):
            raise ValueError("`revision` and `dataset_split` belong to a `dataset`, not to a `path`: remove them")
        if self.dataset is not None and self.sha256 is not None:
            raise ValueError("`sha256` belongs to a single file: pin a dataset with `revision`")
        return self


class SubjectFields(BaseModel):
    """A subject without its pictures."""

    model_config = _STRICT

    id: str = Field(pattern="^[a-z0-9][a-z0-9_-]*$", max_length=64)
    """Unique name of the subject, also used for folders: a-z, 0-9, - and _; at most 64, and no word of the evidence."""
    kind: Kind
    """Kind of the subject: a person, an object, a character or a style."""
    class_noun: str = Field(pattern="^[a-z]+([ -][a-z]+)*$", max_length=40)
    """Lowercase noun of the class, as it stands in prompts: person, dog, teddy bear."""
    identifiers: tuple[Text, ...] = ()
    """Names under which the subject is already known, or rare tokens an attacker may use for it."""
    consent: Consent | None = None
    """Why its pictures may be used. Required for protected subjects, optional for controls."""


class SubjectEntry(SubjectFields):
    """A subject as a registry file describes it."""

    images: tuple[ImageEntry, ...]
    """Its pictures: splits harden, attack and reference for a protected subject, attack and reference for a control."""


class Subject(SubjectFields):
    """Someone or something to protect, or a control on which attacks must still succeed."""

    images: tuple[Image, ...]
    """Its pictures, in the order of the file."""

    @property
    def is_invented(self) -> bool:
        """Whether it is no real person, so that everyone may see its id and pictures: its consent has the basis "invented"."""
        return self.consent is not None and self.consent.basis == "invented"

    def images_of(self, split: Split) -> tuple[Image, ...]:
        """The pictures of one split, in the order of the file."""
        return tuple(image for image in self.images if image.split == split)


class RegistryFile(BaseModel):
    """Who is protected from personalization, and on whom attacks must still succeed."""

    model_config = _STRICT | ConfigDict(title="guardsmith registry")

    version: Literal[1]
    """Version of this format."""
    subjects: tuple[SubjectEntry, ...] = Field(min_length=1)
    """The protected subjects."""
    controls: tuple[SubjectEntry, ...] = ()
    """Subjects that are not protected: they show that hardening left personalization of others intact."""


class Registry(BaseModel):
    """A registry that passed every check, as `load_registry` returns it."""

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
    """SHA-256 of the content (`content_digest`): no paths, no formatting, no order."""
    warnings: tuple[str, ...]
    """Weak places that are allowed, as `file:line: sentence`."""
    _class_noun_places: dict[str, str] = PrivateAttr(default_factory=dict)
    _lines: dict[str, int] = PrivateAttr(default_factory=dict)

    @property
    def lines(self) -> dict[str, int]:
        """Line of the file at which each subject and control is named."""
        return dict(self._lines)

    def find(self, subject_id: str) -> Subject:
        """The subject or control with this id.

        Raises:
            UserError: There is none.
        """
        everyone = {subject.id: subject for subject in (*self.subjects, *self.controls)}
        if subject_id not in everyone:
            raise UserError(f"{self.path} has no subject {subject_id!r}{did_you_mean(subject_id, everyone)}")
        return everyone[subject_id]
