"""Publishing to a loopback Hub (tests/hub.py) with the real client, by Xet and by LFS, and with everything that can go wrong.

The client reads its settings when it is imported, so it runs in processes of its own.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub import Hub
from test_publish import TO, make_output

from guardsmith.models.checkpoint import weights_digest
from guardsmith.registry.loader import load_registry
from guardsmith.release.hub import files_of_release

ROOT = Path(__file__).parent.parent
REPO = "acme/avatar"

# What a process starts with: `told` is printed, `caught` calls and tells the exception.
START = """
import json, pathlib, sys
from guardsmith.release import hub
from guardsmith.release.hub import upload

told, release, waits = {}, pathlib.Path(sys.argv[1]), []
real = hub.with_retries
hub.with_retries = lambda what, call: real(what, call, waits.append)

def caught(**how):
    try:
        done = upload(release, "acme/avatar", message="release", **how)
        return {"commit": done.commit, "url": done.url, "changed": done.changed}
    except Exception as error:
        return {"error": type(error).__name__, "says": str(error)}
"""


def run(hub, home, release, code, **how):
    """What a process told."""
    done = subprocess.run(
        [sys.executable, "-c", f"{START}\n{code}\nprint(json.dumps(told | {{'waits': waits}}))", str(release)],
        env=hub.environment(home, **how), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub", large_above=50_000) as started:
        yield started


@pytest.fixture(scope="module")
def output(tmp_path_factory, v_folder):
    registry = load_registry(ROOT / "registries" / "demo.yaml")
    return make_output(tmp_path_factory.mktemp("published") / "out", v_folder, registry)


@pytest.fixture
def release(tmp_path):
    """A small folder in the place of a release."""
    folder = tmp_path / "release"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(random.Random(0).randbytes(200_000))
    (folder / "model_index.json").write_text("{}\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nA card.\n")
    return folder


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_from_the_command_to_a_pipeline(hub, output, tmp_path, xet):
    """Published, downloaded again, byte for byte what was gathered, and a model that draws."""
    environment = hub.environment(tmp_path / "home", xet=xet)
    command = [sys.executable, "-m", "guardsmith", "publish", output, *TO, "--tag", "v1", "--private", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    told = json.loads(done.stdout)
    repo = hub.repos[REPO]
    assert repo.private and told["changed"] and hub.find(repo, "v1").oid == told["commit"] == hub.find(repo, "main").oid
    code = (
        "import sys; from huggingface_hub import snapshot_download;"
        f" print(snapshot_download({REPO!r}, revision='v1', local_dir=sys.argv[1]))"
    )
    fresh = hub.environment(tmp_path / "another", xet=xet)
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "down"], env=fresh, check=True, timeout=120, capture_output=True
    )
    sent = files_of_release(output / "release")
    for name, file in sent.items():
        assert (tmp_path / "down" / name).read_bytes() == file.read_bytes(), name
    here = {name for name in files_of_release(tmp_path / "down") if not name.startswith(".")}
    assert here == set(sent)
    shutil.rmtree(tmp_path / "down" / ".cache", ignore_errors=True)
    assert weights_digest(tmp_path / "down") == weights_digest(output / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "down")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a photo", num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert image.shape == (1, 3, 64, 64)
    for request in hub.requests:
        if request.origin == "storage":
            assert "authorization" not in request.headers, "the token stays with the Hub"


def test_what_is_there_already_is_not_sent_again_and_what_is_stale_goes(hub, release, tmp_path):
    told = run(hub, tmp_path / "home", release, """
told["first"] = caught(tag="v1")
told["again"] = caught(tag="v1")
(release / "stale.txt").write_text("x")
told["more"] = caught()
(release / "stale.txt").unlink()
(release / "model_index.json").write_text("{ }")
told["less"] = caught(tag="v2")
told["taken"] = caught(tag="v1")
""", xet=False)  # fmt: skip
    first, again, more, less = (told[name] for name in ("first", "again", "more", "less"))
    assert first["changed"] and not again["changed"] and again["commit"] == first["commit"]
    repo = hub.repos[REPO]
    assert {path for _, path in hub.find(repo, more["commit"]).operations} == {"stale.txt"}
    assert set(hub.find(repo, less["commit"]).operations) == {
        ("deletedFile", "stale.txt"),
        ("file", "model_index.json"),
    }
    assert hub.find(repo, "v1").oid == first["commit"] and hub.find(repo, "v2").oid == less["commit"]
    assert told["taken"]["error"] == "UserError" and "has a tag v1 at another commit" in told["taken"]["says"]
    puts = [request for request in hub.requests if (request.method, request.origin) == ("PUT", "storage")]
    assert len(puts) == 1, "the weights went up once"


def test_a_gated_model_is_gated_before_anything_is_in_it(hub, release, tmp_path):
    told = run(hub, tmp_path / "home", release, 'told["done"] = caught(gated="manual", private=True)')
    assert told["done"]["changed"] and (hub.repos[REPO].gated, hub.repos[REPO].private) == ("manual", True)
    asked = [request.path for request in hub.requests if request.method in ("PUT", "POST")]
    settings = next(i for i, path in enumerate(asked) if path.endswith("/settings"))
    commit = next(i for i, path in enumerate(asked) if "/commit/" in path)
    assert settings < commit


def test_a_proposal_leaves_main_as_it_is(hub, release, tmp_path):
    told = run(hub, tmp_path / "home", release, """
