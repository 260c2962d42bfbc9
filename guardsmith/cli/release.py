"""Commands that read and write models for others: import a base; publish, verify-signature, export, release-notes."""

from __future__ import annotations

import json
import re
import shlex
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardsmith.core.console import DAY, day, print_line
from guardsmith.core.errors import UserError

if TYPE_CHECKING:
    from guardsmith.registry.loader import Registry

CONTACT = typer.Option(help="Whom people write to who want to be protected: an address or a link.")
LICENCE = typer.Option("--license", help="Licence of the base, as the Hub calls it.")
LICENCE_FILE = typer.Option("--license-file", help="Text of that licence.")


def check_repo_id(repo_id: str) -> None:
    """Refuse what the Hub does not take as the name of a repository.

    Raises:
        UserError: it is not organisation/name, or has characters that the Hub does not take.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise UserError(f"{repo_id} is no name of a repository; write it as organisation/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{repo_id} is no name that the Hub takes ({reason})") from error


FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|[/.]$|\.lock(/|$)|/\.|^@$|^$")


def check_reference(name: str | None, option: str) -> None:
    """Refuse what git does not take as the name of a branch or tag (git-check-ref-format).

    Raises:
        UserError: it does not.
    """
    if name is not None and FORBIDDEN.search(name):
        raise UserError(f"{option} {name!r}: git takes no such name; use letters, digits, dots, dashes and slashes")


def check_target(repo_id: str, branch: str | None, tag: str | None, *, create_pr: bool) -> None:
    """Refuse names that the Hub or git does not take, and a pull request with a branch or a tag.

    Raises:
        UserError: one of them cannot be.
    """
    if create_pr and (tag or branch):
        raise UserError("--create-pr goes without --tag and --branch: a proposal is neither a release nor a branch")
    check_repo_id(repo_id)
    check_reference(branch, "--branch")
    check_reference(tag, "--tag")


def check_contact(contact: str) -> None:
    """Refuse an empty contact, or one of several lines: it stands on the model card.

    Raises:
        UserError: it is.
    """
    if not contact.strip() or not contact.isprintable():
        raise UserError("--contact: write an address or a link, in one line")


def publish(
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a hardening that was verified.")],
    repo_id: Annotated[str, typer.Option("--repo-id", help="Where to, organisation/name.")],
    subjects: Annotated[Path, typer.Option("--subjects", help="The registry that was verified.")],
    contact: Annotated[str, CONTACT],
    licence: Annotated[str | None, LICENCE] = None,
    licence_file: Annotated[Path | None, LICENCE_FILE] = None,
    private: Annotated[bool, typer.Option("--private", help="For the owners only, if the repository is new.")] = False,
    gated: Annotated[str | None, typer.Option(help="People ask for access: auto or manual.")] = None,
    gated_prompt: Annotated[
        str | None, typer.Option("--gated-prompt", help="What people read who ask for access.")
    ] = None,
    gated_field: Annotated[
        list[str] | None,
        typer.Option(
            "--gated-field", metavar="NAME=KIND", help="What they fill in: text, checkbox, date_picker or country."
        ),
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch other than main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the change as a pull request.")] = False,
    tag: Annotated[str | None, typer.Option(help="Name of this release.")] = None,
    sign_key: Annotated[
        Path | None, typer.Option("--sign-key", help="Sign it with this private key (PEM, elliptic curve).")
    ] = None,
    keyless: Annotated[
        bool,
        typer.Option("--sign-keyless", help="Sign it with Sigstore: as this CI job, or after a login in a browser."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force-unverified", help="Publish although the gate failed; needs --reason.")
    ] = False,
    reason: Annotated[
        str | None, typer.Option(help="Why it is published all the same; printed on the model card.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prepare and list the files, and upload nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON: commit, url, changed, deleted.")
    ] = False,
    today: Annotated[datetime | None, typer.Option(formats=DAY, hidden=True)] = None,
) -> None:
    """Upload a verified model to the Hugging Face Hub with its evidence; exit 1 if the verdict is not pass."""
    from guardsmith.registry.loader import present_day
    from guardsmith.release.card import access_form
    from guardsmith.release.hub import files_of_release
    from guardsmith.release.publish import publish as run_publishing

    if force != bool(reason and reason.strip()):
        raise UserError("--force-unverified and --reason belong together: the card has to say why")
    if gated not in (None, "auto", "manual"):
        raise UserError(f"--gated {gated}: choose auto or manual")
    if gated is None and (gated_prompt or gated_field):
        raise UserError("--gated-prompt and --gated-field belong to --gated: without it nobody fills them in")
    form = None if gated is None else access_form(gated_prompt, gated_field or [])
    if keyless and sign_key:
        raise UserError("--sign-key and --sign-keyless are two ways to sign; choose one")
    check_target(repo_id, branch, tag, create_pr=create_pr)
    check_contact(contact)
    on = day(today) or present_day()
    registry = _registry_of(subjects, on)
    result = run_publishing(
        output, registry, repo_id, today=on, contact=contact, licence=licence, licence_file=licence_file,
        force=reason, sign_key=sign_key, keyless=keyless, form=form, dry_run=dry_run, private=private, gated=gated, branch=branch,
        create_pr=create_pr, tag=tag,
    )  # fmt: skip
    if dry_run:
        release = output / "release"
        for name, file in files_of_release(release).items():
            print_line(f"{file.stat().st_size:>14,}  {name}")
        print_line(f"nothing was uploaded; what would be is in {release}, the model card in {release / 'README.md'}")
    elif result.changed:
        print_line(f"published: {result.url} at {result.commit}")
    else:
        print_line(f"{repo_id} holds exactly this already: {result.url} at {result.commit}")
    if as_json:
        typer.echo(json.dumps(result._asdict(), indent=1))


def _registry_of(subjects: Path, today: date) -> Registry:
    """The registry; an expired consent is a refusal to publish (exit 1), not wrong usage."""
    from guardsmith.registry.loader import load_registry
    from guardsmith.release.publish import Refused

    try:
        return load_registry(subjects, today=today)
    except UserError as error:
        if all("consent expired" in line for line in str(error).splitlines()):
            raise Refused(f"not published: {error}") from error
        raise


def verify_signature(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A published model, downloaded whole.")],
    key: Annotated[Path | None, typer.Option(help="Public key of the publisher (PEM).")] = None,
    identity: Annotated[
        str | None, typer.Option(help="Signed without a key: who published it, an address or the URL of a workflow.")
    ] = None,
    issuer: Annotated[str | None, typer.Option(help="Issuer of that identity, a URL.")] = None,
) -> None:
    """Check that a published model is what was signed; exit 1 if it is not."""
    from guardsmith.release.signing import check_signature

    if (identity is None) != (issuer is None) or (key is None) == (identity is None):
        raise UserError("name --key, or --identity and --issuer: whose signature it has to be")
    check_signature(folder, key, identity=identity, issuer=issuer)
    print_line(
        f"{folder} is what was signed by {identity}"
        if key is None
        else f"{folder} is what was signed with the key that belongs to {key}"
    )


def export(
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a hardening.")],
    like: Annotated[Path, typer.Option(help="The base as a single-file checkpoint (A1111, ComfyUI).")],
    file: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    keep_unknown: Annotated[
        bool, typer.Option("--keep-unknown", help="Copy tensors of no known part too; they may be the base's weights.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force-unverified", help="Export although the gate failed, or the model was not verified.")
    ] = False,
) -> None:
    """Write the hardened model as a single file: that of the base, with the hardened U-Net in its place.

    A model that was not verified, or whose verdict is not pass, is exported with --force-unverified only.
    """
    from guardsmith.core.console import in_words
    from guardsmith.hardening.record import read_hardening
    from guardsmith.models.checkpoint import resolve, weights_digest
    from guardsmith.models.single_file import write_single_file

    record_file = output / "harden.json"
    if not record_file.is_file() or not (output / "model").is_dir():
        raise UserError(f"{output} holds no finished hardening; run `guardsmith harden` first.")
    if not like.is_file():
        raise UserError(f"there is no file {like}; name the base's single-file checkpoint")
    if file.exists():
        raise UserError(f"{file} exists already; name another file")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {file.parent}; make it, or name another file")
    record = read_hardening(record_file)
    if weights_digest(output / "model") != record["model_digest"]:
        raise UserError(
            f"{output / 'model'} was changed after hardening (its digest differs from {record_file}); harden again"
        )
    if not force and (objection := _objection(output, record["model_digest"])):
        raise UserError(f"{objection}; export it all the same with --force-unverified")
    base = resolve(record["base"], record["base_revision"])
    exported = write_single_file(like, base, output / "model", file, keep_unknown=keep_unknown)
    print_line(f"wrote {file}: {exported.replaced} tensors are the hardened model's, everything else is {like}'s")
    if exported.left_out:
        print_line(
            f"left out, for they are copies of a hardened part: {len(exported.left_out)} tensors ({in_words(exported.left_out)})"
        )
    if exported.widened:
        print_line("the hardened tensors are stored in float32: a weight does not fit the precision of the file")


def _objection(output: Path, digest: str) -> str | None:
    """Why a hardened model must not be exported; `None` if nothing is against it."""
    from guardsmith.reports.report import Report

    if not (output / "verify" / "report.json").is_file():
        return f"{output} was never verified (`guardsmith verify {shlex.quote(str(output))}`)"
    report = Report.load(output)
    if report.hardening.model_digest != digest:
        return f"{output / 'verify' / 'report.json'} is about another model"
    return None if report.verdict == "pass" else f"the verdict of {output / 'verify'} is {report.verdict}, not pass"


def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Single-file checkpoint (A1111, ComfyUI), safetensors.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Diffusers folder to write.")],
    config: Annotated[
        str | None,
        typer.Option(help="Diffusers folder or Hub id of the same kind of model.  [default: as diffusers finds it]"),
    ] = None,
) -> None:
    """Make a diffusers folder of a single-file checkpoint, to be used as --base."""
    from guardsmith.config.choosing import kind_of_base
    from guardsmith.config.shipped import recipe_names
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.models.checkpoint import load_model
    from guardsmith.models.single_file import read_single_file

    if not file.is_file():
        raise UserError(f"there is no file {file}; name a single-file checkpoint")
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder")
    quiet_libraries()
    read_single_file(file, folder, config)
    kind = load_model(str(folder)).prediction_type
    print_line(f"wrote {folder} ({kind})")
    kind_of_recipe = kind_of_base(str(folder))
    recipe = next(r for r in (f"tripwire-{kind_of_recipe}", f"apdm-{kind_of_recipe}") if r in recipe_names())
    place = shlex.quote(str(folder))
    print_line(
        f"next: guardsmith plan {recipe} --base {place} --subjects registry.yaml (other recipes: guardsmith list recipes)"
    )


def release_notes(
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a hardening that was verified.")],
    since: Annotated[
        Path | None, typer.Option(help="Output folder, or public report.json, of the release before.")
    ] = None,
    repo_id: Annotated[str | None, typer.Option("--repo-id", help="Name of the release, organisation/name.")] = None,
) -> None:
    """Print Markdown for a release or a pull request, from the public evidence: real persons are not named."""
    from guardsmith.release.notes import release_notes as notes
    from guardsmith.reports.report import PUBLIC, Report

    if repo_id is not None:
        check_repo_id(repo_id)
    earlier = None if since is None else Report.load(since, PUBLIC)
    typer.echo(notes(Report.load(output, PUBLIC), earlier, repo_id), nl=False)
