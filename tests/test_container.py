"""The Dockerfile, as far as it can be judged without an engine: what it lets in, needs, refuses and starts."""

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest

from guardsmith.cli import app as cli
from guardsmith.config.shipped import recipe_names

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXT = (ROOT / "Dockerfile").read_text()
LINES = [line for line in re.sub(r"\s*\\\n\s*", " ", TEXT).split("\n") if line and not line.startswith("#")]
MOUNTED = "/source/"


def lines_of(instruction):
    return [line.removeprefix(instruction).strip() for line in LINES if line.startswith(f"{instruction} ")]


def let_in(name):
    """Whether .dockerignore lets a file into the build: the last line that fits it or a folder above it decides."""
    path, result = PurePosixPath(name), True
    for line in (ROOT / ".dockerignore").read_text().split("\n"):
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        if pattern.startswith("**/"):
            fits = any(fnmatchcase(part, pattern[3:]) for part in path.parts)
        else:
            above = [path, *path.parents][:-1]
            fits = any(len(part.parts) == pattern.count("/") + 1 and fnmatchcase(str(part), pattern) for part in above)
        result = line.startswith("!") if fits else result
    return result


def test_the_build_gets_what_the_package_is_built_of():
    project, built = PROJECT["project"], PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = ["pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]]
    needed += [*built["force-include"], PROJECT["tool"]["hatch"]["version"]["path"]]
    for name in (*built["packages"], "registries"):
        files = (path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        needed += [path.relative_to(ROOT).as_posix() for path in files]
    assert len(needed) > 100
    assert [name for name in needed if not (ROOT / name).exists() or not (let_in(name) or (ROOT / name).is_dir())] == []


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        ".env",
        "guardsmith/.env",
        "registries/avatars/.DS_Store",
        "recipes/.hidden.yaml",
        "guardsmith/cli/__pycache__/app.pyc",
        "recipes/avatar-base/render.mjs",
        "tests/tiny.py",
        "docs/index.md",
        "out/model/model_index.json",
    ],
)
def test_nothing_else_gets_in(name):
    assert not let_in(name)


def test_what_is_mounted_exists_and_gets_in():
    files = re.findall(r"--mount=type=bind,source=(\S+?),target=(\S+)", TEXT)
    assert {name for name, _ in files} == {"constraints.txt", "pyproject.toml"}
    assert all((ROOT / name).exists() and let_in(name) and target == MOUNTED + name for name, target in files)


def test_dependencies_are_installed_before_the_code_is_seen():
    """So that a change of the code leaves their layers as they are; and the code is in one layer alone."""
    assert not lines_of("COPY") and not lines_of("ADD")
    steps = lines_of("RUN")
    assert [index for index, step in enumerate(steps) if "type=bind,target=" in step] == [len(steps) - 1]
    assert all("constraint" in step.lower() for step in steps if "pip install" in step)


def test_the_dependencies_are_the_package_s():
    (code,) = re.findall(r"python -c '([^']+)'", TEXT)
    code = code.replace(MOUNTED, f"{ROOT.as_posix()}/")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == PROJECT["project"]["dependencies"]


@pytest.mark.skipif(sys.platform == "win32", reason="no sh")
@pytest.mark.parametrize(
    ("device", "code", "said"),
    [
        ("cpu", 0, "https://download.pytorch.org/whl/cpu"),
        ("cuda", 0, "https://pypi.org/simple"),
        ("rocm", 1, "cpu or cuda"),
    ],
)
def test_the_device_chooses_where_torch_comes_from(device, code, said):
    (choice,) = re.findall(r"case .*? esac", " ".join(lines_of("RUN")))
    done = subprocess.run(
        ["sh", "-c", f'{choice} && echo "$index"'], capture_output=True, text=True, env={"DEVICE": device}
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True)


def test_the_container_starts_the_demo_as_a_user_without_rights(capsys):
    """The first process is guardsmith itself, without a shell that would keep signals from it."""
    (entry,), (command,) = lines_of("ENTRYPOINT"), lines_of("CMD")
    assert json.loads(entry) == [PROJECT["project"]["name"]]
    assert lines_of("USER") == ["1000"]
    name, recipe, *options = json.loads(command)
    assert (name, options) == ("run", ["--output", "out/demo"])
    assert recipe in recipe_names()
    assert cli.main([name, recipe, *options, "--help"]) == 0, "options that there are"
    assert "--output" in capsys.readouterr().out


def test_the_page_about_installing_shows_the_same_commands():
    shown = (ROOT / "docs/how-to/install.md").read_text()
    commands = [line[1:].split("  ")[1].strip() for line in TEXT.split("\n") if line.startswith("#   docker ")]
    assert len(commands) == 3
    assert [command for command in commands if f"$ {command}\n" not in shown] == []
