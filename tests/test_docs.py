"""The documentation: its links, its generated pages, and the commands and outputs that it shows."""

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from guardsmith.cli import app as cli
from guardsmith.config.shipped import recipe_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "recipes" / "avatar-base" / "README.md"], key=lambda page: page.as_posix()
)  # fmt: skip
sys.path.insert(0, str(DOCS))
import generate  # noqa: E402


def name_of(page):
    return page.relative_to(ROOT).as_posix()


# Links


def links(page):
    """Targets of the links and pictures of a page."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                yield str(target)


def anchors(page):
    """Names that a link to a page can end in, as GitHub and MkDocs make them of headings."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    for before, token in itertools.pairwise(tokens):
        if before.type == "heading_open":
            text = "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))
            yield re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (target.suffix == ".md" and anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_links_of_the_site_stay_inside_of_it():
    """What is outside of docs/ is not on the site: name the file instead of linking to it."""
    outside = [
        (name_of(page), link)
        for page in PAGES
        if page.is_relative_to(DOCS)
        for link in links(page)
        if not re.match(r"[a-z]+:|#", link) and not (page.parent / link).resolve().is_relative_to(DOCS)
    ]
    assert not outside


def test_the_check_of_links_sees_broken_ones(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c: d\n\n[x](other.md) ![y](z.png)\n\n| a |\n|---|\n| [t](in-table.md) |\n")
    assert list(links(page)) == ["other.md", "z.png", "in-table.md"]
    assert list(anchors(page)) == ["a-b-c-d"]


def test_every_page_stands_in_the_navigation():
    def pages(node):
        if isinstance(node, str):
            return [node]
        return [page for part in (node.values() if isinstance(node, dict) else node) for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_code_and_recipes_name_pages_that_exist():
    files = [
        *(ROOT / "guardsmith").rglob("*.py"),
        *(ROOT / "recipes").glob("*.yaml"),
        *(ROOT / "recipes").glob("*/*.py"),
    ]
    named = {
        (name_of(file), place)
        for file in files
        for place in re.findall(
            r"\bdocs/[\w./-]+\.(?:md|json|html|yaml|png|jpg|svg)\b", file.read_text(encoding="utf-8")
        )
        # but what a script says that it writes, which may be for others to run
        if not (file.suffix == ".py" and file.is_relative_to(ROOT / "recipes") and place.startswith("docs/results/"))
    }
    assert len(named) > 10
    assert not [(file, place) for file, place in sorted(named) if not (ROOT / place).exists()]


# Generated pages


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_current(name):
    page = generate.REFERENCE / name
    assert page.read_text(encoding="utf-8") == generate.page(name), "run: python docs/generate.py"


def test_the_reference_has_every_command_and_parameter():
    text = (generate.REFERENCE / "cli.md").read_text()
    commands = [info.name or info.callback.__name__ for info in cli.app.registered_commands]
    assert len(commands) > 10
    assert not [name for name in commands if f"## `guardsmith {name.replace('_', '-')}`" not in text]
    assert "`guardsmith registry add`" in text
    keys = (generate.REFERENCE / "recipe.md").read_text()
    assert "| `learning_rate` | number, above 0 |" in keys
    assert all(f"| `{name}` | " in keys for name in recipe_names())


def test_keys_have_a_meaning():
    """A field of a recipe, registry or report without a docstring leaves its row empty."""
    empty = [
        (name, line)
        for name in ("registry.md", "recipe.md", "report.md")
        for line in (generate.REFERENCE / name).read_text().split("\n")
        if line.startswith("| `") and line.endswith("|  |")
    ]
    assert not empty


# What the pages show

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_a_landing_page():
    assert len(README.split("\n")) <= 150
    first, second = re.findall(r"^(make \w+) ", README, flags=re.MULTILINE)[:2]
    assert (first, second) == ("make demo", "make test")
    for target in ("demo", "test", "docs"):
        assert re.search(rf"^{target}: setup$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_table_of_the_readme_is_what_the_demo_printed(capsys):
    from guardsmith.reports.report import Report
    from guardsmith.reports.terminal import print_report

    shown = re.search(r"<!-- output of the demo's verification -->\n```\n(.*?)```", README, flags=re.DOTALL)
    assert shown
    print_report(Report.load(DOCS / "results" / "tripwire-demo-report.json"), Path("out/verify"))
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    lines = [" ".join(line.split()) for line in shown[1].strip().split("\n")]
    assert len(lines) > 5
    assert [line for line in lines if line not in printed] == []


def test_how_long_the_demo_takes_is_said_once_and_as_recorded():
    """Elsewhere `plan` says it, for the machine at hand. A verification's time is stated once its report has it."""
    names = ("harden", "report")
    hardening, report = (json.loads((DOCS / f"results/tripwire-demo-{name}.json").read_text()) for name in names)
    stated = dict(re.findall(r"(hardens|verifies) in about (\d+) minutes", README))
    recorded = {"hardens": hardening["seconds"], "verifies": report["run"].get("seconds")}
    assert stated == {verb: f"{seconds / 60:.0f}" for verb, seconds in recorded.items() if seconds is not None}
    assert len(re.findall(r"\bminutes?\b", README)) == len(stated)
    for page in ("tutorial/first-hardening.md", "tutorial/first-hardening.ipynb", "index.md"):
        assert not re.search(r"\b(minutes?|hours?)\b", (DOCS / page).read_text()), page
    assert f"Hardening took {hardening['seconds']:.0f} s" in (DOCS / "results/README.md").read_text()


def test_the_picture_of_the_report_is_small():
    assert (DOCS / "pictures" / "report.png").stat().st_size < 300_000


BLOCK = re.compile(r"<!-- runnable(: small)? -->\n```console\n(.*?)```", flags=re.DOTALL)
SMALL = {
    "sampling": {"steps": 2, "guidance": 3.0, "batch": 32},
    "method": {"name": "apdm", "params": {"outer_steps": 2, "inner_steps": 2, "class_images": 4, "learning_rate": 1e-4}},
    "probe": {"times": 0},
    "verify": {
        "attacks": {"lora": {"name": "lora", "params": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}}},
        "identifiers": ["sks"],
        "images_per_unit": 8,
        "class_images": 4,
        "benign_images": 12,
        "deployability": {"checks": []},
    },
}  # fmt: skip


def blocks():
    for page in PAGES:
        for number, found in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
            yield pytest.param(bool(found[1]), found[2], name_of(page), id=f"{name_of(page)}-{number}")


def steps_of(block):
    """Commands of a block, each with the lines that its output has to contain; an ellipsis stands for anything."""
    steps = []
    for line in block.strip().split("\n"):
        if line.startswith("$ "):
            steps.append((shlex.split(line[2:], comments=True), []))
        elif line.strip():
            steps[-1][1].append(" ".join(line.split()))
    return steps


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which all blocks run, and what each command printed in it: pages repeat commands."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("registries", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    return folder, {}


@pytest.mark.parametrize(("small", "block", "page"), blocks())
def test_commands_do_what_the_pages_show(small, block, page, workplace, monkeypatch, capsys):
    folder, done = workplace
    monkeypatch.chdir(folder)
    demo = Path("demo")  # a file of that name goes before the shipped recipe
    demo.unlink(missing_ok=True)
    if small:
        demo.write_text(yaml.safe_dump(SMALL | {"subjects": "registries/demo.yaml"}))
    for command, expected in steps_of(block):
        assert command[0] == "guardsmith", page
        if tuple(command) not in done:
            code = cli.main(command[1:])
            out, err = capsys.readouterr()
            assert code == (3 if small and command[1] == "verify" else 0), out + err
            done[tuple(command)] = [" ".join(line.split()).strip(" ,") for line in (out + err).split("\n")]
        for line in expected:
            shown = ".*".join(re.escape(part) for part in line.strip(" ,").split("…"))
            assert any(re.fullmatch(shown, printed) for printed in done[tuple(command)]), (page, line)


def command_lines():
    """(page, words) of every command line of guardsmith on a page, in blocks and in sentences."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = re.findall(r"^\$ ((?:[A-Z_]+=\S+ )*guardsmith .*)$", text, flags=re.MULTILINE)
        lines += re.findall(r"`(guardsmith [^`\n]+)`", text)
        for line in lines:
            try:
                words = shlex.split(line.partition(" > ")[0], comments=True)
            except ValueError:
                continue  # a sentence that begins with the name
            yield name_of(page), words[words.index("guardsmith") + 1 :]


def test_commands_and_options_on_the_pages_exist():
    from typer.main import get_command

    top = get_command(cli.app)
    wrong, seen = [], 0
    for page, words in command_lines():
        command, known = top, set()
        if re.fullmatch(r"[a-z][a-z-]+", words[0]) and words[0] not in command.commands:
            wrong.append((page, " ".join(words), words[0]))
        for word in words:
            known |= {option for parameter in command.params for option in parameter.opts}
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
            elif word.startswith("-") and not word.startswith("-m"):
                seen += 1
                if word.partition("=")[0] not in known | {"--help", "-h", "--install-completion", "--show-completion"}:
                    wrong.append((page, " ".join(words), word))
    assert seen > 50
    assert not wrong


def test_recipe_keys_on_the_pages_exist():
    from guardsmith.config.recipe import Recipe

    sections = {
        name: set(field.annotation.model_fields)
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
    }
    named = {
        (name_of(page), section, key)
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for section, key in re.findall(
            rf"\b({'|'.join(sections)})\.([a-z_0-9]+)\b(?!/)", page.read_text(encoding="utf-8")
        )
        if key not in ("py", "md", "json", "yaml", "html")
    }
    assert len(named) > 8
    assert not [(page, f"{section}.{key}") for page, section, key in named if key not in sections[section]]


def test_python_examples_are_python():
    found = [
        code
        for page in PAGES
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ]
    assert len(found) >= 2
    for code in found:
        ast.parse(code)


def test_the_attack_of_ones_own_is_found_and_runs(tmp_path, monkeypatch, tiny_epsilon):
    from test_attacks import make_data

    from guardsmith.attacks import AttackData, find_attack

    code = re.search(r"```python\n# my_attacks.py\n(.*?)```", (DOCS / "how-to/extend.md").read_text(), flags=re.DOTALL)
    assert code
    (tmp_path / "my_attacks.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    attack = find_attack("my_attacks:LONG")
    data = make_data()
    assert isinstance(data, AttackData)
    _, losses = attack.run(tiny_epsilon, data, attack.config(steps=2, batch_size=1), seed=0)
    assert len(losses) == 4
    sys.modules.pop("my_attacks", None)  # other tests have modules of that name


# The command line's help


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "guardsmith", *arguments], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | environment,
    )  # fmt: skip


def test_without_arguments_the_help_is_printed(capsys):
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["harden"], ["registry", "add"], ["list"]], ids=" ".join)
def test_the_short_flag_for_help(command, capsys):
    assert cli.main([*command, "-h"]) == 0
    short = capsys.readouterr().out
    assert cli.main([*command, "--help"]) == 0
    assert short == capsys.readouterr().out
    assert short.startswith("Usage: guardsmith")


def test_every_recipe_is_listed_with_a_line(capsys):
    assert cli.main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert [line.split("\t")[0] for line in lines] == recipe_names()
    for line in lines:
        what = line.split("\t")[1]
        assert 20 < len(what) < 130 and what[0].isupper() and what.endswith("."), line


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("guardsmith ver", {"verify", "verify-signature"}),
        ("guardsmith list rec", {"recipes"}),
        ("guardsmith run de", {"demo"}),
        ("guardsmith harden --dry", {"--dry-run"}),
        ("guardsmith harden --recipe tripwire-sdx", {"tripwire-sdxl"}),
    ],
)
def test_the_shell_completes(typed, offered):
    words = {"_GUARDSMITH_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = run(**words)
    assert set(done.stdout.split()) == offered, done.stderr


def test_completion_can_be_shown_and_installed(tmp_path):
    shown = run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_GUARDSMITH_COMPLETE=complete_bash" in shown.stdout
    done = run("--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "guardsmith" in (tmp_path / ".bashrc").read_text()


# What else a package has


def test_every_extra_stands_on_the_page_about_installing():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (DOCS / "how-to" / "install.md").read_text()
    assert [name for name in extras if f"| `{name}` | " not in text] == []


def test_the_citation_has_what_is_asked_for():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "version"} <= cited.keys()
    from guardsmith import __version__

    assert __version__.startswith(cited["version"])


def test_contributing_names_files_that_exist():
    """The files to open in order, and packages in the order of imports."""
    from test_layers import ORDER

    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = re.findall(r"`((?:guardsmith|tests|docs|recipes)/[\w./-]*)`", text)
    assert len(places) > 12
    assert [place for place in places if not (ROOT / place).exists()] == []
    table = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    assert [name for row in table for name in re.findall(r"`(\w+)`", row)] == list(ORDER)


# Tables of results


def script(name):
    """A script of the embedded base, as a module."""
    folder = ROOT / "recipes" / "avatar-base"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def attackers():
    """The tables of the script that attacks every method's model, as a module."""
    return script("attackers_table")


def test_tables_of_attackers_are_those_of_their_data():
    data = json.loads((DOCS / "results" / "attackers.json").read_text())
    written = (DOCS / "results" / "attackers.md").read_text(encoding="utf-8")
    assert written == attackers().tables(data), "run `python attackers.py` in recipes/avatar-base"
    page = (DOCS / "results" / "README.md").read_text(encoding="utf-8").splitlines()
    lost = [line for line in written.splitlines() if line.startswith("| ") and line not in page]
    assert not lost, "docs/results/README.md has other figures"


def test_tables_of_methods_at_their_own_scale_are_those_of_their_data():
    data = json.loads((DOCS / "results" / "own-scale.json").read_text())
    written = (DOCS / "results" / "own-scale.md").read_text(encoding="utf-8")
    assert written == script("own_scale_table").tables(data), "run `python own_scale.py` in recipes/avatar-base"
    page = (DOCS / "results" / "README.md").read_text(encoding="utf-8")
    section = page.split("## APDM and PersGuard at their own scale")[1].split("\n## ")[0].splitlines()
    measured = [line for line in section if re.match(r"\| (base|noise|apdm,|persguard,)", line)]
    assert len(measured) > 8
    assert set(measured) <= set(written.splitlines()), "docs/results/README.md has other figures"


def test_half_way_is_interpolated_between_two_points_and_not_claimed_where_it_was_not_reached():
    half_way = script("own_scale_table").half_way

    def points(*similarities):
        steps = (100, 200, 400)
        return {
            str(at): {"similarity": [value, value, value], "displacement": at / 1e4}
            for at, value in zip(steps, similarities, strict=True)
        } | {"2": {"loss": 1.0}}

    base = points(0.2, 0.6, 0.8)
    assert half_way(base, base) == "150, 0.0150"
    assert half_way(points(0.4, 0.5, 0.8), base) == "100, 0.0100"
    assert half_way(points(0.0, 0.1, 0.3), base) == "not in 400, 0.0400"
    assert half_way(None, base) == "not measured"


def test_tables_of_attackers_tell_protected_from_broken_and_from_not_measured():
    def scores(mean):
        return {"scores": [mean - 0.02, mean, mean + 0.02] * 3}

    def row(base, protected, control):
        return {
            "base": {"protected": scores(base), "control": scores(base)},
            "tripwire": {"protected": scores(protected), "control": scores(control)},
        }

    evasion = {
        "plain": row(0.6, 0.0, 0.6), "negative": row(0.6, 0.5, 0.6), "crop": row(0.2, 0.0, 0.2), "tiles": row(0.6, 0.0, 0.3)
    }  # fmt: skip
    cut = {"tripwire": {"protected": scores(0.6) | {"removal_cost": COST}, "control": scores(0.6)}}
    table = {
        "attacks": {
            "avatar-evasion": evasion, "avatar-hosted": {"plain": evasion["plain"]}, "avatar-removal": {"cut": cut}
        }
    }  # fmt: skip
    text = attackers().tables(table)
    lines = {line.split("|")[1].strip(): line for line in text.split("## Evasion")[1].splitlines() if line[:1] == "|"}
    assert "🔴" not in lines["`plain`"] and "0.00 [" in lines["`plain`"] and "100 %" in lines["`plain`"]
    assert "🔴 **0.50 [" in lines["`negative`"]
    assert lines["`crop`"].count("no evidence") == 2 and "🔴" not in lines["`crop`"]
    assert lines["`tiles`"].count("🔴") == 1 and "🔴 **49 %" in lines["`tiles`"], "counted from chance"
    assert "not measured" in lines["`sketch`"] and "0." not in lines["`sketch`"]
    removal = next(line for line in text.split("## Removal")[1].splitlines() if line.startswith("| `cut`"))
    assert "| 2.5 | 1,200 | 32 | needed | 0.60, 0.60 (`plain`) | 🔴 **0.60 [" in removal


def test_tables_of_attackers_say_when_a_method_gives_way_and_how_far_the_weights_moved():
    def cell(mean, displacement):
        return {"scores": [mean - 0.02, mean, mean + 0.02] * 3, "displacement": displacement}

    base = {"60": cell(0.1, 0.01), "120": cell(0.5, 0.02), "600": cell(0.6, 0.1)}
    hardened = {"60": cell(0.0, 0.03), "120": cell(0.0, 0.04), "600": cell(0.55, 0.5)}
    sides = {"base": {"protected": base}, "tripwire": {"protected": hardened, "control": {"error": "Broken: it"}}}
    rows = [line.split(" | ") for line in attackers().longer_table({"usual-rate": sides})[2:]]
    assert [row[1] for row in rows] == ["60", "120", "600"], "in the order of the steps"
    assert [row[2] for row in rows] == ["1.0 %, 3.0 %", "2.0 %, 4.0 %", "10.0 %, 50.0 %"]
    first, second, last = (row[4] for row in rows)
    assert "no evidence" in first and "0.00 [" in second and "🔴" not in second and "🔴 **0.55 [" in last
    assert all("failed to run (Broken: it)" in row[5] for row in rows)
    alone = attackers().longer_table({"usual-rate": {"tripwire": {"protected": hardened}}})[2:]
    assert (
        "| not measured, 4.0 % | not measured, not measured | 0.00 [" in alone[1] and alone[1].count("no evidence") == 1
    )


def test_the_table_of_everyday_use_has_every_method_and_leaves_out_settings_without_a_fault():
    def case(name, measure, value, status, part=False):
        own = {"case": name, "measure": measure, "value": value, "status": status, "part": part}
        return own | {"low": None, "high": None}

    together = case("all settings together", "collapsed", 0.0, "pass")
    quiet, loud = (case("LCM, 4 steps", "collapsed", value, "pass", part=True) for value in (0.0, 0.02))
    everyday = {
        "apdm": {"samplers": {"cases": [loud, together]}},
        "tripwire": {"samplers": {"cases": [quiet, case("DDIM, 20 steps", "collapsed", 0.0, "pass", True), together]}},
        "imma": {"precision": {"cases": [case("float16", "difference", 2.5, "fail")]}},
    }
    lines = attackers().everyday_table(everyday)
    assert lines[0] == "| | tripwire | imma | apdm |"
    assert lines[2].startswith("| float16: ") and lines[2].endswith("| not measured | 🔴 **2.5** | not measured |")
    assert [line.split(":")[0].rpartition("accelerators, ")[2] for line in lines[3:]] == [
        "LCM, 4 steps",
        "all settings together",
    ]
    assert lines[3].endswith("| 0 % | not measured | 2 % |")


COST = {"seconds": 2.5, "unet_forwards": 1200, "pictures": 32, "needs_base": True, "changed_weights": 0.5}
