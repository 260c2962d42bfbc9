"""The evidence as it may leave the house: `verify/public/`, which `guardsmith publish` uploads.

Who is protected must not be published. Ids are replaced by names that only a salt beside the report can be used to recompute
(`.salt`, never uploaded), and no picture of a subject is shown. Subjects that are invented (consent `basis: invented`) keep both.
Paths of this machine go as well. What the public reads of a field of the report is said at the field (`reports.report`). Whatever
is left of a hidden id or path afterwards is an error, not an upload.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from guardsmith.config.recipe import Recipe
from guardsmith.core.atomic_io import whole_folder, write_json
from guardsmith.core.errors import RunFailed
from guardsmith.core.redaction import Private, redacted
from guardsmith.registry.loader import Subject
from guardsmith.reports.html import Evidence, page_data, save_page
from guardsmith.reports.report import without_path

SALT = ".salt"


def salt_of(folder: Path) -> str:
    """The salt of an output folder, made when there is none yet; only its owner may read it."""
    file = folder / SALT
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(16))
    return file.read_text()


def public_names(protected: Sequence[Subject], controls: Sequence[Subject], salt: str) -> dict[str, str]:
    """Id -> what the public reads instead."""
    names = {}
    for role, group in (("subject", protected), ("control", controls)):
        for subject in group:
            mark = hashlib.sha256(f"{salt}/{subject.id}".encode()).hexdigest()[:12]
            names[subject.id] = subject.id if subject.is_invented else f"{role}-{mark}"
    return names


def redacted_record(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A `harden.json` for the public."""
    public = json.loads(json.dumps(record))
    public["base"] = without_path(public["base"])
    if "recipe" in public:
        places = {Private.PLACE: without_path}
        public["recipe"] = redacted(Recipe.model_validate(public["recipe"]), places).model_dump(mode="json")
    public["subjects"] = [names[name] for name in public["subjects"]]
    public.pop("left_out", None)  # names of files that were not released could name persons too
    return dict(public)


def check_redacted(text: str, names: Mapping[str, str], what: str) -> None:
    """Nothing of what is hidden may be left.

    Raises:
        RunFailed: something is.
    """
    words = set(re.findall(r"[a-z0-9_-]+", text.casefold()))  # ids are such words; thousands are looked up at once
    for name, public in names.items():
        if public != name and name in words:
            raise RunFailed(
                f"{what} still names the subject '{name}' and was not written; give it an id that is no other word"
            )
    if str(Path.home()) in text and str(Path.home()) != "/":
        raise RunFailed(f"{what} still has a path of this machine in it and was not written; please report this")


def save_public(
    folder: Path,
    evidence: Evidence,
    record: Mapping[str, Any] | None,
    protected: Sequence[Subject],
    controls: Sequence[Subject],
    benign: Sequence[tuple[str, Image.Image, Image.Image]],
    salt: str,
) -> None:
    """Write `report.json`, `report.html` and, if there is a record, `harden.json`; the folder appears whole.

    Args:
        folder: where to.
        evidence: report and pictures, not redacted.
        record: `harden.json`, where guardsmith made the model.
        protected: every protected subject, attacked or not.
        controls: the controls.
        benign: see `page_data`.
        salt: see `salt_of`.

    Raises:
        RunFailed: something that has to be hidden is left.
    """
    names = public_names(protected, controls, salt)
    report = evidence.report.redacted(names)
    attacked = {score.subject for score in evidence.report.scores}
    masked = [s.model_copy(update={"id": names[s.id]}) for s in protected if s.id in attacked]
    masked_controls = [s.model_copy(update={"id": names[s.id]}) for s in controls]
    public = Evidence(
        report,
        [unit.renamed(names[unit.subject]) for unit in evidence.units],
        False,
        {names[name]: files for name, files in evidence.released.items()},
        only_invented=True,
        root=evidence.root,
    )
    with whole_folder(folder) as place:
        report.save(place / "report.json")
        save_page(place / "report.html", page_data(public, masked, masked_controls, benign))
        if record is not None:
            write_json(place / "harden.json", redacted_record(record, names))
        for file in sorted(place.iterdir()):
            text = re.sub(r'"data:image/[^"]*"', "", file.read_text(encoding="utf-8"))  # pictures spell anything
            check_redacted(text, names, file.name)
