"""Jobs somewhere: in processes of this machine, and on a Ray that starts here (where it is installed)."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
from some_jobs import Job, lost, lost_once, write
from tiny import assert_one_sentence

from guardsmith.core.errors import RunFailed, UserError
from guardsmith.runtime.executors import check_executor, run_all

WITH_RAY = importlib.util.find_spec("ray") is not None
EVERYWHERE = ["local", pytest.param("ray", marks=pytest.mark.skipif(not WITH_RAY, reason="Ray is not installed"))]
pytestmark = pytest.mark.usefixtures("real_processes")
needs_ray = pytest.mark.skipif(not WITH_RAY, reason="Ray is not installed")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers of Ray import this module."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))


@pytest.mark.parametrize("executor", EVERYWHERE)
def test_every_job_is_done_and_what_it_raised_comes_back(tmp_path, executor):
    jobs = [Job(str(tmp_path), number) for number in range(6)]
    found = dict(run_all(write, jobs, executor=executor, workers=2))
    assert set(found) == set(jobs)
    assert {job.number for job, error in found.items() if error is None} == {0, 1, 2, 5}
    assert isinstance(found[jobs[3]], UserError) and str(found[jobs[3]]) == "number 3 is not wanted"
    assert isinstance(found[jobs[4]], ZeroDivisionError)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1", "2", "5"]
    assert str(os.getpid()) not in {file.read_text() for file in tmp_path.iterdir()}


@needs_ray
def test_ray_gives_the_job_of_a_killed_worker_to_another(tmp_path):
    jobs = [Job(str(tmp_path), number) for number in range(3)]
    assert all(error is None for _, error in run_all(lost_once, jobs, executor="ray", workers=1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1", "2", "begun-1"]


@needs_ray
def test_a_job_that_kills_every_worker_ends_the_run(tmp_path):
    with pytest.raises(RunFailed, match="lost a job's worker") as caught:
        list(run_all(lost, [Job(str(tmp_path), 0)], executor="ray", workers=1))
    assert_one_sentence(caught.value)


@needs_ray
def test_no_cluster_at_the_address_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no Ray cluster at RAY_ADDRESS=127\.0\.0\.1:1") as caught:
        list(run_all(write, [Job(str(tmp_path), 0)], executor="ray"))
    assert_one_sentence(caught.value)
    assert time.monotonic() - began < 60


def test_a_killed_process_here_ends_the_run(tmp_path):
    with pytest.raises(RunFailed, match="run the same command again"):
        list(run_all(lost, [Job(str(tmp_path), 0)], workers=1))


def test_an_unknown_executor_is_one_sentence():
    with pytest.raises(UserError, match="choose local or ray") as caught:
        check_executor("slurm")
    assert_one_sentence(caught.value)


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install guardsmith\[ray\]") as caught:
        check_executor("ray")
    assert_one_sentence(caught.value)
