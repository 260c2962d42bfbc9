"""APDM and PersGuard with as many steps as published, under the smallest attack that personalizes the base, step by step.

python own_scale.py DATA FOLDER [--only NAME ...]     runs what is missing; writes docs/results/own-scale.json and own-scale.md
python own_scale.py                                   the table again

Subjects are of the set `testing`: of every style the first is protected, the second is the control. An attack is followed on its
way: what it draws, how far it moved the weights, the loss and the gradient on fixed samples of the attacked pictures, and the
share of pictures that show PersGuard's backdoor. `noise` and `middle` are no protections: the base with noise of the size of
APDM's change added to every weight, and the base with a middle block that knows nothing. It can be interrupted and run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import world
from evaluate import RESULTS
from own_scale_table import tables
from safetensors.torch import load_file, save_file
from search import backdoor_share
from torch import Tensor

from guardsmith.attacks import ATTACKS, AttackData
from guardsmith.attacks.displacement import displacement, movement
from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import write_json
from guardsmith.core.progress import quiet_libraries
from guardsmith.core.seeds import (
    ATTACK_CLASS,
    ATTACK_SAMPLES,
    BENIGN_AGAIN,
    BENIGN_BASE,
    HARDENING_BENIGN,
    HARDENING_CLASS,
)
from guardsmith.diffusion.cache import drawn_by, drawn_with_states
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import NoisedSamples, noise_samples, row_losses
from guardsmith.diffusion.prompts import (
    HARDENING_TEMPLATES,
    VERIFICATION_TEMPLATES,
    PromptBank,
    benign_prompts,
    class_prompt,
    instance_prompt,
    sample_prompts,
)
from guardsmith.diffusion.sampling import generate, grid
from guardsmith.gate.statistics import interval
from guardsmith.hardening.data import draw_prompt
from guardsmith.methods import METHODS, HardeningContext, Preparation
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.metrics.collapse import collapsed
from guardsmith.metrics.fidelity import features, fidelity
from guardsmith.metrics.identity import similarity
from guardsmith.metrics.kid import kid_ratio_interval
from guardsmith.models.checkpoint import DiffusionModel, load_model, weights_digest, with_own_unet
from guardsmith.training.loop import generator

VIEWS, PICTURES, CLASS_PICTURES, BENIGN = 16, 16, 64, 120
FEWER = 8
"""Pictures on an attack's way; at its end there are more."""
RECIPE = load_recipe("apdm-avatar")
SAMPLING = RECIPE.sampling.model_dump()
RATE = 5e-5
"""DreamBooth's at which 400 steps just personalize the base; also APDM's path and, as published, its own steps."""
ON_THE_WAY = (50, 100, 200, 400)
WITH_RELEASED = (0, 20, *ON_THE_WAY)
LOSSES_AT = (0, 2, 5, 10, 20)
"""Numbers of steps after which losses alone are measured."""


@dataclass(frozen=True)
class Attacker:
    """An attack and what its attacker knows: word, pictures that the hardening had, and when it is judged."""

    params: dict[str, Any]
    points: tuple[int, ...] = (400,)
    name: str = "dreambooth"
    identifier: str = "zwx"
    control: bool = False
    same_pictures: bool = False


JUST_ENOUGH = {"learning_rate": RATE, "steps": 400, "batch_size": 1}
LORA = {"learning_rate": 5e-4, "steps": 400, "batch_size": 1, "rank": 4}
USUAL = {"learning_rate": 3e-4, "steps": 300, "batch_size": 2}
ATTACKERS = {
    "unseen": Attacker(JUST_ENOUGH, ON_THE_WAY),
    "published": Attacker(JUST_ENOUGH | {"steps": 800}, (*ON_THE_WAY, 800), identifier="sks", same_pictures=True),
    "seen": Attacker(JUST_ENOUGH, identifier="sks"),
    "lora": Attacker(LORA, name="lora"),
    "control": Attacker(JUST_ENOUGH, control=True),
    "known": Attacker(JUST_ENOUGH, WITH_RELEASED, identifier="sks", same_pictures=True),
    "control, seen": Attacker(JUST_ENOUGH, WITH_RELEASED, identifier="sks", control=True),
    "half": Attacker(JUST_ENOUGH | {"learning_rate": RATE / 2}),
    "lora, half": Attacker(LORA | {"learning_rate": 2.5e-4}, name="lora"),
    "usual": Attacker(USUAL, (300,)),
    "lora, usual": Attacker({"learning_rate": 2e-3, "steps": 300, "batch_size": 2, "rank": 4}, (300,), "lora"),
}
PLAIN = ("known", "control", "unseen", "lora", "published")
BACKDOORED = ("known", "control, seen", "unseen", "lora")
ON_BASE = ("unseen", "published", "lora", "control", "half", "lora, half", "usual", "control, seen")


