"""What one process of two does in test_parallel.py: several commands, one after the other."""

import functools
import json
import os
import sys
from pathlib import Path


def run(jobs, port, folder):
    """Call `guardsmith` for every job.

    Args:
        jobs: arguments of each.
        port: of the first job, where no launcher has chosen one; each later job has the next.
        folder: of the files `out0`, `err0`, `out1`, `err1`, the streams of the two processes.
    """
    import torch

    import guardsmith.training.optimizers  # noqa: F401 (derives from AdamW, so it comes before that is replaced)
    from guardsmith.cli.app import main
    from guardsmith.core.errors import RunFailed
    from guardsmith.evaluation import forecast
    from guardsmith.methods import METHODS

    def unknown(*_, **__):
        raise RunFailed("not counted here")

    for number, stream in ((1, "out"), (2, "err")):
        file = Path(folder, stream + os.environ["RANK"])
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    forecast.estimate = unknown  # of the memory, half a second for each job
    METHODS["persguard"].checkpoint_every = 5
    torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-3)
    for number, arguments in enumerate(jobs):
        if number or "MASTER_PORT" not in os.environ:  # what a launcher set serves the first job
            os.environ |= {"MASTER_PORT": str(port + number), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        code = main(arguments)
        # A few steps of Tripwire wreck the model, which `harden` says with code 4; the weights are what is compared.
        if code and not Path(arguments[arguments.index("--output") + 1], "harden.json").exists():
            sys.exit(code)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
