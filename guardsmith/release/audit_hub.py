"""`guardsmith.release.audit` for a repository on the Hub: the present commit as a folder, earlier ones by file lists."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from guardsmith.core.errors import UserError
from guardsmith.models.checkpoint import resolve
from guardsmith.models.contents import INDEX, expected_files
from guardsmith.release.audit import Finding, audit_folder, base_of, secret_files
from guardsmith.release.hub import with_retries


class HubAudit(NamedTuple):
    """What was found in a repository.

    Attributes:
        findings: in the present commit first.
        commits: how many earlier commits were looked at.
        not_compared: versions of weight files in earlier commits that are not the base's byte for byte; their values were not
            compared, for they were not downloaded.
    """

    findings: list[Finding]
    commits: int
    not_compared: int


def _tree(api: Any, repo_id: str, revision: str) -> dict[str, Any]:
    from huggingface_hub.errors import EntryNotFoundError

    def listed() -> dict[str, Any]:
        try:
            entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
        except EntryNotFoundError:  # nothing was committed yet
            return {}
        return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}

    return with_retries(repo_id, listed)


def _expected(repo_id: str, commit: str, files: Mapping[str, Any], index: bytes | None) -> set[str]:
    """Those of a commit's files that belong into a release; without an index that can be read, by that of the present commit."""
    from huggingface_hub import hf_hub_download

    def read(name: str) -> bytes:
        if name == INDEX and (name not in files or unreadable):
            return index or b""
        return Path(with_retries(repo_id, lambda: hf_hub_download(repo_id, name, revision=commit))).read_bytes()

    paths = {*files, *({INDEX} if index else set())}
    unreadable = False
    try:
        return expected_files(paths, read, published=True)
    except UserError:
        if index is None:
            raise
    unreadable = True
    try:
        return expected_files(paths, read, published=True)
    except UserError:
        return set()  # an index of shards that is broken: then nothing in this commit is beyond doubt


def audit_repository(
    repo_id: str, base: str | None, *, base_revision: str | None = None, revision: str | None = None
) -> HubAudit:
    """Look into a repository: all of the present commit, and the lists of files of every other commit that can be reached.

    Args:
        repo_id: "organisation/name".
        base: its base, a folder or a Hub id; by default what the release says.
        base_revision: of a base on the Hub.
        revision: branch, tag or commit in the place of main.

    Raises:
        UserError: there is no such repository; it is no diffusers folder; it does not say what its base is.
        RunFailed: the Hub does not answer.
    """
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    head = str(with_retries(repo_id, lambda: api.repo_info(repo_id, revision=revision)).sha)
    files = _tree(api, repo_id, head)
    expected = _expected(repo_id, head, files, None)
    patterns = [glob.escape(name) for name in sorted(expected)]
    folder = Path(with_retries(repo_id, lambda: snapshot_download(repo_id, revision=head, allow_patterns=patterns)))
    if base is None:
        base, base_revision = base_of(folder)
    base_folder = resolve(base, base_revision)
    secret = secret_files(base_folder, folder)
    findings = [Finding("file", name, "is no part of a release") for name in files if name not in expected]
    findings += [each for each in audit_folder(folder, base_folder) if each not in findings]
    findings += _same_bytes(files, secret, "")
    compared_files = {(name, entry.blob_id) for name, entry in files.items()}
    index = (folder / INDEX).read_bytes()
    not_compared, commits = 0, _commits(api, repo_id, head)
    for commit, ref in commits.items():
        older = _tree(api, repo_id, commit)
        new = {name: entry for name, entry in older.items() if (name, entry.blob_id) not in compared_files}
        compared_files |= {(name, entry.blob_id) for name, entry in new.items()}
        if not new:
            continue
        at = f" (commit {commit[:10]}, reached from {ref})"
        belongs = _expected(repo_id, commit, older, index)
        findings += [Finding("file", name + at, "is no part of a release") for name in new if name not in belongs]
        same = _same_bytes(new, secret, at)
        findings += same
        weights = [name for name in new if name in belongs and name.endswith(".safetensors")]
        not_compared += len([name for name in weights if not any(each.where == name + at for each in same)])
    return HubAudit(findings, len(commits), not_compared)


def _commits(api: Any, repo_id: str, head: str) -> dict[str, str]:
    """Every other commit that a branch, a tag or a pull request leads to -> which."""
    refs = with_retries(repo_id, lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    names = [each.name for each in (*refs.branches, *refs.tags)] + [each.ref for each in refs.pull_requests or []]
    commits: dict[str, str] = {}
    for name in names:
        for commit in with_retries(repo_id, lambda name=name: api.list_repo_commits(repo_id, revision=name)):  # type: ignore[misc]
            commits.setdefault(commit.commit_id, name)
    commits.pop(head, None)
    return commits


def _same_bytes(files: Mapping[str, Any], secret: Mapping[str, str], at: str) -> list[Finding]:
    """Large files that are one of the base's byte for byte, by the digests that the Hub has of them."""
    return [
        Finding("weights", name + at, f"is the base's {secret[entry.lfs.sha256]}")
        for name, entry in files.items()
        if entry.lfs is not None and entry.lfs.sha256 in secret
    ]
