"""A Hugging Face Hub on the loopback: enough of its HTTP contract for the real client, its LFS and its Xet uploads.

The API is at 127.0.0.1 and what it keeps of large files at localhost: two origins, so that a test can see that the
token of one does not reach the other. Nothing here is random: the same calls make the same commits.
"""

import base64
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ("*.bin", "*.ckpt", "*.h5", "*.onnx", "*.pt", "*.safetensors", "*.zip")
LICENSES = ("apache-2.0", "cc-by-4.0", "cc0-1.0", "creativeml-openrail-m", "mit", "openrail", "openrail++", "other")
WRITES = ("settings", "preupload", "commit", "branch", "tag", "xet-write-token", "discussions")
FROM_XET = """
import sys, time, hf_xet
cas, name, size, file = sys.argv[1:]
session = hf_xet.XetSession()
with session.new_file_download_group(endpoint=cas, token="x", token_expiry_unix_secs=int(time.time()) + 999) as group:
    group.start_download_file(hf_xet.XetFileInfo(name, int(size)), file)
"""


class Request(NamedTuple):
    """What the client sent; header names are in lower case, `authorization` is among them."""

    method: str
    origin: str
    path: str
    headers: dict


class File(NamedTuple):
    """A small file has `data`; a large one has `sha256`, and its `oid` is that of the pointer that git would keep."""

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None
    pointer_size: int = 0


class Commit(NamedTuple):
    """`operations` are (key, path) as they were sent: what the client left out because it had not changed is not there."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict
    operations: list


class Reply(NamedTuple):
    """`body` is bytes or what JSON can say."""

    body: object
    status: int = 200
    headers: dict = {}  # noqa: RUF012 - never changed


class Refused(Exception):
    def __init__(self, status, message, code=None, commit=None, **more):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.reply = Reply({"error": message, **more}, status, {name: v for name, v in headers.items() if v})


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def large_file(sha256, size):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return File(size, git_oid(pointer), None, sha256, len(pointer))


def hexadecimal(raw):
    """Xet writes its hashes, and sha256 where it keeps one, as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def read_shard(data):
    """The Xet hash by sha256 of every file of a shard.

    Records of 48 bytes: per file its hash, flags and number of segments, the segments, as many checks when the highest
    flag is set, and its sha256 when the next one is; a hash of ones ends the files.
    """
    found, at = {}, 48
    while (name := data[at : at + 32]) != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", data, at + 32)
        at += 48 * (1 + segments * (2 if flags >> 31 else 1))
        if flags >> 30 & 1:
            found[hexadecimal(data[at : at + 32])] = hexadecimal(name)
            at += 48
    return found


