"""The hardening job, from registry and base to `out/model` and `out/harden.json`, in Python and from the command line."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import edit_json, largest_difference, make_checkpoint, pictures, weights

from guardsmith.cli.app import main
from guardsmith.config.loading import load_recipe
from guardsmith.config.shipped import recipe_names
from guardsmith.core.images import to_pil
from guardsmith.core.seeds import HARDENING_REPLACEMENT
from guardsmith.diffusion import cache as drawing
from guardsmith.diffusion.cache import drawn_by
from guardsmith.hardening import pipeline as harden_module
from guardsmith.hardening.pipeline import harden
from guardsmith.methods import METHODS
from guardsmith.models.checkpoint import load_model, weights_digest
from guardsmith.registry.add import add_subject
from guardsmith.registry.loader import load_registry
from guardsmith.training.loop import load_checkpoint

OUTER, INNER, BATCH = 3, 2, 1
RECIPE = f"""\
base: BASE
subjects: R.yaml
sampling: {{steps: 2, batch: 4}}
probe: {{times: 1, pictures: 1}}
method:
  name: apdm
  params:
    outer_steps: {OUTER}
    inner_steps: {INNER}
    batch_size: {BATCH}
    class_images: 4
    learning_rate: 1.0e-3
    personalization_learning_rate: 1.0e-3
verify:
  attacks:
    dreambooth: {{name: dreambooth, params: {{steps: 2}}}}
"""
# Checkpoints are written every 10 outer steps. Between the only one of `LONGER` and its end is no time to kill a process.
LONGER = ["--set", "method.params.outer_steps=12", "--set", "method.params.inner_steps=1"]
LONGEST = ["--set", "method.params.outer_steps=30", "--set", "method.params.inner_steps=1"]


def write_registry(folder, seed):
    """mira, protected, and tom, a control, of four pictures each."""
    for number, name in enumerate(["mira", "tom"]):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(pictures(4, seed=seed + number)):
            to_pil(image).save(folder / name / f"{i}.png")
    consent = {"consent_basis": "request", "reference": "T-1", "granted_on": date(2026, 1, 1)}
    registry = folder / "R.yaml"
    add_subject(registry, folder / "mira", "mira", "person", "person", expires_on=date(2099, 1, 1), **consent)
    add_subject(registry, folder / "tom", "tom", "person", "person", control=True)
    return registry


@pytest.fixture(scope="module")
def recipe(v_folder, tmp_path_factory):
    """A recipe file for the tiny base, with its registry R.yaml beside it."""
    folder = tmp_path_factory.mktemp("job")
    write_registry(folder, seed=1)
    (folder / "recipe.yaml").write_text(RECIPE.replace("BASE", json.dumps(str(v_folder))))
    return folder / "recipe.yaml"


def harden_quietly(recipe, output, *changes):
    loaded = load_recipe(str(recipe), changes)
    return harden(load_registry(loaded.subjects), loaded, output)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """The output of one run; copy it before changing it."""
    output = tmp_path_factory.mktemp("finished") / "out"
    harden_quietly(recipe, output)
    return output


@pytest.fixture(scope="module")
def finished_longer(recipe, tmp_path_factory):
    """harden.json of an unbroken run with the settings `LONGER`."""
    return harden_quietly(recipe, tmp_path_factory.mktemp("longer") / "out", *LONGER[1::2])


@pytest.fixture(scope="module")
def finished_longest(recipe, tmp_path_factory):
    """harden.json of an unbroken run with the settings `LONGEST`."""
    return harden_quietly(recipe, tmp_path_factory.mktemp("longest") / "out", *LONGEST[1::2])


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def sentences(self):
        return self.err.strip().split("\n")


@pytest.fixture
def guardsmith(capsys):
    """The command line in this process; whatever happens, it shows no traceback."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        done = Done(code, *capsys.readouterr())
        assert "Traceback" not in done.err
        assert "this is a bug" not in done.err
        return done

    return call


@pytest.fixture
def run(guardsmith, recipe, tmp_path):
    """`guardsmith harden` with the tiny recipe into tmp_path/out."""

    def call(*options):
        return guardsmith("harden", "--recipe", recipe, "--output", tmp_path / "out", *options)

    return call


