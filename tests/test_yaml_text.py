"""Registries, recipes and policies are YAML that people write: what is refused in one is refused in the others, with its line."""

import os
import time
from pathlib import Path

import pytest
import yaml
from test_registry import folder  # noqa: F401 (a fixture)
from tiny import assert_one_sentence

from guardsmith.cli.app import main
from guardsmith.config.loading import load_recipe
from guardsmith.core import yaml_text
from guardsmith.core.errors import UserError
from guardsmith.core.yaml_text import odd_numbers, parse
from guardsmith.gate.policy import as_yaml, default_policy, load_policy
from guardsmith.registry.loader import load_registry


def bomb():
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{other}: &{other} [{', '.join([f'*{one}'] * 10)}]\n"
    return text


READERS = {
    "registry": load_registry,
    "recipe": lambda file: load_recipe(str(file)),
    "policy": load_policy,
}
BAD = {
    "a key twice": (b"version: 1\nbase: x\nname: y\n\nbase: z\nname: u\nversion: 1\n", "already given on line"),
    "not UTF-8": (b"base: caf\xe9\n", "UTF-8"),
    "UTF-16": ("base: x\n".encode("utf-16"), "UTF-8"),
    "no YAML": (b"base: [x\n", "not valid YAML"),
    "a tab": (b"base:\n\tx: 1\n", "not valid YAML"),
    "zero bytes": (b"\0\0\0", "not valid YAML"),
    "a bomb": (bomb().encode(), "values: remove its nested aliases"),
    "deep": (b"[" * 50_000, "nested too deeply"),
    "a loop": (b"base: &a [*a]\n", "nested too deeply or refers to itself"),
    "python": (b"base: !!python/object/apply:os.system ['touch pwned']\n", "not valid YAML"),
    "two documents": (b"base: x\n---\nbase: y\n", "not valid YAML"),
    "a list as a key": (b"? [a, b]\n: c\n", "not valid YAML"),
    "a list": (b"- a\n", "mapping"),
    "text": (b"hello\n", "mapping"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("case", BAD)
def test_bad_yaml_is_refused_everywhere_in_the_same_words(tmp_path, kind, case):
    content, words = BAD[case]
    file = tmp_path / "file.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        READERS[kind](file)
    assert words in str(caught.value)
    assert all(line.startswith(f"{file}:") for line in str(caught.value).split("\n")), "with the place"
    assert len(str(caught.value)) < 1000
    assert not Path("pwned").exists()


def test_a_long_file_without_aliases_is_no_bomb(monkeypatch):
    """Ten thousand subjects are 400,000 values."""
    monkeypatch.setattr(yaml_text, "_MAX_VALUES", 100)
    data, lines, _ = parse(Path("r.yaml"), "a:\n" + "- {b: 1}\n" * 500)
    assert len(data["a"]) == 500 and lines["a", 499, "b"] == 501
    with pytest.raises(UserError, match="aliases"):
        parse(Path("r.yaml"), "a: &a [1, 2, 3]\nb: &b [*a, *a, *a, *a]\nc: [" + "*b, " * 20 + "*b]\n")


@pytest.mark.parametrize("libyaml", [True, False])
def test_lines_and_values_do_not_depend_on_libyaml(monkeypatch, libyaml):
    monkeypatch.setattr(yaml, "__with_libyaml__", libyaml)
    text = "a: &x {b: 2026-02-30, c: [1, no, 'x: y']}\n# comment\nd:\n- <<: *x\n  b: |\n    text\n- é🙂\ne: http://x\ne: ~\n"
    data, lines, problems = parse(Path("r.yaml"), text)
    assert data == {
        "a": {"b": "2026-02-30", "c": [1, False, "x: y"]},
        "d": [{"b": "text\n", "c": [1, False, "x: y"]}, "é🙂"],
        "e": None,
    }
    assert [lines[key] for key in (("a", "c"), ("d", 0, "b"), ("d", 0, "c"), ("d", 1), ("e",))] == [1, 5, 1, 7, 9]
    assert [problem.line for problem in problems] == [9]


@pytest.mark.parametrize("kind", READERS)
def test_files_that_cannot_be_read_are_refused_everywhere(tmp_path, kind):
    (tmp_path / "there").mkdir()
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    for place in (
        tmp_path / "none.yaml",
        tmp_path / "there",
        loop,
        tmp_path / "none" / "x.yaml",
        tmp_path / "zero\0byte",
    ):
        with pytest.raises(UserError) as caught:
            READERS[kind](place)
        assert_one_sentence(caught.value)


def test_names_of_any_bytes_end_with_a_sentence(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.yaml")
    for arguments in (["check", name], ["check", str(tmp_path / name)], ["harden", "--recipe", name, "--dry-run"]):
        assert main(arguments) == 2
        assert "bug" not in capsys.readouterr().err
    (tmp_path / name).write_text("base: [x\n")
    assert main(["harden", "--recipe", str(tmp_path / name), "--dry-run"]) == 2
    assert "not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("seed: no\n", "seed"),
        ("verify: {class_images: on}\n", "verify.class_images"),
        ("verify: {seeds: [0, yes]}\n", "verify.seeds.1"),
        ("gate: {kid_ratio: .inf}\n", "gate.kid_ratio"),
        ("sampling: {guidance: .inf}\n", "sampling.guidance"),
        ("verify: {attacks: {a: {name: lora, params: {steps: yes}}}}\n", "verify.attacks.a.params.steps"),
        (
            "verify: {attacks: {a: {name: lora, params: {learning_rate: .inf}}}}\n",
            "verify.attacks.a.params.learning_rate",
        ),
        ("purifiers: {p: {name: jpeg, params: {quality: on}}}\n", "purifiers.p.params.quality"),
    ],
)
def test_yes_and_no_are_no_numbers_in_recipes(tmp_path, text, place):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(file))
    assert_one_sentence(caught.value)
    assert str(caught.value).startswith(f"{file}: {place}: ") and "write a number" in str(caught.value)


