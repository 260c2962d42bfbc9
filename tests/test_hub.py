"""The loopback Hub, through the real client: what `publish` is tested against has to behave like the Hub itself.

The client reads its settings when it is imported, so it runs in processes of its own and tells in JSON what it saw.
"""

import importlib.util
import json
import random
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub import Hub

WEIGHTS = random.Random(0).randbytes(1_000_000)
CARD = "---\nlicense: openrail++\nbase_model: acme/base\n---\n\nA card.\n"
FILES = {
    "README.md": CARD.encode(),
    "model_index.json": b"{}\n",
    "unet/diffusion_pytorch_model.safetensors": WEIGHTS,
    "old/a.txt": b"a",
    "old/b.txt": b"b",
}
MODEL = "keeper/shielded"

# What every process starts with. `caught` calls and tells the exception: its name, status and words.
START = """
import json, pathlib, sys
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi, ModelCard
from huggingface_hub import hf_hub_download, snapshot_download

told, api, MODEL, folder = {}, HfApi(), "keeper/shielded", pathlib.Path(sys.argv[1])

def caught(function, *args, **kwargs):
    try:
        return ["nothing", None, str(function(*args, **kwargs))]
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None), str(error)]

def additions():
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [Add(file.relative_to(folder).as_posix(), file) for file in files]

def commit(operations, message="change", **kwargs):
    return api.create_commit(MODEL, operations, commit_message=message, **kwargs)
"""


def run(hub, home, code, folder="", **kwargs):
    """What a process with the client told."""
    code = f"{START}\n{code}\nprint(json.dumps(told))"
    environment = hub.environment(home, **kwargs)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write(folder, files=FILES):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def kept(hub):
    """What the Hub holds of large files: those of LFS, and the blocks of Xet."""
    return {*hub.blobs.iterdir(), *hub.cas.rglob("xorbs/default.*")}


PUBLISH = """
told["user"] = api.whoami()["name"]
told["url"] = [api.create_repo(MODEL, exist_ok=True).repo_id for _ in range(2)]
first = commit(additions(), "first")
told["first"] = first.oid
api.create_tag(MODEL, tag="v1.0", tag_message="the first")
told["snapshot"] = snapshot_download(MODEL, revision="v1.0")
told["info"] = api.model_info(MODEL, revision="v1.0").sha
sizes = {file.rfilename: file.size for file in api.model_info(MODEL, files_metadata=True).siblings}
told["sizes"] = sizes
tree = list(api.list_repo_tree(MODEL, recursive=True))
told["tree"] = {entry.path: getattr(entry, "size", None) for entry in tree}
told["top"] = [entry.path for entry in api.list_repo_tree(MODEL)]
told["below"] = [entry.path for entry in api.list_repo_tree(MODEL, "old")]

checked = [api.verify_repo_checksums(MODEL, revision=first.oid)]
weights = pathlib.Path(told["snapshot"], "unet/diffusion_pytorch_model.safetensors").resolve()
good = weights.read_bytes()
weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
checked.append(api.verify_repo_checksums(MODEL, revision=first.oid))
weights.write_bytes(good)
told["checked"] = [[c.checked_count, [m["path"] for m in c.mismatches], c.missing_paths, c.extra_paths] for c in checked]
"""


@pytest.fixture(scope="module", params=["xet", "lfs"])
def published(request, tmp_path_factory):
    """A model that was published with Xet, and with LFS in parts: the Hub, the folder, what the client told."""
    xet = request.param == "xet"
    if xet and not importlib.util.find_spec("hf_xet"):
        pytest.skip("hf_xet is not installed")
    place = tmp_path_factory.mktemp(request.param)
    folder = write(place / "folder")
    with Hub(place / "hub", part_size=None if xet else 400_000) as hub:
        told = run(hub, place / "home", PUBLISH, folder, xet=xet)
        requests = list(hub.requests)
        yield SimpleNamespace(hub=hub, place=place, folder=folder, told=told, requests=requests, xet=xet)