def everything_in(folder):
    """Contents and times of all files: what must not change where nothing may be written."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def leftovers(folder):
    return [file for file in folder.rglob("*") if ".tmp" in file.name]


def refused(done, *words):
    """Exit code 2 and one sentence with these words."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert len(done.sentences) == 1, done.err
    for word in words:
        assert str(word) in done.err


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_the_model_is_a_pipeline_that_differs_from_the_base_only_in_the_weights_of_its_unet(finished, v_folder):
    hardened, base = everything_in(finished / "model"), everything_in(v_folder)
    different = [name for name in base if name not in hardened or hardened[name][0] != base[name][0]]
    assert hardened.keys() == base.keys()
    assert different == ["unet/diffusion_pytorch_model.safetensors"]

    before, after = load_file(v_folder / different[0]), load_file(finished / "model" / different[0])
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    assert all(torch.isfinite(value).all() for value in after.values())

    pipeline = StableDiffusionPipeline.from_pretrained(finished / "model")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks person", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_harden_json_says_how_the_model_came_about(finished, v_folder, recipe):
    info = json.loads((finished / "harden.json").read_text())
    assert info["base"] == str(v_folder)
    assert info["base_digest"] == weights_digest(v_folder)
    assert info["model_digest"] == weights_digest(finished / "model") != info["base_digest"]
    assert info["registry_digest"] == load_registry(recipe.parent / "R.yaml").digest
    assert info["subjects"] == ["mira"]
    assert (info["method"], info["seed"]) == ("apdm", 0)
    assert info["sampling"] == {"steps": 2, "batch": 4, "guidance": 7.5}
    given = {"outer_steps": OUTER, "inner_steps": INNER, "class_images": 4, "learning_rate": 1e-3}
    defaults = {"beta": 1.0, "reduction": "mean", "identifiers": ["sks"], "distillation_weight": 0.0}
    assert info["params"].items() >= {**given, **defaults}.items()
    assert info["params"].keys() == METHODS["apdm"].config.model_fields.keys()
    assert 0 < info["changed_weights"] <= 1
    assert len(info["history"]) == OUTER
    assert all(step["personalization"] > 0 for step in info["history"])
    assert info["seconds"] > 0
    assert info["run"]["packages"]["torch"] == torch.__version__


def test_the_recorded_cost_is_what_the_loop_does(finished):
    """An inner step: instance and class rows with gradients; pairs without (reference), pairs and class rows with."""
    info = json.loads((finished / "harden.json").read_text())
    with_gradients, without = (1 + 1) + (2 + 1), 2
    assert info["unet_forward_rows"] == OUTER * INNER * BATCH * (with_gradients + without)
    assert info["unet_backward_rows"] == OUTER * INNER * BATCH * with_gradients
    assert info["unet_forward_equivalents"] == info["unet_forward_rows"] + 2 * info["unet_backward_rows"]
    assert info["resumed_after"] == 0


def test_nothing_but_the_result_and_the_cache_is_left(finished):
    left = ["cache", "harden.json", "model", "probes", "settings.json", "state.safetensors"]
    assert sorted(file.name for file in finished.iterdir()) == left
    assert leftovers(finished) == []


def test_the_base_and_the_registry_are_left_alone(run, recipe, v_folder):
    before = everything_in(v_folder), everything_in(recipe.parent)
    assert run().code == 0
    assert (everything_in(v_folder), everything_in(recipe.parent)) == before


def test_the_command_line_gives_the_same_model_and_names_the_next_command(run, finished, tmp_path):
    done = run("--json")
    assert done.code == 0
    info = json.loads(done.out)
    assert info == json.loads((tmp_path / "out/harden.json").read_text())
    assert info["model_digest"] == json.loads((finished / "harden.json").read_text())["model_digest"]
    assert done.sentences[-1].startswith(f"next: guardsmith verify {tmp_path / 'out'} --subjects ")


def test_another_seed_gives_another_model(run, finished, tmp_path):
    assert run("--seed", 1).code == 0
    info = json.loads((tmp_path / "out/harden.json").read_text())
    assert info["seed"] == 1
    assert info["model_digest"] != json.loads((finished / "harden.json").read_text())["model_digest"]


def test_flags_win_over_the_recipe(guardsmith, recipe, tmp_path):
    registry, base = write_registry(tmp_path / "other", seed=50), make_checkpoint(tmp_path / "base", "epsilon", seed=1)
    flags = ["--subjects", registry, "--pretrained_model_name_or_path", base, "--output_dir", tmp_path / "o"]
    assert guardsmith("harden", "--recipe", recipe, "--set", "method.params.outer_steps=1", *flags).code == 0
    info = json.loads((tmp_path / "o/harden.json").read_text())
    assert info["base_digest"] == weights_digest(base)
    assert info["registry_digest"] == load_registry(registry).digest
    assert info["params"]["outer_steps"] == 1


# --- interrupted and resumed -----------------------------------------------------------------------------------------


def interrupt(monkeypatch, title, step):
    """Ctrl-C right after a step of the stage that begins with `title`."""
    real = harden_module.stage

    @contextmanager
    def stage(name, total):
        with real(name, total) as bar:

            def counted(*arguments, **options):
                bar(*arguments, **options)
                if name.startswith(title) and bar.done == step:
                    raise KeyboardInterrupt

            yield counted

    for module in (harden_module, drawing):
        monkeypatch.setattr(module, "stage", stage)