def test_nor_on_the_command_line(capsys):
    assert main(["harden", "--recipe", "demo", "--set", "seed=no", "--dry-run"]) == 2
    assert "--set seed=no: YAML reads yes, no" in capsys.readouterr().err
    assert main(["harden", "--recipe", "demo", "--set", "seed=" + "[" * 20_000, "--dry-run"]) == 2
    assert "bug" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"rules": {"kid_ratio": True}}, "rules.kid_ratio"),
        ({"rules": {"kid_ratio": float("inf")}}, "rules.kid_ratio"),
        ({"classes": {"person": {"chance": False, "chance_high": 0.2, "genuine": 0.5}}}, "classes.person.chance"),
    ],
)
def test_nor_in_policies(tmp_path, changes, place):
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(as_yaml(default_policy())) | changes))
    with pytest.raises(UserError) as caught:
        load_policy(file)
    assert_one_sentence(caught.value)
    assert f"{file}: {place}: " in str(caught.value) and "write a number" in str(caught.value)


def test_a_policys_date_is_no_number_of_seconds(tmp_path):
    file = tmp_path / "p.yaml"
    text = as_yaml(default_policy())
    assert load_policy_of(file, text).dated == default_policy().dated
    with pytest.raises(UserError, match="2026-01-31"):
        load_policy_of(file, text.replace(f"dated: {default_policy().dated}", "dated: 20260131"))


def load_policy_of(file, text):
    file.write_text(text)
    return load_policy(file)


def test_switches_that_are_meant_stay(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("half_variant: yes\nverify: {full_factorial: off}\nprobe: {stop_at: null}\nseed: 3\n")
    recipe = load_recipe(str(file))
    assert recipe.half_variant is True and recipe.verify.full_factorial is False and recipe.seed == 3


def test_odd_numbers_look_at_values_where_pydantic_made_numbers():
    assert list(odd_numbers({"a": True, "b": [1, True]}, {"a": True, "b": (1, 1)})) == [
        "b.1: YAML reads yes, no, on and off as true and false, which is no number; write a number"
    ]
    assert list(odd_numbers({"a": "inf"}, {"a": float("inf")})) == ["a: inf is not finite; write a number"]
    assert list(odd_numbers({"a": "x", 3: 4}, {"a": "x"})) == []


def test_lines_are_those_of_the_file():
    data, lines, problems = parse(Path("x"), "a: 1\n\nb:\n  - c\n  - d: 2\n    e: 3\n")
    assert data == {"a": 1, "b": ["c", {"d": 2, "e": 3}]} and not problems
    assert lines[("b", 0)] == 4 and lines[("b", 1, "e")] == 6


def test_a_recipe_of_any_length_is_read_at_once(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("base: x\n" + "# note\n" * 100_000)
    began = time.monotonic()
    load_recipe(str(file))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (f"verify: {{attacks: {{{'a' * 65}: {{name: lora}}}}}}\n", "64 characters"),
        (f"verify: {{identifiers: [{'a' * 65}]}}\n", "64 characters"),
        ("verify: {identifiers: ['']}\n", "1 to 64"),
        ("verify: {attacks: {a: {name: lora, class_noun: ../../x}}}\n", "class_noun"),
        (f"verify: {{attacks: {{a: {{name: lora, class_noun: {'x' * 41}}}}}}}\n", "class_noun"),
    ],
)
def test_names_that_become_files_fit_into_file_names(tmp_path, text, word):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=word) as caught:
        load_recipe(str(file))
    assert_one_sentence(caught.value)
