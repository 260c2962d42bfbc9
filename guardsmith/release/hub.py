"""Bringing a repository on the Hugging Face Hub to what a folder holds: in one commit, patiently, and checked afterwards.

A token is never asked for, read or printed here: the Hub's client finds it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from guardsmith.core.console import in_words
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.images import sha256_file
from guardsmith.core.progress import console

ATTEMPTS = 5
LONGEST_WAIT = 300.0  # seconds between two attempts
IGNORED = {".gitattributes"}  # the Hub's own

Answer = TypeVar("Answer")


class Published(NamedTuple):
    """What became of it.

    Attributes:
        commit: id of the commit that the repository is at; empty after a dry run.
        url: to look at.
        changed: whether anything was uploaded.
        deleted: files that the repository had and the release has not; earlier commits still hold them.
    """

    commit: str
    url: str
    changed: bool
    deleted: tuple[str, ...] = ()


def files_of_release(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def is_same(file: Path, remote: Any) -> bool:
    """Whether a file is what the repository has already: by SHA-256 where it is stored apart, else by git's own hash."""
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == sha256_file(file))
    data = file.read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def _answered(error: BaseException) -> int | None:
    """The status that the Hub answered with, wherever its client put it; `None` if this is no answer of the Hub."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return int(error.response.status_code)
    if isinstance(error, RuntimeError | ValueError) and isinstance(error.__cause__, HfHubHTTPError):
        return int(error.__cause__.response.status_code)  # of a large file
    told = re.search(r"\b(401|403|404)\b", str(error)) if isinstance(error, ConnectionError) else None
    return int(told[1]) if told else None  # Xet has it in its text only


def _is_network(error: BaseException) -> bool:
    """Whether the Hub did not answer at all."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0].startswith(
        "httpx"
    )


def patiently(what: str, call: Callable[[], Answer], wait: Callable[[float], None] = time.sleep) -> Answer:
    """Call the Hub, again where it is busy (429, 5xx) or does not answer, after as long as it asks for.

    Raises:
        UserError: it says no for good: no token, no right, no such repository.
        RunFailed: somebody else changed the repository meanwhile, or it stays busy.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except LocalTokenNotFoundError as error:
            raise UserError("no token for the Hub was found; log in with `hf auth login` or set HF_TOKEN") from error
        except OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
        except Exception as error:
            status = _answered(error)
            if status in (401, 403):
                raise UserError(
                    f"{what}: the Hub refuses it ({status}); the token has no right to, or there is none"
                ) from error
            if status == 404:
                raise UserError(f"{what}: the Hub does not know it (404); check the name and your access") from error
            if status == 412:
                raise RunFailed(
                    f"{what}: somebody else changed it meanwhile (412); look at it and run again"
                ) from error
            if status is None and not _is_network(error):
                raise
            if status is not None and status != 429 and status < 500:
                raise RunFailed(f"{what}: the Hub refuses it ({status}: {str(error).splitlines()[-1]})") from error
            reason = f"the Hub is busy ({status})" if status else f"the Hub does not answer ({type(error).__name__})"
            if attempt == ATTEMPTS:
                raise RunFailed(
                    f"{what}: {reason} after {ATTEMPTS} attempts; run the same command again to go on"
                ) from error
            asked = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
            delay = min(LONGEST_WAIT, float(asked) if asked.isdigit() else 2.0**attempt)
        console.print(f"{what}: {reason}; again in {delay:.0f} s", markup=False, soft_wrap=True)
        wait(delay)
    raise AssertionError("unreachable")


def check_rights(repo_id: str) -> None:
    """Whether the token at hand may write to a repository of this name, as far as the Hub says before anything is written.

    Args:
        repo_id: "organisation/name"; it need not exist.

    Raises:
        UserError: there is no token, or its account is neither that organisation nor a member of it.
        RunFailed: the Hub does not answer.
    """
    from huggingface_hub import HfApi

    account = patiently("the account at the Hub", lambda: HfApi().whoami())
    owner, name = repo_id.split("/")[0], str(account.get("name", ""))
    spaces = [name, *(str(each.get("name", "")) for each in account.get("orgs") or ())]
    if owner not in spaces:
        raise UserError(
            f"the token at hand is {name}'s, who is no member of {owner}; log in as somebody who is (`hf auth login`), or "
            f"publish to {' or '.join(f'{space}/...' for space in spaces)}"
        )
    token = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if token == "read":
        raise UserError("the token at hand can only read; use one that can write (`hf auth login`)")


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
    files, gone = files_of_release(release), list[str]()

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
        gone[:] = gone or [path for path in remote if path not in files]
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
    wrong = [str(getattr(each, "path", each)) for each in (*arrived.mismatches, *arrived.missing_paths)]
    wrong = [path for path in wrong if path not in IGNORED]
    if wrong:
        raise RunFailed(f"{repo_id} does not hold what was sent ({', '.join(wrong)}); run the same command again")
    if tag is not None and tags.get(tag) != oid:
        if tag in tags:
            raise UserError(
                f"{repo_id} has a tag {tag} at another commit already; everything is uploaded, choose another tag"
            )
        patiently(repo_id, lambda: api.create_tag(repo_id, tag=tag, revision=oid))
    if gone:
        console.print(
            f"deleted from {repo_id}: {in_words(gone)}; earlier commits still hold them: see "
            f"`guardsmith audit-release {repo_id}`",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    return Published(oid, where, changed, tuple(gone))
