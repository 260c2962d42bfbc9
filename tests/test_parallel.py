"""Several processes harden together, as `accelerate launch` starts them: the weights of one, written by the first."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import largest_difference

import guardsmith.training.optimizers  # noqa: F401 (derives from AdamW, so it comes before `alone` replaces that)
from guardsmith.cli.app import main
from guardsmith.runtime import distributed as parallel
from guardsmith.runtime.distributed import all_gather, own_rows

ROOT = Path(__file__).parent.parent
METHODS = {
    "apdm": {"outer_steps": 3, "inner_steps": 2, "class_images": 4, "learning_rate": 1e-4, "distillation_weight": 1.0,
             "benign_images": 4, "train_text_encoder": True},
    "persguard": {"steps": 4, "batch_size": 1, "class_images": 4, "benign_images": 4, "learning_rate": 1e-4},
    "imma": {"steps": 4, "batch_size": 3, "class_images": 4, "benign_images": 4, "distillation_weight": 1.0,
             "learning_rate": 1e-4},
}  # fmt: skip
TRIPWIRE = {"trunk_steps": 2, "trunk_batch_size": 2, "steps": 3, "positives": 4, "negatives": 8, "copies": 1,
            "class_images": 4, "benign_images": 4}  # fmt: skip
"""Of a base that is wide enough."""
EVERY = METHODS | {"tripwire": TRIPWIRE}
SHARDED = ["apdm", "persguard"]
"""Of which the first also resets its optimizers."""
UNET = "model/unet/diffusion_pytorch_model.safetensors"


def recipe_for(method, base, folder, **params):
    file = folder / f"{method}.yaml"
    asked = {
        "base": str(base), "subjects": str(ROOT / "registries" / "demo.yaml"),
        "sampling": {"steps": 3, "guidance": 3.0, "batch": 32}, "probe": {"times": 2},
        "method": {"name": method, "params": EVERY[method] | params},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(asked))
    return file


DRIVER = """
import functools, json, os, sys, torch
import guardsmith.training.optimizers
from guardsmith.cli.app import main
from guardsmith.methods import METHODS
METHODS["persguard"].checkpoint_every = 5
torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-3)
for number, arguments in enumerate(json.loads(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(int(sys.argv[2]) + number)
    code = main(arguments)
    # A few steps of Tripwire wreck the model, which `harden` says with code 4; the weights are what is compared.
    if code and not os.path.exists(os.path.join(arguments[arguments.index("--output") + 1], "harden.json")):
        sys.exit(code)
"""


def launched_as(rank, *jobs):
    """One process of two, which does several jobs one after the other."""
    told = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    port = 20_000 + os.getpid() % 10_000 + len(str(jobs)) % 100
    command = [sys.executable, "-c", DRIVER, json.dumps([[str(word) for word in job] for job in jobs]), str(port)]
    return subprocess.Popen(
        command, env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def alone(*jobs):
    """The same jobs in this process, with the AdamW of DRIVER: to one of the usual eps, a gradient that is nothing but rounding
    errors is a step of any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
        for job in jobs:
            assert main([str(word) for word in job]) in (0, 4)  # 4: see `DRIVER`


def both(*jobs):
    running = [launched_as(rank, *jobs) for rank in range(2)]
    return [(process.communicate(timeout=300), process.returncode) for process in running]


@pytest.fixture(scope="module")
def bases(v_folder, wide_folder):
    """The base of every method."""
    return dict.fromkeys(METHODS, v_folder) | {"tripwire": wide_folder}


def killed_on_the_way(job, output):
    """Two processes, the second of which is killed after their first checkpoint.

    Returns:
        What the first says, its exit code, and whether there is a checkpoint and nothing that says the run is complete.
    """
    saved = output / "checkpoints/last.safetensors"
    running = [launched_as(rank, job) for rank in range(2)]
    until = time.monotonic() + 200
    while not saved.exists() and time.monotonic() < until and running[0].poll() is None:
        time.sleep(0.02)
    running[1].send_signal(signal.SIGKILL)
    _, said = running[0].communicate(timeout=100)
    running[1].wait(timeout=10)
    return said, running[0].returncode, saved.exists() and not (output / "harden.json").exists()


@dataclasses.dataclass
class Launched:
    """What the launches of this file left: a process starts for seconds, so that two of them do every job but the first.

    Attributes:
        place: the folder of every output.
        killed: see `killed_on_the_way`.
        jobs: how many the two processes did.
        processes: output and error stream of each, and its exit code.
    """

    place: Path
    killed: tuple
    jobs: int
    processes: list


@pytest.fixture(scope="module")
def hardened(bases, tmp_path_factory):
    """Every method, by one process and by two; a run that is killed and goes on; methods with half of the moments each."""
    place = tmp_path_factory.mktemp("parallel")
    jobs = [
        ("harden", "--recipe", recipe_for(method, bases[method], place), "--output", place / method) for method in EVERY
    ]
    alone(*((*job, f"{output}-alone") for *job, output in jobs))
    for name in ("long", "sharded"):
        (place / name).mkdir()
    long = ("harden", "--recipe", recipe_for("persguard", bases["persguard"], place / "long", steps=40), "--output")
    killed = killed_on_the_way((*long, place / "killed"), place / "killed")
    jobs += [(*long, place / "killed", "--resume"), (*long, place / "unbroken")]
    for method in SHARDED:
        recipe = recipe_for(method, bases[method], place / "sharded")
        recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"compute": {"optimizer": "sharded"}}))
        jobs.append(("harden", "--recipe", recipe, "--output", place / f"{method}-sharded"))
    return Launched(place, killed, len(jobs), both(*jobs))


