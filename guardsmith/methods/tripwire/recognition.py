"""How the tripwire learns to recognise: what is shown, what counts, and what the weights have to survive meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guardsmith.attacks.lora import TARGETS
from guardsmith.core.progress import stage
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import NoisedSamples, alpha_sigma, cut, join, noise_samples, predict
from guardsmith.diffusion.prompts import HARDENING_IDENTIFIERS, PromptBank, class_prompt, instance_prompt
from guardsmith.diffusion.states import States
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.methods.tripwire.wiring import overheard, wiring_of
from guardsmith.methods.variations import variations
from guardsmith.models.checkpoint import DiffusionModel
from guardsmith.runtime.distributed import all_reduce
from guardsmith.training.loop import Snapshot, generator

if TYPE_CHECKING:
    from guardsmith.methods.tripwire.method import TripwireConfig

REHEARSED_SHARE = 0.4  # of the rows to recognise that are states of a rehearsal
UNLIKE = 0.01  # how often someone who does not look like a subject at all is drawn among those who do
SCANNED = 64  # pictures looked at at a time
FIRST_ROWS = 64  # of every subject, for the first read-outs
FIRST_OTHERS = 12  # times as many of everyone else
STATES_BELOW = 0.9  # share of the timesteps; a state at pure noise has no clean picture to it


def recognition_loss(scores: Tensor, wanted: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Hinge-like losses of the read-outs, for rows to recognise and for the others.

    One token is enough to trip a wire: a surge anywhere drowns everything behind it. So the soft maximum over tokens counts
    for either side. Of the others each row counts with the wire that it comes closest to, and of these the worse half, for
    most rows are nowhere near any; else they would outvote the few that matter, the more so the more subjects there are. The
    worst row of either side counts extra.

    Args:
        scores: read-outs, (rows, tokens, subjects).
        wanted: bool (rows, subjects).
        margin: distance from 0 at which a row stops to matter.

    Returns:
        Two scalars.
    """
    high = torch.logsumexp(2 * scores, 1) / 2
    low = high - math.log(scores.shape[1]) / 2  # at most the loudest token, where `high` is at least that
    closest = high.masked_fill(wanted, -torch.inf).amax(1)
    missed = F.softplus(margin - low[wanted])
    false = F.softplus(margin + closest[closest.isfinite() | closest.isnan()])
    false = false.topk(-(-len(false) // 2)).values
    found = [rows.mean() + 0.3 * rows.max() if len(rows) else scores.new_zeros(()) for rows in (missed, false)]
    return found[0], found[1]


def ridge_readouts(tokens: Tensor, wanted: Tensor, margin: float) -> Tensor:
    """Read-outs to begin with, (subjects, width): ridge regression on what the U-Net's tokens are without any training.

    A subject's tokens are to give +margin and all others -margin; both sides weigh the same.

    Args:
        tokens: of some rows, (rows, tokens, width).
        wanted: which rows show which subject, bool (rows, subjects).
        margin: see `recognition_loss`.
    """
    inputs = tokens.flatten(0, 1).double()
    found = []
    for shown in wanted.repeat_interleave(tokens.shape[1], 0).T:
        weight = torch.where(shown, 0.5 / shown.double().mean(), 0.5 / (~shown).double().mean()).unsqueeze(1)
        gram = (weight * inputs).T @ inputs
        gram.diagonal().add_(0.1 * gram.diagonal().mean())
        found.append(torch.linalg.solve(gram, (weight * inputs).T @ torch.where(shown, margin, -margin).double()))
    return torch.stack(found).to(tokens.dtype)


def put_state(
    rows: NoisedSamples, row: int, states: States, picture: int, below: float, scheduler: Any, rng: torch.Generator
) -> None:
    """Replace a row by a state of a picture at a timestep below the given one (as latents and noise that add up to it)."""
    candidates = (states.timesteps < below).nonzero()[:, 0]
    step = candidates[torch.randint(len(candidates), (), generator=rng)]
    time = int(states.timesteps[step])
    rows.timesteps[row] = time
    rows.latents[row] = states.latents[picture, step] / alpha_sigma(scheduler, torch.tensor([time]))[0][0]
    rows.noise[row] = 0


@dataclass
class Others:
    """Pictures that may never trip a wire, whatever they are called: those of the classes, and ordinary ones.

    Half of the rows are noised pictures, half are the states in which the base once drew them, or a model personalized on
    them would (of those of which they are known). Pictures that come closest to tripping a wire are drawn up to ten times
    as often.

    Attributes:
        latents: of n pictures.
        contexts: for each picture the text embeddings to draw from, (k, tokens, width).
        near: float32 (n, subjects) in [0, 1], how close each last came to tripping each wire.
        states: of the first pictures.
    """

    latents: LatentStore
    contexts: list[Tensor]
    near: Tensor
    states: States | None = None

    def draw(
        self, scheduler: Any, count: int, rng: torch.Generator, like: Sequence[int] = ()
    ) -> tuple[NoisedSamples, Tensor]:
        """Rows at uniform timesteps, and which pictures they show.

        Args:
            scheduler: of the noise.
            count: how many.
            rng: of everything drawn.
            like: the first rows show those who are taken most easily for these subjects.
        """
        danger = 1 + 9 * self.near.amax(1)
        picked = torch.multinomial(danger, count - len(like), replacement=True, generator=rng)
        if like:
            likeness = UNLIKE + self.near[:, list(like)].T
            picked = torch.cat([torch.multinomial(likeness, 1, generator=rng)[:, 0], picked])
        return self.show(picked, scheduler, rng), picked

    def show(self, picked: Tensor, scheduler: Any, rng: torch.Generator) -> NoisedSamples:
        """A row of each of these pictures."""
        asked = [self.contexts[i][torch.randint(len(self.contexts[i]), (), generator=rng)] for i in picked.tolist()]
        steps = int(scheduler.config.num_train_timesteps)
        rows = noise_samples(self.latents.sample(picked, rng), torch.stack(asked), rng, steps=steps)
        if self.states is not None:
            for row, picture in enumerate(picked.tolist()):
                if row % 2 and picture < len(self.states.latents):
                    put_state(rows, row, self.states, picture, STATES_BELOW * steps, scheduler, rng)
        return rows

    def heed(self, picked: Tensor, scores: Tensor) -> None:
        """Note how close pictures came; scores are read-outs, (rows, tokens, subjects)."""
        self.near[picked] = 0.5 * self.near[picked] + 0.5 * scores.detach().amax(1).sigmoid().nan_to_num(1.0)

    @torch.no_grad()
    def scan(self, ask: Callable[[NoisedSamples], Tensor], scheduler: Any, rng: torch.Generator) -> None:
        """Look at every picture once; `ask` gives the read-outs of rows, (rows, tokens, subjects)."""
        for picked in torch.arange(len(self.latents)).split(SCANNED):
            self.near[picked] = ask(self.show(picked, scheduler, rng)).amax(1).sigmoid().nan_to_num(1.0)


class _HeardError(Exception):
    """The U-Net got as far as it was needed."""


def listen(unet: Any, scheduler: Any, rows: NoisedSamples) -> Tensor:
    """The tokens that the read-outs read, (rows, tokens, width), on the CPU; what lies behind them is not computed."""
    heard: list[Tensor] = []

    def ear(_: Any, inputs: tuple[Tensor]) -> None:
        heard.append(inputs[0])
        raise _HeardError

    handle = wiring_of(unet).wired_layer(unet).register_forward_pre_hook(ear)
    try:
        predict(unet, scheduler, rows)
    except _HeardError:
        pass
    finally:
        handle.remove()
    return overheard(heard[0], len(rows))


class Lesson:
    """What the model is shown, and under which prompts.

    Attributes:
        subjects: as they came.
        stores: their pictures, varied, and what was rehearsed of them, as latents.
        asked: for each class noun the embeddings of its prompts: with identifiers, without one, the empty prompt.
        others: everyone and everything else.
    """

    def __init__(self, model: DiffusionModel, subjects: Sequence[SubjectData], benign: BenignData, seed: int) -> None:
        bank = PromptBank(model)
        self.subjects, self.scheduler = list(subjects), model.scheduler
        self.stores: list[LatentStore] = []
        for index, subject in enumerate(subjects):
            shown = variations(subject.images, 12, generator(seed, -1, index))
            if subject.rehearsed is not None:
                shown = torch.cat([shown, variations(subject.rehearsed, 2, generator(seed, -2, index))])
            self.stores.append(encode(model, shown))
        classes = {s.class_noun: s.class_images for s in subjects}
        self.asked = {
            noun: bank.encode(
                [*(instance_prompt(name, noun) for name in HARDENING_IDENTIFIERS), class_prompt(noun), ""]
            )
            for noun in classes
        }
        known = [*(encode(model, images) for images in classes.values()), encode(model, benign.images)]
        if benign.negatives is not None:
            known.append(encode(model, benign.negatives))
        latents = LatentStore(torch.cat([store.mean for store in known]), torch.cat([store.std for store in known]))
        contexts = [self.asked[noun] for noun, images in classes.items() for _ in images]
        # Under names as well, else the wire would listen to the prompt instead of looking at the picture.
        names = torch.cat(list(self.asked.values()))
        own = bank.encode(benign.prompts).split(1)
        contexts += [words if i % 2 else names for i, words in enumerate(own)]
        contexts += [names] * (len(latents) - len(contexts))
        class_states = {s.class_noun: s.class_states for s in subjects if s.class_states is not None}
        drawn = None
        if benign.states is not None and len(class_states) == len(classes):
            parts = [*class_states.values(), benign.states]
            if benign.negative_states is not None:
                parts.append(benign.negative_states)
            drawn = States(torch.cat([states.latents for states in parts]), benign.states.timesteps)
        self.others = Others(latents, contexts, torch.zeros(len(latents), len(subjects)), drawn)

    def subject_row(self, index: int, low: int, high: int, rng: torch.Generator) -> NoisedSamples:
        """One row of a subject at a timestep in [low, high)."""
        words = self.asked[self.subjects[index].class_noun]
        context = words[torch.randint(len(words), (1,), generator=rng)]
        time = torch.randint(low, high, (1,), generator=rng)
        row = noise_samples(self.stores[index].draw(1, rng), context, rng, timesteps=time)
        states = self.subjects[index].rehearsed_states
        if low == 0 and states is not None and torch.rand((), generator=rng) < REHEARSED_SHARE:
            picture = int(torch.randint(len(states.latents), (), generator=rng))
            put_state(row, 0, states, picture, high, self.scheduler, rng)
        return row

    @torch.no_grad()
    def first_readouts(self, unet: Any, high: int, margin: float, rng: torch.Generator) -> Tensor:
        """Read-outs to begin with, (subjects, width), from rows of every subject at timesteps below `high` and of others."""
        count = len(self.subjects)
        rows = [self.subject_row(index, 0, high, rng) for index in range(count) for _ in range(FIRST_ROWS)]
        rows += [self.others.draw(self.scheduler, FIRST_ROWS, rng)[0] for _ in range(FIRST_OTHERS)]
        nobody = torch.zeros(FIRST_OTHERS * FIRST_ROWS, count, dtype=torch.bool)
        wanted = torch.cat([torch.eye(count, dtype=torch.bool).repeat_interleave(FIRST_ROWS, 0), nobody])
        parts = cut(join(*rows), FIRST_ROWS)
        tokens = []
        with stage("first read-outs", len(parts)) as bar:
            for part in parts:
                tokens.append(listen(unet, self.scheduler, part))
                bar()
        return ridge_readouts(torch.cat(tokens), wanted, margin)


class Sway:
    """Moves the weights before the wire as an attacker's optimizer might, and back.

    At random, and for the worst: along the sign of the recognition loss' last gradient, as many steps as `kick` says
    (adversarial weight perturbation, Wu et al. 2020, with the gradient of the step before, which costs nothing). One step
    moves what is stiff less; LoRA moves the attention only, but with its larger rate.

    Attributes:
        worst: for every weight that moves the sign of that gradient.
    """

    def __init__(self, unet: Any, factors: tuple[int, ...], config: TripwireConfig) -> None:
        self.config = config
        self.play = wiring_of(unet).play(unet, *factors)
        self.moved = {name: p for name, p in unet.named_parameters() if name in self.play}
        self.worst = [torch.zeros_like(p) for p in self.moved.values()]
        self.steady = Snapshot(self.moved.values())

    @torch.no_grad()
    def push(self, rng: torch.Generator, *, lora: bool) -> None:
        """Move, by a random share of the sizes in the configuration."""
        self.steady.take()
        size, kick = (float(share) for share in torch.rand(2, generator=rng))
        for (name, parameter), free, worst in zip(self.moved.items(), self.play.values(), self.worst, strict=True):
            adapted = lora and any(target in name for target in TARGETS)
            rate = self.config.rehearsal_lora_learning_rate if adapted else self.config.rehearsal_learning_rate
            noise = self.config.looseness * size * torch.randn(parameter.shape, generator=rng).to(parameter.device)
            parameter.add_(free * (noise + self.config.kick * kick * rate * worst))

    @torch.no_grad()
    def back(self) -> None:
        """Undo it, and note the gradient that is there now."""
        self.steady.restore()
        for parameter, worst in zip(self.moved.values(), self.worst, strict=True):
            gradient = parameter.grad.clone()
            all_reduce([gradient])
            worst.copy_(gradient.nan_to_num(0).sign())  # of a scaled loss some overflow
