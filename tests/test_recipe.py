import json
import re

import pytest
import yaml
from tiny import assert_one_sentence

from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import BUDGETS, Recipe
from guardsmith.config.renamed import RECIPE_KEYS, with_new_keys
from guardsmith.config.shipped import find_recipe, recipe_names
from guardsmith.core.errors import UserError

FULL = """
base: some/folder
subjects: registry/subjects.yaml
seed: 7
sampling: {steps: 5, guidance: 3.0, batch: 2}
method:
  name: apdm
  params: {beta: 2.0, inner_steps: 3, learning_rate: 5e-6, identifiers: [sks, ohwx]}
verify:
  attacks:
    strong: {name: dreambooth, params: {steps: 10}}
    adapter: {name: lora, params: {rank: 8}}
  identifiers: [sks, t@t]
  seeds: [0, 1]
gate: {control_retention: 0.8}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return str(file)

    return write


def problems_of(name, changes=()):
    with pytest.raises(UserError) as caught:
        load_recipe(name, changes)
    lines = str(caught.value).split("\n")
    for line in lines:
        assert_one_sentence(line)
    return lines


def test_a_full_recipe_is_read(write, tmp_path):
    recipe = load_recipe(write(FULL))
    assert recipe.base == "some/folder"
    assert recipe.seed == 7
    assert recipe.sampling.steps == 5
    assert recipe.method.params["beta"] == 2.0
    assert list(recipe.verify.attacks) == ["strong", "adapter"]
    assert recipe.verify.identifiers == ("sks", "t@t")
    assert recipe.verify.seeds == (0, 1)
    assert recipe.gate.control_retention == 0.8
    # The registry is found beside the recipe, wherever the command is run.
    assert recipe.subjects == str(tmp_path / "registry" / "subjects.yaml")


def test_what_is_left_out_has_its_default(write):
    recipe = load_recipe(write("seed: 3"))
    assert recipe == Recipe(seed=3)
    assert recipe.base == "builtin:avatar"
    assert recipe.method.name == "apdm"
    assert recipe.subjects is None


def test_numbers_with_an_exponent_but_no_point_are_numbers(write):
    """YAML 1.1 reads 5e-6 as a word; people write it all the same."""
    from guardsmith.methods import METHODS

    recipe = load_recipe(write(FULL))
    assert METHODS["apdm"].config(**recipe.method.params).learning_rate == 5e-6
    recipe = load_recipe(write(FULL), ["method.params.learning_rate=1e-4"])
    assert METHODS["apdm"].config(**recipe.method.params).learning_rate == 1e-4


def test_single_values_can_be_set(write):
    path = write(FULL)
    changes = ["method.params.beta=5", "seed=9", "verify.identifiers=[zwx]", "gate.kid_ratio=3.5", "revision=main"]
    recipe = load_recipe(path, [*changes, "verify.attacks.extra.name=lora", "subjects=null", "base='a=b'"])
    assert recipe.method.params["beta"] == 5
    assert recipe.method.params["inner_steps"] == 3
    assert recipe.seed == 9
    assert recipe.verify.identifiers == ("zwx",)
    assert recipe.gate.kid_ratio == 3.5
    assert recipe.gate.control_retention == 0.8
    assert recipe.verify.attacks["extra"].name == "lora"
    assert recipe.subjects is None
    assert recipe.base == "a=b"


def test_a_section_that_the_recipe_lacks_can_be_set(write):
    assert load_recipe(write("seed: 1"), ["sampling.steps=4"]).sampling.steps == 4


@pytest.mark.parametrize("change", ["seed", "=1", "  =1", "seed.x=1", "method.params.beta={", ""])
def test_malformed_changes_are_refused(write, change):
    lines = problems_of(write(FULL), [change])
    assert any("--set" in line for line in lines)


def test_every_problem_is_told_at_once(write):
    text = """
sed: 1
sampling: {steps: 1, guidence: 2}
method: {name: apdm, params: {betta: 2, inner_steps: 0}}
verify:
  attacks:
    a: {name: dreamboth}
    b: {name: lora, params: {rnak: 2}}
  images_per_unit: lots
