"""How strangers look to the U-Net when somebody personalizes the model on them, without doing it.

Training on a handful of pictures drives a denoiser towards one that is known in closed form: at every noise level the mean
of these pictures under the posterior given what is seen so far,

    D(z_t) = sum_i w_i z_i,     w = softmax_i( -|z_t - a z_i|^2 / (2 s^2) )         z_t = a z + s eps (`losses.shares`)

(the optimal denoiser of an empirical distribution, Karras et al. 2022, appendix B.3). A personalized model's prediction
under its prompt tends to D, the one without a prompt stays the base's, and guidance puts them together as always. The states
in which such a model draws cost one U-Net forward a step, instead of a training and two forwards a step.

Tripwire needs them of those who look like a protected subject: when somebody personalizes the model on such a bystander, the
wire does not see a noised picture but a half-finished one, which guidance has exaggerated. Of the protected subjects
themselves they can take the place of rehearsals, which cost sixteen times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardsmith.core.progress import stage
from guardsmith.core.seeds import IDEAL_NEGATIVES, IDEAL_SUBJECTS
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import alpha_sigma, clean_coefficients, noise_samples
from guardsmith.diffusion.prompts import HARDENING_IDENTIFIERS, PromptBank, instance_prompt
from guardsmith.diffusion.sampling import first_noise, solver_for
from guardsmith.diffusion.states import StateRecorder, States
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.methods.tripwire.recognition import Lesson, listen
from guardsmith.methods.variations import variations
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.training.loop import UNetCost, generator, load_checkpoint, save_checkpoint

FIRST_SEED = IDEAL_NEGATIVES.start
SUBJECT_SEED = IDEAL_SUBJECTS.start
LOOK_AT = 0.25  # share of the timesteps at which likeness is compared: most of the picture is there
BATCH = 32
IMAGINED_STEPS = 20  # solver steps, as many as a rehearsal draws with


def posterior_mean(noisy: Tensor, pictures: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """The best guess of the clean picture for one who knows that it is one of a few.

    Args:
        noisy: z_t, float32 (n, c, h, w).
        pictures: for each row the k clean ones, float32 (n, k, c, h, w).
        signal: a, in (0, 1).
        noise: s, in (0, 1).

    Returns:
        float32 (n, c, h, w).
    """
    distance = (noisy.unsqueeze(1) - signal * pictures).square().flatten(2).sum(2)
    weight = (-distance / (2 * noise.square())).softmax(1)
    return torch.einsum("nk,nkchw->nchw", weight, pictures)


@torch.no_grad()
def ideal_states(
    model: DiffusionModel,
    pictures: Tensor,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    on_batch: Callable[[], None] | None = None,
) -> States:
    """The states in which models draw that were ideally personalized on these pictures.

    Args:
        model: the base, whose unconditional prediction counts as well.
        pictures: latents of the k pictures that each of the n models was trained on, float32 (n, k, c, h, w).
        seeds: n seeds of the initial noise.
        steps: DPM-Solver++ (2M) steps.
        guidance: classifier-free guidance scale.
        on_batch: called after every `BATCH` pictures.
    """
    nothing = PromptBank(model).encode([""])
    recorder = StateRecorder()
    for start in range(0, len(pictures), BATCH):
        known = pictures[start : start + BATCH]
        solver = solver_for(model, steps)
        latents = first_noise(model, seeds[start : start + BATCH]) * solver.init_noise_sigma
        for t in solver.timesteps:
            recorder(int(t), latents)
            signal, noise = alpha_sigma(model.scheduler, t.reshape(1))
            seen, said = clean_coefficients(model.scheduler, t.reshape(1))
            out = model.unet(latents, t, nothing.expand(len(latents), -1, -1), return_dict=False)[0]
            without = seen * latents - said * out
            clean = without + guidance * (
                posterior_mean(latents, known, signal[0, 0, 0, 0], noise[0, 0, 0, 0]) - without
            )
            latents = solver.step((seen * latents - clean) / said, t, latents, return_dict=False)[0]
        if on_batch is not None:
            on_batch()
    states = recorder.states()
    assert states is not None
    return states


@torch.no_grad()
def likeness(model: DiffusionModel, subjects: Sequence[SubjectData], benign: BenignData, seed: int) -> Tensor:
    """How much each bystander looks like each subject to the base, float32 (bystanders, subjects): ridge read-outs."""
    assert benign.negatives is not None
    steps = int(model.scheduler.config.num_train_timesteps)
    lesson, rng = Lesson(model, subjects, benign, seed), generator(seed, -9)
    readouts = lesson.first_readouts(model.unet, int(LOOK_AT * 2 * steps), 1.0, rng)
    words = PromptBank(model).encode([instance_prompt(HARDENING_IDENTIFIERS[0], subjects[0].class_noun)])
    crowd, found = lesson.others.latents.mean[-len(benign.negatives) :].split(BATCH), []
    with stage("bystanders: who looks like a subject", len(crowd)) as bar:
        for latents in crowd:
            rows = noise_samples(latents, words, rng, timesteps=torch.full((len(latents),), int(LOOK_AT * steps)))
            found.append((listen(model.unet, model.scheduler, rows) @ readouts.T).amax(1))
            bar()
    return torch.cat(found)


def with_ideal_states(
    model: DiffusionModel,
    subjects: Sequence[SubjectData],
    benign: BenignData,
    count: int,
    *,
    seed: int,
    steps: int,
    guidance: float,
    cache: Path,
) -> tuple[BenignData, int]:
    """Bystanders with those first who look most like a subject, how models personalized on them would draw, and U-Net rows.

    Args:
        model: the base.
        subjects: whom to look like.
        benign: with bystanders.
        count: how many bystanders for each subject; one may look like several.
        seed: of the noise at which likeness is judged.
        steps: solver steps, those with which `ordinary` was drawn.
        guidance: of the drawing.
        cache: file to keep the result in; one that is there is used.
    """
    pictures = benign.negatives
    assert pictures is not None
    if not cache.exists():
        with UNetCost() as counter:
            score = likeness(model, subjects, benign, seed)
            close = score.topk(min(count, len(score)), dim=0).indices.flatten().unique()
            rest = torch.ones(len(score), dtype=torch.bool)
            rest[close] = False
            order = torch.cat([close, rest.nonzero()[:, 0]])
            with stage("bystanders as attacks would draw them", -(-len(close) // BATCH)) as bar:
                states = ideal_states(
                    model, encode(model, pictures[close]).mean.unsqueeze(1), range(FIRST_SEED, FIRST_SEED + len(close)),
                    steps=steps, guidance=guidance, on_batch=bar,
                )  # fmt: skip
        cache.parent.mkdir(parents=True, exist_ok=True)
        drawn = {"order": order, "states": states.latents, "timesteps": states.timesteps}
        save_checkpoint(cache, drawn, {"forwards": counter.forwards})
    tensors, told = load_checkpoint(cache)
    found = States(tensors["states"], tensors["timesteps"])
    return replace(benign, negatives=pictures[tensors["order"]], negative_states=found), int(told["forwards"])


def imagined_by(
    model: DiffusionModel, subjects: Sequence[SubjectData], config: Any, seed: int, cache: Path
) -> tuple[list[SubjectData], int]:
    """The subjects with the states in which models ideally personalized on them would draw, and the U-Net rows it took.

    Every picture is drawn by a model of its own: the first by one trained on the subject's pictures as they are, the others
    by models trained on variations of them.

    Args:
        model: the base.
        subjects: whom to imagine; only their `harden` pictures go in.
        config: a method's, with `ideal_images` and `rehearsal_guidance` (see `TripwireConfig`).
        seed: of the variations.
        cache: folder to keep the states in; those that are there are used.
    """
    found, forwards = [], 0
    cache.mkdir(parents=True, exist_ok=True)
    with stage("subjects as attacks would draw them", len(subjects)) as bar:
        for subject in subjects:
            file = cache / f"imagined-{subject.id}.safetensors"
            if not file.exists():
                with UNetCost() as counter:
                    shown = variations(subject.images, config.ideal_images - 1, generator(seed, -10))
                    known = encode(model, shown).mean.unflatten(0, (config.ideal_images, len(subject.images)))
                    states = ideal_states(
                        model, known, range(SUBJECT_SEED, SUBJECT_SEED + config.ideal_images), steps=IMAGINED_STEPS,
                        guidance=config.rehearsal_guidance,
                    )  # fmt: skip
                drawn = {"states": states.latents, "timesteps": states.timesteps}
                save_checkpoint(file, drawn, {"forwards": counter.forwards})
            tensors, told = load_checkpoint(file)
            states = States(tensors["states"], tensors["timesteps"])
            found.append(replace(subject, rehearsed_states=states))
            forwards += int(told["forwards"])
            bar()
    return found, forwards