@pytest.mark.parametrize(
    ("title", "step", "kept"),
    [("class pictures", 1, 0), ("hardening", 4, 0), ("hardening", 11, 10), ("hardening", 12, 10)],
)
def test_a_run_resumed_after_ctrl_c_equals_an_unbroken_one(run, finished_longer, tmp_path, title, step, kept):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, title, step)
        done = run(*LONGER)
    assert done.code == 130
    assert done.sentences[-1] == "interrupted"
    assert not (tmp_path / "out/model").exists()
    assert not (tmp_path / "out/harden.json").exists()
    assert leftovers(tmp_path) == []

    assert run(*LONGER, "--resume").code == 0
    info = json.loads((tmp_path / "out/harden.json").read_text())
    assert info["resumed_after"] == kept
    assert info["model_digest"] == weights_digest(tmp_path / "out/model") == finished_longer["model_digest"]
    assert info["history"] == finished_longer["history"]
    assert info["unet_forward_equivalents"] == finished_longer["unet_forward_equivalents"]


@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_a_killed_process_can_be_resumed(run, recipe, finished_longest, tmp_path, number, code):
    output = tmp_path / "out"
    command = ["harden", "--recipe", str(recipe), "--output", str(output), *LONGEST]
    child = forked.start(main, command, streams=tmp_path / "streams")
    try:
        deadline = time.monotonic() + 120
        while not (output / "checkpoints/last.safetensors").exists():
            assert child.is_alive(), (tmp_path / "streams/err").read_text()
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.005)
        os.kill(child.pid, number)
        child.join(timeout=60)
    finally:
        child.kill()
    err = (tmp_path / "streams/err").read_text()
    assert child.exitcode == code, err
    assert "Traceback" not in err
    assert not (output / "model").exists()
    assert not (output / "harden.json").exists()

    assert run(*LONGEST, "--resume").code == 0
    info = json.loads((output / "harden.json").read_text())
    assert 10 <= info["resumed_after"] < 30
    assert info["model_digest"] == weights_digest(output / "model") == finished_longest["model_digest"]
    assert leftovers(output) == []
    assert not (output / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
def test_a_run_that_is_killed_five_times_gives_the_weights_of_an_unbroken_one(recipe, tmp_path):
    """At random moments: while it draws, trains, saves, or before it has begun."""
    steps = ["--set", "method.params.outer_steps=600", "--set", "method.params.inner_steps=2"]
    whole = harden_quietly(recipe, tmp_path / "whole", *steps[1::2])
    output, rng, reached = tmp_path / "out", random.Random(0), []
    command = [
        sys.executable,
        "-m",
        "guardsmith",
        "--progress",
        "json",
        "harden",
        "--recipe",
        recipe,
        "--output",
        output,
        *steps,
    ]
    for time_number in range(5):
        resume = ["--resume"] if (output / "settings.json").exists() else []
        with subprocess.Popen([*command, *resume], stderr=subprocess.PIPE, text=True) as child:
            for line in child.stderr:
                told = json.loads(line) if line.startswith("{") else {}
                if told.get("stage", "").startswith("hardening"):
                    break
            time.sleep(rng.random() * 2)
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, f"it had ended before it was killed the time {time_number}"
        saved = output / "checkpoints/last.safetensors"
        reached.append(len(load_checkpoint(saved)[1]["history"]) if saved.exists() else 0)
    assert reached == sorted(reached) and len(set(reached)) > 1, "what was saved is not lost"
    loaded = load_recipe(str(recipe), steps[1::2])
    again = harden(load_registry(loaded.subjects), loaded, output, resume=True)
    assert again["model_digest"] == whole["model_digest"]
    assert again["history"] == whole["history"]


def test_losses_go_to_trackers_and_no_names_do(run, finished, tmp_path, monkeypatch):
    import accelerate.tracking
    from test_trackers import Told

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "told", Told)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["told"])
    monkeypatch.setattr(Told, "runs", [])
    assert run("--report-to", "told").code == 0
    info = json.loads((tmp_path / "out/harden.json").read_text())
    [told] = Told.runs
    assert told["rows"] == list(enumerate(info["history"])) and told["ended"]
    assert told["settings"]["method"] == "apdm" and told["settings"]["subjects"] == len(info["subjects"])
    assert not any(name in json.dumps(told["settings"]) for name in info["subjects"])
    assert info["model_digest"] == json.loads((finished / "harden.json").read_text())["model_digest"]
    done = run("--report-to", "nobody", "--overwrite")
    assert done.code == 2 and "there is no such tracker" in done.err


def test_a_complete_run_is_not_run_again(run, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    before = everything_in(tmp_path / "out")
    monkeypatch.setattr(METHODS["apdm"], "run", None)
    done = run("--resume", "--json")
    assert done.code == 0
    assert json.loads(done.out) == json.loads((finished / "harden.json").read_text())
    assert "complete already" in done.err
    assert everything_in(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--set", "method.params.outer_steps=4"], "params.outer_steps"),
        (["--set", "sampling.steps=3", "--seed", "1"], "sampling.steps, seed"),
    ],
)
def test_resume_with_other_settings_is_refused(run, finished, tmp_path, options, changed):
    shutil.copytree(finished, tmp_path / "out")
    before = everything_in(tmp_path / "out")
    refused(run("--resume", *options), f"({changed})", "--overwrite")
    assert everything_in(tmp_path / "out") == before


