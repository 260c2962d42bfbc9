"""Limits that keep the code readable, and tables that no new file may be missing from."""

import ast
from pathlib import Path

import pytest

from guardsmith.attacks.adaptive.removals import REMOVALS
from guardsmith.attacks.evasion import EVASIONS
from guardsmith.cloaks import CLOAKS
from guardsmith.gate.rules import RULES
from guardsmith.methods import METHODS
from guardsmith.purifiers import PURIFIERS

ROOT = Path(__file__).parent.parent / "guardsmith"

LINES_OF_MODULE, LINES_OF_FUNCTION = 400, 80
EXEMPT: dict[str, str] = {}
"""Module, or module:function -> why it may be longer."""


def sizes():
    """(name, lines, limit) of every module and function."""
    for file in sorted(ROOT.rglob("*.py")):
        name, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
        yield name, len(text.splitlines()), LINES_OF_MODULE
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1, LINES_OF_FUNCTION


def test_modules_and_functions_are_short():
    measured = list(sizes())
    assert len(measured) > 1000, "the walk itself has to see something"
    too_long = {name: lines for name, lines, limit in measured if lines > limit}
    assert too_long.keys() - EXEMPT.keys() == set(), {name: too_long[name] for name in too_long.keys() - EXEMPT.keys()}


def defines(file, name):
    """Whether a module has a function or a variable of this name at its top."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if name in [*names, getattr(node, "name", None)]:
            return True
    return False


def methods_in(file):
    """Classes of a module that derive from `HardeningMethod`."""
    nodes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return [node.name for node in nodes if any("HardeningMethod" in ast.unparse(base) for base in node.bases)]


def test_every_method_of_the_package_is_in_the_table():
    classes = {name for file in (ROOT / "methods").rglob("*.py") for name in methods_in(file)}
    assert len(classes) >= 4 and classes == {type(method).__name__ for method in METHODS.values()}


@pytest.mark.parametrize(
    ("folder", "name", "modules"),
    [
        ("gate/rules", "RULE", {rule.evaluate.__module__ for rule in RULES}),
        ("attacks/evasion", "EVASIONS", {entry.apply.__module__ for entry in EVASIONS.values()}),
        ("attacks/adaptive", "REMOVAL", {entry.run.__module__ for entry in REMOVALS.values()}),
        ("cloaks", "cloak", {entry.run.__module__ for entry in CLOAKS.values()}),
        ("purifiers", "purify", {entry.run.__module__ for entry in PURIFIERS.values()}),
    ],
)  # fmt: skip
def test_every_file_with_an_entry_is_in_its_table(folder, name, modules):
    files = [file for file in (ROOT / folder).glob("*.py") if file.stem != "__init__" and defines(file, name)]
    assert len(files) >= 6
    missing = {file.stem for file in files} - {module.rpartition(".")[2] for module in modules}
    assert not missing, f"not in the table of {folder}: {missing}"
