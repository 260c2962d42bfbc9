"""What commands import, for `forked.py`: a process that has this much starts a command at once."""

import gc
import importlib

from guardsmith.core.progress import quiet_libraries

quiet_libraries()
for name in (
    "torch.distributed", "diffusers", "transformers", "diffusers.pipelines.stable_diffusion", "guardsmith.cli.app",
    "guardsmith.hardening.pipeline", "guardsmith.evaluation.pipeline", "guardsmith.training.optimizers",
):  # fmt: skip
    importlib.import_module(name)
gc.freeze()  # else the first collection in every process copies all of it
