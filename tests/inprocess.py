"""Jobs in this process, in the place of `guardsmith.runtime.processes`: every new process imports torch, for four seconds."""

import contextlib
import pickle
from collections import deque
from concurrent.futures import Future

from guardsmith.runtime import processes as real


class Queue:
    """What `processes` hands out for messages: they are copied, as on the way between two processes."""

    def __init__(self):
        self.messages = deque()

    def put(self, message):
        self.messages.append(pickle.dumps(message))

    def get(self):
        return pickle.loads(self.messages.popleft())

    def empty(self):
        return not self.messages


class Pool:
    """Does a job when it is submitted. Function, arguments, result and exception are copied: what cannot be, fails."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            function, arguments = pickle.loads(pickle.dumps((function, arguments)))
            future.set_result(pickle.loads(pickle.dumps(function(*arguments))))
        except Exception as error:
            future.set_exception(pickle.loads(pickle.dumps(error)))
        return future


@contextlib.contextmanager
def processes(count=None):
    """In the place of `guardsmith.runtime.processes.processes`."""
    from guardsmith.evaluation import loaded

    before, queue = real._queue, Queue()
    real._queue = queue
    loaded.forget()  # a new process has loaded nothing yet
    try:
        yield Pool(), queue
    finally:
        real._queue = before
        loaded.forget()


def command(arguments):
    """`guardsmith` with its jobs in the same process, for `forked.start`; returns the exit code."""
    from guardsmith.cli.app import main
    from guardsmith.runtime import executors

    executors.processes = processes
    return main(arguments)