@dataclass(frozen=True)
class Trial:
    """A model to attack: how it is hardened (`None`: it is the base, perhaps changed), and the steps after which it is judged."""

    method: str | None
    params: dict[str, Any]
    steps: tuple[int, ...]
    attackers: tuple[str, ...]


APDM = {
    "learning_rate": RATE, "personalization_learning_rate": RATE, "inner_steps": 20, "batch_size": 1, "beta": 1.0,
    "reduction": "mean", "pairing": "paired", "class_images": 200, "identifiers": ["sks"],
}  # fmt: skip
PERSGUARD = {"learning_rate": 1e-4, "batch_size": 4, "class_images": 64, "target_noun": "robot"}
KNOWN = ["sks", "ohwx", "hta", "nulo", "pqv"]
TRIALS = {
    "base": Trial(None, {}, (), ON_BASE),
    "apdm": Trial("apdm", APDM, (200, 400, 800), PLAIN),
    "apdm, released": Trial("apdm", APDM | {"leak": True, "reduction": "element"}, (200, 400, 800), PLAIN),
    "persguard, target": Trial("persguard", PERSGUARD | {"identifiers": KNOWN}, (300,), BACKDOORED),
    "persguard, pattern": Trial(
        "persguard", PERSGUARD | {"identifiers": KNOWN, "backdoor": "pattern"}, (300,), BACKDOORED
    ),
    "persguard, without L_BR": Trial(
        "persguard", PERSGUARD | {"identifiers": KNOWN, "retention_weight": 0.0}, (300,), ("known", "control, seen")
    ),
    "noise": Trial(None, {}, (), ("unseen",)),
    "middle": Trial(None, {}, (), ("unseen",)),
}
CHAIN = (
    "avataaars/base", "avataaars/apdm/200", "avataaars/persguard, target", "avataaars/noise", "avataaars/apdm/400",
    "avataaars/middle", "avataaars/apdm, released/200", "avataaars/persguard, pattern", "avataaars/apdm/800",
    "avataaars/persguard, without L_BR", "avataaars/apdm, released/800", "micah/base", "micah/apdm",
    "micah/persguard, target",
)  # fmt: skip
"""What runs, in order: STYLE/TRIAL, or STYLE/TRIAL/STEPS for the model after so many steps only."""
LIKE = 200
"""Steps of APDM after which its change is as large as the noise of `noise`."""


class Bench:
    """The base, the pictures, and the table of results."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.folder, self.base = folder, load_model("builtin:avatar")
        self.pixels, self.lines = world.load(data, "testing")
        self.prompts = benign_prompts(self.base, VERIFICATION_TEMPLATES, BENIGN, RECIPE.seed + 1)
        self.file = RESULTS / "own-scale.json"
        self.table = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.table |= {"command": "python own_scale.py DATA FOLDER", "model_digest": weights_digest(self.base.folder)}
        self.table.setdefault("models", {})

    def save(self) -> None:
        """Write data and tables."""
        write_json(self.file, self.table)
        self.file.with_suffix(".md").write_text(tables(self.table), encoding="utf-8")

    def person(self, style: str, control: bool) -> tuple[str, Tensor]:
        """Class noun and pictures of a style's first subject or, as control, of the second."""
        first = next(i for i, line in enumerate(self.lines) if line["style"] == style) + control * VIEWS
        return str(self.lines[first]["class_noun"]), world.to_float(self.pixels[first : first + VIEWS])

    def benign(self, model: DiffusionModel, seed: int, cache: str | None) -> Tensor:
        """Pictures of the benign prompts."""
        file = None if cache is None else self.folder / f"{cache}.safetensors"
        return drawn_by(model, RECIPE.sampling, [prompt.text for prompt in self.prompts], seed, file, "benign pictures")


