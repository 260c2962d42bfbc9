"""The report of a verification: one typed object that is built, written, read and redacted as itself.

What a field holds is said at the field, and so is what the public may read of it (`core.redaction`). A new column or section is a
field here, the place in `evaluation` where it is measured, and the place where it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from guardsmith.config.recipe import Recipe, ThreatModel
from guardsmith.core.atomic_io import write_json
from guardsmith.core.console import warn
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.redaction import Place, Private, Reason, Rules, SubjectId, UnitName, redacted
from guardsmith.gate.calibration import Levels
from guardsmith.gate.checks import Check, Status
from guardsmith.gate.deployability import Measurement
from guardsmith.gate.evidence import Side, Utility
from guardsmith.gate.policy import Policy
from guardsmith.gate.statistics import Interval
from guardsmith.reports.displacement import Displacement, DisplacementToBreak, JustEnough
from guardsmith.reports.versions import PART, SCHEMA, upgraded

Role = Literal["protected", "control"]
PUBLIC = "verify/public/report.json"
"""Where an output folder has the report for the public."""


class _Part(BaseModel):
    model_config = PART


class Score(_Part):
    """What one attack reached on one subject at one evaluation point."""

    side: Side
    """The model attacked."""
    subject: SubjectId
    """Id of the subject or control."""
    attack: str
    """Label of the attack in the recipe."""
    evaluation_point: float = Field(gt=0)
    """Share of the attack's usual steps."""
    units: list[list[float | None]]
    """Per unit (identifier x seed) the similarity of each picture to the subject's real ones; null where none was measured."""
    interval: Interval | None
    """Their mean with its 95 % interval; null where nothing was scored."""
    fdfr: float | None = None
    """Share of the pictures in which no face is detected (face detection failure rate); null for judges of anything else."""
    displacement: Displacement | None = None
    """How far the attack moved the weights; null in reports from before it was measured."""


class RemovalRecord(_Part):
    """What editing the weights before training cost an attacker: the mean over identifiers and seeds."""

    side: Side
    """The model that was edited."""
    subject: SubjectId
    """Id of the subject or control."""
    attack: str
    """Label of the attack."""
    removal: str
    """How the weights were edited, a name of `guardsmith list removals`."""
    seconds: float
    """Of wall clock, on the machine of the run."""
    unet_forwards: float
    """Rows that went through denoisers, in forward equivalents."""
    pictures: int
    """Pictures that the attacker needed for it."""
    needs_base: bool
    """Whether a public model of the same architecture was needed."""
    changed_weights: float
    """Share of the denoiser's weights that changed."""


class Attacked(_Part):
    """How many were attacked."""

    protected: int
    """Protected subjects attacked."""
    of: int
    """Protected subjects in the registry."""
    controls: int
    """Controls."""


class AttackedSubject(_Part):
    """A subject that was attacked."""

    id: SubjectId
    """In the registry."""
    class_noun: str
    """Its class."""
    role: Role
    """Whether attacks on it have to fail (protected), or to succeed (control)."""


class JudgeRecord(_Part):
    """Who measured similarity."""

    name: str
    """As `guardsmith policy --judge` knows it."""
    model: Place | None = None
    """The encoder, where it is not the usual one."""
    clip_t: Place | None = None
    """The CLIP that measured CLIP-T; null where it was not measured."""


class PolicyRecord(_Part):
    """The policy that judged."""

    name: str
    """As its file says."""
    dated: str
    """As its file says, YYYY-MM-DD."""
    measured_on: str
    """Where its levels come from."""
    judge: JudgeRecord
    """The judge, whose similarities the levels are levels of."""
    digest: str
    """Of judge, rules and levels."""

    @classmethod
    def of(cls, policy: Policy) -> PolicyRecord:
        """What a report keeps of a policy; its rules and levels have places of their own."""
        content = policy.model_dump(mode="json", include={"name", "dated", "measured_on", "judge"})
        return cls.model_validate(content | {"digest": policy.digest})


class Hardening(_Part):
    """What is on record of how the model came about; null where guardsmith did not make it."""

    base: Place
    """Name of the base."""
    base_digest: str
    """Of its weights."""
    model_digest: str
    """Of the weights that were judged."""
    registry_digest: str
    """Of who is protected."""
    method: str | None
    """Hardening method."""
    params: Annotated[dict[str, Any] | None, Private.PLACE]
    """Its parameters."""
    seed: int | None
    """Of everything random."""
    seconds: float | None
    """How long it took."""
    unet_forward_equivalents: int | None
    """What it cost."""
    files: dict[str, str] | None = None
    """File of the model that was judged -> its SHA-256; reports from before this was recorded have none."""
    carries: Annotated[list[str] | None, Private.WITHHELD] = None
    """Files and tensors that a checkpoint holds and that are no part of the model; null where it was not recorded."""


class Run(_Part):
    """Versions, machine and time."""

    guardsmith: str
    """Version."""
    packages: dict[str, str]
    """Package -> version."""
    python: str
    """Version."""
    machine: str
    """Operating system and processor."""
    threads: int | None = None
    """Of one process."""
    processes: int | None = None
    """Of the launcher; 1 without one."""
    deterministic: bool | None = None
    """Whether torch was held to deterministic algorithms."""
    finished: str
    """When, ISO 8601."""
    seconds: float | None = None
    """Of the verification, wall clock; attacks that were kept from an earlier one took none of it. Earlier reports do not say."""