def test_what_was_committed_comes_back_byte_for_byte(published):
    told = published.told
    assert told["user"] == "keeper"
    assert told["url"] == [MODEL, MODEL]
    snapshot = Path(told["snapshot"])
    assert {path: (snapshot / path).read_bytes() for path in FILES} == FILES
    files = {str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()}
    assert files == {*FILES, ".gitattributes"}
    assert published.hub.read(MODEL, "unet/diffusion_pytorch_model.safetensors", "v1.0") == WEIGHTS


def test_what_was_committed_is_listed(published):
    told, folders = published.told, {"unet": None, "old": None}
    sizes = {path: len(data) for path, data in FILES.items()}
    sizes[".gitattributes"] = len(published.hub.read(MODEL, ".gitattributes"))
    assert told["info"] == told["first"]
    assert told["sizes"] == sizes
    assert told["tree"] == sizes | folders
    assert set(told["top"]) == {".gitattributes", "README.md", "model_index.json", "unet", "old"}
    assert told["below"] == ["old/a.txt", "old/b.txt"]


def test_a_tampered_file_is_found(published):
    whole, tampered = published.told["checked"]
    assert whole == [len(FILES) + 1, [], [], []]
    assert tampered == [len(FILES) + 1, ["unet/diffusion_pytorch_model.safetensors"], [], []]


def test_large_files_went_where_they_should(published):
    """The storage is another origin: the token is not for it."""
    hub = published.hub
    ours, storage = ([r for r in published.requests if r.origin == origin] for origin in ("api", "storage"))
    assert hub.endpoint.startswith("http://127.0.0.1:")
    assert hub.storage.startswith("http://localhost:")
    assert {r.headers.get("authorization") for r in ours if "commit" in r.path} == {f"Bearer {hub.token}"}
    assert all(r.headers.get("authorization") is None for r in storage)
    if published.xet:
        assert not storage
        assert [r.headers["authorization"] for r in ours if "xet-write-token" in r.path] == [f"Bearer {hub.token}"]
    else:
        assert [r.method for r in storage] == ["PUT", "PUT", "PUT", "GET"]  # three parts
        assert not any("xet" in r.path for r in ours)


def test_the_same_commit_again_sends_nothing(published):
    """Also for somebody who has nothing in a cache."""
    hub, before = published.hub, kept(published.hub)
    head, asked = hub.repos[MODEL].refs["refs/heads/main"], len(hub.requests)
    told = run(
        hub, published.place / "new", 'told["oid"] = commit(additions()).oid', published.folder, xet=published.xet
    )
    assert told["oid"] == head == hub.repos[MODEL].refs["refs/heads/main"]
    assert kept(hub) == before
    assert not [r for r in hub.requests[asked:] if r.origin == "storage" or "/commit/" in r.path]


LATER = """
main = api.model_info(MODEL).sha
told["parent"] = caught(commit, [Add("c.txt", b"c")], parent_commit="0" * 40)
told["after"] = api.model_info(MODEL).sha == main

pull = commit([*additions(), Add("c.safetensors", b"12345" * 99)], "proposal", create_pr=True)
told["pull"] = [pull.oid, pull.pr_revision, pull.pr_num]
told["main"] = [api.model_info(MODEL).sha == main, api.file_exists(MODEL, "c.safetensors")]
told["proposed"] = pathlib.Path(hf_hub_download(MODEL, "c.safetensors", revision="refs/pr/1")).read_text()
refs = api.list_repo_refs(MODEL, include_pull_requests=True)
told["refs"] = [{ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags, refs.pull_requests)]
api.merge_pull_request(MODEL, 1)
told["merged"] = [api.model_info(MODEL).sha not in (main, pull.oid), api.file_exists(MODEL, "c.safetensors")]

api.create_branch(MODEL, branch="try/this", revision="v1.0")
head = api.model_info(MODEL, revision="try/this").sha
commit([Delete("old/"), Delete("model_index.json"), Add("c.txt", b"c")], revision="try/this", parent_commit=head)
told["left"] = api.list_repo_files(MODEL, revision="try/this")
told["log"] = [entry.title for entry in api.list_repo_commits(MODEL, revision="try/this")]
told["gone"] = caught(commit, [Add("d.txt", b"d"), Delete("nothing.txt")])
told["nothing"] = api.file_exists(MODEL, "d.txt")
api.delete_branch(MODEL, branch="try/this")
api.delete_tag(MODEL, tag="v1.0")
told["names"] = [[ref.name for ref in kind] for kind in (api.list_repo_refs(MODEL).branches, api.list_repo_refs(MODEL).tags)]
api.delete_repo(MODEL)
told["exists"] = api.repo_exists(MODEL)
"""


