"""Where the attacks of a verification run: processes of this machine, or a Ray cluster.

Jobs are independent and leave their results in files that every machine has to see (one that is done already is not a job any
more), so a lost worker costs the job that it had: Ray gives it to another one, and a killed verification goes on with what is
missing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.progress import quiet_libraries
from guardsmith.runtime.cores import usable_cores
from guardsmith.runtime.device import DETERMINISTIC, VARIABLE, chosen_device
from guardsmith.runtime.processes import processes

EXECUTORS = ("local", "ray")
ADDRESS = "RAY_ADDRESS"
"""Environment variable with the cluster's address, as Ray has it; without it Ray starts on this machine."""
INHERITED = (VARIABLE, DETERMINISTIC, "HF_HUB_OFFLINE", "HF_HOME")
"""Environment variables that its workers get."""
RETRIES = 3  # workers that a job may lose

Job = TypeVar("Job")


def run_all(
    function: Callable[[Job], object], jobs: Sequence[Job], *, executor: str = "local", workers: int | None = None
) -> Iterator[tuple[Job, Exception | None]]:
    """Call a function with every job, in processes of this machine or on a Ray cluster.

    Args:
        function: importable where it runs; its results are not brought back.
        jobs: its arguments, each on its own.
        executor: one of `EXECUTORS`.
        workers: jobs that run at the same time: in processes of this machine, or of a Ray that starts here.

    Yields:
        Each job when it has ended, with the exception that it raised, or `None`.

    Raises:
        UserError: there is no Ray here, or no cluster at its address.
        RunFailed: a process was killed, or too many workers were lost.
    """
    if executor == "ray":
        yield from _with_ray(function, jobs, workers)
        return
    with processes(workers) as (pool, _):
        running = {pool.submit(function, job): job for job in jobs}
        for future in as_completed(running):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            if error is not None and not isinstance(error, Exception):
                raise error
            yield running[future], error


def check_executor(executor: str) -> None:
    """Whether work can be sent there.

    Raises:
        UserError: it is none of `EXECUTORS`, or Ray is not installed.
    """
    if executor not in EXECUTORS:
        raise UserError(f"--executor {executor}: choose {' or '.join(EXECUTORS)}")
    if executor == "ray":
        _ray()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install guardsmith[ray]") from None
    return ray


def _call(function: Callable[[Job], object], job: Job, variables: dict[str, str]) -> None:
    """Run a job in a worker of Ray, set up as the processes of this machine are (see `guardsmith.runtime.processes`)."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    quiet_libraries()
    function(job)


def check_reachable(address: str) -> None:
    """Check that a server answers at host:port, for which Ray itself takes minutes.

    Raises:
        UserError: none does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto" and other words of Ray's
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"there is no Ray cluster at {ADDRESS}={address} ({error})") from error


def _with_ray(
    function: Callable[[Job], object], jobs: Sequence[Job], workers: int | None
) -> Iterator[tuple[Job, Exception | None]]:
    ray = _ray()
    address, device = os.environ.get(ADDRESS), chosen_device()
    here = {"num_cpus": workers or usable_cores(), "include_dashboard": False} if address is None else {}
    if address is not None:
        check_reachable(address)
    variables = {name: os.environ[name] for name in INHERITED if name in os.environ}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"there is no Ray cluster at {ADDRESS}={address} ({reason})") from error
    try:
        share = {"num_cpus": 1} if device.type == "cpu" else {"num_cpus": 1, "num_gpus": 1}
        remote = ray.remote(max_retries=RETRIES, **share)(_call)
        running = {remote.remote(function, job, variables): job for job in jobs}
        while running:
            [ready], _ = ray.wait(list(running), num_returns=1)
            failure: Exception | None = None
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                failure = error.cause if isinstance(error.cause, Exception) else error
            except ray.exceptions.RayError as lost:
                raise RunFailed(
                    f"Ray lost a job's worker {RETRIES + 1} times (out of memory?); run the same command again to go on."
                ) from lost
            yield running.pop(ready), failure
    finally:
        ray.shutdown()
