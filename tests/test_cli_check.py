import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import guardsmith
from guardsmith.cli import app as cli
from guardsmith.cli.app import main
from guardsmith.core.errors import RunFailed
from guardsmith.core.images import sha256_file
from guardsmith.registry import loader as registry_module

ROOT = Path(__file__).parent.parent


def blobs(seed, size=64):
    """A smooth random picture; two seeds look nothing alike."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def photos(place, count, first):
    place.mkdir(parents=True)
    for number in range(count):
        blobs(first + number).save(place / f"{number:02}.png")
    return place


def add(folder, subject, *options, count=4, first=0):
    pictures = photos(folder / subject, count, first)
    arguments = ["registry", "add", str(pictures), "--registry", str(folder / "R.yaml"), "--id", subject]
    return main([*arguments, "--kind", "person", "--class-noun", "person", *options])


CONSENT = ["--consent-basis", "request", "--reference", "T-1", "--granted-on", "2026-01-01", "--expires", "2099-01-01"]


@pytest.fixture
def folder(tmp_path, capsys):
    assert add(tmp_path, "mira", *CONSENT, "--identifier", "sks", "--identifier", "mira v") == 0
    assert add(tmp_path, "tom", "--control", first=10) == 0
    capsys.readouterr()
    return tmp_path


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_check_prints_a_table_to_stdout_and_talk_to_stderr(folder, capsys):
    assert main(["check", str(folder / "R.yaml")]) == 0
    out, err = capsys.readouterr()
    row = next(line for line in out.split("\n") if "mira" in line)
    assert row.split() == ["mira", "person", "person", "protected", "2", "1", "1", "2099-01-01"]
    row = next(line for line in out.split("\n") if "tom" in line)
    assert row.split() == ["tom", "person", "person", "control", "0", "2", "2", "not", "needed"]
    assert "next" not in out
    assert err.strip().split("\n")[-1] == "next: guardsmith list recipes", (
        "nobody is sent to the avatar base with photographs"
    )
    assert main(["check", str(ROOT / "registries" / "demo.yaml")]) == 0
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last == f"next: guardsmith harden --subjects {ROOT / 'registries' / 'demo.yaml'}"


def alone(folder):
    """The registry of `folder` without its control."""
    text = (folder / "R.yaml").read_text()
    (folder / "alone.yaml").write_text(text[: text.index("controls:")])
    return str(folder / "alone.yaml")


@pytest.fixture
def no_negatives(monkeypatch):
    """Nothing is hardened here, and thousands of pictures take seconds to open."""
    from guardsmith.hardening import pipeline

    monkeypatch.setattr(pipeline, "load_negatives", lambda *_: (None, None))


def test_a_registry_without_controls_is_warned_of_before_the_first_step(folder, capsys, monkeypatch, no_negatives):
    """Its verification is inconclusive whatever happens: check, plan, harden and verify say so, and which rules it is."""
    from guardsmith.config.loading import load_recipe
    from guardsmith.evaluation import pipeline
    from guardsmith.gate.rules import RULES
    from guardsmith.registry.loader import NEED_CONTROLS, load_registry

    registry = alone(folder)
    said = f"{registry} has no controls: no verification with it can pass"
    assert set(NEED_CONTROLS) <= {rule.title for rule in RULES}
    assert main(["check", registry]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert f"warning: {said}" in err and all(f"'{title}'" in err for title in NEED_CONTROLS)
    assert "registry add --control" in err
    assert main(["check", registry, "--json"]) == 0
    assert [sentence for sentence in json.loads(capsys.readouterr().out)["warnings"] if said in sentence]
    for words in (["plan", "demo"], ["harden", "--recipe", "demo", "--dry-run"]):
        assert main([*words, "--subjects", registry, "--json"]) == 0
        assert [sentence for sentence in json.loads(capsys.readouterr().out)["warnings"] if said in sentence]

    def attacked(*_, **__):
        assert said in " ".join(capsys.readouterr().err.split())
        raise RunFailed("enough")

    monkeypatch.setattr(pipeline, "preflight", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "with_just_enough", lambda plan, **_: (plan, []))
    monkeypatch.setattr(pipeline, "measure", attacked)
    with pytest.raises(RunFailed, match="enough"):
        pipeline.verify(load_registry(registry), load_recipe("demo"), folder / "out")
    assert main(["check", str(folder / "R.yaml")]) == 0
    assert "has no controls" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "run"])
def test_plan_and_run_take_a_recipe_as_harden_and_verify_do(command, tmp_path, capsys):
    """By the option or as an argument, and the same either way; two different ones are refused; none is chosen as elsewhere."""
    more = ["--subjects", str(ROOT / "registries/demo.yaml"), "--json", "--output", str(tmp_path / "out")]
    more += ["--dry-run"] if command == "run" else []
    plans = []
    for words in (["apdm-avatar"], ["--recipe", "apdm-avatar"], ["apdm-avatar", "--recipe", "apdm-avatar"], []):
        assert main([command, *words, *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert [plan["method"] for plan in plans] == ["apdm", "apdm", "apdm", "tripwire"]
    assert all(plan["params"] == plans[0]["params"] for plan in plans[:3])
    assert main([command, "demo", "--recipe", "apdm-avatar", *more]) == 2
    assert "two recipes are named, demo and --recipe apdm-avatar; name one" in capsys.readouterr().err
    assert main([command, "--base", "owner/name", *more]) == 2
    assert "choose a recipe with --recipe" in capsys.readouterr().err
    assert main([command]) == 2
    assert "Usage: guardsmith" in "".join(capsys.readouterr()), "a command of hours does not begin by its name alone"


@pytest.mark.parametrize(
    ("change", "words"),
    [("two_stage=true", "two_stage needs another subject"), ("data=mixed", "data: mixed needs 3 pictures of others"),
     ("evasion=side_by_side", "side_by_side needs another subject")],
)  # fmt: skip
def test_attacks_that_need_others_are_refused_before_a_run_hardens(folder, change, words, capsys, no_negatives):
    arguments = ["--subjects", alone(folder), "--set", f"verify.attacks.lora.{change}", "--output", str(folder / "out")]
    for command in ("plan", "run"):
        assert main([command, "demo", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_hardening_alone_needs_no_others_for_attacks(folder):
    arguments = ["--subjects", alone(folder), "--set", "verify.attacks.lora.two_stage=true"]
    assert main(["harden", "--recipe", "demo", *arguments, "--output", str(folder / "out"), "--dry-run"]) == 0


def test_check_json_is_data_only(folder, capsys):
    assert main(["check", str(folder / "R.yaml"), "--json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert [subject["id"] for subject in data["subjects"]] == ["mira"]
    assert data["subjects"][0]["identifiers"] == ["sks", "mira v"]
    assert data["subjects"][0]["consent"]["expires_on"] == "2099-01-01"
    assert len(data["controls"][0]["images"]) == 4
    assert data["digest"] == registry_module.load_registry(folder / "R.yaml").digest
    assert data["warnings"] == []
    assert "next: guardsmith list recipes" in err


def test_check_warns_about_what_is_not_pinned(folder, capsys):
    photos(folder / "more", 2, first=40)
    text = (folder / "R.yaml").read_text()
    (folder / "R.yaml").write_text(text.replace("controls:", "      - {path: more, split: attack}\ncontrols:"))
    assert main(["check", str(folder / "R.yaml")]) == 0
    err = capsys.readouterr().err
    assert "warning: " in err
    assert "more is not pinned" in err


def test_expired_consent_is_exit_code_2_with_file_and_line(folder, capsys):
    assert main(["check", str(folder / "R.yaml"), "--today", "2099-01-02"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err == f"{folder / 'R.yaml'}:7: subject 'mira': consent expired on 2099-01-01: renew it or remove the subject\n"
    )


def test_problems_are_printed_whole_whatever_the_width_of_the_terminal(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = (folder / "R.yaml").read_text().replace("kind: person", "knd: '[bold]person[/bold]'")
    (folder / "R.yaml").write_text(text)
    assert main(["check", str(folder / "R.yaml")]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 2
    assert all(line.startswith(f"{folder / 'R.yaml'}:") for line in lines)
    assert "did you mean 'kind'" in lines[0]


BROKEN = {
    "yaml": lambda folder: (folder / "R.yaml").write_text("version: [1"),
    "empty": lambda folder: (folder / "R.yaml").write_text("version: 1\nsubjects: []\n"),
    "corrupt": lambda folder: (folder / "mira/00.png").write_text("x"),
    "gone": lambda folder: (folder / "mira/00.png").unlink(),
    "no registry": lambda folder: (folder / "R.yaml").unlink(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_bad_input_is_one_sentence_and_no_traceback(folder, how):
    BROKEN[how](folder)
    done = run("-m", "guardsmith", "check", "R.yaml", cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().split("\n")) == 1
    assert done.stderr.startswith("R.yaml")


def test_check_imports_nothing_heavy_and_is_quick(tmp_path):
    """The shape of the shipped registry: 12 subjects with 16 pictures each."""
    images = {}
    for number in range(12):
        photos(tmp_path / f"s{number}", 16, first=100 * number)
        splits = ["harden"] * 8 + ["attack"] * 4 + ["reference"] * 4
        images[number] = "".join(
            f"      - {{path: s{number}/{i:02}.png, sha256: "
            f"{sha256_file(tmp_path / f's{number}/{i:02}.png')}, split: {split}}}\n"
            for i, split in enumerate(splits)
        )
    consent = "    consent: {basis: request, reference: T-1, granted_on: 2026-01-01}\n"
    entries = [
        f"  - id: s{number}\n    kind: person\n    class_noun: person\n{consent}    images:\n{images[number]}"
        for number in range(12)
    ]
    text = "version: 1\nsubjects:\n" + "".join(entries[:6]) + "controls:\n" + "".join(entries[6:])
    (tmp_path / "R.yaml").write_text(text)

    program = """