gate: {control_retention: 2}
"""
    lines = problems_of(write(text))
    for words in (
        ("sed", "seed"),
        ("sampling.steps",),
        ("sampling.guidence", "guidance"),
        ("method.params", "betta", "beta"),
        ("inner_steps",),
        ("dreamboth", "dreambooth"),
        ("verify.attacks.b.params", "rnak", "rank"),
        ("images_per_unit", "lots"),
        ("gate.control_retention",),
    ):
        assert any(all(word in line for word in words) for line in lines), f"{words} in {lines}"
    assert len(lines) == 9
    assert all("mine.yaml" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: {name: adpm}", ("adpm", "apdm")),
        ("method: {name: zzzz}", ("zzzz", "apdm")),
        ("verify: {attacks: {x: {params: {}}}}", ("verify.attacks.x", "name")),
        ("verify: {attacks: {x: {name: zzzz}}}", ("zzzz", "dreambooth", "lora")),
        ("method: {params: {reduction: sum}}", ("reduction", "mean", "element")),
        ("method: {params: {parameters: all}}", ("parameters", "cross_attention")),
        ("method: {params: [1]}", ("method.params",)),
        ("method: 3", ("method",)),
        ("verify: [1]", ("verify",)),
        ("verify: {identifiers: []}", ("verify.identifiers",)),
        ("verify: {seeds: []}", ("verify.seeds",)),
        ("verify: {seeds: [1, 2, 1]}", ("verify.seeds", "twice")),
        ("verify: {identifiers: [sks, sks]}", ("verify.identifiers", "twice")),
        ("verify: {evaluation_points: [0.5, 4]}", ("verify.evaluation_points", "usual end")),
        ("verify: {evaluation_points: [0, 1]}", ("verify.evaluation_points", "above 0")),
        ("verify: {evaluation_points: [1, 4, 4]}", ("verify.evaluation_points", "twice")),
        ("verify: {sample: 0}", ("verify.sample",)),
        ("verify: {identifiers: [sks, 123]}", ("verify.identifiers", "123")),
        ("gate: {personalized_share: 1}", ("gate.personalized_share",)),
        ("sampling: {guidance: 0.5}", ("sampling.guidance",)),
        ("seed: many", ("seed", "many")),
    ],
)
def test_wrong_values_are_named(write, text, words):
    lines = problems_of(write(text))
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("text", ["", "- a", "just words", "{", "a: [", "seed: 1\n\tbase: x", "a: \x01"])
def test_files_that_are_no_recipe_are_refused(write, text):
    (line,) = problems_of(write(text))
    assert "mine.yaml" in line


def test_files_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    (line,) = problems_of(str(file))
    assert "mine.yaml" in line


def test_yaml_cannot_run_code(write, tmp_path):
    target = tmp_path / "touched"
    problems_of(write(f"seed: !!python/object/apply:os.system ['touch {target}']"))
    problems_of(write("seed: 1"), [f"seed=!!python/object/apply:os.system ['touch {target}']"])
    assert not target.exists()


def test_unknown_recipes_are_refused_with_a_near_name():
    assert "demo" in recipe_names()
    (line,) = problems_of("demmo")
    assert "demmo" in line
    assert "demo" in line
    (line,) = problems_of("qqqq")
    assert "demo" in line
    problems_of("./no/such/file.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.verify.attacks
    assert find_recipe(name).suffix == ".yaml"
    assert load_recipe(str(find_recipe(name))) == recipe


def test_a_recipe_cannot_change_afterwards(write):
    recipe = load_recipe(write(FULL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1
    assert yaml.safe_load(FULL)["seed"] == 7


def test_an_attack_label_that_is_no_folder_name_is_refused(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("verify: {attacks: {../up: {name: lora}}}")
    with pytest.raises(UserError, match=r"the label '\.\./up'"):
        load_recipe(str(file))


def test_a_budget_changes_what_is_tried_and_single_values_go_on_top(capsys):
    from guardsmith.cli import app as cli
    from guardsmith.cli.options import budget_as_changes

    recipe = load_recipe("several-avatars", budget_as_changes("quick"))
    assert (recipe.verify.sample, recipe.verify.evaluation_points, recipe.verify.full_factorial) == (4, (1.0,), False)
    assert recipe.verify.attacks == load_recipe("several-avatars").verify.attacks
    assert load_recipe("several-avatars", budget_as_changes("standard")) == load_recipe("several-avatars")
    audit = load_recipe("demo", [*budget_as_changes("audit"), "verify.images_per_unit=30"])
    assert (audit.verify.seeds, audit.verify.images_per_unit, max(audit.verify.evaluation_points)) == ((0, 1, 2), 30, 4)
    assert budget_as_changes(None) == []
    assert cli.main(["run", "demo", "--budget", "lavish"]) == 2
    assert "choose quick, standard, audit" in capsys.readouterr().err


def test_every_budget_has_enough_pictures_for_the_gate():
    for name in BUDGETS:
        for changes in ([], BUDGETS[name]):
            recipe = load_recipe("demo", [f"verify.{key}={json.dumps(changes[key])}" for key in changes])
            assert recipe.verify.images_per_unit >= recipe.gate.minimum_images


OLD = """
bystanders: faces
verify: {looks: [1, 4], crossed: false, ordinary_images: 50, sample: 3}
method: {params: {ordinary_images: 40}}
gate: {learnt_share: 0.4, destroyed_share: 0.1}
"""


def test_keys_of_earlier_versions_are_read_with_a_warning_that_names_the_new_one(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(OLD)
    new = OLD
    for old, name in RECIPE_KEYS.items():
        new = new.replace(f"{old.split('.')[-1]}:", f"{name.split('.')[-1]}:")
    (tmp_path / "new.yaml").write_text(new)
    recipe = load_recipe(str(tmp_path / "old.yaml"))
    warnings = capsys.readouterr().err
    assert recipe == load_recipe(str(tmp_path / "new.yaml"))
    assert capsys.readouterr().err == ""
    assert (recipe.verify.evaluation_points, recipe.verify.full_factorial, recipe.verify.benign_images) == (
        (1, 4),
        False,
        50,
    )
    assert (recipe.gate.personalized_share, recipe.gate.collapsed_share, recipe.verify.sample) == (0.4, 0.1, 3)
    assert recipe.method.params == {"benign_images": 40}
    assert recipe.negatives == str(tmp_path / "faces")
    for old, name in RECIPE_KEYS.items():
        assert f"'{old}' is called '{name}' now" in warnings
    assert len(warnings.splitlines()) == len(RECIPE_KEYS)


def test_changes_may_use_keys_of_earlier_versions_too(tmp_path, capsys):
    (tmp_path / "new.yaml").write_text("verify: {evaluation_points: [1, 2]}")
    recipe = load_recipe(str(tmp_path / "new.yaml"), ["verify.looks=[1, 4]", "bystanders=x", "verify.crossed=false"])
    assert recipe.verify.evaluation_points == (1, 4) and not recipe.verify.full_factorial
    assert "'verify.looks' is called 'verify.evaluation_points' now" in capsys.readouterr().err
    recipe = load_recipe("demo", ["verify={looks: [1, 3]}"])
    assert recipe.verify.evaluation_points == (1, 3)
    assert "'verify.looks' is called" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["bystanders: a\nnegatives: b\n", "verify: {looks: [1], evaluation_points: [1, 2]}"])
def test_a_key_under_both_names_is_refused(tmp_path, text):
    (tmp_path / "both.yaml").write_text(text)
    with pytest.raises(UserError, match=r"is the old name of .* both are there; remove") as caught:
        load_recipe(str(tmp_path / "both.yaml"))
    assert_one_sentence(caught.value)


def test_what_is_no_section_is_refused_as_before(tmp_path):
    for text in ("verify: [looks]", "verify: 3", "gate: learnt_share"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml: (verify|gate)"):
            load_recipe(str(tmp_path / "bad.yaml"))


def test_shipped_recipes_use_no_old_key(capsys):
    for name in recipe_names():
        load_recipe(name)
    assert capsys.readouterr().err == ""


def test_a_table_of_renamed_keys_leaves_the_data_as_it_is():
    data = {"a": {"old": 1, "other": 2}, "b": 3}
    renamed, warnings = with_new_keys(data, {"a.old": "a.new", "b.old": "b.new", "c": "d"}, "f")
    assert renamed == {"a": {"new": 1, "other": 2}, "b": 3} and list(renamed["a"]) == ["new", "other"]
    assert data["a"] == {"old": 1, "other": 2} and warnings == ["f: 'a.old' is called 'a.new' now; please rename it"]


@pytest.mark.parametrize(
    ("change", "near"),
    [("steps=3", "did you mean 'sampling.steps'"), ("verify.seed=[0]", "did you mean 'seeds'"), ("sed=1", "did you mean 'seed'")],
)  # fmt: skip
def test_a_key_in_the_wrong_place_is_told_where_it_belongs(change, near):
    with pytest.raises(UserError, match=re.escape(near)):
        load_recipe("demo", [change])


def test_levels_of_the_embedded_judge_are_refused(tmp_path):
    """It has levels of its own, which would be used in their place."""
    file = tmp_path / "levels.yaml"
    classes = {"person": {"chance": 0.0, "chance_high": 0.1, "genuine": 0.8}}
    file.write_text(yaml.safe_dump({"judge": "avatar", "dated": "2026-01-01", "classes": classes}))
    with pytest.raises(UserError, match="has its own levels") as caught:
        load_recipe("demo", [f"judge={json.dumps({'levels': str(file)})}"])
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("sampling.steps=1", "--set sampling.steps=1: input should be greater"),
        ("sampling={steps: 1}", "--set sampling={steps: 1}: sampling.steps: input should be greater"),
        ("method.params.betta=1", "--set method.params.betta=1: 'method.params.betta' is not a known key; did you mean"),
        ("method.name=adpm", "--set method.name=adpm: method: there is no method 'adpm'"),
        ("verify.attacks.a.params.rank=0", "--set verify.attacks.a.params.rank=0: input should be greater"),
        ("seed=no", "--set seed=no: YAML reads yes"),
        ("verify.attacks.a.evasion=nothing", "--set verify.attacks.a.evasion=nothing: "),
        ("verify.looks=[2]", "--set verify.looks=[2]: value error, these have to be shares"),
        ("verify={looks: [1], evaluation_points: [1]}", "--set verify={looks: [1], evaluation_points: [1]}: 'verify.looks'"),
        ("verify.threat_model=open-weights", "--set verify.threat_model=open-weights: verify.threat_model is open-weights"),
        ("judge.levels=none.yaml", "--set judge.levels=none.yaml: judge.levels: there is no file"),
        # The parameters are the file's, and wrong only for the attack that the change names.
        ("verify.attacks.a.name=dreambooth", "--set verify.attacks.a.name=dreambooth: 'verify.attacks.a.params.rank'"),
    ],
)  # fmt: skip
def test_problems_of_a_change_name_the_change_and_not_the_file(write, change, expected):
    path = write("verify: {attacks: {a: {name: lora, params: {rank: 2}}}}")
    lines = problems_of(path, ["seed=3", change, "gate.kid_ratio=3"])
    assert len(lines) == 1 and lines[0].startswith(expected)
    assert "mine.yaml" not in lines[0]


def test_problems_of_the_file_name_the_file_whatever_is_changed_besides(write):
    path = write("sampling: {steps: 1}\nmethod: {params: {inner_steps: 0}}")
    lines = problems_of(path, ["seed=3", "sampling.guidance=0", "method.params.beta=2"])
    by_key = {next(key for key in ("inner_steps", "guidance", "sampling.steps") if key in line): line for line in lines}
    assert len(by_key) == len(lines) == 3
    assert by_key["guidance"].startswith("--set sampling.guidance=0: ")
    for key in ("inner_steps", "sampling.steps"):
        assert by_key[key].startswith(f"{path}: ")
    # The last of two changes of a value is the one that counts, and one that mends the file's value is none.
    assert problems_of(path, ["sampling.steps=4", "method.params.inner_steps=0", "method.params.inner_steps=-1"]) == [
        "--set method.params.inner_steps=-1: input should be greater than 0 (found -1)"
    ]


def test_problems_of_options_and_arguments_name_these(capsys):
    import guardsmith as gs
    from guardsmith.cli import app as cli

    assert cli.main(["harden", "--recipe", "demo", "--method", "adpm", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("--method adpm: method: there is no method 'adpm'")
    assert cli.main(["plan", "demo", "--levels", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("--levels none.yaml: judge.levels: there is no file")
    with pytest.raises(UserError, match=r"^sampling\.steps='few': input should be a valid integer"):
        gs.load_recipe("demo", {"sampling.steps": "few"})
