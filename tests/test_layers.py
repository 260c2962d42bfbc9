"""The architecture: which package may import which."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "guardsmith"

ORDER = (
    "core", "runtime", "registry", "models", "diffusion", "training", "metrics", "purifiers", "attacks", "methods", "cloaks",
    "config", "gate", "hardening", "reports", "evaluation", "release", "pictures", "screening", "cli",
)  # fmt: skip
"""From the ground up: a package may import those before it, and nothing else of guardsmith."""


def imports() -> Iterator[tuple[str, str, str]]:
    """(importing file and line, its package, imported package), for every import of guardsmith, lazy ones too."""
    for file in sorted(ROOT.rglob("*.py")):
        inside = file.relative_to(ROOT).parts
        if len(inside) == 1:
            continue  # the public face and `python -m guardsmith`
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module == "guardsmith":
                names = [f"guardsmith.{alias.name}" for alias in node.names if (ROOT / alias.name).is_dir()]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("guardsmith."):
                names = [str(node.module)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("guardsmith.")]
            for name in names:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", inside[0], name.split(".")[1]


def test_every_package_has_its_place():
    packages = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and any(folder.glob("*.py"))}
    assert packages == set(ORDER)


def test_imports_run_downwards_only():
    place = {package: number for number, package in enumerate(ORDER)}
    wrong = [
        f"{where} imports {imported}" for where, package, imported in imports() if place[imported] > place[package]
    ]
    assert not wrong
    assert len(list(imports())) > 300, "the walk itself has to see something"


def test_packages_say_what_lives_there_and_what_does_not():
    for package in ORDER:
        text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
        assert text and len(text.split(".")) >= 3, package


@pytest.mark.parametrize("package", ["core", "registry", "metrics", "methods", "attacks"])
def test_no_module_imports_itself_round_a_circle(package):
    graph = defaultdict(set)
    files = {
        ".".join(("guardsmith", *f.relative_to(ROOT).with_suffix("").parts)): f for f in (ROOT / package).rglob("*.py")
    }
    for name, file in files.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # at the top: those are the ones that fail
            if isinstance(node, ast.ImportFrom) and node.module:
                graph[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & files.keys()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in files:
        visit(name, ())