def test_resume_with_another_base_or_registry_is_refused(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    registry = write_registry(tmp_path / "other", seed=50)
    refused(run("--resume", "--subjects", registry), "(registry_digest)")
    base = make_checkpoint(tmp_path / "base", "v_prediction", seed=1)
    refused(run("--resume", "--base", base), "(base, base_digest)")


# --- the output folder -----------------------------------------------------------------------------------------------


def test_an_existing_output_is_left_alone(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    before = everything_in(tmp_path / "out")
    refused(run(), tmp_path / "out", "--resume", "--overwrite")
    assert everything_in(tmp_path / "out") == before


@pytest.mark.parametrize("file", ["notes.txt", "settings.json", "harden.json"])
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_folder_of_somebody_else_is_neither_overwritten_nor_written_into(run, tmp_path, file, flag):
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out" / file).write_text('{"colour": "blue"}')
    before = everything_in(tmp_path)
    refused(run(flag), "not made by guardsmith", flag)
    assert everything_in(tmp_path) == before


def test_overwrite_starts_anew_and_keeps_what_guardsmith_did_not_write(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/verify").mkdir()
    assert run("--overwrite", "--seed", "1").code == 0
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert not (tmp_path / "out/verify").exists()
    info = json.loads((tmp_path / "out/harden.json").read_text())
    assert info["seed"] == 1
    assert info["model_digest"] == weights_digest(tmp_path / "out/model")
    assert info["model_digest"] != weights_digest(finished / "model")


def test_the_output_is_a_file(run, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(run("--overwrite"), "is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_base_is_not_overwritten_by_its_own_hardening(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    before = everything_in(tmp_path / "out")
    refused(run("--overwrite", "--base", tmp_path / "out/model"), "another folder")
    assert everything_in(tmp_path / "out") == before


def test_the_output_is_not_put_into_the_base(guardsmith, recipe, v_folder):
    before = everything_in(v_folder)
    refused(guardsmith("harden", "--recipe", recipe, "--output", v_folder / "out"), "inside of the base")
    assert everything_in(v_folder) == before


@pytest.mark.parametrize("where", ["mkdir", "write_text"])
def test_an_output_that_cannot_be_written_to(run, tmp_path, monkeypatch, where):
    def denied(self, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, where, denied)
    refused(run(), tmp_path / "out", "cannot be written to", "Permission denied", "another folder")
    assert leftovers(tmp_path) == []


class SafetensorError(Exception):
    """What safetensors raises instead of an OSError."""


FULL = [
    OSError(errno.ENOSPC, "No space left on device", "x"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_at_the_end_leaves_no_half_model_and_can_be_resumed(run, finished, tmp_path, error):
    def full(self, folder, **options):
        (Path(folder) / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "save_pretrained", full)
        done = run()
    assert done.code == 4
    assert "no space left" in done.sentences[-1]
    assert not (tmp_path / "out/model").exists()
    assert not (tmp_path / "out/harden.json").exists()
    assert leftovers(tmp_path) == []

    assert run("--resume").code == 0
    assert weights_digest(tmp_path / "out/model") == weights_digest(finished / "model")


def test_a_full_disk_at_the_start_leaves_no_half_cache(run, tmp_path, monkeypatch):
    def full(tensors, file):
        Path(file).write_bytes(b"half")
        raise FULL[1]

    monkeypatch.setattr(drawing, "save_file", full)
    done = run()
    assert done.code == 4
    assert "no space left" in done.sentences[-1]
    assert sorted(file.name for file in (tmp_path / "out").rglob("*")) == ["cache", "settings.json"]


def test_a_full_disk_before_anything_is_written(run, tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        raise FULL[0]

    monkeypatch.setattr(Path, "write_text", full)
    done = run()
    assert done.code == 4
    assert "no space left" in done.err
    assert leftovers(tmp_path) == []


# --- training that goes wrong ----------------------------------------------------------------------------------------


def test_a_diverged_training_keeps_its_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["apdm"], "checkpoint_every", 1)
    done = run("--set", "method.params.learning_rate=1e12")
    assert done.code == 4
    assert "diverged at step 2" in done.sentences[-1]
    assert "lower the learning rate" in done.sentences[-1]
    assert (tmp_path / "out/checkpoints/last.safetensors").is_file()
    assert not (tmp_path / "out/model").exists()
    assert not (tmp_path / "out/harden.json").exists()
    assert leftovers(tmp_path) == []


def test_a_training_that_changes_nothing_is_not_passed_off_as_a_hardened_model(run, tmp_path):
    done = run("--set", "method.params.learning_rate=1e-60", "--set", "method.params.outer_steps=1")
    assert done.code == 2
    assert "learning rate is too small" in done.sentences[-1]
    assert not (tmp_path / "out/model").exists()
    assert not (tmp_path / "out/harden.json").exists()


# --- the base --------------------------------------------------------------------------------------------------------


def nothing_inside(folder):
    folder.mkdir()
    (folder / "readme.txt").write_text("no model here")


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("folder", nothing_inside, "not a diffusion model"),
        ("model.ckpt", lambda file: file.write_bytes(b"pickle"), "safetensors"),
        ("not-there.bin", lambda file: None, "safetensors"),
        ("model.safetensors", lambda file: file.write_bytes(b"x"), "is a single file"),
        ("nowhere", lambda file: None, "no base model"),
    ],
)
def test_a_base_that_is_none(run, tmp_path, name, make, words):
    make(tmp_path / name)
    refused(run("--base", tmp_path / name), tmp_path / name, words)
    assert not (tmp_path / "out").exists()


def test_the_output_of_a_run_is_not_a_base_but_holds_one(run, finished, tmp_path):
    refused(run("--base", finished), finished / "model")
    assert not (tmp_path / "out").exists()


def test_a_hub_model_without_a_connection(run, tmp_path):
    done = run("--base", "guardsmith-tests/not-there")
    assert done.code == 4
    assert len(done.sentences) == 1
    assert "guardsmith-tests/not-there" in done.err
    assert "cannot be reached" in done.err
    assert not (tmp_path / "out").exists()


def test_an_identifier_that_the_tokenizer_drops(run, tmp_path):
    refused(run("--set", "method.params.identifiers=[sks, ' ']"), "the identifier ' ' has no token")
    assert not (tmp_path / "out").exists()


# --- the registry ----------------------------------------------------------------------------------------------------


def test_expired_consent_is_refused_before_anything_is_written(run, recipe, tmp_path):
    refused(run("--today", "2099-01-02"), recipe.parent / "R.yaml", "expired on 2099-01-01")
    assert not (tmp_path / "out").exists()


def test_a_registry_that_does_not_exist(run, tmp_path):
    refused(run("--subjects", tmp_path / "nobody.yaml"), tmp_path / "nobody.yaml", "does not exist")
    assert not (tmp_path / "out").exists()


def test_no_registry_at_all(run, tmp_path):
    refused(run("--set", "subjects=null"), "--subjects")
    assert not (tmp_path / "out").exists()


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "metod.name=apdm"], ["'metod'", "did you mean 'method'?"]),
        (["--set", "method.parms.beta=2"], ["'method.parms'", "did you mean 'params'?"]),
        (["--set", "colour=blue"], ["'colour' is not a known key"]),
        (["--method", "apmd"], ["no method 'apmd'", "did you mean 'apdm'?"]),
        (["--method", "xyz"], ["no method 'xyz'", "there is: apdm"]),
        (["--set", "verify.attacks.x.name=dreamboth"], ["verify.attacks.x", "did you mean 'dreambooth'?"]),
        (["--set", "verify.attacks.x.params.rank=4"], ["verify.attacks.x.name", "required"]),
        (["--set", "method.params.outer_step=3"], ["'method.params.outer_step'", "did you mean 'outer_steps'?"]),
        (["--set", "method.params.outer_steps=many"], ["method.params", "outer_steps", "integer", "'many'"]),
        (["--set", "method.params.learning_rate=0"], ["learning_rate", "greater than 0"]),
        (["--set", "method.params=3"], ["method.params", "dictionary"]),
        (["--set", "method=apdm"], ["method", "found 'apdm'"]),
        (["--set", "verify.attacks.dreambooth.params.steps=-1"], ["verify.attacks.dreambooth.params", "steps"]),
        (["--set", "sampling.steps=1"], ["sampling.steps", "greater than or equal to 2"]),
        (["--set", "seed"], ["--set seed", "key=value"]),
        (["--set", "=1"], ["--set =1", "key=value"]),
        (["--set", "base.more=1"], ["--set base.more=1", "'base' is not a section"]),
        (["--set", "seed=[1"], ["--set seed=", "'[1'", "YAML"]),
    ],
)
def test_a_wrong_value_of_the_recipe(run, tmp_path, options, words):
    refused(run(*options), *words)
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_recipe_are_told_at_once(guardsmith, tmp_path):
    (tmp_path / "bad.yaml").write_text("""\
subject: R.yaml
method: {name: apmd}
sampling: {steps: 0}
verify:
  attacks:
    one: {name: lora, params: {ranks: 4}}
    two: {name: dreamboth}
""")
    changes = ["--set", "seed", "--set", "gate.kid_ratio=-1"]
    done = guardsmith("harden", "--recipe", tmp_path / "bad.yaml", "--output", tmp_path / "out", *changes)
    assert done.code == 2
    told = ["--set seed", "'subject'", "sampling.steps", "gate.kid_ratio", "'apmd'", ".params.ranks'", "'dreamboth'"]
    assert len(done.sentences) == len(told)
    for word in told:
        assert sum(word in sentence for sentence in done.sentences) == 1, word
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("base: [", "not valid YAML"), ("", "mapping"), ("- base", "mapping"), ("b\xe4se: x".encode("latin-1"), "UTF-8")],
)
def test_a_file_that_is_no_recipe(guardsmith, tmp_path, text, words):
    (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(guardsmith("harden", "--recipe", tmp_path / "bad.yaml"), tmp_path / "bad.yaml", words)


def test_an_unknown_recipe(guardsmith):
    refused(guardsmith("harden", "--recipe", "demoo"), "no recipe 'demoo'", "did you mean 'demo'?")
    refused(guardsmith("harden", "--recipe", "xyz"), "no recipe 'xyz'", "demo")
    refused(guardsmith("run", "demoo"), "did you mean 'demo'?")


# --- dry run, lists, verify ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--set", "method.params.distillation_weight=0.5", "--set", "method.params.benign_images=4"],
        [
            "--set",
            "method.params={batch_size: 2, outer_steps: 1, inner_steps: 3, class_images: 4, learning_rate: 0.01}",
        ],
    ],
)
def test_a_dry_run_writes_nothing_and_tells_the_cost_of_the_real_one(run, tmp_path, options):
    done = run("--dry-run", "--json", *options)
    assert done.code == 0
    plan = json.loads(done.out)
    assert list(tmp_path.iterdir()) == []
    assert (plan["subjects"], plan["controls"], plan["method"]) == (["mira"], ["tom"], "apdm")

    assert run(*options).code == 0
    info = json.loads((tmp_path / "out/harden.json").read_text())
    assert plan["unet_forward_equivalents"] == info["unet_forward_equivalents"]
    assert plan["params"] == info["params"]