def test_commits_pull_requests_branches_and_deletion(published):
    """The last test of the published model, which is deleted in it."""
    hub, first = published.hub, published.told["first"]
    commits = hub.repos[MODEL].commits
    told = run(hub, published.place / "home", LATER, published.folder, xet=published.xet)
    assert told["parent"][:2] == ["HfHubHTTPError", 412]
    assert told["after"]
    oid, revision, number = told["pull"]
    assert (revision, number) == ("refs/pr/1", 1)
    assert commits[oid].operations == [("lfsFile", "c.safetensors")]  # the rest has not changed
    assert told["main"] == [True, False]
    assert told["proposed"] == "12345" * 99
    assert told["refs"] == [{"main": first}, {"v1.0": first}, {"refs/pr/1": oid}]
    assert told["merged"] == [True, True]
    assert told["left"] == [".gitattributes", "README.md", "c.txt", "unet/diffusion_pytorch_model.safetensors"]
    assert told["log"] == ["change", "first", "initial commit"]
    assert told["gone"][:2] == ["RemoteEntryNotFoundError", 404]
    assert "differentiate file and folder" in told["gone"][2]  # the client's own advice: it knew the words
    assert told["nothing"] is False
    assert told["names"] == [["main"], []]
    assert told["exists"] is False
    assert any(r.origin == "storage" for r in hub.requests) != published.xet


ERRORS = """
guest, nobody, wrong = HfApi(token=sys.argv[1]), HfApi(token=False), HfApi(token="hf_wrong")
api.create_repo(MODEL)
first = commit([Add("README.md", b"hello"), Add("a.safetensors", b"a" * 99)])

told["no repo"] = caught(api.model_info, "keeper/none")
told["no repo, no token"] = caught(nobody.model_info, "keeper/none")
told["no revision"] = caught(hf_hub_download, MODEL, "README.md", revision="v9")
told["no file"] = caught(hf_hub_download, MODEL, "none.txt")
told["no write"] = caught(guest.create_commit, MODEL, [Add("b.txt", b"b")], commit_message="b")
told["no write, no token"] = caught(nobody.create_commit, MODEL, [Add("b.txt", b"b")], commit_message="b")
told["no new repo"] = caught(guest.create_repo, "keeper/new")
told["wrong token"] = caught(wrong.model_info, MODEL)
told["wrong user"] = caught(wrong.whoami)
pull = [Add("b.txt", b"b"), Add("b.safetensors", b"b" * 99)]
told["pull request"] = caught(guest.create_commit, MODEL, pull, commit_message="b", create_pr=True)

api.update_repo_settings(MODEL, gated="manual")
told["gated info"] = guest.model_info(MODEL).gated
told["gated"] = caught(guest.hf_hub_download, MODEL, "README.md")
told["gated snapshot"] = caught(nobody.snapshot_download, MODEL)
told["gated check"] = caught(guest.auth_check, MODEL)
told["gated owner"] = pathlib.Path(api.hf_hub_download(MODEL, "README.md")).read_text()

api.update_repo_settings(MODEL, gated=False, private=True)
told["private"] = api.model_info(MODEL).private
told["private, guest"] = caught(guest.model_info, MODEL)
told["private, no token"] = caught(nobody.hf_hub_download, MODEL, "a.safetensors")

api.create_tag(MODEL, tag="v1")
told["tag twice"] = caught(api.create_tag, MODEL, tag="v1")
told["tag twice, fine"] = caught(api.create_tag, MODEL, tag="v1", exist_ok=True)
told["tag of nothing"] = caught(api.create_tag, MODEL, tag="v2", revision="none")
told["bad name"] = caught(api.create_tag, MODEL, tag="a tag")
told["repo twice"] = caught(api.create_repo, MODEL)

told["card"] = caught(ModelCard("---\\nlicense: mit\\n---\\n").validate)
told["bad card"] = caught(ModelCard("---\\nlicense: mine\\n---\\n").validate)
bad = b"---\\nbase_model: /home/me/model\\n---\\n"
told["bad commit"] = caught(commit, [Add("README.md", bad), Add("new.safetensors", b"new")])
"""


