"""The model card of a hardened checkpoint: what it is, what was measured, what it does not stop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from guardsmith.config.threat_model import CLAIMS
from guardsmith.core.errors import UserError
from guardsmith.gate.checks import EXIT_CODES
from guardsmith.gate.rules import RULES
from guardsmith.gate.statistics import interval
from guardsmith.models.checkpoint import resolve
from guardsmith.models.contents import EVIDENCE, LICENCE
from guardsmith.reports.compare import group, group_units, retention, rows
from guardsmith.reports.report import Report

# Licences of the bases that guardsmith knows how to harden, and where their text is.
LICENCES = {
    "creativeml-openrail-m": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    "openrail++": "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
    "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
}
RESTRICTED = ("openrail", "stabilityai", "other")
"""Parts of the names of licences that restrict what a model may be used for; of `other` it is not known."""


class Licence(NamedTuple):
    """What a checkpoint may be used for.

    Attributes:
        id: as the Hub knows it, e.g. "creativeml-openrail-m"; "other" where it does not.
        text: the licence or, where only its place is known, where to read it.
    """

    id: str
    text: str

    @property
    def restricts_use(self) -> bool:
        """Whether it says what the model may not be used for."""
        return any(part in self.id for part in RESTRICTED)


def licence_of(model: Path, base: str, option: str | None, file: Path | None) -> Licence:
    """The licence of the base, which the hardened model has as well.

    Args:
        model: folder of the hardened model, with the licence files of its base if that had some.
        base: as the recipe names it.
        option: id that the user gives.
        file: its text, if the user gives it.

    Raises:
        UserError: it is not known which, or its text is not, or cannot be read.
    """
    licence_id = option or ("apache-2.0" if base == "builtin:avatar" else None)
    if licence_id is None:
        raise UserError(
            f"the licence of {base} is not known; name it with --license (SD 1.x: creativeml-openrail-m, SD 2.x: openrail++)"
        )
    if not LICENCE_ID.fullmatch(licence_id):
        raise UserError(
            f"--license {licence_id!r}: write it as the Hub calls it, such as creativeml-openrail-m, or say other"
        )
    if file is not None:
        return Licence(licence_id, _text_of(file))
    # Some bases have several: the licence itself, its attachments, notices of the parts.
    if texts := [
        _text_of(place) for place in sorted(model.iterdir()) if place.is_file() and LICENCE.fullmatch(place.name)
    ]:
        return Licence(
            licence_id, texts[0] if len(texts) == 1 else "\n\n".join(text.strip("\n") for text in texts) + "\n"
        )
    if licence_id not in LICENCES:
        raise UserError(f"the text of the licence {licence_id} is not known; give it with --license-file")
    use = ", with its use restrictions" if Licence(licence_id, "").restricts_use else ""
    text = f"This model was made from {base} and is under the licence of that model, {licence_id}{use}: {LICENCES[licence_id]}\n"
    return Licence(licence_id, text)


LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def _text_of(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"the licence {file} cannot be read ({reason}); name its text with --license-file") from error
    if not text.strip():
        raise UserError(f"the licence {file} is empty; name its text with --license-file")
    return text


def licence_before(base: str, revision: str | None, option: str | None, file: Path | None) -> Licence:
    """The licence that a hardened model of a base will be published under, before it is there; see `licence_of`.

    Raises:
        UserError: see `licence_of`.
    """
    return licence_of(resolve(base, revision), base, option, file)


class AccessForm(NamedTuple):
    """What people are asked who want a gated model.

    Attributes:
        prompt: text above the form; empty for the Hub's own.
        fields: name of a field -> its kind, one of `FIELDS`.
    """

    prompt: str
    fields: dict[str, str]


FIELDS = ("text", "checkbox", "date_picker", "country")


def access_form(prompt: str | None, fields: Sequence[str]) -> AccessForm:
    """The form from NAME=KIND pairs.

    Raises:
        UserError: a pair is none, or a kind is unknown.
    """
    kinds = {}
    for field in fields:
        name, equals, kind = field.rpartition("=")
        if not equals or not name.strip() or kind not in FIELDS:
            raise UserError(f"--gated-field {field}: write it as NAME=KIND, a kind being one of {', '.join(FIELDS)}")
        kinds[name.strip()] = kind
    return AccessForm((prompt or "").strip(), kinds)


class Measured(NamedTuple):
    """One result.

    Attributes:
        kind: what kind of number, e.g. "identity_similarity".
        name: in words.
        value: itself.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    kind: str
    name: str
    value: float
    low: float
    high: float


