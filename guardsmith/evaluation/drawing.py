"""Jobs that draw: sets of pictures in one file each, which attacks and checks read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from guardsmith.config.recipe import Recipe
from guardsmith.core.progress import stage
from guardsmith.diffusion.cache import drawn_by
from guardsmith.evaluation.loaded import model_at
from guardsmith.evaluation.planning import TargetModel
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.runtime.executors import run_all
from guardsmith.runtime.processes import usual_count


class Job(Protocol):
    """What a worker can be sent beside attacks. It leaves its result in files."""

    def run(self) -> None:
        """Do it."""


@dataclass(frozen=True)
class Drawing:
    """A set of pictures by one model.

    Attributes:
        place: of the model (`DiffusionModel.place`).
        recipe: has the settings of the sampling.
        prompts: one per picture.
        seed: of the first picture; the next ones have the seeds that follow.
        file: where they are kept.
        title: of the progress bar.
    """

    place: str
    recipe: Recipe
    prompts: tuple[str, ...]
    seed: int
    file: Path
    title: str

    @staticmethod
    def by(target: TargetModel, recipe: Recipe, prompts: Sequence[str], seed: int, file: Path, title: str) -> Drawing:
        """By one side's model."""
        return Drawing(target.model.place, recipe, tuple(prompts), seed, file, title)

    def run(self) -> None:
        """Draw the pictures unless they are there, without a progress bar."""
        drawn_by(model_at(self.place), self.recipe.sampling, list(self.prompts), self.seed, self.file, None)

    def drawn(self, model: DiffusionModel) -> Tensor:
        """The pictures, float32 (n, 3, h, w) in [-1, 1], by the model that is at the place; drawn unless they are there."""
        return drawn_by(model, self.recipe.sampling, list(self.prompts), self.seed, self.file, self.title)

    @property
    def cost(self) -> int:
        """Pictures."""
        return len(self.prompts)


class Costed(Job, Protocol):
    """A job that says how long it takes."""

    @property
    def cost(self) -> int:
        """Pictures, roughly."""


def draw_beside_each_other(jobs: Sequence[Costed], title: str, workers: int | None, executor: str) -> None:
    """Run jobs in processes of this machine if there are as many; fewer are left to the caller, who has all threads for each.

    Args:
        jobs: those with nothing to do are not among them.
        title: of the progress bar.
        workers: processes; by default see `guardsmith.runtime.processes`.
        executor: on a cluster, too, this is done here.
    """
    if executor != "local" or not 1 < (workers or usual_count()) <= len(jobs):
        return
    with stage(title, len(jobs)) as bar:
        for _, error in run_all(run_job, sorted(jobs, key=lambda job: -job.cost), workers=workers):
            if error is not None:
                raise error
            bar()


def run_job(job: Job) -> None:
    """In a worker."""
    job.run()
