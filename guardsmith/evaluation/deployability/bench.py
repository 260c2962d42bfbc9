"""Base and hardened model on one bench: the same prompts, the same noise, diffusers' own pipelines on either side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from guardsmith.config.deployability import CheckName, DeployabilitySpec
from guardsmith.core.atomic_io import folder_digest, read_kept, whole_file
from guardsmith.core.images import to_pil
from guardsmith.core.seeds import DEPLOYABILITY, DEPLOYABILITY_REFERENCE
from guardsmith.diffusion.sampling import first_noise
from guardsmith.evaluation.deployability.intervals import paired_excess, paired_ratio
from guardsmith.gate.deployability import Measure, Measurement
from guardsmith.metrics import Judge
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.models.families import SD, SD3
from guardsmith.registry.loader import Subject
from guardsmith.runtime.device import chosen_device

SIDES = ("base", "hardened")
NOISE = {"first": DEPLOYABILITY_REFERENCE, "second": DEPLOYABILITY}
"""Two sets of noise that no other pictures have: of what others are compared with, and of everything else."""
SHOWN = 6  # pictures of either side in a strip
REFERENCE = 80
"""Pictures that say what collapse is, at least: of so many without a fault the interval ends below 5 %."""
TINY = 0.01
"""Levels of 255 that count as no difference, so that a ratio of two differences is always defined."""
FLAT = 0.02
"""A picture that deviates less than this from its mean colours (of a range of 2) shows nothing."""
REVISION = 1
"""To be raised when the same settings give other pictures than before, so that what was kept is made again."""


class Shelf(NamedTuple):
    """Where what a model drew for the checks is kept.

    Attributes:
        digest: of the model's weights.
        folder: of the files.
        everything: whether all of it is kept, and not only what several checks need.
    """

    digest: str
    folder: Path
    everything: bool = True


def broken(pictures: Tensor) -> Tensor:
    """Which pictures are none: NaN, infinite, black or of one colour; bool (n,), of float (n, 3, h, w) in [-1, 1]."""
    finite = torch.isfinite(pictures).flatten(1).all(1)
    spread = torch.nan_to_num(pictures).flatten(2).std(2).amax(1)
    found: Tensor = ~finite | (spread < FLAT)
    return found


def differences(pictures: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute difference of each picture in levels of 255, (n,); what is no picture (`broken`) differs by all of them."""
    found = (torch.nan_to_num(pictures) - torch.nan_to_num(reference)).abs().flatten(1).mean(1) * 127.5
    return torch.where(broken(pictures) | broken(reference), torch.full((), 255.0), found)