def harden(bench: Bench, style: str, trial: Trial, steps: int, place: Path) -> tuple[DiffusionModel, dict[str, Any]]:
    """The model after so many steps, continued from where an earlier call ended, and how its losses went."""
    method = METHODS[str(trial.method)]
    config = method.config(**trial.params, **{"outer_steps" if trial.method == "apdm" else "steps": steps})
    noun, views = bench.person(style, control=False)
    images, states = drawn_with_states(
        bench.base, RECIPE.sampling, [class_prompt(noun)] * config.class_images, HARDENING_CLASS.start,
        bench.folder / f"class-{noun}-{config.class_images}.safetensors", "class pictures",
    )  # fmt: skip
    subject = SubjectData(style, noun, (), views[:4], images[:4], images, states)
    benign = None
    if method.needs_benign(config):
        words = [prompt.text for prompt in benign_prompts(bench.base, HARDENING_TEMPLATES, config.benign_images, 0)]
        file = bench.folder / f"benign-{len(words)}.safetensors"
        drawn, _ = drawn_with_states(
            bench.base, RECIPE.sampling, words, HARDENING_BENIGN.start, file, "benign pictures"
        )
        benign = BenignData(drawn, words)
    prepared = method.prepare(
        Preparation(
            model=bench.base, subjects=[subject], benign=benign, config=config, seed=0, sampling_steps=SAMPLING["steps"],
            guidance=SAMPLING["guidance"], cache=place,
            draw=partial(draw_prompt, bench.base, RECIPE, count=config.class_images, cache=bench.folder),
        )
    )  # fmt: skip
    model, history = method.run(
        HardeningContext(
            model=bench.base, subjects=prepared.subjects, benign=prepared.benign, config=config, seed=0,
            checkpoint=place / "checkpoint.safetensors", checkpoint_every=100,
        )
    )  # fmt: skip
    part = max(1, len(history) // 16)
    course = [
        {key: float(f"{mean(step[key] for step in history[i : i + part]):.4g}") for key in history[0]}
        for i in range(0, len(history), part)
    ]
    return model, {"params": config.model_dump(), "course": course, "course_steps": part}


def changed_base(bench: Bench, trial: str, like: Path) -> DiffusionModel:
    """The base with random changes: `noise` as large, weight tensor by weight tensor, as those of a stored U-Net; or `middle`."""
    own, rng = with_own_unet(bench.base), generator(0, 31)
    if trial == "middle":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(31)
            for module in own.unet.mid_block.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    else:
        other = load_file(like)
        with torch.no_grad():
            for name, weight in own.unet.named_parameters():
                noise = torch.randn(weight.shape, generator=rng)
                weight += noise * ((other[name] - weight).norm() / noise.norm())
    return own


def fixed_samples(model: DiffusionModel, images: Tensor, prompt: str) -> NoisedSamples:
    """16 samples of the pictures at timesteps spread evenly, always with the same noise."""
    store, rng, count = encode(model, images), generator(0, 77), 16
    times = torch.linspace(15, 985, count).long()
    context = PromptBank(model).encode([prompt])
    return noise_samples(store.sample(torch.arange(count) % len(store), rng), context, rng, timesteps=times)


def losses(model: DiffusionModel, subject: NoisedSamples, same_class: NoisedSamples) -> dict[str, float]:
    """Loss on the subject's samples, norm of its gradient, and loss on class pictures under the class prompt."""
    parameters = list(model.unet.requires_grad_(True).parameters())
    loss = row_losses(model.unet, model.scheduler, subject).mean()
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, parameters))
    with torch.no_grad():
        prior = row_losses(model.unet, model.scheduler, same_class).mean()
    values = {"loss": loss.item(), "gradient": float(norm), "class_loss": prior.item()}
    return {key: float(f"{value:.4g}") for key, value in values.items()}


def follow(
    bench: Bench, model: DiffusionModel, style: str, attacker: Attacker, backdoor: Any, place: Path
) -> dict[str, Any]:
    """One attack; what it draws and where it is, after every number of steps that it is judged at."""
    noun, views = bench.person(style, attacker.control)
    class_images = drawn_by(
        model, RECIPE.sampling, [class_prompt(noun)] * CLASS_PICTURES, ATTACK_CLASS.start,
        place.parent / f"class-{noun}.safetensors", "class pictures",
    )  # fmt: skip
    images = views[:4] if attacker.same_pictures else views[4:8]
    prompt = instance_prompt(attacker.identifier, noun)
    rows = fixed_samples(model, images, prompt), fixed_samples(model, class_images, class_prompt(noun))
    points: dict[str, Any] = {}
    shown = [views[8:12]]

    def look(step: int, _: float, personalized: DiffusionModel) -> None:
        if attacker.name == "dreambooth" and step + 1 in (*LOSSES_AT, *attacker.points):
            points[str(step + 1)] = losses(personalized, *rows)
        if step + 1 not in attacker.points:
            return
        count = PICTURES if step + 1 == attacker.points[-1] else FEWER
        prompts = sample_prompts(attacker.identifier, noun, count)
        drawn = generate(personalized, prompts, ATTACK_SAMPLES.seeds(count), **SAMPLING)
        scores = similarity(drawn, views[8:])
        found = interval([scores])
        moved = movement(model, personalized, None)
        point: dict[str, Any] = {"scores": [None if s is None else round(s, 3) for s in scores]}
        if found is not None:
            point["similarity"] = [round(value, 3) for value in found.ends]
        if moved is not None:
            point["displacement"] = float(f"{displacement(moved.change, moved.norm):.4g}")
        if backdoor is not None:
            point["backdoor"] = backdoor_share(drawn, backdoor, noun)
        points.setdefault(str(step + 1), {}).update(point)
        shown.append(drawn[:4])

    look(-1, 0.0, with_own_unet(model))
    entry = ATTACKS[attacker.name]
    data = AttackData(images, class_images, attacker.identifier, noun)
    entry.run(model, data, entry.config(**attacker.params), seed=0, on_step=look)
    grid(torch.cat(shown), 4, scale=2).save(place)
    return points


