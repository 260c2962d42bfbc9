"""Publish a hardened checkpoint on the Hugging Face Hub with its evidence, if its verdict is pass.

    <output>/release/     the files to be uploaded, written first
        README.md LICENSE.md     model card, licence of the base
        unet/ vae/ ...           the model, a complete diffusers folder
        guardsmith/              report.html, report.json, harden.json (`verify/public/`), bom.cdx.json, and grid.png if nobody
                                 in it is real

The upload itself is in `hub.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from guardsmith.core.atomic_io import whole_folder, write_json, write_text
from guardsmith.core.console import in_words
from guardsmith.core.credentials import credential_in_file
from guardsmith.core.errors import GuardsmithError, RunFailed, UserError
from guardsmith.models.checkpoint import weights_digest
from guardsmith.models.contents import EVIDENCE, EVIDENCE_FILES, HALF, LICENCE, README, list_files
from guardsmith.models.release_files import changed_files, surplus_files
from guardsmith.registry.loader import Registry
from guardsmith.release.bom import bill_of_materials
from guardsmith.release.card import AccessForm, licence_of, model_card
from guardsmith.release.hub import Published, upload
from guardsmith.release.signing import check_key, check_package, sign
from guardsmith.reports.report import Report


class Refused(GuardsmithError):
    """The model must not be published, e.g. for its verdict is not pass (exit code 1)."""

    exit_code = 1


def _digests(report: Report, file: Path) -> dict[str, str]:
    """Digest of every file of the model that a report is about.

    Raises:
        UserError: it is of an earlier guardsmith, which did not record them.
    """
    digests = report.hardening.files
    if not digests:
        raise UserError(f"{file} does not say which files were verified; verify again.")
    return dict(digests)


def objections(output: Path, registry: Registry, today: date) -> list[str]:
    """Why this model must not be published: one sentence for each broken rule.

    Raises:
        UserError: there is no finished verification, or one without a digest of every file.
        Refused: the folder holds what was not verified; that is never published, whatever the reason.
    """
    file, public = output / "verify" / "report.json", output / "verify" / "public" / "report.json"
    if not (output / "model").is_dir():
        raise UserError(f"{output} holds no model; run `guardsmith harden` first.")
    if not file.is_file() or not public.is_file():
        raise UserError(f"{output} holds no report with public evidence; run `guardsmith verify` first.")
    report, public_report = Report.load(file), Report.load(public)
    sentences = []
    if report.verdict != "pass":
        names = [check.name for check in report.checks if check.status == report.verdict]
        which = ", ".join(dict.fromkeys(names)) or "nothing was checked"
        sentences.append(f"the verdict of {file} is {report.verdict}, not pass ({which})")
    digests = _digests(report, file)
    if surplus := surplus_files(output / "model", digests):
        raise Refused(
            f"not published: {output / 'model'} holds what was not verified ({in_words(surplus)}); delete it, or harden and "
            "verify again"
        )
    wrong = changed_files(output / "model", digests)
    if wrong or weights_digest(output / "model") != report.hardening.model_digest:
        sentences.append(
            f"{output / 'model'} is not what was verified (the digests differ from the report's: {in_words(wrong)})"
        )
    if registry.digest != report.hardening.registry_digest:
        sentences.append(f"{registry.path} is not the registry that was verified (the digests differ)")
    if (public_report.verdict, public_report.run) != (report.verdict, report.run):
        sentences.append(f"{public} is not of the same verification as {file}")
    for subject in registry.subjects:
        until = None if subject.consent is None else subject.consent.expires_on
        if until is not None and until < today:
            sentences.append(f"the consent for {subject.id} expired on {until}")
    return sentences


def gather(
    output: Path,
    registry: Registry,
    repo_id: str,
    *,
    contact: str,
    licence: str | None = None,
    licence_file: Path | None = None,
    unverified: str | None = None,
    sign_key: Path | None = None,
    keyless: bool = False,
    form: AccessForm | None = None,
) -> Path:
    """Write the release folder; it appears whole.

    Args:
        output: of a verified hardening.
        registry: who is protected.
        repo_id: where it will be.
        contact: for the card.
        licence: see `licence_of`.
        licence_file: likewise.
        unverified: for the card, why it is published although the gate failed.
        sign_key: private key to sign it with.
        keyless: sign it with Sigstore.
        form: for the card, what people fill in who request access.

    Raises:
        UserError: the licence is not known.
        RunFailed: see `sign`.
    """
    model, evidence = output / "model", output / "verify"
    report = Report.load(evidence / "public" / "report.json")
    terms = licence_of(model, report.hardening.base, licence, licence_file)
    open_to_all = all(subject.is_invented for subject in (*registry.subjects, *registry.controls))
    digests = _digests(report, evidence / "public" / "report.json")
    with whole_folder(output / "release") as place:
        for name in digests:
            if name != README and not LICENCE.fullmatch(name) and (model / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(model / name, place / name)
        (place / EVIDENCE).mkdir()
        for name in ("report.json", "report.html", "harden.json"):
            if (evidence / "public" / name).is_file():
                shutil.copyfile(evidence / "public" / name, place / EVIDENCE / name)
        write_text(place / EVIDENCE / "recipe.yaml", recipe_as_yaml(report))
        if open_to_all and (evidence / "grid.png").is_file():
            shutil.copyfile(evidence / "grid.png", place / EVIDENCE / "grid.png")
        write_text(place / "LICENSE.md", terms.text)
        write_json(place / EVIDENCE / "bom.cdx.json", bill_of_materials(report, terms, repo_id))
        card = model_card(
            report,
            terms,
            repo_id,
            contact=contact,
            unverified=unverified,
            grid=(place / EVIDENCE / "grid.png").exists(),
            half=any(any(place.glob(f"{denoiser}/*.{HALF}.*")) for denoiser in ("unet", "transformer")),
            form=form,
        )
        write_text(place / "README.md", card)
        check_release(place, digests)
        if sign_key is not None or keyless:
            sign(place, sign_key, output / "release")
    return output / "release"


def recipe_as_yaml(report: Report) -> str:
    """The recipe of a verification as a file that anyone can verify with: attacks, judge, levels, rules.

    Args:
        report: redacted.
    """
    recipe = report.recipe.model_dump(mode="json", exclude_none=True)
    header = "# The recipe of this model's verification, with its judge and levels; subjects are those of your own registry.\n"
    return header + yaml.safe_dump(recipe, sort_keys=False, width=120)


def check_release(release: Path, model_files: Collection[str]) -> None:
    """Raise unless every file is a known one and none looks like it holds a credential.

    Args:
        release: the folder.
        model_files: those of the model, relative to it.

    Raises:
        Refused: a file is not known, or seems to hold a credential.
    """
    names = {*model_files, README, "LICENSE.md", *(f"{EVIDENCE}/{name}" for name in EVIDENCE_FILES)}
    if surplus := surplus_files(release, names):
        raise Refused(f"not published: these files are no part of a model or of its evidence: {in_words(surplus)}")
    for name, file in list_files(release).items():
        if kind := credential_in_file(file):
            raise Refused(f"not published: {name} seems to hold {kind}; take it out of the model or of the evidence")


def publish(
    output: Path,
    registry: Registry,
    repo_id: str,
    *,
    today: date,
    contact: str,
    licence: str | None = None,
    licence_file: Path | None = None,
    force: str | None = None,
    sign_key: Path | None = None,
    keyless: bool = False,
    form: AccessForm | None = None,
    dry_run: bool = False,
    **upload_options: Any,
) -> Published:
    """Check, write the release folder and upload it.

    Args:
        output: of a verified hardening.
        registry: who is protected.
        repo_id: "organisation/name".
        today: the day on which consents must hold.
        contact: see `model_card`.
        licence: see `licence_of`.
        licence_file: likewise.
        sign_key: see `gather`.
        form: see `gather`.
        keyless: see `gather`; not in a dry run, for the log that it goes into is public.
        force: publish although the gate failed, for this reason, which the card states.
        dry_run: upload nothing.
        upload_options: of `upload`.

    Raises:
        Refused: a rule is broken (see `objections`) and `force` is not given, or the folder holds what was not verified.
        UserError: see `objections`, `gather` and `upload`.
        RunFailed: see `upload`.
    """
    if sign_key is not None:
        check_key(sign_key)
    elif keyless:
        check_package()
    broken_rules = objections(output, registry, today)
    if broken_rules and force is None:
        raise Refused("not published: " + "; ".join(broken_rules))
    release = gather(
        output, registry, repo_id, contact=contact, licence=licence, licence_file=licence_file,
        unverified=force if broken_rules else None, sign_key=sign_key, keyless=keyless and not dry_run, form=form,
    )  # fmt: skip
    digest = weights_digest(release)
    if not broken_rules and digest != Report.load(output / "verify" / "report.json").hardening.model_digest:
        raise RunFailed(f"{output / 'model'} was changed while {release} was gathered from it; verify again")
    digests = _digests(Report.load(output / "verify" / "report.json"), output)
    if not broken_rules and (wrong := [name for name in changed_files(release, digests) if (release / name).is_file()
                                and name != README and not LICENCE.fullmatch(name)]):  # fmt: skip
        raise RunFailed(f"{release} is not what was verified ({in_words(wrong)}); verify again")
    check_release(release, digests)
    if dry_run:
        return Published("", "", False)
    return upload(release, repo_id, message=f"Hardened model {digest[:19]}", **upload_options)
