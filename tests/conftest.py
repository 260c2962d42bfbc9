import gc
import os

# Before anything imports huggingface_hub: no test may depend on the network or on what a cache happens to hold.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Before anything imports torch: on nets this small a second thread only waits (ten times slower on a busy machine).
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def offline():
    from huggingface_hub import constants

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE, "huggingface_hub was imported before conftest.py could switch the network off"


# The longest files, longest first: they begin first, so that no worker waits for the other at the end.
LONG = ("test_verify", "test_harden", "test_families", "test_parallel", "test_deployability", "test_apdm", "test_device",
        "test_attacks", "test_path", "test_single_file", "test_imma", "test_attack_axes", "test_notebook", "test_cloaks",
        "test_cli_check", "test_audit", "test_docs", "test_compute", "test_odd_bases", "test_publish_hub", "test_benchmark",
        "test_leaks", "test_purifiers", "test_tripwire_method", "test_vision", "test_api", "test_processes",
        "test_persguard")  # fmt: skip


def pytest_collection_modifyitems(items):
    # What was imported stays to the end: without it a full collection costs a few milliseconds instead of a third of a second.
    gc.collect()
    gc.freeze()
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


USERS = ("guardsmith.runtime.executors.processes",)


@pytest.fixture(scope="session", autouse=True)
def jobs_in_this_process():
    """What would run in processes runs here (see inprocess.py); commands that tests start as processes do as they always do."""
    import inprocess

    with pytest.MonkeyPatch.context() as patch:
        for name in USERS:
            patch.setattr(name, inprocess.processes)
        yield


@pytest.fixture(scope="session", autouse=True)
def shipped_tables_are_read_once():
    """The embedded base's negatives are thousands of pictures, and every command that plans a run reads them for seconds."""
    from guardsmith.registry import images

    read, known, shipped = images._dataset_files, {}, str(Path(images.__file__).parents[2])

    def once(entry, folder):
        if shipped not in str(entry.dataset):
            return read(entry, folder)
        key = (entry.dataset, os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))
        if key not in known:
            known[key] = read(entry, folder)
        return list(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_dataset_files", once)
        yield


IRRELEVANT = {
    "steps", "outer_steps", "inner_steps", "class_images", "benign_images", "learning_rate", "personalization_learning_rate",
}  # fmt: skip
"""What does not matter to the memory of a hardening."""


@pytest.fixture(scope="session", autouse=True)
def forecasts_measure_once():
    """Every command that hardens or plans says what it will take: memory, counted on a network of the base's shape, and time, of
    a few timed forwards. The first of a base and method measures; test_memory.py has what these functions do. Where a copy of the
    base lies does not matter to the memory."""
    from guardsmith.evaluation import forecast
    from guardsmith.models.checkpoint import DiffusionModel, resolve

    estimate, timed, known = forecast.estimate, forecast.seconds_per_forward, {}
    other = forecast.other_seconds

    def estimated(recipe, method, config, *, loaded=0):
        folder = resolve(recipe.base, recipe.revision)
        base = [(file.relative_to(folder), file.read_bytes()) for file in sorted(folder.glob("**/*config.json"))]
        base += [(file.relative_to(folder), file.stat().st_size) for file in sorted(folder.glob("*/*.safetensors"))]
        settings = config.model_dump(exclude=IRRELEVANT)
        key = "GiB", repr(base), recipe.method.name, repr(settings), repr(recipe.compute)
        if key not in known:
            known[key] = estimate(recipe, method, config, loaded=loaded)
        return known[key]

    def seconds(model):
        if not isinstance(model, DiffusionModel):
            return timed(model)
        key = "seconds", repr(model.unet.config)
        if key not in known:
            known[key] = timed(model)
        return known[key]

    def others(spec, model):
        key = "other", repr(spec), repr(model.unet.config)
        if key not in known:
            known[key] = other(spec, model)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "other_seconds", others)
        patch.setattr(forecast, "estimate", estimated)
        patch.setattr(forecast, "seconds_per_forward", seconds)
        yield


@pytest.fixture(scope="session", autouse=True)
def the_command_line_is_built_once():
    """Typer builds all commands anew, for a twentieth of a second, whenever the same process runs one of them."""
    import typer.main

    from guardsmith.cli.app import app

    build, built = typer.main.get_command, {}

    def once(typed):
        if typed is not app:
            return build(typed)
        return built.setdefault("app", built.get("app") or build(typed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", once)
        yield


@pytest.fixture
def real_processes(monkeypatch):
    """For tests of what only processes of their own can show."""
    from guardsmith.runtime.processes import processes

    for name in USERS:
        monkeypatch.setattr(name, processes)


@pytest.fixture(scope="session")
def epsilon_folder(tmp_path_factory):
    """A tiny checkpoint that predicts noise, on Stable Diffusion 1's schedule; copy it before changing it."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "epsilon", "epsilon")


@pytest.fixture(scope="session")
def v_folder(tmp_path_factory):
    """A tiny checkpoint that predicts velocity, on the cosine schedule; copy it before changing it."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_epsilon(epsilon_folder):
    """`epsilon_folder` in memory; nothing may change it."""
    from guardsmith.models.checkpoint import load_model

    return load_model(str(epsilon_folder))


@pytest.fixture(scope="session")
def tiny_v(v_folder):
    """`v_folder` in memory; nothing may change it."""
    from guardsmith.models.checkpoint import load_model

    return load_model(str(v_folder))


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """A checkpoint like `v_folder`'s whose U-Net is wide enough for the tripwire; copy it before changing it."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "wide", "v_prediction", wide=True)


@pytest.fixture(scope="session")
def wide_v(wide_folder):
    """`wide_folder` in memory; nothing may change it."""
    from guardsmith.models.checkpoint import load_model

    return load_model(str(wide_folder))


@pytest.fixture(scope="session")
def wide_trunk(wide_v, tmp_path_factory):
    """File of a trunk of `wide_v`."""
    from tiny import untaught_trunk

    return untaught_trunk(wide_v, tmp_path_factory.mktemp("trunks") / "wide.safetensors")


@pytest.fixture(params=["epsilon", "v_prediction"])
def tiny(request):
    """Both tiny models, one after the other."""
    return request.getfixturevalue({"epsilon": "tiny_epsilon", "v_prediction": "tiny_v"}[request.param])


@pytest.fixture
def few_steps(monkeypatch):
    """Schedulers of the check "samplers" take two steps, whatever is asked for; the steps that were, in their order."""
    from guardsmith.evaluation.deployability import samplers

    asked, sampled = [], samplers.sampled

    def shortened(bench, side, kind, steps, *further, **settings):
        asked.append(steps)
        return sampled(bench, side, kind, 2, *further, **settings)

    monkeypatch.setattr(samplers, "sampled", shortened)
    return asked


@pytest.fixture
def nothing_compiled(monkeypatch):
    """`torch.compile` costs ten seconds; test_deployability.py has it for a U-Net, test_families.py for a transformer."""
    from guardsmith.evaluation.deployability import samplers

    monkeypatch.setattr(samplers, "compiled", samplers.sliced)
