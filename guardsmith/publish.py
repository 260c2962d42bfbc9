"""Publish: a hardened checkpoint on the Hugging Face Hub, with its evidence, if it deserves that.

    <output>/release/     what goes up, gathered first, for anyone to look at
        README.md LICENSE.md     model card, licence of the base
        unet/ vae/ ...           the model, a complete diffusers folder
        guardsmith/              report.html, report.json, harden.json (`verify/public/`), grid.png if nobody in it is real

One commit replaces what the repository had. A token is never asked for, read or printed here: the Hub's client finds it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from guardsmith.card import licence_of, model_card
from guardsmith.errors import GuardsmithError, RunFailed, UserError
from guardsmith.models import EVIDENCE, weights_digest
from guardsmith.page import is_invented
from guardsmith.progress import console
from guardsmith.records import read_record, whole_folder, write_text
from guardsmith.registry import Registry

ATTEMPTS = 5
LONGEST_WAIT = 300.0  # seconds between two attempts
IGNORED = {".gitattributes"}  # the Hub's own

Answer = TypeVar("Answer")


class Refused(GuardsmithError):
    """The gate did not say yes to what was to be published (exit code 1)."""

    exit_code = 1


class Published(NamedTuple):
    """What became of it.

    Attributes:
        commit: id of the commit that the repository is at; empty after a dry run.
        url: to look at.
        changed: whether anything was uploaded.
    """

    commit: str
    url: str
    changed: bool


def objections(output: Path, registry: Registry, today: date) -> list[str]:
    """Why this model must not be published: one sentence for each rule that it breaks.

    Raises:
        UserError: there is no finished verification.
    """
    file, public = output / "verify" / "report.json", output / "verify" / "public" / "report.json"
    if not (output / "model").is_dir():
        raise UserError(f"{output} holds no model; run `guardsmith harden` first.")
    if not file.is_file() or not public.is_file():
        raise UserError(f"{output} holds no report with public evidence; run `guardsmith verify` first.")
    report = read_record(file, ("verdict", "hardening", "checks", "run"), "verify again")
    shown = read_record(public, ("verdict", "run"), "verify again")
    found = []
    if report["verdict"] != "pass":
        failed = [check["name"] for check in report["checks"] if check["status"] == report["verdict"]]
        which = ", ".join(dict.fromkeys(failed)) or "nothing was checked"
        found.append(f"the verdict of {file} is {report['verdict']}, not pass ({which})")
    if weights_digest(output / "model") != report["hardening"]["model_digest"]:
        found.append(f"{output / 'model'} is not what was verified (its digest differs from the report's)")
    if registry.digest != report["hardening"]["registry_digest"]:
        found.append(f"{registry.path} is not the registry that was verified (the digests differ)")
    if any(shown[key] != report[key] for key in ("verdict", "run")):
        found.append(f"{public} is not of the same verification as {file}")
    for subject in registry.subjects:
        until = None if subject.consent is None else subject.consent.expires_on
        if until is not None and until < today:
            found.append(f"the consent for {subject.id} expired on {until}")
    return found


def gather(
    output: Path,
    registry: Registry,
    repo_id: str,
    *,
    contact: str,
    licence: str | None = None,
    licence_file: Path | None = None,
    unverified: str | None = None,
) -> Path:
    """Put together what goes up; the folder appears whole.

    Args:
        output: of a verified hardening.
        registry: who is protected.
        repo_id: where it will be.
        contact: for the card.
        licence: see `licence_of`.
        licence_file: likewise.
        unverified: for the card, if the gate did not say yes.

    Raises:
        UserError: the licence is not known.
    """
    model, verified = output / "model", output / "verify"
    report = read_record(verified / "public" / "report.json", ("hardening", "recipe"), "verify again")
    base = read_record(verified / "report.json", ("hardening",), "verify again")["hardening"]["base"]
    known = licence_of(model, base, licence, licence_file)
    open_to_all = all(is_invented(subject) for subject in (*registry.subjects, *registry.controls))
    with whole_folder(output / "release") as place:
        shutil.copytree(model, place, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if n == ".cache"])
        for file in [*place.glob("LICENSE*"), *place.glob("README*")]:
            file.unlink()
        shutil.copytree(verified / "public", place / EVIDENCE)
        if open_to_all and (verified / "grid.png").is_file():
            shutil.copy(verified / "grid.png", place / EVIDENCE / "grid.png")
        write_text(place / "LICENSE.md", known.text)
        card = model_card(
            report,
            known,
            repo_id,
            contact=contact,
            unverified=unverified,
            grid=(place / EVIDENCE / "grid.png").exists(),
        )
        write_text(place / "README.md", card)
    return output / "release"


def files_of_release(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def is_same(file: Path, remote: Any) -> bool:
    """Whether a file is what the repository has already: by SHA-256 where it is stored apart, else by git's own hash."""
    data = file.read_bytes()
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == hashlib.sha256(data).hexdigest())
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def patiently(what: str, call: Callable[[], Answer], wait: Callable[[float], None] = time.sleep) -> Answer:
    """Call the Hub, again where it is busy (429, 5xx) or does not answer, after as long as it asks for.

    Raises:
        UserError: it says no for good: no token, no right, no such repository.
        RunFailed: somebody else changed the repository meanwhile, or it stays busy.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for attempt in range(1, ATTEMPTS + 1):
        delay = min(LONGEST_WAIT, 2.0**attempt)
        try:
            return call()
        except LocalTokenNotFoundError as error:
            raise UserError("no token for the Hub was found; log in with `hf auth login` or set HF_TOKEN") from error
        except OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set; unset it to publish") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise UserError(
                    f"{what}: the Hub refuses it ({status}); the token has no right to, or there is none"
                ) from error
            if status == 404:
                raise UserError(f"{what}: the Hub does not know it (404); check the name and your access") from error
            if status == 412:
                raise RunFailed(
                    f"{what}: somebody else changed the repository meanwhile (412); look at it and run again"
                ) from error
            if status != 429 and status < 500:
                raise RunFailed(f"{what}: the Hub refuses it ({status}: {str(error).splitlines()[-1]})") from error
            asked = str(error.response.headers.get("Retry-After", ""))
            if asked.isdigit():
                delay = min(LONGEST_WAIT, float(asked))
            reason = f"the Hub is busy ({status})"
            if attempt == ATTEMPTS:
                raise RunFailed(
                    f"{what}: {reason} after {ATTEMPTS} attempts; run the same command again to go on"
                ) from error
        except (ConnectionError, TimeoutError, OSError) as error:
            reason = f"the Hub does not answer ({type(error).__name__})"
            if attempt == ATTEMPTS:
                raise RunFailed(
                    f"{what}: {reason} after {ATTEMPTS} attempts; run the same command again to go on"
                ) from error
        console.print(f"{what}: {reason}; again in {delay:.0f} s", markup=False, soft_wrap=True)
        wait(delay)
    raise AssertionError("unreachable")


def upload(
    release: Path,
    repo_id: str,
    *,
    message: str,
    private: bool = False,
    gated: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
) -> Published:
    """Bring a repository to what a folder holds, in one commit, and check what arrived.

    Args:
        release: see `gather`.
        repo_id: "organisation/name"; made if it is not there.
        message: of the commit.
        private: make it so that only its owners see it, if it is new.
        gated: "auto" or "manual": people have to ask for access.
        branch: other than main; made if it is not there.
        create_pr: propose the commit instead.
        tag: name for the commit.

    Raises:
        UserError: see `patiently`; the tag is there already, at another commit.
        RunFailed: see `patiently`; what arrived is not what was sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi()
    revision = branch or "main"
    try:
        patiently("model card", lambda: ModelCard.load(release / "README.md").validate())
    except ValueError as error:
        raise RunFailed(f"the Hub does not accept the model card: {' '.join(str(error).split())}") from error
    url = patiently(repo_id, lambda: api.create_repo(repo_id, private=private or None, exist_ok=True)).url
    if gated is not None:
        patiently(repo_id, lambda: api.update_repo_settings(repo_id, gated=gated))  # type: ignore[arg-type]
    if branch is not None:
        patiently(repo_id, lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    refs = patiently(repo_id, lambda: api.list_repo_refs(repo_id))
    tags = {each.name: each.target_commit for each in refs.tags}
    files = files_of_release(release)

    def there() -> tuple[str, dict[str, Any]]:
        head = str(api.repo_info(repo_id, revision=revision).sha)
        try:
            entries = [e for e in api.list_repo_tree(repo_id, recursive=True, revision=head) if hasattr(e, "blob_id")]
        except EntryNotFoundError:  # nothing was committed yet
            entries = []
        return head, {entry.path: entry for entry in entries if entry.path not in IGNORED}

    def differences(remote: Mapping[str, Any]) -> list[Any]:
        changed = [path for path, file in files.items() if path not in remote or not is_same(file, remote[path])]
        return [
            *(CommitOperationAdd(path, files[path]) for path in changed),
            *(CommitOperationDelete(path, is_folder=False) for path in remote if path not in files),
        ]

    def commit() -> tuple[str, str, bool]:
        # Asked anew at every attempt: an answer that was lost on the way may have been a yes.
        head, remote = there()
        operations = differences(remote)
        if not operations:
            return head, url, False
        made = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, parent_commit=head
        )
        return str(made.oid), str(made.pr_url or url), True

    if tag in tags and create_pr:
        raise UserError(f"{repo_id} has a tag {tag} already; choose another")
    oid, where, changed = patiently(repo_id, commit)
    at = f"refs/pr/{where.rstrip('/').rsplit('/', 1)[1]}" if create_pr and changed else oid
    arrived = patiently(repo_id, lambda: api.verify_repo_checksums(repo_id, revision=at, local_dir=release))
    if arrived.mismatches or arrived.missing_paths:
        wrong = [str(getattr(each, "path", each)) for each in (*arrived.mismatches, *arrived.missing_paths)]
        raise RunFailed(f"{repo_id} does not hold what was sent ({', '.join(wrong)}); run the same command again")
    if tag is not None and tags.get(tag) != oid:
        if tag in tags:
            raise UserError(
                f"{repo_id} has a tag {tag} at another commit already; everything is uploaded, choose another tag"
            )
        patiently(repo_id, lambda: api.create_tag(repo_id, tag=tag, revision=oid))
    return Published(oid, where, changed)


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
    dry_run: bool = False,
    **how: Any,
) -> Published:
    """Refuse, or gather and upload.

    Args:
        output: of a verified hardening.
        registry: who is protected.
        repo_id: "organisation/name".
        today: the day on which consents must hold.
        contact: see `model_card`.
        licence: see `licence_of`.
        licence_file: likewise.
        force: publish although the gate did not say yes, for this reason, which the card tells.
        dry_run: gather, and stop.
        how: see `upload`.

    Raises:
        Refused: the gate did not say yes, and nobody forces it.
        UserError: see `objections`, `gather` and `upload`.
        RunFailed: see `upload`.
    """
    found = objections(output, registry, today)
    if found and force is None:
        raise Refused("not published: " + "; ".join(found))
    release = gather(
        output, registry, repo_id, contact=contact, licence=licence, licence_file=licence_file,
        unverified=force if found else None,
    )  # fmt: skip
    digest = weights_digest(release)
    if not found and digest != json.loads((output / "verify" / "report.json").read_text())["hardening"]["model_digest"]:
        raise RunFailed(f"{output / 'model'} was changed while {release} was gathered from it; verify again")
    if dry_run:
        return Published("", "", False)
    return upload(release, repo_id, message=f"Hardened model {digest[:19]}", **how)
