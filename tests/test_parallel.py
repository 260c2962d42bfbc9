"""Several processes harden together, as `accelerate launch` starts them: the weights of one, written by the first."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import several_jobs
import torch
import yaml
from safetensors.torch import load_file
from tiny import largest_difference

import guardsmith.training.optimizers  # noqa: F401 (derives from AdamW, so it comes before `alone` replaces that)
from guardsmith.cli.app import main
from guardsmith.runtime import distributed as parallel
from guardsmith.runtime.distributed import all_gather, own_rows

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
METHODS = {
    "apdm": {"outer_steps": 3, "inner_steps": 2, "class_images": 4, "learning_rate": 1e-4, "distillation_weight": 1.0,
             "benign_images": 4, "train_text_encoder": True},
    "persguard": {"steps": 4, "batch_size": 1, "class_images": 4, "benign_images": 4, "learning_rate": 1e-4},
    "imma": {"steps": 4, "batch_size": 3, "class_images": 4, "benign_images": 4, "distillation_weight": 1.0,
             "learning_rate": 1e-4},
}  # fmt: skip
TRIPWIRE = {"trunk_steps": 2, "trunk_batch_size": 2, "steps": 3, "positives": 4, "negatives": 8, "copies": 1,
            "class_images": 4, "benign_images": 4, "early_steps": [1], "early_images": 2, "early_sampling_steps": 2}  # fmt: skip
"""Of a base that is wide enough."""
EVERY = METHODS | {"tripwire": TRIPWIRE}
SHARDED = ["apdm", "persguard"]
"""Of which the first also resets its optimizers."""
UNET = "model/unet/diffusion_pytorch_model.safetensors"


def recipe_for(method, base, folder, **params):
    file = folder / f"{method}.yaml"
    asked = {
        "base": str(base), "subjects": str(ROOT / "registries" / "demo.yaml"),
        "sampling": {"steps": 2, "guidance": 3.0, "batch": 32}, "probe": {"times": 1, "pictures": 1},
        "method": {"name": method, "params": EVERY[method] | params},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(asked))
    return file


# With --cpu accelerate starts one process, whatever the number; this way it starts two, which find no GPU and compute here.
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def driven(folder, *jobs):
    """Arguments of `several_jobs.run` for a process of two, which does the jobs one after the other."""
    port = 20_000 + os.getpid() % 10_000 + len(str(jobs)) % 100
    return [[str(word) for word in job] for job in jobs], port, str(folder)


def launched_as(rank, folder, job):
    """One process of two."""
    told = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    return forked.start(several_jobs.run, *driven(folder, job), streams=folder / f"streams{rank}", **told)


def alone(*jobs):
    """The same jobs in this process, with the AdamW of several_jobs.py: to one of the usual eps, a gradient that is nothing but
    rounding errors is a step of any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
        for job in jobs:
            assert main([str(word) for word in job]) in (0, 4)  # 4: see several_jobs.py


@pytest.fixture(scope="module")
def bases(v_folder, wide_folder):
    """The base of every method."""
    return dict.fromkeys(METHODS, v_folder) | {"tripwire": wide_folder}


def killed_on_the_way(job, output):
    """Two processes, the second of which is killed after their first checkpoint.

    Returns:
        What the first says, its exit code, and whether there is a checkpoint and nothing that says the run is complete.
    """
    saved, streams = output / "checkpoints/last.safetensors", output.with_name("streams")
    streams.mkdir()
    running = [launched_as(rank, streams, job) for rank in range(2)]
    until = time.monotonic() + 200
    while not saved.exists() and time.monotonic() < until and running[0].is_alive():
        time.sleep(0.02)
    running[1].kill()
    for process in running:
        process.join(timeout=100)
    said = (streams / "err0").read_text()
    return said, running[0].exitcode, saved.exists() and not (output / "harden.json").exists()


@dataclasses.dataclass
class Launched:
    """What the launches of this file left: a process starts for seconds, so that two of them do every job but the killed one.

    Attributes:
        place: the folder of every output.
        killed: see `killed_on_the_way`.
        jobs: how many the two processes did.
        code: of the launcher.
        streams: output and error stream of each of the two.
    """

    place: Path
    killed: tuple
    jobs: int
    code: int
    streams: list


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
    long = ("harden", "--recipe", recipe_for("persguard", bases["persguard"], place / "long", steps=25), "--output")
    killed = killed_on_the_way((*long, place / "killed"), place / "killed")
    jobs += [(*long, place / "killed", "--resume"), (*long, place / "unbroken")]
    for method in SHARDED:
        recipe = recipe_for(method, bases[method], place / "sharded")
        recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"compute": {"optimizer": "sharded"}}))
        jobs.append(("harden", "--recipe", recipe, "--output", place / f"{method}-sharded"))
    job_list, port, folder = driven(place, *jobs)
    command = [sys.executable, *ACCELERATE, several_jobs.__file__, json.dumps(job_list), str(port), folder]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, timeout=300, capture_output=True, check=False)
    assert (place / "err1").exists(), done.stderr.decode()
    streams = [[(place / f"{stream}{rank}").read_text() for stream in ("out", "err")] for rank in range(2)]
    return Launched(place, killed, len(jobs), done.returncode, streams)


def test_accelerate_launches_them_and_the_second_neither_fails_nor_talks(hardened):
    first, second = hardened.streams
    assert hardened.code == 0, first[1] + second[1]
    assert first[1].count("hardened on 1 subjects") == hardened.jobs
    assert second == ["", ""]


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
