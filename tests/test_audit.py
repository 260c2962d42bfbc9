"""`guardsmith audit-release`: folders, single files and repositories of those who published before."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hub import Hub
from leaks import CLUTTER, TOKEN, UNET, base_tensors_in, clutter
from safetensors.torch import load_file, save_file
from test_leaks import hardened
from test_single_file import in_a1111
from tiny import weights

from guardsmith.cli import app as cli
from guardsmith.models.checkpoint import load_model, save_model
from guardsmith.models.contents import list_files
from guardsmith.release.audit import audit_folder, base_of

REPO = "acme/avatar"


@pytest.fixture
def base(v_folder, tmp_path):
    return shutil.copytree(v_folder, tmp_path / "base")


@pytest.fixture
def model(base, tmp_path):
    save_model(hardened(base), tmp_path / "model", half_variant=True)
    return tmp_path / "model"


def test_what_guardsmith_writes_now_is_clean(base, model, capsys):
    (model / ".gitattributes").write_text("x")
    (model / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (model / ".cache" / "huggingface" / "download" / "x.metadata").write_text("x")
    assert cli.main(["audit-release", str(model), "--base", str(base)]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "nothing in" in told.err


def test_a_copy_of_the_whole_base_is_not(base, model, capsys):
    """As published folders were: the base's, with another U-Net."""
    shutil.copytree(clutter(base), model, dirs_exist_ok=True, ignore=lambda place, names: [n for n in names if place.endswith("unet") and n.startswith("diffusion_pytorch_model.") and n.count(".") == 1 and n.endswith("safetensors")])  # fmt: skip # noqa: E501
    assert cli.main(["audit-release", str(model), "--base", str(base), "--json"]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert TOKEN not in told.out + told.err
    files = {each["where"] for each in found if each["kind"] == "file"}
    for name in CLUTTER:
        assert name in files or f"{name.split('/')[0]}/" in files or "unet/nested/" in files, name
    credentials = {each["where"] for each in found if each["kind"] == "credential"}
    assert {".git/config", ".env", "README.md", "vae/diffusion_pytorch_model.safetensors"} <= credentials
    same = {each["where"] for each in found if each["kind"] == "weights"}
    assert {name for name in CLUTTER if name.lower().endswith(".safetensors")} <= same
    assert "vae/diffusion_pytorch_model.safetensors" in same and UNET not in same


def test_a_model_that_was_not_hardened(base, tmp_path, capsys):
    assert cli.main(["audit-release", str(base), "--base", str(base)]) == 1
    assert "is the base's own" in capsys.readouterr().out
    half = {name: value.half() for name, value in load_file(base / UNET).items()}
    other = shutil.copytree(base, tmp_path / "half")
    save_file(half, other / UNET, metadata={"format": "pt"})
    [finding] = audit_folder(other, base)
    assert (finding.kind, finding.where) == ("weights", "unet")


def test_what_cannot_be_read_hides_nothing_else(base, model, capsys):
    (model / "unet" / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    shutil.copy(base / UNET, model / "y.safetensors")
    assert cli.main(["audit-release", str(model), "--base", str(base)]) == 1
    told = capsys.readouterr().out
    assert "unet/x.safetensors: cannot be read as safetensors" in told and "weights     y.safetensors: conv" in told


def test_wrong_usage(base, model, tmp_path, capsys):
    for arguments, said in (
        ([str(tmp_path / "nothing")], "there is no release"), ([str(model)], "--base"),
        ([str(tmp_path)], "output of a hardening run"),
        ([str(model), "--base", str(base), "--revision", "x"], "--revision"), ([str(model / UNET)], "--base"),
        ([str(model), "--base", str(tmp_path / "x")], "no base model"),
    ):  # fmt: skip
        assert cli.main(["audit-release", *arguments]) == 2, arguments
        assert said in capsys.readouterr().err
    (model / "guardsmith").mkdir()
    (model / "guardsmith" / "harden.json").write_text('{"base": "builtin:avatar", "base_revision": null}')
    assert base_of(model) == ("builtin:avatar", None)


def test_single_files(base, model, tmp_path, capsys):
    own, before = load_file(model / UNET), load_file(base / UNET)
    file = tmp_path / "new.safetensors"
    tensors = {in_a1111(name): value for name, value in own.items()} | {"betas": torch.linspace(0, 1, 20)}
    command = ["audit-release", str(file), "--base", str(base)]
    save_file(tensors, file)
    assert cli.main(command) == 0
    ema = {
        "model_ema." + in_a1111(name).removeprefix("model.").replace(".", ""): v * 1.01 for name, v in before.items()
    }
    save_file(tensors | ema | {"some.thing": before["conv_in.weight"].half()}, file, metadata={"by": TOKEN})
    assert cli.main(command) == 1
    told = capsys.readouterr().out
    assert f"{len(ema)} tensors are named like copies" in told and "1 tensors are of no known part" in told
    assert "some.thing is the base's unet conv_in.weight" in told and "a token of the Hub" in told and TOKEN not in told
    save_file({in_a1111(name): value.half() for name, value in before.items()}, file)
    assert cli.main(command) == 1
    assert "its U-Net is the base's own" in capsys.readouterr().out


STEPS = """
import contextlib, io, json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from guardsmith.cli.app import main

def push(repo, branch, folder, *gone):
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    api.create_branch(repo, branch=branch, exist_ok=True)
    files = [f for f in sorted(Path(folder).rglob("*")) if f.is_file() and ".git" not in f.parts]
    add = [CommitOperationAdd(f.relative_to(folder).as_posix(), f) for f in files]
    api.create_commit(repo, [*add, *(CommitOperationDelete(name) for name in gone)], commit_message="x", revision=branch)

def guardsmith(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()

results = [globals()[name](*arguments) for name, *arguments in json.loads(sys.argv[1])]
print(json.dumps([result for result in results if result]))
"""


def at_the_hub(environment, *steps):
    """Pushes and commands, one after the other in one process that may talk to the Hub; code and output of the commands."""
    told = json.dumps([[str(word) for word in step] for step in steps])
    command = [sys.executable, "-c", STEPS, told]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_repository_and_its_history(base, model, tmp_path):
    with_single_file = shutil.copytree(model, tmp_path / "with-single-file")
    shutil.copy(base / UNET, with_single_file / "v1.safetensors")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / ".env").write_text(f"HF_TOKEN={TOKEN}")
    audit = ("guardsmith", "audit-release", REPO, "--base", base, "--json")
    with Hub(tmp_path / "hub", large_above=20_000) as hub:
        # The base itself by the same names, its single file, a secret on a branch: then all of it is deleted again.
        first, second, last = at_the_hub(
            hub.environment(tmp_path / "home", xet=False),
            ("push", REPO, "main", model), audit,
            ("push", REPO, "main", base), ("push", REPO, "main", with_single_file),
            ("push", REPO, "next", tmp_path / "secret"), audit,
            ("push", REPO, "main", model, "v1.safetensors"), audit,
        )  # fmt: skip
        assert hub.token not in json.dumps([first, second, last])
    assert (first[0], json.loads(first[1])) == (0, [])
    code, found = second[0], json.loads(second[1])
    assert code == 1
    assert "v1.safetensors" in [each["where"] for each in found if "(commit" not in each["where"]]
    code, found = last[0], json.loads(last[1])
    assert code == 1
    assert all("(commit" in each["where"] for each in found)
    kinds = {(each["kind"], each["where"].partition(" (")[0]) for each in found}
    assert kinds == {
        ("file", "v1.safetensors"), ("file", ".env"), ("weights", "v1.safetensors"), ("weights", UNET),
    }  # fmt: skip
    assert any("reached from next" in each["where"] for each in found)


def test_a_hub_commit_holds_nothing_of_the_base(base, model, tmp_path):
    """What is uploaded, tensor by tensor; stale files go, and that earlier commits keep them is said."""
    from test_publish import TO, make_output
    from test_publish_hub import ROOT

    from guardsmith.registry.loader import load_registry

    output = make_output(tmp_path / "out", model, load_registry(ROOT / "registries" / "demo.yaml"))
    with Hub(tmp_path / "hub", large_above=20_000) as hub:
        environment = hub.environment(tmp_path / "home", xet=False)
        publish = ("guardsmith", "publish", output, *TO, "--json")
        [(code, out, err)] = at_the_hub(environment, ("push", REPO, "main", clutter(base)), publish)
        assert code == 0, err
        assert "earlier commits still hold them" in err and f"audit-release {REPO}" in err
        assert {"unet/model.onnx", "v1-5-pruned.safetensors"} <= set(json.loads(out)["deleted"])
        names = set(hub.find(hub.repos[REPO], "main").files) - {".gitattributes"}
        assert names == set(list_files(output / "release"))
        down = tmp_path / "down"
        for name in names:
            (down / name).parent.mkdir(parents=True, exist_ok=True)
            (down / name).write_bytes(hub.read(REPO, name))
            assert TOKEN.encode() not in (down / name).read_bytes()
        assert not base_tensors_in(down.rglob("*.safetensors"), base, output / "model")
        assert set(weights(load_model(str(down)).unet)) == set(load_file(base / UNET))
