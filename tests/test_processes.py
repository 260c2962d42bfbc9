"""Work in processes: one thread each, news on the way, nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import assert_one_sentence

from guardsmith.core.errors import RunFailed
from guardsmith.runtime.processes import gather, processes, send


@pytest.fixture(scope="module")
def two():
    """A pool of two and its queue, for tests that leave it as it is: every process imports torch, for seconds."""
    with processes(2) as both:
        yield both


def test_processes_have_one_thread_and_leave_ctrl_c_to_the_first(two):
    pool, _ = two
    assert pool.submit(torch.get_num_threads).result() == 1
    assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_all_news_arrives(two):
    seen, (pool, queue) = [], two
    gather([pool.submit(send, n) for n in range(20)], queue, seen.append)
    assert sorted(seen) == list(range(20))


def test_an_error_in_a_process_reaches_the_caller(two):
    pool, queue = two
    with pytest.raises(ZeroDivisionError):
        gather([pool.submit(divmod, 1, 0)], queue, print)


def test_a_killed_process_is_said_in_one_sentence():
    with pytest.raises(RunFailed) as caught, processes(1) as (pool, queue):
        gather([pool.submit(os._exit, 9), pool.submit(time.sleep, 0)], queue, print)
    assert_one_sentence(caught.value)
    assert "run the same command again" in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_is_left_running_after_an_error(error):
    began, others = time.monotonic(), multiprocessing.active_children()
    with pytest.raises(error), processes(1) as (pool, _):
        sleeping = [pool.submit(time.sleep, 60) for _ in range(3)]
        while not any(future.running() for future in sleeping):
            time.sleep(0.05)
        raise error
    assert time.monotonic() - began < 30
    assert set(multiprocessing.active_children()) <= {*others}, "those of a pool before it may have ended meanwhile"


SLEEPER = """
import os, sys, time
from guardsmith.runtime.processes import processes
if __name__ == "__main__":
    with processes(1) as (pool, _):
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60).result()
"""


def test_nothing_is_left_running_after_a_kill(tmp_path):
    """The first process gets no chance to end the others."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    first = subprocess.Popen([sys.executable, str(tmp_path / "sleeper.py")], stdout=subprocess.PIPE, text=True)
    worker = int(first.stdout.readline())
    time.sleep(0.5)
    os.kill(worker, 0)  # it is there
    first.kill()
    first.wait()
    for _ in range(100):
        if not running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the process went on")


def running(pid):
    """Whether there is such a process that has not ended (one that nobody waited for still has a number)."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