def measured(report: Report) -> list[Measured]:
    """What a report comes down to: similarities, what controls keep, benign prompts."""
    results = []
    for attack in report.recipe.verify.attacks:
        similarity = interval(group_units(report, "hardened", group(report, "protected"), attack, 1))
        if similarity is not None:
            name = f"similarity of protected subjects after {attack} (lower is better)"
            results.append(Measured("identity_similarity", name, *similarity.ends))
        share = retention(report, attack, group(report, "control"))
        if share is not None:
            name = f"share of the base's similarity that controls keep after {attack}"
            results.append(Measured("control_retention", name, *share.ends))
    ratio, low, high = report.utility.kid_ratio, report.utility.kid_ratio_low, report.utility.kid_ratio_high
    if ratio is not None and low is not None and high is not None:
        name = "KID of benign pictures to the base's, over that of two sets of seeds"
        results.append(Measured("kid_ratio", name, ratio, low, high))
    return results


def limits(report: Report) -> list[str]:
    """What the model does not stop, one sentence each."""
    sentences = [
        "Anyone who still has the base, or another model: hardening protects subjects on this model only.",
        "Attackers who know the method and work against it, longer or other attacks than those that were tried, and subjects "
        "that were not in the registry.",
        "Personalization on somebody who looks much like a protected subject may fail too.",
    ]
    claim = report.recipe.gate.claimed_displacement
    if claim is not None:
        sentences.append(f"Attackers who change the weights by more than {100 * claim:.2g} % of their norm.")
    if report.hardening.method == "tripwire":
        sentences.append(
            "An attacker who knows the method and has the weights removes the protection completely, in seconds and without "
            "training."
        )
    return sentences


def results(report: Report, repo_id: str) -> list[Any]:
    """What was measured, as the Hub's `model-index` has it."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image", task_name="Text-to-image after personalization", dataset_type="guardsmith-registry",
            dataset_name="registry of protected subjects and controls", metric_type=each.kind, metric_name=each.name,
            metric_value=round(each.value, 4), metric_args={"interval_95": [round(each.low, 4), round(each.high, 4)]},
            source_name="guardsmith verify", source_url=f"https://huggingface.co/{repo_id}/blob/main/{EVIDENCE}/report.json",
        )
        for each in measured(report)
    ]  # fmt: skip


def model_card(
    report: Report,
    licence: Licence,
    repo_id: str,
    *,
    contact: str,
    unverified: str | None = None,
    grid: bool = False,
    half: bool = False,
    form: AccessForm | None = None,
) -> str:
    """The README.md of the repository: metadata and text.

    Args:
        report: `verify/public/report.json`.
        licence: see `licence_of`.
        repo_id: where it will be.
        contact: whom to write to, an address or a link.
        unverified: why it is published although the gate did not say yes.
        grid: whether there is a picture of everybody attacked.
        half: whether there are half-precision files beside the others.
        form: what people are asked who want it, if it is gated.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = report.hardening.base
    on_the_hub = base.count("/") == 1
    gate_metadata: dict[str, Any] = {}
    if form is not None:
        gate_metadata |= {"extra_gated_prompt": form.prompt} if form.prompt else {}
        gate_metadata |= {"extra_gated_fields": form.fields} if form.fields else {}
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        base_model_relation="finetune" if on_the_hub else None,
        license=licence.id,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "guardsmith",
            "stable-diffusion",
            "personalization-protection",
            *(["not-verified"] if unverified else []),
        ],
        model_name=repo_id,
        eval_results=results(report, repo_id),
        inference=False,
        **gate_metadata,
    )
    statuses = {title: [check.status for check in report.checks if check.name == title] for title in
                dict.fromkeys([*(rule.title for rule in RULES), *(check.name for check in report.checks)])}  # fmt: skip
    checks = {title: [each.count(status) for status in EXIT_CODES] for title, each in statuses.items() if each}
    nouns = {subject.class_noun for subject in report.subjects}
    card = ModelCard.from_template(
        data,
        template_str=(files("guardsmith") / "templates" / "card.md").read_text(encoding="utf-8"),
        repo_id=repo_id, report=report, licence=licence.id, restricted=licence.restricts_use, contact=contact,
        unverified=unverified, grid=grid, half=half,
        evidence=EVIDENCE, checks=checks, answers=rows(report), base=base, limits=limits(report), claims=CLAIMS,
        levels={noun: level for noun, level in report.calibration.items() if noun in nouns},
    )  # fmt: skip
    return str(card)