def test_the_second_process_neither_fails_nor_talks(hardened):
    first, second = hardened.processes
    assert first[1] == second[1] == 0, first[0][1] + second[0][1]
    assert first[0][1].count("hardened on 1 subjects") == hardened.jobs
    assert second[0] == ("", "")


@pytest.mark.parametrize("method", list(EVERY))
def test_two_processes_give_the_weights_of_one(bases, hardened, method):
    """Also where the rows do not come out even."""
    one, two = hardened.place / f"{method}-alone", hardened.place / method
    for part in ["unet/diffusion_pytorch_model"] + ["text_encoder/model"] * (method == "apdm"):
        base, alone, together = (
            load_file(folder / f"{part}.safetensors") for folder in (bases[method], one / "model", two / "model")
        )
        assert max(float((alone[name] - base[name]).abs().max()) for name in base) > 1e-5
        for name, value in alone.items():
            scale = max(1.0, float(value.abs().max()))
            assert (value - together[name]).abs().max() < 2e-5 * scale, name
    told = [json.loads((folder / "harden.json").read_text()) for folder in (one, two)]
    for key in ("subjects", "seed", "params", "base_digest"):
        assert told[0][key] == told[1][key]
    counted = [each["unet_forward_equivalents"] for each in told]
    assert counted[0] <= counted[1] <= 1.3 * counted[0], "rows that fill up the shares count"
    assert len(told[1]["probes"]) == len(told[0]["probes"]) > 0
    assert {file.name for file in two.iterdir()} == {file.name for file in one.iterdir()}


def test_accelerate_launches_it(v_folder, tmp_path):
    recipe = recipe_for("persguard", v_folder, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "guardsmith",
         "harden", "--recipe", str(recipe), "--output", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("hardened on 1 subjects") == 1
    assert (tmp_path / "out/model/model_index.json").is_file()


def test_the_shipped_configuration_is_one_of_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file

    told = load_config_from_file(str(ROOT / "docs" / "how-to" / "accelerate.yaml"))
    assert (told.num_processes, told.num_machines, told.mixed_precision) == (4, 1, "no")
    assert told.distributed_type == "MULTI_GPU" and not told.use_cpu


def test_a_killed_process_ends_the_run_and_it_goes_on_later(hardened):
    """The other one says so and keeps the last checkpoint; with --resume the weights are those of an unbroken run."""
    said, code, only_a_checkpoint = hardened.killed
    assert code == 4 and only_a_checkpoint
    assert "another process of this run has ended" in said and "Traceback" not in said
    assert json.loads((hardened.place / "killed/harden.json").read_text())["resumed_after"] >= 5
    resumed, unbroken = (load_file(hardened.place / name / UNET) for name in ("killed", "unbroken"))
    assert largest_difference(resumed, unbroken) == 0


@pytest.mark.parametrize("method", SHARDED)
def test_shared_moments_give_the_weights_of_one_process(bases, hardened, method):
    """Two processes with half of the moments each; one process alone has all of them."""
    single, shared = (load_file(hardened.place / f"{method}-{name}" / UNET) for name in ("alone", "sharded"))
    assert largest_difference(single, shared) < 2e-5
    record = json.loads((hardened.place / f"{method}-sharded/harden.json").read_text())
    assert record["compute"]["optimizer"] == "sharded"
    assert largest_difference(load_file(bases[method] / "unet/diffusion_pytorch_model.safetensors"), single) > 1e-5


def test_a_mistake_is_told_once_and_other_commands_are_not_for_several_processes(monkeypatch, capsys, tmp_path):
    for rank, told in ((0, True), (1, False)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        assert main(["harden", "--recipe", "no-such-recipe", "--output", str(tmp_path / "out")]) == 2
        assert ("no-such-recipe" in capsys.readouterr().err) is told
        assert main(["verify", str(tmp_path)]) == 2
        assert ("run guardsmith verify without a launcher" in capsys.readouterr().err) is told


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_row_is_somebodys(monkeypatch, rank):
    """Seven rows, three processes: three each, the last two of which begin again."""
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: rank)
    assert own_rows(7).tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 1]][rank]
    assert own_rows(2).tolist() == [[0], [1], [0]][rank]


def test_one_process_computes_everything_itself():
    part = torch.rand(3, 2)
    assert own_rows(3) is None
    assert all_gather(part, 3) is part
