"""APDM's protection gradients in a second thread, while the path goes on: for a small denoiser on CPUs.

It stays because on the embedded base and two idle cores an inner step takes two thirds of the time with it (docs/results,
"Speed"): a step of a small U-Net does not keep both busy. Where other work does, it takes twice the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Task = Callable[[], None]


class SecondThread:
    """Runs tasks in another thread, one at a time, on a copy of the network as it was when each was submitted.

    Args:
        network: what moves along the path.
        path: those of its parameters that the path moves; the copy shares all others.
        differentiated: parameters of the network whose gradients the tasks take.

    Attributes:
        network: the copy, for the tasks.
        differentiated: the copy's parameters in the place of the given ones.
    """

    def __init__(
        self, network: Any, path: Sequence[torch.nn.Parameter], differentiated: Sequence[torch.nn.Parameter]
    ) -> None:
        moving = {id(parameter) for parameter in path}
        memo = {id(parameter): parameter for parameter in network.parameters() if id(parameter) not in moving}
        self.network = copy.deepcopy(network, memo)
        self.differentiated = [memo[id(parameter)] for parameter in differentiated]
        self._path: list[Tensor] = list(path)
        self._copies: list[Tensor] = [memo[id(parameter)] for parameter in path]

    @contextmanager
    def running(self) -> Iterator[Callable[[Task], None]]:
        """Inside, tasks can be submitted, and each of the two threads has half of the cores; at the end all are done."""
        cores = torch.get_num_threads()
        torch.set_num_threads(max(1, cores // 2))
        last: Future[None] | None = None
        try:
            with ThreadPoolExecutor(1) as pool:

                def submit(task: Task) -> None:
                    nonlocal last
                    if last is not None:
                        last.result()
                    with torch.no_grad():
                        torch._foreach_copy_(self._copies, self._path)
                    last = pool.submit(task)

                yield submit
                if last is not None:
                    last.result()
        finally:
            torch.set_num_threads(cores)