def test_errors_become_the_exceptions_of_the_client(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        told = run(hub, tmp_path / "home", ERRORS, hub.guest_token, xet=False)
        blobs = len(list(hub.blobs.iterdir()))
    seen = {name: tuple(answer[:2]) for name, answer in told.items() if isinstance(answer, list)}
    fine = ("nothing", None)
    assert seen == {
        "no repo": ("RepositoryNotFoundError", 404),
        "no repo, no token": ("RepositoryNotFoundError", 401),
        "no revision": ("RevisionNotFoundError", 404),
        "no file": ("RemoteEntryNotFoundError", 404),
        "no write": ("HfHubHTTPError", 403),
        "no write, no token": ("RepositoryNotFoundError", 401),
        "no new repo": ("HfHubHTTPError", 403),
        "wrong token": ("HfHubHTTPError", 401),
        "wrong user": ("HfHubHTTPError", 401),
        "pull request": fine,
        "gated": ("GatedRepoError", 403),
        "gated snapshot": ("GatedRepoError", 401),
        "gated check": ("GatedRepoError", 403),
        "private, guest": ("RepositoryNotFoundError", 404),
        "private, no token": ("RepositoryNotFoundError", 401),
        "tag twice": ("HfHubHTTPError", 409),
        "tag twice, fine": fine,
        "tag of nothing": ("RevisionNotFoundError", 404),
        "bad name": ("BadRequestError", 400),
        "repo twice": ("HfHubHTTPError", 409),
        "card": fine,
        "bad card": ("ValueError", None),
        "bad commit": ("ValueError", None),
    }
    assert told["gated info"] == "manual"
    assert told["gated owner"] == "hello"
    assert told["private"] is True
    assert "base_model" in told["bad commit"][2]
    assert blobs == 2  # of the commit and the pull request: a bad card is found before anything is sent


FAULTS = """
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100_000  # it goes on after the last whole chunk, of 10 MB otherwise
text, large = lambda: [Add("a.txt", b"a")], [Add("a.safetensors", folder)]
make = lambda name: api.create_repo("keeper/" + name).repo_id
plain = make("plain")
told["commits"] = [caught(api.create_commit, plain, text(), commit_message="x")[:2] for _ in range(6)]
told["headers"] = caught(api.create_tag, plain, tag="v1")
told["busy"] = caught(api.create_commit, make("busy"), text(), commit_message="x")[:2]
told["info"] = caught(api.model_info, "keeper/busy")[:2]
told["storage"] = caught(api.create_commit, make("storage"), large, commit_message="x")
told["verify"] = caught(api.create_commit, make("verify"), [Add("b.safetensors", b"b" * 99)], commit_message="x")
told["resumed"] = pathlib.Path(hf_hub_download("keeper/storage", "a.safetensors")).read_bytes() == folder.read_bytes()
"""


def test_faults_happen_as_often_as_wanted(tmp_path):
    """And what the client tries again by itself: not a commit, whose outcome it cannot know when the answer is cut."""
    (tmp_path / "weights").write_bytes(WEIGHTS)
    with Hub(tmp_path / "hub") as hub:
        for status in (403, 412, 429, 503):
            hub.fail("/plain/commit/", status, headers={"Retry-After": "0"})
        hub.cut("/plain/commit/")
        hub.fail("/models/keeper/busy", 503, method="GET")
        hub.fail("/tag/", 404, headers={"X-Error-Code": "RevisionNotFound"})
        hub.fail("/busy/preupload/", 429, headers={"Retry-After": "0"}, method="POST")
        hub.fail("/verify.git/info/lfs/objects/verify", 403)
        hub.cut("?key=signed", method="PUT")
        hub.cut("?key=signed", method="GET")
        told = run(hub, tmp_path / "home", FAULTS, tmp_path / "weights", xet=False)
        heads = {name: hub.find(repo, "main") for name, repo in hub.repos.items()}
        assert [fault.left for fault in hub.faults] == [0] * 11
    refused = [["HfHubHTTPError", status] for status in (403, 412, 429, 503)]
    assert told["commits"] == [*refused, ["RemoteProtocolError", None], ["nothing", None]]
    assert told["info"] == ["HfHubHTTPError", 503]
    assert told["headers"][0] == "RevisionNotFoundError"
    assert told["busy"] == ["nothing", None]
    assert told["storage"][:2] == ["nothing", None]
    assert told["verify"][:2] == ["RuntimeError", None]  # what the client says when LFS fails
    assert told["resumed"]
    assert heads["keeper/plain"].operations == [("file", "a.txt")]  # it was done, though the answer did not arrive
    assert len(hub.repos["keeper/plain"].commits) == 2  # so the next try had nothing left to do
    assert not heads["keeper/verify"].operations
    ranges = [r.headers.get("range") for r in hub.requests if r.origin == "storage" and r.method == "GET"]
    assert ranges == [None, "bytes=500000-"]


def ask(hub, path, headers=None, **wanted):
    headers = {"Authorization": f"Bearer {hub.token}"} | (headers or {})
    request = urllib.request.Request(hub.endpoint + path, headers=headers, **wanted)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return answer.status, answer.read()


def test_a_part_of_a_file_can_be_had(tmp_path):
    with Hub(tmp_path) as hub:
        ask(hub, "/api/repos/create", data=b'{"name": "shielded"}')
        path, whole = f"/{MODEL}/resolve/main/.gitattributes", hub.read(MODEL, ".gitattributes")
        assert ask(hub, path) == (200, whole)
        assert ask(hub, path, {"Range": "bytes=2-5"}) == (206, whole[2:6])
        assert ask(hub, path, {"Range": "bytes=7-"}) == (206, whole[7:])
        with pytest.raises(urllib.error.HTTPError, match="416"):
            ask(hub, path, {"Range": f"bytes={len(whole)}-"})


def test_nothing_is_left_and_nothing_is_random(tmp_path, capfd):
    before, heads = threading.active_count(), []
    for name in ("first", "second"):
        with Hub(tmp_path / name) as hub:
            port = int(hub.endpoint.split(":")[-1])
            ask(hub, "/api/repos/create", data=b'{"name": "shielded", "organization": "acme"}')
            heads.append(json.loads(ask(hub, "/api/models/acme/shielded")[1])["sha"])
            with socket.create_connection(("127.0.0.1", port)):
                pass  # a client that says nothing
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    assert heads[0] == heads[1]
    assert threading.active_count() == before
    assert capfd.readouterr() == ("", "")


def test_a_bug_of_the_hub_is_not_hidden(tmp_path):
    """A test may expect an error, and must not take ours for it."""
    with pytest.raises(json.JSONDecodeError), Hub(tmp_path) as hub:  # noqa: SIM117
        with pytest.raises(urllib.error.HTTPError):
            ask(hub, "/api/repos/create", data=b"no JSON")


def test_the_environment_of_the_tests_stays_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    monkeypatch.setenv("https_proxy", "http://proxy")
    with Hub(tmp_path) as hub:
        environment = hub.environment(tmp_path, xet=False, token=None)
        names = {name for name in environment if name.startswith("HF_") or name.lower().endswith("_proxy")}
        assert "HF_TOKEN" in hub.environment(tmp_path)
    assert not {"HF_HUB_CACHE", "https_proxy", "HF_TOKEN"} & names
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["HF_HUB_DISABLE_XET"] == "1"
    assert "TRANSFORMERS_OFFLINE" not in environment