@pytest.mark.parametrize("command", [["harden", "--recipe", "demo"], ["run", "demo"]])
def test_bystanders_that_are_not_there_are_refused(guardsmith, tmp_path, command):
    done = guardsmith(*command, "--output", tmp_path / "out", "--negatives", "nobody")
    refused(done, "negatives: there is no folder", "nobody")
    assert not (tmp_path / "out").exists()


def test_persguard_gets_pictures_of_what_appears_instead(recipe, tmp_path):
    asked = yaml.safe_load(recipe.read_text())
    params = {"steps": 2, "batch_size": 1, "class_images": 3, "backdoor": "target", "target_noun": "rabbit"}
    asked["method"] = {"name": "persguard", "params": params}
    chosen = recipe.with_name("persguard.yaml")
    chosen.write_text(yaml.safe_dump(asked))
    info = harden_quietly(chosen, tmp_path / "out")
    (file,) = (tmp_path / "out/cache").glob("instead-*.safetensors")
    model = load_model(asked["base"])
    sampling, first = load_recipe(str(chosen), ()).sampling, HARDENING_REPLACEMENT.start
    expected = drawn_by(model, sampling, ["a photo of rabbit"] * 3, first, None, "")
    assert torch.equal(load_file(file)["images"], expected)
    assert (info["method"], len(info["history"])) == ("persguard", 2)
    assert info["unet_forward_equivalents"] == METHODS["persguard"].cost(
        METHODS["persguard"].config(**params), ["person"]
    )


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], "tripwire"),
        (["--method", "apdm"], "apdm"),
        (["--method", "persguard"], "persguard"),
        (["--method", "imma"], "imma"),
    ],
)
def test_without_a_recipe_the_method_chooses_one_for_the_embedded_base(guardsmith, tmp_path, flags, method):
    registry = Path(__file__).parent.parent / "registries" / "demo.yaml"
    done = guardsmith("harden", "--subjects", registry, "--dry-run", "--json", "--output", tmp_path / "out", *flags)
    assert done.code == 0
    plan = json.loads(done.out)
    assert (plan["base"], plan["method"]) == ("builtin:avatar", method)
    assert plan["params"].keys() == METHODS[method].config.model_fields.keys()


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", ["apdm", "imma", "persguard", "tripwire"]),
        ("attacks", ["adversarial_prompt", "custom_diffusion", "dreambooth", "lora", "textual_inversion"]),
        ("recipes", ["apdm-sd15", "demo", "imma-sd21", "persguard-sd21-base", "tripwire-sd15"]),
    ],
)
def test_lists(guardsmith, what, names):
    done = guardsmith("list", what)
    assert done.code == 0
    assert {line.split("\t")[0] for line in done.out.strip().split("\n")} >= {*names}


