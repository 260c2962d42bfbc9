"""What the parts of a hardening by the tripwire take on the embedded base, in processor seconds; `benchmark.py --what tripwire`.

Every part is timed for a few steps, or pictures, with the demo's settings, and scaled to as many as a run has; what was timed and
what it was scaled to is written beside it. Nothing that is scaled changes with the number of the step, but for the first one.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from guardsmith.config.loading import load_recipe
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import PromptBank, class_prompt
from guardsmith.diffusion.sampling import generate
from guardsmith.methods import METHODS
from guardsmith.methods.data import SubjectData
from guardsmith.methods.tripwire.early import early_pictures
from guardsmith.methods.tripwire.examples import EARLY_COPIES, EARLY_TRANSFORMED, positives_of
from guardsmith.methods.tripwire.install import install
from guardsmith.methods.tripwire.layout import layout_of
from guardsmith.methods.tripwire.method import training_of
from guardsmith.methods.tripwire.recogniser import Recogniser
from guardsmith.methods.tripwire.training import Examples, optimizer_of, training_step
from guardsmith.methods.tripwire.trunk import prepare
from guardsmith.models.checkpoint import DiffusionModel, load_model, with_own_unet
from guardsmith.training.loop import generator

TRUNK = {"steps": 5000, "rows": 8}  # of the shipped one: 1,000, and twice 2,000 on from there
PERIOD = 10  # steps of a trunk's preparation after which kinds of steps come again
SOME = 6
COUNTS = (1, 5, 20, 50)


def timed(run: Callable[[], Any]) -> float:
    """Processor seconds of one call, of all threads."""
    began = time.process_time()
    run()
    return time.process_time() - began


def trunk_step(model: DiffusionModel) -> dict[str, Any]:
    """Mean processor seconds of a step of the trunk's preparation, over every kind of step."""
    config, bank, ends = _config(), PromptBank(model), [time.process_time()]
    side, channels = int(model.unet.config.sample_size), int(model.unet.config.in_channels)
    store = encode(model, torch.rand((32, 3, model.image_size, model.image_size), generator=generator(0)) * 2 - 1)
    assert store.mean.shape[1:] == (channels, side, side)
    prepare(
        model, layout_of(model.unet, config.groups, config.outer_groups), store,
        bank.encode([class_prompt("person"), class_prompt("robot")]), bank.encode([""]), steps=1 + PERIOD,
        rows=TRUNK["rows"], learning_rate=1e-4, seed=0, on_step=lambda *_: ends.append(time.process_time()),
    )  # fmt: skip
    each = [after - before for before, after in itertools.pairwise(ends[1:])]
    return {"timed": PERIOD, "samples": each, "seconds": statistics.mean(each)}


def _config() -> Any:
    recipe = load_recipe("demo")
    return METHODS["tripwire"].config(**recipe.method.params)


def _subject(model: DiffusionModel, number: int, count: int = 4) -> SubjectData:
    """Pictures that show nothing: what is in them does not matter for the time."""
    side = model.image_size
    pictures = torch.rand((count + 8, 3, side, side), generator=generator(number)) * 2 - 1
    return SubjectData(f"subject-{number}", "person", (), pictures[:count], pictures[count:], pictures[count:])


def of_one_subject(model: DiffusionModel) -> dict[str, Any]:
    """Processor seconds of what every subject takes before the recogniser's training, part by part."""
    config, subject, recipe = _config(), _subject(model, 0), load_recipe("demo")
    drawing = config.early_drawing(recipe.sampling.guidance)
    ends: list[float] = []
    short = replace(drawing, looks=(2 + SOME,), images=1)
    early_pictures(model, subject, short, 0, lambda: ends.append(time.process_time()))
    step = statistics.median(after - before for before, after in itertools.pairwise(ends[:-1]))
    batch = 4 * SOME
    prompts, seeds = ["a photo of sks person"] * batch, list(range(batch))
    options = {"steps": drawing.sampling_steps, "guidance": drawing.guidance}
    generate(model, prompts[:1], seeds[:1], **options)
    picture = timed(lambda: generate(model, prompts, seeds, **options)) / batch
    drawn = len(drawing.looks) * drawing.images
    few = config.model_copy(update={"copies": 6, "transformed": 50})
    others = subject.class_images
    varied = timed(lambda: positives_of(model, subject.images, None, others, few, 0, 0))
    made = len(subject.images) * (few.copies + few.transformed)
    together = len(subject.images) * (config.copies + config.transformed) + drawn * (EARLY_COPIES + EARLY_TRANSFORMED)
    parts = {
        "learning it": {"timed": SOME, "of": max(drawing.looks), "seconds": step * max(drawing.looks)},
        "drawing it early": {"timed": batch, "of": drawn, "seconds": picture * drawn},
        "variations": {"timed": made, "of": together, "seconds": varied / made * together},
    }
    return {"parts": parts, "seconds": sum(part["seconds"] for part in parts.values())}


def recogniser_step(model: DiffusionModel, subjects: int) -> list[float]:
    """Processor seconds of steps of the recogniser's training with so many subjects."""
    config = _config()
    training, side = training_of(config), int(model.unet.config.sample_size)
    shape = (64, int(model.unet.config.in_channels), side, side)
    positives = [torch.randn(shape, generator=generator(1, number)) for number in range(subjects)]
    negatives = torch.randn((4000, *shape[1:]), generator=generator(2))
    examples = Examples(positives, negatives, torch.randn((400, *shape[1:]), generator=generator(3)))
    recogniser = Recogniser(model.unet, layout_of(model.unet, config.groups, config.outer_groups))
    optimizer = optimizer_of(recogniser, training)
    return [
        timed(lambda: training_step(recogniser, optimizer, examples, model.scheduler, training, step=step, seed=0))  # noqa: B023
        for step in range(1 + SOME)
    ][1:]


def installing(model: DiffusionModel) -> float:
    """Processor seconds of putting a recogniser into its channels."""
    config = _config()
    layout = layout_of(model.unet, config.groups, config.outer_groups)
    recogniser, own = Recogniser(model.unet, layout), with_own_unet(model)
    recogniser.measure(torch.randn((8, int(own.unet.config.in_channels), *[int(own.unet.config.sample_size)] * 2)))
    return timed(lambda: install(own.unet, layout, recogniser, config.scales(), generator(0)))


def run() -> dict[str, Any]:
    """All parts, and what follows from them for one, five, twenty and fifty subjects, and for one more."""
    model, config = load_model("builtin:avatar"), _config()
    trunk = trunk_step(model)
    one, install_seconds = of_one_subject(model), installing(model)
    steps = {count: recogniser_step(model, count) for count in COUNTS}
    prepared = trunk["seconds"] * TRUNK["steps"]
    whole = {
        count: count * one["seconds"] + statistics.median(samples) * config.steps + install_seconds
        for count, samples in steps.items()
    }
    more = whole[5] + one["seconds"]  # adding trains the recogniser as long as before, and draws all subjects anew
    return {
        "unit": "processor seconds, scaled from what was timed", "settings": "recipes/demo.yaml",
        "trunk": trunk | {"of": TRUNK["steps"], "rows": TRUNK["rows"], "together": prepared},
        "subject": one, "install": install_seconds,
        "recogniser": {"of": config.steps, "timed": SOME, "samples": steps},
        "hardening": whole, "a_subject": {count: seconds / count for count, seconds in whole.items()},
        "one_more_of_six": more, "one_more_over_the_whole": more / (prepared + whole[5]),
    }  # fmt: skip
