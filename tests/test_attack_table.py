"""Every entry of the table of attacks is complete: what a new one lacks is found here, and not after hours of a verification."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from test_attacks import make_data
from tiny import same_weights, weights

import guardsmith.attacks
from guardsmith.attacks import ATTACKS, Attack, find_attack
from guardsmith.attacks.table import RENAMED

ROOT = Path(__file__).parent.parent
FOLDER = Path(guardsmith.attacks.__file__).parent
SMALL = {"steps": 2, "batch_size": 1, "learning_rate": 1e-3}


def defines_an_attack(file):
    """Whether a module has a function `attack` or an entry `ATTACK`."""
    names = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return bool({"attack", "ATTACK"} & set(names))


def test_every_file_with_an_attack_is_in_the_table():
    files = {file.stem for file in FOLDER.rglob("*.py") if defines_an_attack(file)}
    assert files == {entry.run.__module__.rpartition(".")[2] for entry in ATTACKS.values()}


def test_every_file_defines_its_own_entry():
    for name, entry in ATTACKS.items():
        module = inspect.getmodule(entry.run)
        assert module.ATTACK is entry, name
        assert entry.config.__module__ == module.__name__, name
        assert len([value for value in vars(module).values() if isinstance(value, Attack)]) == 1, name


@pytest.mark.parametrize("name", ATTACKS)
def test_an_entry_says_all_that_is_needed(name):
    entry = ATTACKS[name]
    assert re.fullmatch(r"hf\.co/papers/\d+\.\d+|guardsmith", entry.paper)
    assert len(inspect.getmodule(entry.run).__doc__) > 60
    assert "Returns" in entry.run.__doc__ or "returns" in entry.run.__doc__
    config = entry.config
    assert config.model_config["extra"] == "forbid" and config.model_config["frozen"]
    assert {"steps", "batch_size", "learning_rate"} <= config.model_fields.keys()
    assert entry.steps({}) == config().steps and entry.steps({"steps": 7}) == 7, "every setting has a default"
    source = "".join(inspect.getsource(part) for part in config.__mro__ if part.__module__.startswith("guardsmith."))
    for field in config.model_fields:
        assert re.search(rf'^    {field}: .*?\n    """', source, re.MULTILINE | re.DOTALL), f"{field} has no docstring"
    parameters = inspect.signature(entry.run).parameters
    assert list(parameters)[:5] == ["model", "data", "config", "seed", "on_step"]
    assert parameters["seed"].kind is parameters["on_step"].kind is inspect.Parameter.KEYWORD_ONLY
    assert f"`{name}`" in (ROOT / "docs" / "explanation" / "attacks.md").read_text(), "not in the docs"
    assert not (set(Attack._fields) - set(entry._asdict()))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_entry_runs(tiny_v, name):
    entry, steps = ATTACKS[name], []
    before = weights(tiny_v.unet)
    small = SMALL | ({"unlearn_steps": 1} if "unlearn_steps" in entry.config.model_fields else {})
    own, losses = entry.run(
        tiny_v, make_data(), entry.config(**small), seed=0, on_step=lambda step, loss, _: steps.append((step, loss))
    )
    assert [step for step, _ in steps] == [0, 1] and [loss for _, loss in steps] == losses
    assert same_weights(before, weights(tiny_v.unet)), "the model under attack stays as it is"
    assert own is not tiny_v and not any(p.requires_grad for p in own.unet.parameters())
    _, cut = entry.run(tiny_v, make_data(), entry.config(**small), seed=0, on_step=lambda *_: True)
    assert cut == losses[:1], "a true answer of on_step ends it"
    words = entry.prompts("sks", "person", 3)
    assert len(words) == 3 and all("sks" in prompt and prompt.endswith(entry.suffix) for prompt in words)


def test_a_former_name_is_read_with_a_warning_that_names_the_new_one(capsys):
    assert set(RENAMED.values()) <= ATTACKS.keys() and not RENAMED.keys() & ATTACKS.keys()
    guardsmith.attacks.table._present_name.cache_clear()
    assert find_attack("redteam") is find_attack("redteam") is ATTACKS["purified_cdl"]
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "'redteam'" in err and "'purified_cdl'" in err
