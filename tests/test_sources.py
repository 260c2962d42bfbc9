"""A folder or a Hub id: paths at which nothing is are refused by every command and every setting that takes either."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from guardsmith.cli.app import main
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.sources import check_source, is_path
from guardsmith.models.checkpoint import resolve

REGISTRY = str(Path(__file__).parent.parent / "registries/demo.yaml")
PATHS = [
    "./models/sd15", "../sd15", ".hidden/sd15", "/models/sd15", "~/models/sd15", "a/b/c", "sd15/", "owner/sd15/",
    "sd15.safetensors", "owner/sd15.SAFETENSORS", "models\\sd15", "here/sd15",
]  # fmt: skip
IDS = ["owner/name", "Owner-1/na.me_2", "nowhere/sd15"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with a folder `here` in it."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()


@pytest.mark.parametrize("source", PATHS)
def test_paths_at_which_nothing_is_are_refused_before_the_hub_is_asked(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert is_path(source)
    with pytest.raises(UserError, match=r"^there is no base model at ") as caught:
        resolve(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", IDS)
def test_what_can_be_a_hub_id_is_asked_for_and_the_failure_names_both(source):
    assert not is_path(source)
    check_source(source, "base model")
    with pytest.raises(
        RunFailed, match=f"^{source}: there is no folder of this name, it is not in the local Hub cache"
    ):
        resolve(source)


def test_what_is_there_is_a_path_and_no_problem():
    Path("here/sd15").mkdir()
    for source in ("here", "here/sd15", "./here/"):
        assert is_path(source)
        check_source(source, "base model")


def test_a_parent_folder_that_is_here_is_named_as_the_reason():
    with pytest.raises(UserError, match="the folder here is here and holds no sd15"):
        check_source("here/sd15", "base model")


def test_an_id_that_the_local_cache_has_is_no_path_although_a_folder_is_called_like_its_owner(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert is_path("here/sd15")
    (tmp_path / "cache/models--here--sd15").mkdir(parents=True)
    assert not is_path("here/sd15") and is_path("here/sd21")


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "demo"],
        ["run", "demo", "--output", "out"],
        ["harden", "--recipe", "demo", "--output", "out"],
        ["harden", "--method", "apdm", "--output", "out"],
        ["harden", "--recipe", "demo", "--output", "out", "--dry-run"],
        ["verify", "out", "--model", "builtin:avatar"],
    ],
)
@pytest.mark.parametrize("source", ["./models/sd15", "here/sd15"])
def test_every_command_with_a_base_ends_with_2_and_writes_nothing(words, source, capsys):
    assert main([*words, "--base", source, "--subjects", REGISTRY]) == 2
    assert f"there is no base model at {source}" in capsys.readouterr().err
    assert not Path("out").exists()


def test_so_do_those_that_take_another_source(capsys):
    Path("faces/person/one").mkdir(parents=True)
    for words, what in (
        (["check", REGISTRY, "--base", "here/sd15"], "base model"),
        (["verify", "out", "--model", "here/sd15", "--subjects", REGISTRY], "base model"),
        (["audit-release", "here/sd15"], "release"),
        (["policy", "--judge", "dino", "--judge-model", "here/sd15", "--subjects", REGISTRY], "judge"),
    ):
        assert main(words) == 2, words
        assert f"there is no {what} at here/sd15" in capsys.readouterr().err


def test_settings_of_a_recipe_are_checked_before_anything_is_drawn(capsys):
    for setting in ("controlnet", "t2i_adapter"):
        key = f"verify.deployability.{setting}"
        assert main(["plan", "demo", "--subjects", REGISTRY, "--set", f"{key}=here/{setting}"]) == 2
        assert f"there is no {key} at here/{setting}" in capsys.readouterr().err
    skipped = ["--set", "verify.deployability.checks=[precision]"]
    assert main(["plan", "demo", "--subjects", REGISTRY, "--set", f"{key}=here/x", *skipped]) == 0


def test_purifiers_refuse_them_too():
    from guardsmith.purifiers.pixel_model import load_pixel_model
    from guardsmith.purifiers.restore import RestoreConfig, upscaled

    with pytest.raises(UserError, match="there is no pixel diffusion model at here/ddpm"):
        load_pixel_model("here/ddpm")
    with pytest.raises(UserError, match="there is no upscaler at here/x4"):
        upscaled(None, RestoreConfig(upscaler="here/x4"), "person", 0)


@pytest.mark.parametrize(("known_not_to_be", "code"), [(True, 2), (False, 0)])
def test_a_plan_stops_where_the_hub_says_that_there_is_no_such_model(known_not_to_be, code, monkeypatch, capsys):
    """Without the Hub the plan may be for another machine, so it warns only; either says what was not found."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    def refuse(*_, **__):
        response = SimpleNamespace(headers={}, request=None, status_code=404 if known_not_to_be else 503)
        raise (RepositoryNotFoundError if known_not_to_be else HfHubHTTPError)("no answer", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert main(["plan", "demo", "--base", "owner/name", "--subjects", REGISTRY]) == code
    out = capsys.readouterr()
    assert "owner/name: there is no folder of this name, and the Hub did not give such a model" in out.out
    assert ("owner/name: there is no folder" in out.err) == known_not_to_be


def test_the_default_base_is_no_path():
    assert not is_path(Recipe().base) and resolve(Recipe().base).is_dir()
