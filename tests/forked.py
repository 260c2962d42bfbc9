"""Processes of their own that begin at once: forked from one that has imported what commands import, which takes six seconds.

They have their own number, environment, streams, signals and exit code. What an interpreter does before a command begins is not
seen this way; test_quiet_libraries.py and test_cli_check.py have that.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

HERE = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")


def _serve():
    """Start the process that the others are forked from, unless it is there."""
    CONTEXT.set_forkserver_preload(["imported"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _begin(function, arguments, streams, environment):
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # A test run in the background of a shell inherits an ignored SIGINT, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(function(*arguments))


def start(function, *arguments, streams, **environment):
    """Call a function in a new process, whose exit code is what the function returns.

    Args:
        function: one that this process can import; what tests have replaced here is not replaced there.
        arguments: what it is called with.
        streams: folder of the files `out` and `err`.
        environment: variables beside those of this process.

    Returns:
        `multiprocessing.Process`.
    """
    _serve()
    streams.mkdir(exist_ok=True)
    every = dict(os.environ) | environment
    process = CONTEXT.Process(target=_begin, args=(function, arguments, streams, every), daemon=True)
    process.start()
    return process