def test_an_unknown_list(guardsmith):
    refused(guardsmith("list", "models"), "'models'", "cloaks, purifiers or recipes")


@pytest.mark.parametrize("method", [method for method in METHODS if f"{method}-sd21" in recipe_names()])
def test_without_a_recipe_the_method_chooses_one_for_stable_diffusion(guardsmith, wide_folder, tmp_path, method):
    registry = write_registry(tmp_path / "registry", seed=1)
    flags = ("--base", wide_folder, "--method", method, "--dry-run", "--json", "--output", tmp_path / "out")
    done = guardsmith("harden", "--subjects", registry, *flags)
    assert done.code == 0, done.err
    asked = load_recipe(f"{method}-sd21").method
    plan = json.loads(done.out)
    assert plan["method"] == method == asked.name
    assert plan["params"] == METHODS[method].config(**asked.params).model_dump(mode="json")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_in_order(name):
    """They can be read, attack with something, and say what they cost."""
    recipe = load_recipe(name)
    assert recipe.verify.attacks
    text = (Path(__file__).parent.parent / "recipes" / f"{name}.yaml").read_text()
    method = METHODS[recipe.method.name]
    if name.endswith("-attacks"):
        return
    if text.startswith("# For cloak,"):
        assert recipe.cloaks and recipe.purifiers and recipe.defender
        return
    if text.startswith("# For verify only"):
        return
    assert "Cost" in text
    told = f"{method.cost(method.config(**recipe.method.params), ['person']):,} U-Net forward equivalents"
    assert told in " ".join(text.replace("\n#", " ").split()) or name == "demo"  # which points to what was measured


