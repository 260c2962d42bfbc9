"""Files that a run keeps: whole after a power loss, computed again where they cannot be read, and not deleted under a reader."""

import errno
import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from guardsmith.cli.app import main
from guardsmith.config.recipe import Sampling
from guardsmith.core import atomic_io
from guardsmith.core.atomic_io import read_kept, whole_file, whole_folder, write_text
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.diffusion.cache import drawn_by, drawn_with_states
from guardsmith.hardening.record import StepCosts
from guardsmith.runtime.output import lock_output
from guardsmith.training.loop import save_checkpoint

BROKEN = [b"", b"\0" * 100, b"{", b"\xff\xfe"]


@pytest.fixture
def synced(monkeypatch):
    """What was handed to fsync, in order, and what was renamed in between."""
    events = []
    names = {}
    real_open, real_fsync, real_replace = os.open, os.fsync, Path.replace

    def open_(path, *arguments, **options):
        descriptor = real_open(path, *arguments, **options)
        names[descriptor] = Path(path).name
        return descriptor

    def replace(self, target):
        events.append(("renamed", Path(target).name))
        return real_replace(self, target)

    monkeypatch.setattr(atomic_io.os, "open", open_)
    monkeypatch.setattr(atomic_io.os, "fsync", lambda descriptor: events.append(("synced", names.get(descriptor))))
    monkeypatch.setattr(Path, "replace", replace)
    del real_fsync
    return events


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, synced):
    write_text(tmp_path / "a.json", "{}")
    first, second, third = synced
    assert first[0] == "synced" and first[1].startswith(".a.json.") and first[1].endswith(".tmp")
    assert second == ("renamed", "a.json")
    assert third == ("synced", tmp_path.name), "or the name itself can be lost"


def test_checkpoints_and_folders_are_too(tmp_path, synced):
    save_checkpoint(tmp_path / "last.safetensors", {"a": torch.ones(2)}, {})
    assert [kind for kind, _ in synced] == ["synced", "renamed", "synced"]
    synced.clear()
    with whole_folder(tmp_path / "unit") as place:
        (place / "images").mkdir()
        (place / "images" / "0.png").write_bytes(b"x")
        (place / "scores.json").write_text("{}")
    renamed = synced.index(("renamed", "unit"))
    assert {name for _, name in synced[:renamed]} >= {"0.png", "scores.json", "images"}


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="space"), whole_file(tmp_path / "a") as place:
        place.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("content", BROKEN)
def test_what_cannot_be_read_is_named_and_deleted(tmp_path, capsys, content):
    file = tmp_path / "kept.json"
    file.write_bytes(content)
    assert read_kept(file, lambda path: json.loads(path.read_bytes()), "it is made again") is None
    err = capsys.readouterr().err
    assert str(file) in err.replace("\n", "") and "it is made again" in err and err.count("warning") == 1
    assert not file.exists()
    assert read_kept(file, lambda path: json.loads(path.read_bytes()), "x") is None
    assert capsys.readouterr().err == "", "what was never there is nothing to warn of"


def test_memory_that_is_short_is_no_broken_file(tmp_path):
    (tmp_path / "a").write_text("good")

    def short(path):
        raise MemoryError

    with pytest.raises(RunFailed, match="out of memory"):
        read_kept(tmp_path / "a", short, "x")
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize("content", [*BROKEN, "other"])
def test_cached_pictures_that_cannot_be_read_are_drawn_again(tiny_v, tmp_path, capsys, content):
    cache, settings = tmp_path / "class.safetensors", Sampling(steps=2)
    wanted, states = drawn_with_states(tiny_v, settings, ["a photo"] * 2, 7, cache, "x")
    if content == "other":
        save_file({"images": wanted}, cache)
    else:
        cache.write_bytes(content)
    again, same = drawn_with_states(tiny_v, settings, ["a photo"] * 2, 7, cache, "x")
    assert torch.equal(again, wanted) and torch.equal(same.latents, states.latents)
    assert "class.safetensors" in capsys.readouterr().err
    assert torch.equal(drawn_by(tiny_v, settings, ["a photo"] * 2, 7, cache, "x"), wanted)
    assert "warning" not in capsys.readouterr().err


def test_a_cut_log_of_costs_counts_what_it_has(tmp_path, capsys):
    costs = StepCosts(tmp_path / "checkpoints" / "cost.jsonl")
    for step in range(3):
        costs.add(step, 10, 5)
    assert costs.total(3) == (30, 15)
    costs.file.write_bytes(costs.file.read_bytes()[:-6] + b"\0\0\xff")
    assert costs.total(3) == (20, 10)
    assert "cost of 1 steps is not counted" in capsys.readouterr().err.replace("\n", " ")
    costs.file.unlink()
    assert costs.total(1) == (0, 0)


def test_a_verification_locks_what_it_reads(tmp_path, capsys):
    """Or `harden --overwrite` deletes it."""
    output = tmp_path / "out"
    output.mkdir()
    with ExitStack() as stack:
        lock_output(output, stack)
        errors = []

        def verify():
            from guardsmith.config.loading import load_recipe
            from guardsmith.evaluation.pipeline import verify
            from guardsmith.registry.loader import load_registry

            root = Path(__file__).parent.parent
            try:
                verify(load_registry(root / "registries" / "demo.yaml"), load_recipe("demo"), output)
            except UserError as error:
                errors.append(str(error))

        thread = threading.Thread(target=verify)
        thread.start()
        thread.join()
        assert errors and "another run is writing into" in errors[0]
    assert not (output / ".lock").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code"), [(["check", "nowhere.yaml"], 2), (["list", "recipes"], 0), (["chek"], 2)]
)
def test_an_unwritable_stderr_leaves_the_exit_code_right(arguments, code):
    """1 would mean that the gate failed."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "guardsmith", *arguments],
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=120,
            check=False,
        )
    assert done.returncode == code
    closed = subprocess.run(
        f"{sys.executable} -m guardsmith {' '.join(arguments)} 2>&-", shell=True, stdout=subprocess.PIPE, timeout=120,
        check=False,
    )  # fmt: skip
    assert closed.returncode == code


def test_progress_that_cannot_be_written_ends_no_run(monkeypatch):
    from guardsmith.core import progress

    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = isatty = lambda self: False

    def command(*_, **__):
        with progress.stage("x", 1) as bar:
            bar()
        sys.stderr.write("x\n")
        return 0

    monkeypatch.setattr("guardsmith.cli.app.app", command)
    monkeypatch.setattr(sys, "stderr", Full())
    for style in progress.STYLES:
        monkeypatch.setattr(progress, "_style", style)
        assert main([]) == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_attacks_whose_pictures_were_lost_run_again(tmp_path, capsys, monkeypatch, damage):
    from test_page import make_unit

    from guardsmith.evaluation import runs

    good, bad = make_unit(tmp_path, "mira"), make_unit(tmp_path, "nora")
    file = bad.pictures(1.0)[1]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -20])
    jobs = []
    monkeypatch.setattr(runs, "run_all", lambda function, units, **_: jobs.extend(units) or [])
    runs.run_units([good, bad])
    assert jobs == [bad]
    err = capsys.readouterr().err.replace("\n", "")
    assert err.count("warning") == 1 and "runs again" in err and "nora" in err
