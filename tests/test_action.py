"""The GitHub Action: its script is run with a guardsmith that only says what it was asked."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from guardsmith.cli import app as cli

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step.get("name", step.get("uses")): step for step in ACTION["runs"]["steps"]}
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > asked
if [ "$CODE" != 2 ] && [ "$CODE" != 4 ]; then mkdir -p "$2/verify"; echo "what was found" > "$2/verify/report.md"; fi
exit "$CODE"
"""


def verified(tmp_path, code, **inputs):
    """Exit code of the step, outputs, summary and what guardsmith was asked."""
    fake = tmp_path / "bin" / "guardsmith"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    step = STEPS["Verify"]
    given = {name: told.get("default", "") for name, told in ACTION["inputs"].items()} | inputs
    values = {
        key: given[re.fullmatch(r"\$\{\{ inputs\.([a-z-]+) \}\}", value)[1]] for key, value in step["env"].items()
    }
    values |= {"PATH": f"{fake.parent}:{os.environ['PATH']}", "CODE": str(code)}
    values |= {"GITHUB_OUTPUT": str(tmp_path / "outputs"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(shell, cwd=tmp_path, env=values, check=False)
    told = dict(line.split("=") for line in (tmp_path / "outputs").read_text().splitlines())
    summary = tmp_path / "summary"
    return done.returncode, told, summary.read_text() if summary.exists() else "", (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("code", "verdict"), [(0, "pass"), (1, "fail"), (3, "inconclusive"), (2, "error"), (4, "error")]
)
def test_the_verdict_is_an_output_and_the_gate_has_its_exit_code(tmp_path, code, verdict):
    status, told, summary, _ = verified(tmp_path, code, output="out", subjects="registry.yaml")
    assert status == 0, "the report has to be kept whatever it says; the last step is the gate"
    assert told == {"verdict": verdict, "exit-code": str(code)}
    assert ("what was found" in summary) == (verdict != "error")
    gate = subprocess.run(["bash", "-c", STEPS["Gate"]["run"]], env={"CODE": str(code)}, check=False)
    assert gate.returncode == code


def test_without_a_result_the_gate_is_closed():
    assert subprocess.run(["bash", "-c", STEPS["Gate"]["run"]], env={"CODE": ""}, check=False).returncode == 4
    assert "if" not in STEPS["Gate"]


def test_only_what_was_given_is_passed_on_and_nothing_is_read_as_code(tmp_path):
    trick = "a b; touch hacked; $(touch hacked)"
    _, _, _, asked = verified(tmp_path, 0, output="out", subjects=trick, model="org/name")
    assert asked.splitlines() == [
        "verify", "out", "--subjects", trick, "--recipe", "demo", "--budget", "standard", "--model", "org/name"
    ]  # fmt: skip
    assert not (tmp_path / "hacked").exists()


def test_an_old_report_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "out/verify").mkdir(parents=True)
    (tmp_path / "out/verify/report.md").write_text("old")
    (tmp_path / "out/verify/report.json").write_text("old")
    _, told, summary, _ = verified(tmp_path, 2, output="out", subjects="r.yaml")
    assert told["verdict"] == "error" and not summary
    assert not list((tmp_path / "out/verify").iterdir())


def test_the_script_uses_options_that_there_are():
    command = get_command(cli.app).commands["verify"]
    known = {name for parameter in command.params for name in parameter.opts}
    used = set(re.findall(r"(--[a-z-]+)", STEPS["Verify"]["run"]))
    assert used and used <= known
    inputs = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert inputs == set(ACTION["inputs"])