@dataclass
class Bench:
    """What every check works with.

    Attributes:
        models: base and hardened model, by side.
        prompts: benign ones; every setting draws them in this order.
        judge: whose features say which pictures have collapsed, and whose similarity says what adapters draw.
        spec: what is to be checked.
        steps: solver steps of benign pictures.
        guidance: their scale.
        batch: pictures per call of a pipeline.
        root: the folder of the verification.
        controls: unprotected subjects that adapters are made for.
        identifier: what the adapters' makers call them.
        dreambooth: settings of DreamBooth on this base, for another fine-tune of it.
        seed: of everything that is trained.
        known: the base's pictures of the prompts from two sets of noise, where some are there already; else they are drawn.
        shelves: side -> where its pictures are kept for other checks and other verifications; those of other sides are not.
    """

    models: Mapping[str, DiffusionModel]
    prompts: Sequence[str]
    judge: Judge
    spec: DeployabilitySpec
    steps: int
    guidance: float
    batch: int
    root: Path
    controls: Sequence[Subject] = ()
    identifier: str = "zwx"
    dreambooth: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    known: tuple[Tensor, Tensor] | None = None
    shelves: Mapping[str, Shelf] = field(default_factory=dict)
    _plain: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _pipelines: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the strips are."""
        return self.root / "deployability"

    @property
    def flow(self) -> bool:
        """Whether this is a family without a noise schedule of betas (Stable Diffusion 3)."""
        return self.models["base"].family is SD3

    def load(self, side: str, dtype: torch.dtype = torch.float32) -> Any:
        """A pipeline of its own from the side's folder, on the chosen device, with the usual solver."""
        model = self.models[side]
        without = {"safety_checker": None, "requires_safety_checker": False} if model.family is SD else {}
        pipeline = DiffusionPipeline.from_pretrained(model.folder, dtype=dtype, use_safetensors=True, **without)
        pipeline.set_progress_bar_config(disable=True)
        if not self.flow:
            pipeline.scheduler = solver(pipeline, DPMSolverMultistepScheduler, algorithm_type="dpmsolver++")
        return pipeline.to(chosen_device())

    def pipeline(self, side: str) -> Any:
        """The side's float32 pipeline, loaded once. Whoever changes it puts it back."""
        if side not in self._pipelines:
            self._pipelines[side] = self.load(side)
        return self._pipelines[side]

    def own_denoiser(self, side: str) -> Any:
        """The side's float32 pipeline with a copy of its denoiser, for whoever changes that alone."""
        pipeline, name = copy.copy(self.pipeline(side)), "transformer" if self.flow else "unet"
        setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)))
        return pipeline

    def noise(self, which: str, count: int) -> Tensor:
        """Noise of the first `count` pictures, float32, as the denoiser takes it; of the "first" or the "second" set."""
        return first_noise(self.models["base"], NOISE[which].seeds(count))

    def draw(
        self,
        pipeline: Any,
        *,
        noise: str = "second",
        count: int | None = None,
        start: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        prompts: Sequence[str] | None = None,
        each: Callable[[slice], dict[str, Any]] | None = None,
    ) -> Tensor:
        """Pictures of the first `count` prompts by any pipeline, float32 (count - start, 3, h, w) in [-1, 1] on the CPU, or NaN.

        Args:
            pipeline: of diffusers.
            noise: see `noise`; `""` where the pipeline makes its own from generators.
            count: `spec.images` where it is not given.
            start: how many of the first are left out.
            steps: of the solver, where they are not the usual ones.
            guidance: likewise.
            prompts: likewise.
            each: further arguments of the pipeline for a slice of the pictures.
        """
        texts = list(prompts or self.prompts)[: count or self.spec.images]
        count = len(texts)
        dtype, device = _denoiser(pipeline).dtype, chosen_device()
        drawn, seeds = [], NOISE[noise or "second"].seeds(count)
        for first in range(start, count, self.batch):
            some = slice(first, min(first + self.batch, count))
            further: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds[some]]}
            if noise:
                further["latents"] = self.noise(noise, count)[some].to(device, dtype)
            out = pipeline(
                prompt=texts[some], num_inference_steps=steps or self.steps,
                guidance_scale=self.guidance if guidance is None else guidance, output_type="pt",
                **further, **(each(some) if each else {}),
            )  # fmt: skip
            images = out.images
            if not isinstance(
                images, Tensor
            ):  # the pipeline of T2I-Adapters gives arrays (n, h, w, 3) whatever is asked for
                images = torch.from_numpy(images).permute(0, 3, 1, 2)
            drawn.append(images.float().cpu() * 2 - 1)
        return torch.cat(drawn)

    @property
    def reference(self) -> int:
        """How many pictures say what collapse is."""
        return min(max(REFERENCE, self.spec.images), len(self.prompts))

    def plain(self, side: str, noise: str = "second", count: int | None = None) -> Tensor:
        """The first benign pictures by a side in float32; none is drawn twice."""
        count = count or self.spec.images
        # In two parts in any order of the checks: whichever is the first, the pictures and their files are the same.
        usual = self.spec.images
        known = self._plain.get((side, noise), self.plain(side, noise) if count > usual else torch.empty(0))
        if len(known) < count:
            start = len(known)

            def draw() -> Tensor:
                return self.draw(self.pipeline(side), noise=noise, count=count, start=start)

            more = self.pictures(side, f"plain, {noise} noise", draw, start, count=count, shared=True)
            known = self._plain[side, noise] = torch.cat([known, more])
        return known[:count]

    def kept(
        self, side: str, name: str, make: Callable[[], dict[str, Tensor]], *settings: Any, shared: bool = False
    ) -> dict[str, Tensor]:
        """What `make` gives, read from the side's shelf if it was made before; without a shelf it is made.

        Args:
            side: whose it is. It may depend on this model and the settings alone.
            name: of what is made, for people.
            make: makes it.
            settings: everything else that it depends on, as JSON has it.
            shared: whether several checks need it.
        """
        shelf = self.shelves.get(side)
        if shelf is None or not (shelf.everything or shared):
            return make()
        words = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
        file = shelf.folder / f"{words}-{folder_digest(REVISION, shelf.digest, name, *settings)}.safetensors"
        kept = read_kept(file, load_file, "what it held is made again")
        if kept is not None:
            return kept
        made = {key: value.contiguous() for key, value in make().items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            save_file(made, temporary)
        return made

    def pictures(
        self, side: str, name: str, draw: Callable[[], Tensor], *settings: Any,
        count: int | None = None, prompts: Sequence[str] | None = None, shared: bool = False,
    ) -> Tensor:  # fmt: skip
        """Pictures that `draw` gives, or those that the side's shelf has of it (see `kept` and the method `draw`)."""
        texts = list(prompts or self.prompts)[: count or self.spec.images]
        usual = self.steps, self.guidance, self.batch
        return self.kept(side, name, lambda: {"pictures": draw()}, texts, usual, *settings, shared=shared)["pictures"]

    @cached_property
    def usual_distance(self) -> float:
        """How far apart the base's own pictures of one prompt are at most, in the judge's features."""
        second = self.plain("base", "second", self.reference) if self.known is None else self.known[1][: self.reference]
        return float((self.judge.features(second) - self.reference_features).norm(dim=1).max())

    @cached_property
    def reference_features(self) -> Tensor:
        """Features of the base's pictures that others are compared with, (reference, d)."""
        known = None if self.known is None else self.known[0][: self.reference]
        return self.judge.features(self.plain("base", "first", self.reference) if known is None else known)

    def collapsed(self, pictures: Tensor) -> Tensor:
        """Which pictures have collapsed, bool (n,): none at all, or further from the base's than any two of the base's own."""
        features = self.judge.features(torch.nan_to_num(pictures))
        distance = (features - self.reference_features[: len(pictures)]).norm(dim=1)
        found: Tensor = broken(pictures) | ~(distance <= self.usual_distance)
        return found

    def strip(self, check: CheckName, case: str, base: Tensor, hardened: Tensor) -> str:
        """Save pictures of both sides, the base's above; returns the file's place under the root."""
        words = "".join(letter if letter.isalnum() else "-" for letter in case.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [[to_pil(torch.nan_to_num(p, -1.0)) for p in side[:SHOWN]] for side in (base, hardened)]
        width, height = rows[0][0].size
        sheet = Image.new("RGB", (width * len(rows[0]), 2 * height), "white")
        for y, row in enumerate(rows):
            for x, tile in enumerate(row):
                sheet.paste(tile, (x * width, y * height))
        file = self.folder / f"{check}-{words}.png"
        sheet.save(file)
        return file.relative_to(self.root).as_posix()


def solver(pipeline: Any, kind: Any, **settings: Any) -> Any:
    """A scheduler on the pipeline's own noise schedule, with steps that begin where it ends in noise."""
    if getattr(pipeline, "transformer", None) is None:  # schedules of flows have no spacing
        settings |= {"timestep_spacing": "trailing"}
    return kind.from_config(pipeline.scheduler.config, **settings)


def _denoiser(pipeline: Any) -> Any:
    return pipeline.transformer if getattr(pipeline, "transformer", None) is not None else pipeline.unet


def compared_collapse(
    bench: Bench, check: CheckName, case: str, base: Tensor, hardened: Tensor, *, part: bool = False, how: str = ""
) -> Measurement:
    """How many more of the hardened side's pictures have collapsed than of the base's, which are of the same noise.

    Args:
        bench: gives the reference.
        check: see `Measurement`, as the others.
        case: likewise.
        base: pictures of the first prompts, (n, 3, h, w) in [-1, 1].
        hardened: likewise.
        part: likewise.
        how: likewise.
    """
    before, now = bench.collapsed(base), bench.collapsed(hardened)
    excess = paired_excess(now.tolist(), before.tolist())
    return Measurement(
        check=check, case=case, measure="collapsed", value=excess.mean, low=excess.low, high=excess.high, n=len(base), part=part,
        base=float(before.float().mean()), hardened=float(now.float().mean()), how=how,
        pictures=bench.strip(check, case, base, hardened),
    )  # fmt: skip


def compared_difference(
    check: CheckName, case: str, base: Tensor, hardened: Tensor, *, how: str = "", pictures: str | None = None
) -> Measurement:
    """Ratio of two differences picture by picture, in levels of 255, (n,) each; see `Measurement` for the others."""
    ratio = paired_ratio((hardened + TINY).tolist(), (base + TINY).tolist())
    assert ratio is not None  # the lower one is above zero
    return Measurement(
        check=check, case=case, measure="difference", value=ratio.mean, low=ratio.low, high=ratio.high, n=len(base),
        base=float(base.mean()), hardened=float(hardened.mean()), how=how, pictures=pictures,
    )  # fmt: skip


def compared_faults(
    check: CheckName, case: str, base: int, hardened: int, n: int, *, how: str = "", pictures: str | None = None
) -> Measurement:
    """How many more faults the hardened side has than the base, of `n` possible ones; see `Measurement` for the others."""
    return Measurement(
        check=check, case=case, measure="faults", value=max(hardened - base, 0), base=base, hardened=hardened, n=n, how=how,
        pictures=pictures,
    )  # fmt: skip


def attempt(
    check: CheckName, case: str, measure: Measure, run: Callable[[], Measurement | list[Measurement]]
) -> list[Measurement]:
    """One case; whatever it raises becomes a case that failed to run, for one broken pipeline must not hide the others."""
    try:
        found = run()
    except Exception as error:  # diffusers and torch raise anything; nothing of it may pass for a result
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found = Measurement(check=check, case=case, measure=measure, error=reason)
    return found if isinstance(found, list) else [found]