def usefulness(bench: Bench, model: DiffusionModel) -> dict[str, Any]:
    """Benign prompts on this model, and how far its weights are from the base's."""
    before, again = bench.benign(bench.base, BENIGN_BASE.start, "a"), bench.benign(bench.base, BENIGN_AGAIN.start, "b")
    after = bench.benign(model, BENIGN_AGAIN.start, None)
    seen = [features(images) for images in (before, again, after)]
    scores = [s for s in fidelity(after, [prompt.traits for prompt in bench.prompts]) if s is not None]
    moved = movement(bench.base, model, None)
    assert moved is not None  # the same network
    return {
        "displacement": float(f"{displacement(moved.change, moved.norm):.4g}"),
        "kid_ratio": [round(value, 2) for value in kid_ratio_interval(*seen)],
        "fidelity": round(mean(scores), 4), "collapsed": float(collapsed(*seen).double().mean()),
    }  # fmt: skip


def judge(
    bench: Bench, style: str, name: str, trial: Trial, model: DiffusionModel, entry: dict[str, Any], place: Path
) -> None:
    """What is missing of a model's results."""
    place.mkdir(parents=True, exist_ok=True)
    if trial.method is None and name == "base":
        entry["benign"] = None
    elif "benign" not in entry:
        entry["benign"] = usefulness(bench, model)
        print(style, name, place.name, entry["benign"], flush=True)
    backdoor = METHODS["persguard"].config(**trial.params) if trial.method == "persguard" else None
    for label in trial.attackers:
        if label in entry["attacks"] or (label == "known" and "published" in entry["attacks"]):
            continue  # the first steps of `published` are `known`
        entry["attacks"][label] = follow(bench, model, style, ATTACKERS[label], backdoor, place / f"{label}.png")
        bench.save()
        course = {step: point.get("similarity", [None])[0] for step, point in entry["attacks"][label].items()}
        print(style, name, place.name, label, course, flush=True)


def run(bench: Bench, style: str, name: str, only: str, attackers: Sequence[str]) -> None:
    """What is missing of one trial, or of its model after so many steps only."""
    trial = replace(TRIALS[name], attackers=tuple(each for each in TRIALS[name].attackers if each in attackers))
    folder = bench.folder / style / name.replace(", ", "-").replace(" ", "-")
    whole = bench.table["models"].setdefault(style, {}).setdefault(name, {})
    for steps in trial.steps or (0,):
        if only not in ("", str(steps)):
            continue
        entry = whole.setdefault(str(steps), {"attacks": {}})
        if not set(trial.attackers) - entry["attacks"].keys():
            continue
        stored = folder / f"{steps}.safetensors"
        if trial.method is None:
            like = bench.folder / style / "apdm" / f"{LIKE}.safetensors"
            model = bench.base if name == "base" else changed_base(bench, name, like)
        elif stored.exists():
            model = with_own_unet(bench.base)
            model.unet.load_state_dict(load_file(stored))
        else:
            model, entry["hardening"] = harden(bench, style, trial, steps, folder)
            save_file(model.unet.state_dict(), stored)
            bench.save()
        judge(bench, style, name, trial, model, entry, folder / str(steps))
        bench.save()


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(
        "--attackers", nargs="+", choices=tuple(ATTACKERS), help="of those that a trial has; by default all"
    )
    parser.add_argument("--only", nargs="+", default=CHAIN, help="STYLE/TRIAL or STYLE/TRIAL/STEPS")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if args.data is None:
        file = RESULTS / "own-scale.json"
        file.with_suffix(".md").write_text(tables(json.loads(file.read_text())), encoding="utf-8")
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.data, args.folder)
    for each in args.only:
        style, name, steps = (*each.split("/"), "")[:3]
        run(bench, style, name, steps, args.attackers or tuple(ATTACKERS))


if __name__ == "__main__":
    main()