def larger_registry(folder, names=("zoe", "mira")):
    """The registry of the recipe with another subject before mira."""
    write_registry(folder, seed=1)
    (folder / "zoe").mkdir()
    for i, image in enumerate(pictures(4, seed=40)):
        to_pil(image).save(folder / "zoe" / f"{i}.png")
    (folder / "R.yaml").unlink()
    consent = {"consent_basis": "request", "reference": "T-1", "granted_on": date(2026, 1, 1)}
    for name in names:
        add_subject(folder / "R.yaml", folder / name, name, "person", "person", expires_on=date(2099, 1, 1), **consent)
    return folder / "R.yaml"


def test_a_subject_is_added_to_a_hardened_model(guardsmith, recipe, finished, tmp_path):
    """It begins where the first run ended, goes on with both, and says so; the first run stays as it is."""
    before = {file.name: file.read_bytes() for file in finished.iterdir() if file.is_file()}
    flags = ("--recipe", recipe, "--subjects", larger_registry(tmp_path), "--output", tmp_path / "out")
    tiny = ("--set", "method.params.learning_rate=1e-30", "--set", "method.params.outer_steps=1")
    done = guardsmith("harden", *flags, *tiny, "--add-to", finished)
    assert done.code == 0, done.err
    told, first = (json.loads((place / "harden.json").read_text()) for place in (tmp_path / "out", finished))
    assert told["subjects"] == ["mira", "zoe"]  # in the order of the first run, then what is new
    assert told["added_to"] == first["model_digest"]
    old, new = (load_model(str(place / "model")) for place in (finished, tmp_path / "out"))
    base = load_model(load_recipe(str(recipe)).base)
    assert largest_difference(weights(old.unet), weights(new.unet)) < 1e-6
    assert largest_difference(weights(base.unet), weights(new.unet)) > 1e-4
    assert {file.name: file.read_bytes() for file in finished.iterdir() if file.is_file()} == before


def test_what_cannot_be_added_to_is_refused(guardsmith, recipe, finished, tmp_path):
    both, without = larger_registry(tmp_path / "a"), larger_registry(tmp_path / "b", ("zoe",))

    def add(registry, *flags, to=finished):
        return guardsmith(
            "harden", "--recipe", recipe, "--subjects", registry, "--output", tmp_path / "out", "--add-to", to, *flags
        )

    refused(add(without), "protects mira", "harden again from the base, without --add-to")
    refused(add(both, to=tmp_path / "nothing"), "no finished hardening to add to")
    refused(
        add(both, "--set", "method.name=imma", "--set", "method.params={}"), "was hardened with another method (apdm)"
    )
    assert not (tmp_path / "out").exists()


def test_a_subject_is_taken_out_by_hardening_again(guardsmith, recipe, finished, tmp_path):
    """From the base, with the rest: the result knows nothing of whom it no longer names."""
    without = larger_registry(tmp_path / "a", ("zoe",))
    done = guardsmith("harden", "--recipe", recipe, "--subjects", without, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "out/harden.json").read_text())
    assert told["subjects"] == ["zoe"]
    assert "added_to" not in told


@pytest.mark.parametrize("missing", ["harden.json", "model"])
def test_verify_needs_a_finished_hardening(guardsmith, recipe, finished, tmp_path, missing):
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns(missing))
    refused(guardsmith("verify", tmp_path / "out", "--recipe", recipe), "guardsmith harden")
    refused(guardsmith("verify", tmp_path / "nothing", "--recipe", recipe), "guardsmith harden")


def test_verify_needs_the_registry_of_the_hardening(guardsmith, recipe, finished, tmp_path):
    registry = write_registry(tmp_path / "other", seed=50)
    refused(guardsmith("verify", finished, "--recipe", recipe, "--subjects", registry), registry, "digests differ")