import os, sys
from guardsmith.cli.app import main
code = main(["check", "R.yaml"])
heavy = {"torch", "diffusers", "transformers", "datasets", "scipy", "imagehash", "peft", "accelerate"}
print("loaded:", sorted(heavy & set(sys.modules)), file=sys.stderr)
print("seconds:", os.times().user, file=sys.stderr)
sys.exit(code)
"""
    seconds = []
    for _ in range(3):  # the fastest counts: other work on the machine slows single runs down
        done = run("-c", program, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "loaded: []" in done.stderr
        seconds.append(float(done.stderr.rsplit("seconds:", 1)[1]))
    assert min(seconds) < 1.5


NETWORKS = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "datasets",
    "pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "jinja2", "asyncio",
)  # fmt: skip
"""What no command needs that only reads files and prints; together they take seconds to import."""
DATA = ("numpy", "PIL", "pydantic", "yaml", "rich")
REPORTS = [str(ROOT / "docs" / "results" / f"{name}.json") for name in ("demo-report", "demo-longer-report")]


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["--help"], NETWORKS + DATA),
        (["check", str(ROOT / "registries" / "demo.yaml")], NETWORKS),
        (["registry", "schema"], NETWORKS),
        (["report", "schema"], NETWORKS),
        (["policy"], NETWORKS),
        (["compare", *REPORTS], NETWORKS),
        (["compare", "--changes", *REPORTS], NETWORKS),
    ],
    ids=["help", "check", "registry-schema", "report-schema", "policy", "compare", "changes"],
)
def test_commands_that_only_read_files_import_no_networks(arguments, unneeded):
    program = (
        f"import json, sys; from guardsmith.cli.app import main; code = main({arguments!r})\n"
        f"print(json.dumps([code, sorted(set({unneeded!r}) & {{*sys.modules}})]), file=sys.stderr)"
    )
    done = run("-c", program)
    assert json.loads(done.stderr.strip().split("\n")[-1]) == [0, []], done.stderr
    assert done.stdout, "it did what it is for"


def test_version_and_names_of_recipes_are_light():
    """The shell completes the latter."""
    program = (
        "import sys; from guardsmith.cli.app import main; main(['--version']); main(['list', 'recipes'])\n"
        "print({'torch', 'numpy'} & {*sys.modules})"
    )
    lines = run("-c", program).stdout.splitlines()
    assert lines[0] == f"guardsmith {guardsmith.__version__}" and lines[-1] == "set()"
    assert len(lines) > 10, "the recipes"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["chek"], "chek"),
        (["check"], "R.yaml"),
        (["check", "a.yaml", "--nonsense"], "--nonsense"),
        (["check", "a.yaml", "--today", "tomorrow"], "tomorrow"),
        (["registry", "add", "x"], "--registry"),
    ],
)
def test_wrong_usage(arguments, word, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert word in err
    assert "--help`" in err
    assert len(err.strip().split("\n")) == 1


@pytest.mark.parametrize(("processes", "handler"), [("1", signal.default_int_handler), ("2", signal.SIG_DFL)])
def test_sigterm_interrupts_except_processes_of_a_launcher(monkeypatch, processes, handler):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(cli, "app", lambda **_: seen.append(signal.getsignal(signal.SIGTERM)))
    assert main(["check"]) == 0
    assert seen == [handler]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("arguments", [[], ["registry"]])
def test_no_command_prints_help(arguments, capsys):
    assert main(arguments) == 2
    assert "Usage: guardsmith" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RunFailed("the training diverged"), 4, ["the training diverged"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (OSError(errno.ENOSPC, "No space left on device", "/out/model"), 4, ["no space left", "/out/model"]),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, ["no permission", "/out"]),
        (OSError(errno.EROFS, "Read-only file system", "/out"), 2, ["/out"]),
        (MemoryError(), 4, ["out of memory"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 4, ["out of memory:", "--resume"]),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
            4,
            ["out of memory:", "smaller batch"],
        ),
        (ZeroDivisionError("division by zero"), 4, ["division by zero", "bug", "GUARDSMITH_DEBUG=1"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 4, ["bug"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 4, []),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(monkeypatch, capsys, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(registry_module, "load_registry", fail)
    monkeypatch.delenv("GUARDSMITH_DEBUG", raising=False)
    # Typer wraps the standard streams for a broken pipe.
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert main(["check", "R.yaml"]) == code
    err = capsys.readouterr().err
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert len(err.strip().split("\n")) == 1


def test_debug_shows_the_traceback(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(registry_module, "load_registry", fail)
    monkeypatch.setenv("GUARDSMITH_DEBUG", "1")
    assert main(["check", "R.yaml"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_add_says_what_it_did_and_what_comes_next(tmp_path, capsys):
    assert add(tmp_path, "mira", *CONSENT, "--ratio", "1:1:2") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 harden, 1 attack, 2 reference" in err
    assert err.strip().split("\n")[-1] == f"next: guardsmith check {tmp_path / 'R.yaml'}"


@pytest.mark.parametrize("ratio", ["1:1", "a:b:c", "-1:1:1", "1:nan:1", "1:inf:1"])
def test_add_refuses_a_wrong_ratio(tmp_path, capsys, ratio):
    assert add(tmp_path, "mira", *CONSENT, f"--ratio={ratio}") == 2
    assert "harden:attack:reference" in capsys.readouterr().err
    assert not (tmp_path / "R.yaml").exists()


def test_add_without_consent_is_refused_and_writes_nothing(tmp_path, capsys):
    assert add(tmp_path, "mira") == 2
    assert "needs a consent" in capsys.readouterr().err
    assert not (tmp_path / "R.yaml").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_add_to_a_read_only_folder(tmp_path, capsys):
    photos(tmp_path / "p", 4, first=0)
    place = tmp_path / "locked"
    place.mkdir()
    place.chmod(0o555)
    arguments = ["registry", "add", str(tmp_path / "p"), "--registry", str(place / "R.yaml"), "--id", "a"]
    assert main([*arguments, "--kind", "person", "--class-noun", "person", *CONSENT]) == 2
    assert "permission" in capsys.readouterr().err


def test_schema_goes_to_stdout_or_to_a_file(tmp_path, capsys):
    assert main(["registry", "schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == registry_module.json_schema()
    assert main(["registry", "schema", "--output", str(tmp_path / "s.json")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "s.json").read_text() == printed
    assert (Path(__file__).parent.parent / "registries/schema.json").read_text() == printed
