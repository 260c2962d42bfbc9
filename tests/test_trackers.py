"""Progress for machines, and losses to trackers."""

import io
import json
from typing import ClassVar

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from rich.console import Console
from tiny import assert_one_sentence

from guardsmith.cli import app as cli
from guardsmith.core import progress
from guardsmith.core.errors import UserError
from guardsmith.training.trackers import check_trackers, tracked


@pytest.fixture
def usual():
    yield
    progress.show_as("auto")


def test_progress_in_json_lines(usual, capsys):
    progress.show_as("json")
    with progress.stage("hardening", 3) as bar:
        for _ in range(3):
            bar({"loss": 0.25})
    [line] = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told.pop("seconds") >= 0
    assert told == {"stage": "hardening", "done": 3, "total": 3, "shown": {"loss": 0.25}}


def test_on_a_narrow_terminal_the_losses_give_way_and_stages_may_nest(monkeypatch):
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), width=80, force_terminal=True))
    with progress.stage("hardening (tripwire)", 240) as bar:
        bar(dict.fromkeys(("missed", "false", "distillation", "gradient_norm"), 1.2345), done=100)
        with progress.stage("first read-outs", 13) as inner:
            inner()
    shown = progress.console.file.getvalue()
    assert any(
        all(part in line for part in ("hardening (tripwire)", "100/240", "left", "…")) for line in shown.splitlines()
    )
    assert "1/13" in shown


def test_the_style_is_chosen_on_the_command_line(usual, capsys):
    assert cli.main(["--progress", "json", "list", "methods"]) == 0
    assert progress._style == "json"
    assert cli.main(["--progress", "loud", "list", "methods"]) == 2
    assert "choose auto, lines, json" in capsys.readouterr().err


class Told(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory = "told", True
    runs: ClassVar = []

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.run = {"name": run_name, "place": logging_dir, "rows": [], "ended": False}
        Told.runs.append(self.run)

    @property
    def tracker(self):
        return self.run

    def store_init_configuration(self, values):
        self.run["settings"] = values

    def log(self, values, step=None):
        self.run["rows"].append((step, values))

    def finish(self):
        self.run["ended"] = True


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "told", Told)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["told"])
    Told.runs = []
    return Told.runs


def test_losses_go_to_trackers(told, tmp_path):
    check_trackers(["told"])
    with tracked(["told"], tmp_path / "out", {"seed": 1}) as report:
        report(0, {"loss": 0.5})
        report(1, {"loss": 0.25})
    [run] = told
    assert run == {"name": "out", "place": tmp_path / "out" / "logs", "settings": {"seed": 1}, "ended": True,
                   "rows": [(0, {"loss": 0.5}), (1, {"loss": 0.25})]}  # fmt: skip
    with pytest.raises(RuntimeError, match="stop"), tracked(["told"], tmp_path, {}):
        raise RuntimeError("stop")
    assert told[1]["ended"], "a run that fails closes its trackers"
    with tracked([], tmp_path, {}) as report:
        report(0, {"loss": 0.5})


def test_unknown_and_missing_trackers_are_one_sentence(told):
    for name, said in (("tensorbord", "there is no such tracker"), ("wandb", "pip install wandb")):
        with pytest.raises(UserError, match=said) as caught:
            check_trackers([name])
        assert_one_sentence(caught.value)