class Report(_Part):
    """The result of a verification (`report.json`): verdict, checks, scores, settings and versions."""

    version: Literal[3] = Field(SCHEMA, alias="schema")
    """Version of this schema."""
    verdict: Status
    """The worst of the checks."""
    exit_code: Literal[0, 1, 3]
    """Of the command: pass, fail, inconclusive."""
    checks: list[Check]
    """Every check of the gate."""
    scores: list[Score]
    """What was measured."""
    released: dict[SubjectId, list[float | None]] = {}
    """Protected subject -> similarity to it of every picture that the released weights draw of it without an attack."""
    displacement_to_break: list[DisplacementToBreak] = []
    """Where attackers went on for longer than usual, or at other rates."""
    just_enough: list[JustEnough] = []
    """Searches for just-enough attacks."""
    removals: list[RemovalRecord] = []
    """What attackers with open weights spent on removing the protection before they trained."""
    threat_model: ThreatModel | None = None
    """What the attackers had: `hosted` (a training service) or `open-weights` (the file too); earlier reports do not say."""
    attacked: Attacked
    """Numbers of subjects."""
    subjects: list[AttackedSubject]
    """Who was attacked."""
    utility: Utility
    """Benign prompts."""
    deployability: list[Measurement] = []
    """Everyday use: every case that was tried, base and hardened model side by side; reports from before have none."""
    failed_units: dict[UnitName, Reason]
    """Attacks that did not run -> why."""
    policy: PolicyRecord | None = None
    """Whose rules and levels; reports from before there were policies have none."""
    calibration: dict[str, Levels]
    """Class noun -> what similarities mean."""
    hardening: Hardening
    """Of the model."""
    recipe: Recipe
    """Attacks and gate, with everything that the recipe left to its defaults."""
    run: Run
    """Versions, machine, time."""
    _folder: Path | None = PrivateAttr(None)

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "report") -> Report:
        """The report that a mapping holds, of this or an earlier schema; unknown fields are left out.

        Args:
            data: what a `report.json` holds.
            where: it is from, for messages. Keys with old names are warned of.

        Raises:
            UserError: it is no report, or one of a later schema.
        """
        if not isinstance(data, Mapping) or not {"schema", "verdict", "checks"} <= data.keys():
            raise UserError(
                f"{where} is no report of a verification; name the folder that `guardsmith verify` wrote to, or the report.json "
                "in its folder verify"
            )
        current, warnings = upgraded(data, where)
        for warning in warnings:
            warn(warning)
        try:
            return cls.model_validate(current, extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = "is missing" if first["type"] == "missing" else "is not as expected"
            raise UserError(
                f"{where} is not a report of this version of guardsmith ({place} {reason}); verify again"
            ) from error

    @classmethod
    def load(cls, run: Path, place: str = "verify/report.json") -> Report:
        """Read the report of a verified run: its output folder, or the file itself.

        Args:
            run: folder or file.
            place: of the report in such a folder.

        Raises:
            UserError: there is none, or see `parse`.
        """
        file = run / place if run.is_dir() else run
        if not file.is_file():
            what = f"holds no report ({place})" if run.is_dir() else "holds no report, for it does not exist"
            raise UserError(f"{run} {what}; run `guardsmith verify` first, or name the folder that it wrote to")
        try:
            data = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(f"{file} is no report, for it is not valid JSON; name another, or verify again") from error
        return cls.parse(data, str(file)).beside(file.parent)

    def beside(self, folder: Path) -> Report:
        """The same report, which knows the folder that its pictures are in."""
        self._folder = folder
        return self

    def __eq__(self, other: object) -> bool:
        """Two reports are equal if they say the same, wherever their pictures are."""
        return isinstance(other, Report) and self.as_json() == other.as_json()

    __hash__ = None  # type: ignore[assignment]

    def figure(self) -> Image.Image:
        """The pictures of the verification: a row for each subject and attack, real ones, base and hardened side by side.

        Returns:
            The grid of `verify` (grid.png), RGB; a notebook shows it. It shows the subjects: think before you pass it on.

        Raises:
            UserError: the report was read from a file without its pictures beside it.
        """
        file = None if self._folder is None else self._folder / "grid.png"
        if file is None or not file.is_file():
            raise UserError(
                "there are no pictures beside this report; load it from the output folder of the verification."
            )
        with Image.open(file) as grid:
            return grid.convert("RGB")

    def as_json(self) -> dict[str, Any]:
        """What the file holds: numbers, strings, lists and mappings only."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Write the file; it appears whole."""
        write_json(path, self.as_json())

    def redacted(self, names: Mapping[str, str]) -> Report:
        """A copy for the public, by the annotations of the fields.

        Args:
            names: id of every subject and control -> what the public reads instead.

        Raises:
            RunFailed: a subject of the report has no public name.
        """

        def public_name(subject: str) -> str:
            if subject and subject not in names:
                raise RunFailed(f"the report names '{subject}', who has no public name; nothing was written")
            return names[subject] if subject else ""

        def public_unit(unit: str) -> str:
            side, subject, rest = unit.split("/", 2)
            return f"{side}/{public_name(subject)}/{rest}"

        rules: Rules = {
            Private.SUBJECT: public_name, Private.UNIT: public_unit, Private.PLACE: without_path,
            Private.REASON: lambda reason: "it did not run",
        }  # fmt: skip
        return redacted(self, rules)


def without_path(place: str) -> str:
    """A model by the name that people know it by: a folder of this machine loses its path."""
    try:
        return Path(place).name if Path(place).expanduser().exists() else place
    except (OSError, RuntimeError, ValueError):  # no path at all: too long, or of an unknown user
        return place


def json_schema() -> dict[str, Any]:
    """The JSON schema of `report.json`, committed as docs/reference/report.schema.json; further fields are allowed everywhere."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Report.model_json_schema(mode="serialization"),
    }
    text = json.dumps(schema)
    result: dict[str, Any] = json.loads(text, object_hook=_open)
    return result


def _open(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("additionalProperties") is False:
        del part["additionalProperties"]
    return part