told["main"] = caught()
(release / "model_index.json").write_text("{ }")
told["proposed"] = caught(create_pr=True)
told["branch"] = caught(branch="next")
""", xet=False)  # fmt: skip
    repo = hub.repos[REPO]
    assert hub.find(repo, "main").oid == told["main"]["commit"]
    assert told["proposed"]["changed"] and hub.find(repo, "refs/pr/1").oid == told["proposed"]["commit"]
    assert hub.read(REPO, "model_index.json", "refs/pr/1") == b"{ }"
    assert hub.read(REPO, "model_index.json") == b"{}\n"
    assert (
        hub.find(repo, "next").oid == told["branch"]["commit"] and hub.read(REPO, "model_index.json", "next") == b"{ }"
    )


def test_a_busy_hub_and_lost_answers(hub, release, tmp_path):
    hub.fail("/commit/", 503, times=1, headers={"Retry-After": "3"})
    hub.fail("/api/repos/create", 429, times=2, headers={"Retry-After": "5"})
    hub.cut("/commit/")  # the commit is made, and nobody hears of it
    told = run(hub, tmp_path / "home", release, 'told["done"] = caught()', xet=False)
    assert "error" not in told["done"], told
    assert told["waits"][:2] == [5.0, 5.0] and 3.0 in told["waits"]
    assert not any(fault.left for fault in hub.faults)
    repo = hub.repos[REPO]
    assert hub.find(repo, "main").oid == told["done"]["commit"]
    assert hub.read(REPO, "unet/weights.safetensors") == (release / "unet" / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("part", "status", "error", "said"),
    [
        ("/commit/", 403, "UserError", "the token has no right"),
        ("/commit/", 412, "RunFailed", "somebody else changed it"),
        ("/api/validate-yaml", 400, "RunFailed", "does not accept the model card"),
    ],
)
def test_what_the_hub_refuses_is_not_tried_again_and_nothing_is_published(
    hub, release, tmp_path, part, status, error, said
):
    hub.fail(part, status, times=9, body={"error": "no"})
    told = run(hub, tmp_path / "home", release, 'told["done"] = caught(tag="v1")', xet=False)
    assert told["done"]["error"] == error and said in told["done"]["says"], told
    assert told["waits"] == []
    if REPO in hub.repos:
        assert "unet/weights.safetensors" not in hub.find(hub.repos[REPO], "main").files
    assert not any("/tag/" in request.path for request in hub.requests)


def test_without_a_token(hub, release, tmp_path):
    told = run(hub, tmp_path / "home", release, 'told["done"] = caught()', xet=False, token=None)
    assert told["done"]["error"] == "UserError", told
    assert REPO not in hub.repos


def test_a_token_without_rights(hub, release, tmp_path):
    told = run(hub, tmp_path / "home", release, 'told["done"] = caught()', xet=False, token=hub.guest_token)
    assert told["done"]["error"] == "UserError" and "no right" in told["done"]["says"], told
    assert hub.guest_token not in json.dumps(told)


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, release, tmp_path):
    """The differences are to a commit that is no longer the head when ours arrives."""
    told = run(hub, tmp_path / "home", release, """
from huggingface_hub import CommitOperationAdd, HfApi
told["first"] = caught()
real_commit = HfApi.create_commit

def late(self, repo_id, operations, **how):
    if how.get("commit_message") == "release":
        HfApi.create_commit = real_commit
        self.create_commit(repo_id, [CommitOperationAdd("theirs.txt", b"theirs")], commit_message="theirs")
    return real_commit(self, repo_id, operations, **how)

HfApi.create_commit = late
(release / "model_index.json").write_text("{ }")
told["second"] = caught()
""", xet=False)  # fmt: skip
    assert told["second"]["error"] == "RunFailed" and "(412)" in told["second"]["says"], told
    assert hub.read(REPO, "theirs.txt") == b"theirs" and hub.read(REPO, "model_index.json") == b"{}\n"


def test_what_arrived_is_compared_with_what_was_sent(hub, release, tmp_path):
    told = run(hub, tmp_path / "home", release, """
from huggingface_hub import HfApi
real_commit = HfApi.create_commit

def spoiling(self, repo_id, operations, **how):
    made = real_commit(self, repo_id, operations, **how)
    (release / "unet" / "weights.safetensors").write_bytes(b"another")
    return made

HfApi.create_commit = spoiling
told["done"] = caught(tag="v1")
""", xet=False)  # fmt: skip
    assert told["done"]["error"] == "RunFailed" and "unet/weights.safetensors" in told["done"]["says"], told
    assert "v1" not in json.dumps([request.path for request in hub.requests if "/tag/" in request.path])


def test_a_killed_upload_goes_on(hub, release, tmp_path):
    """Killed once the weights are there and before the commit: nothing is published, and they are not sent again."""
    hub.fail("/commit/", 503, times=99, headers={"Retry-After": "60"})
    code = f"{START}\nhub.with_retries = real\ncaught()"
    environment = hub.environment(tmp_path / "home", xet=False)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(release)], env=environment, stderr=subprocess.DEVNULL
    ) as child:
        deadline = time.monotonic() + 60
        while not any("/commit/" in request.path for request in hub.requests):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert "unet/weights.safetensors" not in hub.find(hub.repos[REPO], "main").files
    hub.faults.clear()
    told = run(hub, tmp_path / "home", release, 'told["done"] = caught()', xet=False)
    assert told["done"]["changed"], told
    puts = [request for request in hub.requests if (request.method, request.origin) == ("PUT", "storage")]
    assert len(puts) == 1
    assert hub.read(REPO, "unet/weights.safetensors") == (release / "unet" / "weights.safetensors").read_bytes()
