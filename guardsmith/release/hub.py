"""Uploading a release folder to the Hugging Face Hub: in one commit, with retries, and verified afterwards.

`create_commit` leaves out files that have not changed. `upload_folder` is not used: it may split a large folder into several
commits, and a release would be incomplete for a while. Tokens are found by the Hub's client and never read or printed here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from guardsmith.core.console import in_words
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.progress import console

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

ATTEMPTS = 5
LONGEST_WAIT = 300.0  # seconds between two attempts
IGNORED = {".gitattributes"}  # the Hub's own

Answer = TypeVar("Answer")


class Published(NamedTuple):
    """Result of an upload.

    Attributes:
        commit: id of the commit that the repository is at; empty after a dry run.
        url: of the repository, or of the pull request.
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


def _status_of(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer, wherever its client put it; `None` if the error is not an answer of the Hub."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return int(error.response.status_code)
    if isinstance(error, RuntimeError | ValueError) and isinstance(error.__cause__, HfHubHTTPError):
        return int(error.__cause__.response.status_code)  # of a large file
    status = re.search(r"\b(401|403|404)\b", str(error)) if isinstance(error, ConnectionError) else None
    return int(status[1]) if status else None  # Xet has it in its text only


def _is_network(error: BaseException) -> bool:
    """Whether the Hub did not answer at all."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0].startswith(
        "httpx"
    )


def with_retries(what: str, call: Callable[[], Answer], wait: Callable[[float], None] = time.sleep) -> Answer:
    """Call the Hub, and again when it is busy (429, 5xx) or does not answer, after the delay that it asks for.

    The Hub's client retries transfers of file data only, and tenacity would replace the loop, not the decision which errors are
    final and what to tell the user about each.

    Args:
        what: what the call is about, for messages.
        call: is called up to `ATTEMPTS` times.
        wait: sleeps for so many seconds.

    Raises:
        UserError: the error is final: no token, no permission, no such repository.
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
            status = _status_of(error)
            _raise_final(what, status, error)
            reason = f"the Hub is busy ({status})" if status else f"the Hub does not answer ({type(error).__name__})"
            if attempt == ATTEMPTS:
                raise RunFailed(
                    f"{what}: {reason} after {ATTEMPTS} attempts; run the same command again to go on"
                ) from error
            retry_after = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
            delay = min(LONGEST_WAIT, float(retry_after) if retry_after.isdigit() else 2.0**attempt)
        console.print(f"{what}: {reason}; again in {delay:.0f} s", markup=False, soft_wrap=True)
        wait(delay)
    raise AssertionError("unreachable")


def _raise_final(what: str, status: int | None, error: Exception) -> None:
    """Raise for an error that another attempt would not change."""
    if status in (401, 403):
        raise UserError(
            f"{what}: the Hub refuses it ({status}); the token has no right to, or there is none"
        ) from error
    if status == 404:
        raise UserError(f"{what}: the Hub does not know it (404); check the name and your access") from error
    if status == 412:
        raise RunFailed(f"{what}: somebody else changed it meanwhile (412); look at it and run again") from error
    if status is None and not _is_network(error):
        raise error
    if status is not None and status != 429 and status < 500:
        raise RunFailed(f"{what}: the Hub refuses it ({status}: {str(error).splitlines()[-1]})") from error


def check_rights(repo_id: str) -> None:
    """Raise unless the token at hand may write to a repository of this name, as far as the Hub says beforehand.

    Args:
        repo_id: "organisation/name"; it need not exist.

    Raises:
        UserError: there is no token, or its account is neither that organisation nor a member of it.
        RunFailed: the Hub does not answer.
    """
    from huggingface_hub import HfApi

    account = with_retries("the account at the Hub", lambda: HfApi().whoami())
    owner, name = repo_id.split("/")[0], str(account.get("name", ""))
    spaces = [name, *(str(each.get("name", "")) for each in account.get("orgs") or ())]
    if owner not in spaces:
        raise UserError(
            f"the token at hand is {name}'s, who is no member of {owner}; log in as a member (`hf auth login`), or "
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
    """Make a repository hold exactly the files of a folder, in one commit, and compare checksums afterwards.

    Args:
        release: folder of the release.
        repo_id: "organisation/name"; created if missing.
        message: of the commit.
        private: create it visible to its owners only; an existing one stays as it is.
        gated: "auto" or "manual": people have to request access.
        branch: other than main; created if missing.
        create_pr: open a pull request with the commit instead.
        tag: name for the commit.

    Raises:
        UserError: the Hub refuses it for good (`with_retries`), or the tag exists at another commit.
        RunFailed: the Hub stays busy or refuses the model card, somebody else changed the repository meanwhile, or its files
            differ from the folder's afterwards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

    api, revision = HfApi(), branch or "main"
    try:
        with_retries("model card", lambda: ModelCard.load(release / "README.md").validate())
    except ValueError as error:
        raise RunFailed(f"the Hub does not accept the model card: {' '.join(str(error).split())}") from error
    url = with_retries(repo_id, lambda: api.create_repo(repo_id, private=private or None, exist_ok=True)).url
    if gated is not None:
        with_retries(repo_id, lambda: api.update_repo_settings(repo_id, gated=gated))  # type: ignore[arg-type]
    if branch is not None:
        with_retries(repo_id, lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    refs = with_retries(repo_id, lambda: api.list_repo_refs(repo_id))
    tags = {each.name: each.target_commit for each in refs.tags}
    if tag in tags and create_pr:
        raise UserError(f"{repo_id} has a tag {tag} already; choose another")
    heads = [each.target_commit for each in refs.branches if each.name == revision]
    files, deleted = files_of_release(release), list[str]()

    def commit() -> CommitInfo:
        # Listed anew at every attempt: the commit may have been made although its answer was lost.
        head, paths = _listing(api, repo_id, revision)
        surplus = [path for path in paths if path not in files]
        deleted[:] = deleted or surplus
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path, file) for path, file in files.items()),
                *(CommitOperationDelete(path, is_folder=False) for path in surplus),
            ],
            commit_message=message, revision=revision, create_pr=create_pr, parent_commit=head,
        )  # fmt: skip

    info = with_retries(repo_id, commit)
    oid, url = str(info.oid), str(info.pr_url or url)
    at = f"refs/pr/{url.rstrip('/').rsplit('/', 1)[1]}" if info.pr_url else oid
    verification = with_retries(repo_id, lambda: api.verify_repo_checksums(repo_id, revision=at, local_dir=release))
    different = {str(getattr(each, "path", each)) for each in (*verification.mismatches, *verification.missing_paths)}
    if different := different - IGNORED:
        raise RunFailed(
            f"{repo_id} does not hold what was sent ({', '.join(sorted(different))}); run the same command again"
        )
    if tag is not None and tags.get(tag) != oid:
        if tag in tags:
            raise UserError(
                f"{repo_id} has a tag {tag} at another commit already; everything is uploaded, choose another tag"
            )
        with_retries(repo_id, lambda: api.create_tag(repo_id, tag=tag, revision=oid))
    if deleted:
        _say_deleted(repo_id, deleted)
    return Published(oid, url, oid not in heads, tuple(deleted))


def _say_deleted(repo_id: str, deleted: list[str]) -> None:
    console.print(
        f"deleted from {repo_id}: {in_words(deleted)}; earlier commits still hold them: see "
        f"`guardsmith audit-release {repo_id}`",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _listing(api: HfApi, repo_id: str, revision: str) -> tuple[str, list[str]]:
    """The newest commit of a revision, and the paths of its files but the Hub's own."""
    from huggingface_hub.errors import EntryNotFoundError

    head = str(api.repo_info(repo_id, revision=revision).sha)
    try:
        paths = api.list_repo_files(repo_id, revision=head)
    except EntryNotFoundError:  # nothing was committed yet
        paths = []
    return head, [path for path in paths if path not in IGNORED]
