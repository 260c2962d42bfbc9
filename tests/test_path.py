"""The documented path on a small base of every family: the commands of docs/how-to/base.md, as they stand there.

The base, the pictures and the encoder are small and made here; the recipes that the page names are replaced by one of APDM with
one step (a tripwire of a few steps wrecks such a base, and `harden` says so). Such a model learns nothing, so its verdict is
no pass, which is what publishing has to refuse.
"""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub import Hub
from test_harden import write_registry
from tiny import make_checkpoint, make_sd3, make_sdxl, pictures
from transformers import Dinov2Config, Dinov2Model

from guardsmith.cli.app import main
from guardsmith.core.images import to_pil
from guardsmith.release.publish import recipe_as_yaml
from guardsmith.reports.report import Report

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/how-to/base.md").read_text(encoding="utf-8")
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FAMILIES = {
    "sd15": lambda folder: make_checkpoint(folder, "epsilon"), "sd21": lambda folder: make_checkpoint(folder, "v_prediction"),
    "sdxl": make_sdxl, "sd3": make_sd3,
}  # fmt: skip
JOB = {
    "sampling": {"steps": 2, "guidance": 3.0, "batch": 32}, "probe": {"times": 1, "pictures": 0},
    "verify": {
        "attacks": {"lora": {"name": "lora", "params": {"steps": 1, "batch_size": 1}}}, "identifiers": ["sks"],
        "images_per_unit": 2, "class_images": 2, "benign_images": 10, "deployability": {"checks": []},
    },
    "gate": {"minimum_images": 2},
}  # fmt: skip
APDM = {"outer_steps": 1, "inner_steps": 1, "class_images": 4, "learning_rate": 1e-4}
METHODS = {
    name: {"name": "apdm", "params": APDM} for name in ("tripwire-sd15", "apdm-sd15")
}  # recipe -> what is run for it


def documented():
    """The commands of the path, each as a list of words, and the file that its stdout goes to."""
    block = re.search(r"<!-- the documented path.*?-->\n```console\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block
    found = []
    for line in block[1].strip().split("\n"):
        words = shlex.split(line.removeprefix("$ "))
        file = words[words.index(">") + 1] if ">" in words else None
        found.append((words[1 : words.index(">")] if file else words[1:], file))
    return found


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def write_identities(folder, count=3):
    """Two photographs each of a few identities: the second differs from the first by a little noise."""
    for number, image in enumerate(pictures(count, seed=40)):
        place = folder / "person" / f"somebody-{number}"
        place.mkdir(parents=True)
        for i in range(2):
            noise = 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(10 * number + i))
            to_pil((image + noise).clamp(-1, 1)).save(place / f"{i}.png")


def adapted(words, folder, base, dino):
    """The documented words with the small base and recipe in place of the real ones."""
    words = [str(base) if word == BASE else word for word in words]
    for name, method in METHODS.items():
        if name in words:
            recipe = JOB | {"base": BASE, "method": method}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
            words[words.index(name)] = f"{name}.yaml"
    return [*words, "--judge-model", str(dino), "--size", "64"] if words[0] == "levels" else words