def test_verify_refuses_a_model_that_was_changed_after_hardening(guardsmith, recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    file = tmp_path / "out/model/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1e-3
    save_file(weights, file)
    refused(guardsmith("verify", tmp_path / "out", "--recipe", recipe), "changed after hardening")


def test_verify_refuses_a_base_that_is_another_one_now(guardsmith, recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    edit_json(tmp_path / "out/harden.json", base_digest="sha256:0")
    refused(guardsmith("verify", tmp_path / "out", "--recipe", recipe), "is not the base")


def test_bystanders_reach_the_method_and_are_on_record(recipe, tmp_path, monkeypatch, run, wide_folder, wide_trunk):
    """As a folder beside the recipe or from the command line; another folder is another run."""
    for name, seed in (("others", 50), ("more", 60)):
        (recipe.parent / name).mkdir()
        for i, image in enumerate(pictures(5, seed=seed)):
            to_pil(image).save(recipe.parent / name / f"{i}.png")
    asked = yaml.safe_load(recipe.read_text()) | {"bystanders": "others", "base": str(wide_folder)}
    params = {"trunk": str(wide_trunk), "steps": 1, "positives": 2, "negatives": 4, "copies": 1, "early_steps": []}
    params |= {"class_images": 3, "benign_images": 3}
    asked["method"] = {"name": "tripwire", "params": params}
    chosen = recipe.with_name("bystanders.yaml")
    chosen.write_text(yaml.safe_dump(asked))
    seen = []
    run_method = METHODS["tripwire"].run

    def spy(context):
        seen.append(context.benign)
        return run_method(context)

    monkeypatch.setattr(METHODS["tripwire"], "run", spy)
    first = harden_quietly(chosen, tmp_path / "first")
    assert seen[0].negatives.shape == (5, 3, 64, 64)
    assert (seen[0].negatives - pictures(5, seed=50)).abs().max() < 0.02  # PNG's rounding
    done = run(
        "--recipe", str(chosen), "--bystanders", str(recipe.parent / "more"), "--output", str(tmp_path / "second")
    )
    assert done.code == 4 and "wrecked the model" in done.err  # one step of Tripwire fires on everything
    second = json.loads((tmp_path / "second/harden.json").read_text())
    assert first["bystanders_digest"] != second["bystanders_digest"]
    assert first["model_digest"] != second["model_digest"]
    for place in ("nowhere", "parquet:nowhere.parquet"):
        done = run("--recipe", str(chosen), "--bystanders", place, "--output", str(tmp_path / "third"))
        assert done.code == 2
        assert "negatives: " in done.err and "nowhere" in done.err
        assert not (tmp_path / "third").exists()


def test_a_second_run_into_the_same_folder_is_refused(recipe, tmp_path, run):
    output = tmp_path / "out"
    asked = ("--recipe", str(recipe), "--output", str(output))
    seen = []

    def another(step, losses):
        if not seen:
            for flag in ("--resume", "--overwrite"):
                seen.append(run(*asked, flag))

    with pytest.MonkeyPatch.context() as patch:
        run_method = METHODS["apdm"].run

        def run_both(context):
            def on_step(step, losses):
                another(step, losses)
                context.on_step(step, losses)

            return run_method(replace(context, on_step=on_step))

        patch.setattr(METHODS["apdm"], "run", run_both)
        first = run(*asked)
    assert first.code == 0, first.err
    assert [done.code for done in seen] == [2, 2]
    assert all("another run is writing into" in done.err for done in seen)
    assert not (output / ".lock").exists()
    assert run(*asked, "--resume").code == 0, "it is free again, and complete"


def test_what_cannot_be_saved_is_known_before_the_first_step(run, recipe, tmp_path, monkeypatch):
    """Trial: no picture is drawn and no step taken, one sentence, nothing half-written."""
    monkeypatch.setattr(harden_module, "subject_data", lambda *_, **__: pytest.fail("it began"))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr(UNet2DConditionModel, "save_pretrained", read_only)
        refused(run(), "no permission")
    with monkeypatch.context() as broken:
        broken.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: {}["no such class"])
        refused(run("--overwrite"), "diffusers cannot open")
    assert leftovers(tmp_path / "out") == []
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "model.trial").exists()


def test_the_record_says_what_is_in_the_model_and_what_is_not(v_folder, recipe, guardsmith, tmp_path):
    base = shutil.copytree(v_folder, tmp_path / "base")
    (base / "v1.ckpt").write_bytes(b"x")
    half = {name: value.half() for name, value in load_file(base / "vae/diffusion_pytorch_model.safetensors").items()}
    save_file(half, base / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    edit_json(base / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    done = guardsmith("harden", "--recipe", recipe, "--output", tmp_path / "out", "--base", base)
    assert done.code == 0, done.err
    info = json.loads((tmp_path / "out" / "harden.json").read_text())
    assert info["left_out"] == ["v1.ckpt"] and info["nulled"] == {"safety_checker": "absent"}
    assert info["precision"] == {"unet": "float32", "vae": "float16", "text_encoder": "float32"}
    files = {name: file for name, (file, _) in everything_in(tmp_path / "out" / "model").items()}
    assert info["files"] == {name: "sha256:" + hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert "v1.ckpt" in done.err and "safety_checker is null" in done.err
