"""Work in processes of one thread each, which on small models is faster than one process with many threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from guardsmith.core.errors import RunFailed
from guardsmith.core.progress import quiet_libraries
from guardsmith.runtime.cores import usable_cores
from guardsmith.runtime.device import chosen_device

_queue: Any = None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start(queue: Any) -> None:
    global _queue
    _queue = queue
    # A killed process cannot end its children; without this they would finish what they were at, for minutes.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    torch.set_num_threads(1)
    quiet_libraries()


def send(message: Any) -> None:
    """Called in a worker process: send a small message to the process that waits in `gather`."""
    _queue.put(message)


def usual_count() -> int:
    """Processes that run at the same time by default: one per usable core, one with an accelerator."""
    return usable_cores() if chosen_device().type == "cpu" else 1


@contextmanager
def processes(count: int | None = None) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """A pool of `count` processes and the queue of their messages; by default one per usable core, one with an accelerator.

    On an exception, Ctrl-C included, they are ended.

    Raises:
        RunFailed: one of them was killed.
    """
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    queue = context.SimpleQueue()  # without a thread behind it: a message is there before its sender's job ends
    pool = ProcessPoolExecutor(count or usual_count(), mp_context=context, initializer=_start, initargs=(queue,))
    try:
        yield pool, queue
        pool.shutdown()
    except BaseException as error:
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RunFailed("a process was killed (out of memory?); run the same command again to go on.") from error
        raise


def gather(running: list[Future[Any]], queue: Any, on_message: Callable[[Any], None]) -> None:
    """Wait for all jobs, handing on the messages that their processes send.

    Raises:
        Exception: the first one that a job raised.
    """
    left = True
    while left:
        left = bool(wait(running, timeout=0.2).not_done)
        while not queue.empty():
            on_message(queue.get())
        for future in running:
            if future.done():
                future.result()