def run(words, file=None):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    if file:
        Path(file).write_text(out.getvalue())
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_of_the_path_does_what_the_page_says(family, dino, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_registry(tmp_path / "registry", seed=1)
    Path("registry.yaml").write_text((tmp_path / "registry/R.yaml").read_text().replace("path: ", "path: registry/"))
    write_identities(tmp_path / "levels")
    base = FAMILIES[family](tmp_path / "base")
    expected = {"verify": (1, 3), "run": (1, 3), "publish": (1,)}  # never a pass
    done = {}
    for words, file in documented():
        code, out, err = run(adapted(words, tmp_path, base, dino), file)
        assert code in expected.get(words[0], (0,)), (words, out, err)
        assert "Traceback" not in err and "this is a bug" not in err
        done[words[0]] = out + err
    assert [*done] == ["check", "levels", "plan", "harden", "verify", "run", "compare", "publish", "release-notes"]
    assert "next: guardsmith verify out --subjects" in done["harden"]
    assert (
        "U-Net forwards" in done["plan"]
        and "forwards a second that were measured" in done["plan"]
        and "GiB" in done["plan"]
    )
    assert "not published: the verdict of" in done["publish"]

    report = Report.load(Path("out"))
    assert (report.policy.judge.name, report.policy.judge.model) == ("dino", str(dino))
    assert report.calibration["person"].genuine > report.calibration["person"].chance_high
    assert report.recipe.verify.attacks["lora"].params["steps"] == 1, "the recipe of the hardening, not the demo's"
    protected = [check for check in report.checks if check.name == "protected"]
    assert protected and all(check.status != "pass" for check in protected), "an attack of one step proves nothing"
    page = Path("out/verify/report.html").read_text()
    assert "What this does not show" in page and "as good as its base" not in page
    recipe = yaml.safe_load(recipe_as_yaml(Report.load(Path("out"), "verify/public/report.json")))
    assert recipe["judge"]["measured"]["classes"]["person"]["genuine"] == report.calibration["person"].genuine
    assert str(tmp_path) not in json.dumps(recipe)


def test_without_a_method_the_methods_are_listed(tmp_path, epsilon_folder):
    registry = str(write_registry(tmp_path / "registry", seed=1))
    code, out, err = run(
        ["harden", "--base", str(epsilon_folder), "--subjects", registry, "--output", str(tmp_path / "out")]
    )
    assert code == 2 and out == ""
    for name, recipe in (("tripwire", "tripwire-sd15"), ("apdm", "apdm-sd15"), ("imma", "imma-sd15")):
        assert re.search(rf"^  {name}: .*embedded base.*\(recipe: {recipe}\)", err, flags=re.MULTILINE)
    assert not (tmp_path / "out").exists()
    code, _, err = run(["harden"])
    assert code == 2 and "Usage: guardsmith harden" in err
    folder = make_sdxl(tmp_path / "sdxl")
    code, _, err = run(["harden", "--base", str(folder), "--method", "imma", "--subjects", registry])
    assert code == 2 and "no recipe of imma" in err and "tripwire-sdxl" in err


def test_the_python_interface_asks_too(tmp_path, epsilon_folder):
    import guardsmith as gs

    registry = gs.load_registry(write_registry(tmp_path / "registry", seed=1))
    with pytest.raises(gs.UserError, match="there is no default") as caught:
        gs.harden(str(epsilon_folder), registry, output=tmp_path / "out")
    assert "tripwire" in str(caught.value)


def test_a_judge_without_levels_is_said_before_the_first_step(tmp_path, epsilon_folder, dino):
    """`run` refuses, `harden` warns; nothing is drawn for either."""
    registry = str(write_registry(tmp_path / "registry", seed=1))
    job = JOB | {
        "base": str(epsilon_folder),
        "judge": {"name": "dino", "model": str(dino)},
        "method": METHODS["apdm-sd15"],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    where = ["--subjects", registry, "--output", str(tmp_path / "out")]
    for command in (["run", str(tmp_path / "job.yaml")], ["plan", str(tmp_path / "job.yaml")]):
        code, _, err = run([*command, *where])
        assert code == 2 and "guardsmith levels FOLDER --judge dino" in err
        assert not (tmp_path / "out").exists()
    code, out, _ = run(["harden", "--recipe", str(tmp_path / "job.yaml"), "--dry-run", "--json", *where])
    assert code == 0 and any("guardsmith levels" in sentence for sentence in json.loads(out)["warnings"])


def test_levels_are_refused_where_they_cannot_be_measured(tmp_path, dino):
    write_identities(tmp_path / "one", count=1)
    flags = ["--judge", "dino", "--judge-model", str(dino), "--size", "64"]
    for folder, said in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path, "needs"),
        (tmp_path / "one", "two at least"),
    ):
        code, out, err = run(["levels", str(folder), *flags])
        assert (code, out) == (2, "") and said in err


RIGHTS = """
import sys
from guardsmith.core.errors import GuardsmithError
from guardsmith.release.hub import check_rights
try:
    check_rights(sys.argv[1])
    print("may")
except GuardsmithError as error:
    print(error)
"""


def test_rights_at_the_hub_are_looked_at_before_anything_runs(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        account = next(iter(hub.namespaces))
        own = hub.namespaces[account][-1]

        def said(repo_id, **how):
            command = [sys.executable, "-c", RIGHTS, repo_id]
            environment = hub.environment(tmp_path / "home", **how)
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()

        assert said(f"{own}/model") == "may"
        assert "no member of somebody-else" in said("somebody-else/model")
        assert "token" in said(f"{own}/model", token=None)
        assert not hub.repos, "nothing was made there"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--publish", "acme/has space", "--contact", "x@example.org"], "no name that the Hub takes"),
        (["--publish", "acme/a--b", "--contact", "x@example.org"], "no name that the Hub takes"),
        (["--publish", "acme/model.git", "--contact", "x@example.org"], "no name that the Hub takes"),
        (["--publish", "acme/model", "--contact", " "], "--contact"),
        (["--publish", "acme/model", "--contact", "x", "--license-file", "not-there"], "cannot be read"),
    ],
)
def test_what_the_hub_never_takes_is_said_at_the_start(tmp_path, flags, said):
    code, _, err = run(["run", "demo", "--output", str(tmp_path / "out"), *flags])
    assert code == 2 and said in err and "bug" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a b", "v1..2", "x.lock", "/x", "x~1", "-x", "a:b", "x/"])
@pytest.mark.parametrize("option", ["--tag", "--branch"])
def test_names_that_git_does_not_take(tmp_path, option, name):
    where = ["--repo-id", "acme/model", "--subjects", "r.yaml", "--contact", "x@example.org"]
    code, _, err = run(["publish", str(tmp_path), *where, f"{option}={name}", "--dry-run"])
    assert code == 2 and "git takes no such name" in err