def check_card(text):
    """Errors and warnings about a model card's metadata: a few of the Hub's rules, read line by line."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if not block:
        return [], ["the card has no metadata"]
    values = dict(re.findall(r"^(\w+): *['\"]?(\S.*?)['\"]? *$", block[1], re.MULTILINE))
    errors = []
    if values.get("license", "mit") not in LICENSES:
        errors.append(f'"license" is none of {", ".join(LICENSES)}')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", values.get("base_model", "a/b")):
        errors.append(f'"base_model" is not the name of a model: {values["base_model"]}')
    return errors, [] if "license" in values else ['"license" is missing']


class Hub:
    """Use it as `with Hub(folder) as hub`; `hub.repos` has what was published, `hub.requests` what was sent.

    `hub.token` belongs to `hub.user`, who also writes to the organization `acme`; `hub.guest_token` to somebody who may
    read, open pull requests, and write under the name `guest`.
    """

    user = "keeper"
    token = "hf_loopbackkeeper"
    guest_token = "hf_loopbackguest"

    def __init__(self, folder, large_above=5_000_000, part_size=None):
        """Files over `large_above` bytes are large by any name; with `part_size`, LFS takes them in such parts."""
        self.folder, self.large_above, self.part_size = Path(folder).resolve(), large_above, part_size
        self.accounts = {self.token: self.user, self.guest_token: "guest"}
        self.namespaces = {self.user: (self.user, "acme"), "guest": ("guest",)}
        self.repos, self.requests, self.faults, self.bugs = {}, [], [], []
        self.xet, self.shards, self.count, self.lock = {}, set(), 0, threading.RLock()
        self.blobs, self.cas = self.folder / "blobs", self.folder / "cas"
        for place in (self.blobs, self.cas):
            place.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        self.servers = [Server(self, "api"), Server(self, "storage")]
        self.endpoint, self.storage = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), self.servers, strict=True)
        )
        self.threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in self.servers]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        if self.bugs and kind is None:
            raise self.bugs[0]

    def environment(self, home, xet=True, token=token):
        """The environment of a process that talks to this Hub, and keeps its cache and all else in `home`."""
        theirs = re.compile(r"HF_|HUGGING_?FACE|TRANSFORMERS_OFFLINE|.*_PROXY$", re.IGNORECASE)
        return {name: value for name, value in os.environ.items() if not theirs.match(name)} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token else {}),
        }

    def fail(self, path_part, status, times=1, headers=None, method=None, body=None):
        """Answer the next `times` requests whose path has `path_part` with `status`, and do nothing else."""
        message = f"made to fail with {status}"
        reply = Reply(body or {"error": message}, status, {"X-Error-Message": message} | (headers or {}))
        self.faults.append(SimpleNamespace(part=path_part, method=method, left=times, reply=reply))

    def cut(self, path_part, times=1, method=None):
        """Close the connection in the middle of what is sent.

        That is what the client sends when it is a PUT, and otherwise the answer: what was asked for has been done then.
        """
        self.faults.append(SimpleNamespace(part=path_part, method=method, left=times, reply=None))

    def read(self, repo_id, path, revision="main"):
        """The bytes of a published file."""
        with self.lock:
            file = self.find(self.repos[repo_id], revision).files[path]
            return self.blob(file.sha256).read_bytes() if file.sha256 else file.data

    # What it holds

    def add_commit(self, repo, ref, parent, title, message, author, files, operations=()):
        """Make `ref` point to a new commit."""
        self.count += 1
        date = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=self.count)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        listing = [(path, file.oid) for path, file in sorted(files.items())]
        oid = hashlib.sha1(repr((repo.id, ref, parent, title, message, self.count, listing)).encode()).hexdigest()
        repo.commits[oid] = Commit(oid, parent, title, message, author, date, files, list(operations))
        repo.refs[ref] = oid
        return oid

    def find(self, repo, revision):
        """The commit of a branch, a tag, a pull request, or the commit with that beginning."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in repo.refs:
                return repo.commits[repo.refs[ref]]
        found = [commit for oid, commit in repo.commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise Refused(404, f"No such revision: {revision}", "RevisionNotFound")
        return found[0]

    def xet_hash(self, sha256):
        """The Xet hash of a file that was uploaded that way, or None."""
        if sha256 not in self.xet:
            for shard in set(self.cas.rglob("shards/*.mdb")) - self.shards:
                self.shards.add(shard)
                self.xet |= read_shard(shard.read_bytes())
        return self.xet.get(sha256)

    def has(self, sha256):
        return (self.blobs / sha256).exists() or self.xet_hash(sha256) is not None

    def blob(self, sha256):
        """Where the bytes of a large file are; those of Xet are put together by Xet when somebody asks without it."""
        file = self.blobs / sha256
        if not file.exists():
            size, part = str(self.large_size(sha256)), self.blobs / f"{sha256}.part"
            command = [sys.executable, "-c", FROM_XET, f"local://{self.cas}", self.xet_hash(sha256), size, str(part)]
            subprocess.run(command, check=True, capture_output=True)
            part.replace(file)
        return file

    def large_size(self, sha256):
        commits = [commit for repo in self.repos.values() for commit in repo.commits.values()]
        return next(file.size for commit in commits for file in commit.files.values() if file.sha256 == sha256)

    # Who may do what

    def account(self, request, needed=True):
        """Whose token it is; without one, None where none is needed."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if given and given not in self.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")  # the client knows these words
        if needed and not given:
            raise Refused(401, "A token is needed")
        return self.accounts.get(given)

    def check_writer(self, request, space):
        if space not in self.namespaces[self.account(request)]:
            raise Refused(403, f"This token may not write under {space}")

    def repo(self, request, space, name, writes=False, reads=False):
        """The repository, for who may see it, and write to it (anybody a pull request) or read its files if so wanted."""
        account, repo = self.account(request, needed=False), self.repos.get(f"{space}/{name}")
        owner = space in self.namespaces.get(account, ())
        if repo is None or (repo.private and not owner):
            raise Refused(404 if account else 401, "No such repository, or not for you", "RepoNotFound")
        if reads and repo.gated and not owner:
            raise Refused(403 if account else 401, "Access to this model has to be asked for", "GatedRepo")
        if writes and account is None:
            raise Refused(401, "A token is needed", "RepoNotFound")
        if writes and "create_pr=1" not in request.path:
            self.check_writer(request, space)
        return repo

    # What it answers

    def answer(self, request, body):
        """The API."""
        url = urlsplit(request.path)
        query, path = parse_qs(url.query), [unquote(part) for part in url.path.strip("/").split("/")]
        match [request.method.replace("HEAD", "GET"), *path]:
            case ["GET", "api", "whoami-v2"]:
                account = self.account(request)
                told = {"type": "user", "name": account, "auth": {"accessToken": {"displayName": "x", "role": "write"}}}
                return Reply(told | {"orgs": [{"name": name} for name in self.namespaces[account] if name != account]})
            case ["POST", "api", "validate-yaml"]:
                errors, warnings = (
                    [{"message": m} for m in found] for found in check_card(json.loads(body)["content"])
                )
                return Reply({"errors": errors, "warnings": warnings}, 400 if errors else 200)
            case ["POST" | "DELETE", "api", "repos", "create" | "delete" as action]:
                return self.change_repos(request, action, json.loads(body))
            case ["POST", space, name, "info", "lfs", "objects", action] if name.endswith(".git"):
                wanted = json.loads(body)
                # a pull request names no branch to write to
                self.repo(request, space, name.removesuffix(".git"), writes="ref" in wanted)
                self.account(request)
                return self.lfs(f"{self.endpoint}/{space}/{name}/info/lfs/objects/verify", action, wanted)
            case ["POST", "lfs-complete", sha256]:  # without a token: the link itself is the permission
                count = len(json.loads(body)["parts"])
                parts = [self.blobs / f"{sha256}.{number}" for number in range(1, count + 1)]
                return self.keep(sha256, b"".join(part.read_bytes() for part in parts), query)
            case ["GET", space, name, "resolve", revision, *file]:
                repo = self.repo(request, space, name, reads=True)
                return self.resolve(request, repo, self.find(repo, revision), "/".join(file))
            case [method, "api", "models", space, name, *rest]:
                action = [*rest, ""][0]
                writes = (
                    (action in WRITES and method != "GET")
                    or action == "xet-write-token"
                    or rest == ["auth-check", "write"]
                )
                repo = self.repo(request, space, name, writes, reads=action in ("xet-read-token", "auth-check"))
                return self.answer_about(repo, request, [method, *rest], query, body)
        raise Refused(404, f"There is no {request.method} {request.path} here")

    def answer_about(self, repo, request, wanted, query, body):
        """The API below one repository."""
        match wanted:
            case ["GET"]:
                return self.info(repo, self.find(repo, "main"), "blobs" in query)
            case ["GET", "revision", revision]:
                return self.info(repo, self.find(repo, revision), "blobs" in query)
            case ["GET", "auth-check", *_]:
                return Reply({})
            case ["GET", "tree", revision, *folder]:
                return Reply(self.tree(self.find(repo, revision), "/".join(folder), query.get("recursive") == ["true"]))
            case ["POST", "paths-info", revision]:
                paths = parse_qs(body.decode())["paths"]
                return Reply([e for e in self.tree(self.find(repo, revision), "", True) if e["path"] in paths])
            case ["GET", "refs"]:
                refs = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
                for ref, oid in repo.refs.items():
                    kind, name = ref.split("/", 2)[1:]
                    kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[kind]
                    name = ref if kind == "pullRequests" else name
                    refs[kind].append({"name": name, "ref": ref, "targetCommit": oid})
                return Reply(refs)
            case ["GET", "commits", revision]:
                log, commit = [], self.find(repo, revision)
                while commit:
                    told = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
                    log.append(told | {"authors": [{"user": commit.author}]})
                    commit = repo.commits.get(commit.parent)
                return Reply(log)
            case ["PUT", "settings"]:
                settings = json.loads(body)
                repo.private = settings.get("visibility", "private" if repo.private else "public") == "private"
                repo.gated = settings.get("gated", repo.gated)
                return Reply({"private": repo.private, "gated": repo.gated})
            case ["POST" | "DELETE" as method, "branch" | "tag" as kind, *name]:
                return self.change_refs(repo, method, kind, "/".join(name), json.loads(body or "{}"))
            case ["POST", "preupload", revision]:
                known = self.find(repo, revision).files
                return Reply({"files": [self.preupload(known.get(f["path"]), **f) for f in json.loads(body)["files"]]})
            case ["POST", "commit", revision]:
                lines = [json.loads(line) for line in body.splitlines()]
                return self.commit(repo, revision, lines, self.account(request), "create_pr" in query)
            case ["POST", "discussions", number, "merge"]:
                pull, main = self.find(repo, f"refs/pr/{number}"), self.find(repo, "main")
                if pull.parent != main.oid:
                    raise Refused(409, "The branch has moved on since the pull request")
                title = f"{pull.title} (#{number})"  # one new commit, which is not that of the pull request
                self.add_commit(repo, "refs/heads/main", main.oid, title, "", self.account(request), pull.files)
                return Reply({})
            case ["GET", "xet-write-token" | "xet-read-token" as action, revision]:
                if revision != "None":  # the client does not know the revision of a pull request to be
                    self.find(repo, revision)
                url, token, until = f"local://{self.cas}", action, 4102444800
                headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
                return Reply({"casUrl": url, "accessToken": token, "exp": until}, 200, headers)
        raise Refused(404, f"There is no {request.method} {request.path} here")

    def change_repos(self, request, action, wanted):
        account = self.account(request)
        space, name = wanted.get("organization") or account, wanted["name"]
        repo_id, url = f"{space}/{name}", f"{self.endpoint}/{space}/{name}"
        if action == "delete":
            self.repo(request, space, name, writes=True)
            del self.repos[repo_id]
            return Reply({})
        self.check_writer(request, space)
        if wanted.get("type", "model") != "model":
            raise Refused(400, "Only models live here")
        if repo_id in self.repos:
            raise Refused(409, "There is such a repository", url=url)
        private = wanted.get("visibility") == "private"
        repo = self.repos[repo_id] = SimpleNamespace(id=repo_id, refs={}, commits={}, private=private, gated=False)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()
        files = {".gitattributes": File(len(attributes), git_oid(attributes), attributes)}
        self.add_commit(repo, "refs/heads/main", None, "initial commit", "", account, files)
        return Reply({"url": url, "name": repo_id})

    def change_refs(self, repo, method, kind, name, wanted):
        name, start = (wanted["tag"], name) if "tag" in wanted else (name, wanted.get("startingPoint", "main"))
        ref = f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}"
        if method == "POST":
            if re.search(r"[\s~^:?*\[\\]|\.\.|^[-/.]|[/.]$|^$", name):
                raise Refused(400, f"Not a name for a {kind}: {name}")
            if ref in repo.refs:
                raise Refused(409, f"There is such a {kind}: {name}")
            repo.refs[ref] = self.find(repo, start).oid
        elif ref not in repo.refs:
            raise Refused(404, f"No such {kind}: {name}", "RevisionNotFound")
        elif ref == "refs/heads/main":
            raise Refused(403, "main stays")
        else:
            del repo.refs[ref]
        return Reply({})

    def info(self, repo, commit, blobs):
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        for told in siblings if blobs else ():
            file = commit.files[told["rfilename"]]
            told |= {"size": file.size, "blobId": file.oid}
            if file.sha256:
                told["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        told = {"id": repo.id, "author": repo.id.split("/")[0], "private": repo.private, "gated": repo.gated}
        told |= {
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": min(c.date for c in repo.commits.values()),
        }
        return Reply(told | {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    def tree(self, commit, folder, recursive):
        start, entries = f"{folder}/" if folder else "", {}
        for path, file in sorted(commit.files.items()):
            if not path.startswith(start):
                continue
            for above in reversed(Path(path.removeprefix(start)).parents[:-1]):
                oid = hashlib.sha1(f"{commit.oid} {above}".encode()).hexdigest()
                entries[start + str(above)] = {"type": "directory", "path": start + str(above), "oid": oid, "size": 0}
            entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
            if file.sha256:
                entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
                if name := self.xet_hash(file.sha256):
                    entries[path]["xetHash"] = name
        if folder and not entries:
            raise Refused(404, f"No such folder: {folder}", "EntryNotFound", commit.oid)
        return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(start)]

    def preupload(self, known, path, size, sample):
        """How the client has to send a file, and what is there by that name, for it to see whether that is the same."""
        large = size > self.large_above or any(fnmatch(path.split("/")[-1], pattern) for pattern in LARGE)
        told = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        return told | ({"oid": known.sha256 or known.oid} if known else {})

    def commit(self, repo, revision, lines, author, create_pr):
        """All of it or, when anything is wrong, nothing."""
        header, operations = lines[0]["value"], [(line["key"], line["value"]) for line in lines[1:]]
        parent, wanted = self.find(repo, revision), header.get("parentCommit")
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        if create_pr:
            parent = self.find(repo, wanted or revision)
            ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}"
        elif ref not in repo.refs:
            raise Refused(404, f"Not a branch: {revision}", "RevisionNotFound")
        elif wanted and not parent.oid.startswith(wanted):
            raise Refused(412, "The branch has moved on since that parent commit")
        files = dict(parent.files)
        for key, value in operations:
            path, folder = value["path"], value["path"].rstrip("/") + "/"
            if key == "file":
                data = base64.b64decode(value["content"])
                files[path] = File(len(data), git_oid(data), data)
            elif key == "lfsFile":
                if not self.has(value["oid"]):
                    raise Refused(400, f"The content of {path} was not uploaded")
                files[path] = large_file(value["oid"], value.get("size") or self.large_size(value["oid"]))
            else:
                gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(folder))]
                if not gone:  # the client knows these words
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {p: file for p, file in files.items() if p not in gone}
        done = [(key, value["path"]) for key, value in operations]
        oid = self.add_commit(repo, ref, parent.oid, header["summary"], header["description"], author, files, done)
        told = {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo.id}/commit/{oid}"}
        pull = f"{self.endpoint}/{repo.id}/discussions/{ref.split('/')[-1]}"
        return Reply(told | ({"pullRequestUrl": pull} if create_pr else {}))

    def resolve(self, request, repo, commit, path):
        """A small file itself, the place of a large one."""
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, f"No such file: {path}", "EntryNotFound", commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.sha256 or file.oid}"'}
        if not file.sha256:
            return self.part(request, file.data, headers)
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        headers |= {"Location": f"{self.storage}/{file.sha256}?key=signed"}
        if name := self.xet_hash(file.sha256):
            route = f"{self.endpoint}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": name, "Link": f'<{route}>; rel="xet-auth"'}
        return Reply(b"", 302, headers)

    def part(self, request, data, headers):
        """The bytes, or those of them that were asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not wanted:
            return Reply(data, 200, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first > last:
            return Reply(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
        return Reply(data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # Large files without Xet

    def lfs(self, verify, action, wanted):
        if action == "verify":
            file = self.blobs / wanted["oid"]
            if not file.exists() or file.stat().st_size != wanted["size"]:
                raise Refused(404, "No such object of that size")
            return Reply({})
        objects = [{"oid": entry["oid"], "size": entry["size"]} for entry in wanted["objects"]]
        for entry in objects:
            if self.has(entry["oid"]):
                continue  # without actions the client does not send it
            link = f"{self.storage}/{entry['oid']}"
            upload = {"href": f"{link}?key=signed"}
            if self.part_size and entry["size"] > self.part_size:
                count = -(-entry["size"] // self.part_size)
                upload = {"href": f"{self.endpoint}/lfs-complete/{entry['oid']}?key=signed"}
                upload["header"] = {str(n): f"{link}.{n}?key=signed" for n in range(1, count + 1)}
                upload["header"]["chunk_size"] = str(self.part_size)
            entry["actions"] = {"upload": upload, "verify": {"href": verify}}
        return Reply({"transfer": "basic", "objects": objects})

    def keep(self, name, data, query):
        """Keep what was sent under its sha256, or a part of it."""
        if query.get("key") != ["signed"]:
            raise Refused(403, "Not a link that the Hub gave")
        if "." not in name and hashlib.sha256(data).hexdigest() != name:
            raise Refused(400, "The content is not what its name says")
        (self.blobs / name).write_bytes(data)
        return Reply(b"", 200, {"ETag": f'"{git_oid(data)}"'})

    def store(self, request, body):
        """The storage: it knows no tokens, only the links that the Hub gave."""
        url = urlsplit(request.path)
        name, query = url.path.strip("/"), parse_qs(url.query)
        if request.method == "PUT":
            return self.keep(name, body, query)
        if query.get("key") != ["signed"] or not self.has(name):
            raise Refused(403, "Not a link that the Hub gave")
        return self.part(request, self.blob(name).read_bytes(), {"ETag": f'"{name}"'})


class Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them: none is left
    request_queue_size = 64

    def __init__(self, hub, origin):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.origin = hub, origin

    def handle_error(self, *_):
        if not isinstance(sys.exception(), OSError):  # a client that went away is none of our bugs
            self.hub.bugs.append(sys.exception())


class Handler(BaseHTTPRequestHandler):
    """One request per connection, so that closing never waits for a client that only keeps one open."""

    timeout = 20  # seconds without a byte

    def log_message(self, *_):
        """Say nothing."""

    def serve(self):
        hub, origin = self.server.hub, self.server.origin
        request = Request(self.command, origin, self.path, {name.lower(): v for name, v in self.headers.items()})
        with hub.lock:
            hub.requests.append(request)
            due = [f for f in hub.faults if f.left and f.part in self.path and f.method in (None, self.command)]
            if due:
                due[0].left -= 1
        cut = bool(due) and due[0].reply is None
        if cut and self.command == "PUT":
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            return
        body = self.body()
        self.send(due[0].reply if due and not cut else self.reply(request, body), cut)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def reply(self, request, body):
        hub = self.server.hub
        try:
            with hub.lock:
                return (hub.answer if request.origin == "api" else hub.store)(request, body)
        except Refused as refused:
            return refused.reply
        except Exception as bug:
            hub.bugs.append(bug)
            return Reply({"error": repr(bug)}, 500)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.exactly(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.exactly(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def exactly(self, size):
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionResetError("the client went away")
        return data

    def send(self, reply, cut):
        data, kind = reply.body, "application/octet-stream"
        if not isinstance(data, bytes):
            data, kind = json.dumps(data).encode(), "application/json; charset=utf-8"
        if cut and (self.command == "HEAD" or not data):
            return  # nothing to cut: not even a status
        self.send_response(reply.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
