"""What is known of a run before its first step: what stands in its way, and what it will cost.

Costs of a hardening are counted by its method; those of a verification are counted from the settings of its attacks. Hours are
these counts at the rate of a few timed forwards on this machine.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from math import ceil
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from guardsmith.attacks import find_attack
from guardsmith.attacks.sampling_tricks import SETTINGS
from guardsmith.config.recipe import AttackSpec, MethodSpec, Recipe
from guardsmith.core.console import warn
from guardsmith.core.errors import GuardsmithError, RunFailed, UserError
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.evaluation.planning import attacked_subjects, attacks_at_rates, attacks_to_search, check_others
from guardsmith.evaluation.preflight import check_attacks, check_policy, check_threat_model
from guardsmith.gate.policy import Policy, recipe_policy
from guardsmith.hardening.compatibility import check_against_base, check_computes
from guardsmith.hardening.data import negative_files
from guardsmith.hardening.memory import estimate
from guardsmith.methods import find_method
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import DiffusionModel, load_model
from guardsmith.models.contents import weight_files
from guardsmith.registry.loader import Registry, missing_controls, present_day
from guardsmith.runtime.output import check_apart

Outlook = Literal["fine", "warning", "problem"]
GIB = 2**30
TIMED_SECONDS = 3.0  # of forwards, at least one and at most
TIMED_FORWARDS = 5
ROWS = (2, 8)  # of the timed calls: as a real base is trained, and as a small one is, which is faster a row
QUICK = 0.05  # seconds of a call, below which a larger one is timed too
BACKWARD = 3  # a row forward and backward, in forward equivalents
USUAL_PROBES = 5  # of a search for a just-enough attack
GUIDED = 2  # rows of a picture's step, for guidance draws with and without the prompt


@dataclass(frozen=True)
class Line:
    """One line of a forecast.

    Attributes:
        what: is looked at.
        detail: what was found.
        outlook: whether it stands in the way.
    """

    what: str
    detail: str
    outlook: Outlook = "fine"


@dataclass
class Forecast:
    """Everything that is known of a run.

    Attributes:
        lines: for people.
        data: the numbers, for machines.
    """

    lines: list[Line] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, detail: str, outlook: Outlook = "fine") -> None:
        """Put down a finding."""
        self.lines.append(Line(what, detail, outlook))

    def found(self, outlook: Outlook) -> list[str]:
        """What was found, of one kind, one sentence each."""
        return [line.detail for line in self.lines if line.outlook == outlook]

    def as_json(self) -> dict[str, Any]:
        """The numbers, and what was found."""
        return self.data | {"warnings": self.found("warning"), "problems": self.found("problem")}


def forecast(
    registry: Registry,
    recipe: Recipe,
    output: Path,
    *,
    hardens: bool = True,
    verifies: bool = True,
    policy: Policy | None = None,
    model: DiffusionModel | None = None,
    today: date | None = None,
) -> Forecast:
    """Look at everything before anything is drawn or written.

    Args:
        registry: whom to protect.
        recipe: how.
        output: folder of the run.
        hardens: a hardening is planned.
        verifies: a verification is planned in the same run; where it is not, what would stand in its way is a warning.
        policy: of the gate, if one was given.
        model: the base, if it is loaded already.
        today: the day on which the run begins.

    Raises:
        UserError: the base cannot be loaded, or a number of the recipe is beyond reason.
    """
    plan = Forecast()
    base = model if model is not None else _loaded(recipe, plan)
    _describe(plan, registry, recipe, output, base)
    if base is not None:
        _judged(plan, lambda: check_apart(base.folder, output), "output")
        _judged(plan, lambda: check_against_base(base, registry, recipe), "base and method")
        _judged(plan, lambda: check_computes(base), "base")
    if hardens and (negatives := recipe.negatives) is not None:
        _judged(plan, lambda: negative_files(negatives), "negatives")
    _look_at_judge(plan, registry, recipe, base, policy, "problem" if verifies else "warning")
    if sentence := missing_controls(registry):
        plan.add("controls", sentence, "warning")
    forwards = {
        "hardening": _hardening_forwards(recipe, registry) if hardens else 0,
        "verification": verification_forwards(recipe, registry) if recipe.verify.attacks else 0,
    }
    plan.data["unet_forward_equivalents"] = forwards["hardening"]
    plan.data["verification_forwards"] = forwards["verification"]
    plan.add("U-Net forwards", f"{forwards['hardening']:,} to harden, about {forwards['verification']:,} to verify "
                               "(without the checks of everyday use)")  # fmt: skip
    hours = _hours(plan, base, forwards, recipe if hardens else None) if base is not None else None
    _look_at_room(plan, recipe, output, base, hardens)
    _look_at_consents(plan, registry, hours, today or present_day())
    return plan


def refuse_or_warn(plan: Forecast) -> list[str]:
    """The warnings of a forecast.

    Raises:
        UserError: something stands in the way; every problem, one sentence a line.
    """
    if problems := plan.found("problem"):
        raise UserError("\n".join(problems))
    return plan.found("warning")


def before_hardening(
    registry: Registry,
    recipe: Recipe,
    output: Path,
    *,
    verifies: bool = True,
    policy: Policy | None = None,
    today: date | None = None,
) -> Callable[[DiffusionModel], None]:
    """What `hardening.pipeline.harden` calls with the base before it draws or writes anything; see `forecast`.

    It raises `UserError` with all that stands in the way, and prints warnings of what may.
    """

    def check(base: DiffusionModel) -> None:
        result = forecast(registry, recipe, output, verifies=verifies, policy=policy, model=base, today=today)
        for sentence in refuse_or_warn(result):
            warn(sentence)

    return check


def _loaded(recipe: Recipe, plan: Forecast) -> DiffusionModel | None:
    try:
        return load_model(recipe.base, recipe.revision)
    except RunFailed as error:  # a Hub id: elsewhere it may be had, unless the Hub says that there is no such model
        known_not_to_be = isinstance(error.__cause__, RepositoryNotFoundError)
        sentence = str(error).rstrip(".")
        plan.add("base", f"{sentence}; memory and speed are not known", "problem" if known_not_to_be else "warning")
        return None


def _judged(plan: Forecast, check: Any, what: str) -> None:
    try:
        check()
    except UserError as error:
        for sentence in str(error).split("\n"):
            plan.add(what, sentence, "problem")


def _describe(plan: Forecast, registry: Registry, recipe: Recipe, output: Path, base: DiffusionModel | None) -> None:
    method = find_method(recipe.method.name)
    config = method.config(**recipe.method.params)
    plan.data |= {
        "base": recipe.base,
        "subjects": [subject.id for subject in registry.subjects],
        "controls": [subject.id for subject in registry.controls],
        "method": recipe.method.name,
        "params": config.model_dump(mode="json"),
        "judge": recipe.judge.name,
        "output": str(output),
    }
    if base is not None:
        plan.add("base", f"{recipe.base}: {base.family.name}, {base.prediction_type}, {base.image_size} px")
    plan.add("subjects", f"{len(registry.subjects)} protected, {len(registry.controls)} controls")
    plan.add("method", f"{recipe.method.name}, {method.steps(config):,} steps; {method.shown}")


def _look_at_judge(
    plan: Forecast,
    registry: Registry,
    recipe: Recipe,
    base: DiffusionModel | None,
    policy: Policy | None,
    outlook: Outlook,
) -> None:
    try:
        rules = recipe_policy(recipe, policy)
        check_attacks(recipe)
        check_others(registry, recipe)
        check_threat_model(rules, recipe)
        if base is not None:
            check_policy(rules, registry, base.image_size)
        load_judge(rules.judge.name, rules.judge.model, rules.judge.clip_t)
    except GuardsmithError as error:
        plan.add("judge", f"this cannot be verified as it is: {error}", outlook)
    else:
        plan.data["judge"] = rules.judge.name
        plan.add("judge", f"{rules.judge.name}, levels of {', '.join(rules.classes)}")


def _hardening_forwards(recipe: Recipe, registry: Registry) -> int:
    method = find_method(recipe.method.name)
    return method.cost(method.config(**recipe.method.params), [subject.class_noun for subject in registry.subjects])


def attack_forwards(attack: AttackSpec, recipe: Recipe, steps: int) -> int:
    """Forward equivalents of one attack with its pictures, counted from its settings.

    Args:
        attack: with its settings.
        recipe: how it draws.
        steps: that it takes, at most.
    """
    settings = find_attack(attack.name).config(**attack.params).model_dump()
    prior = 2 if settings.get("prior_weight", 0) else 1
    training = steps * settings.get("batch_size", 1) * settings.get("gradient_accumulation", 1) * prior * BACKWARD
    points = len(recipe.verify.evaluation_points)
    steps_drawn = SETTINGS.get(attack.drawing, {}).get("steps", recipe.sampling.steps)
    sampling = points * recipe.verify.images_per_unit * steps_drawn * GUIDED
    return int(training * (2 if attack.two_stage else 1) + sampling)


def verification_forwards(recipe: Recipe, registry: Registry) -> int:
    """Forward equivalents of a verification, at most: every attack on both models, and pictures of classes and benign prompts.

    A just-enough attack counts with a search of its usual length and with as many steps as the attack that it comes from.
    """
    verify = recipe.verify
    protected, controls = len(attacked_subjects(registry, verify, recipe.seed)), len(registry.controls)
    pairs = len(verify.identifiers) * len(verify.seeds) if verify.full_factorial else 1
    longest, total = max(verify.evaluation_points), 0
    new = [verify.attacks[label] for label in attacks_to_search(verify)]
    runs = [(attack, controls) for attack in (*verify.attacks.values(), *new)]
    runs += [(attack, 0) for attack in attacks_at_rates(verify).values()]
    for attack, others in runs:
        steps = find_attack(attack.name).steps(attack.params)
        usual, longer = attack_forwards(attack, recipe, steps), attack_forwards(attack, recipe, ceil(longest * steps))
        total += pairs * (protected * (usual + longer) + 2 * others * usual)
    for attack in new:
        steps = find_attack(attack.name).steps(attack.params)
        total += USUAL_PROBES * min(verify.displacement.subjects, protected) * attack_forwards(attack, recipe, steps)
    nouns = {subject.class_noun for subject in (*registry.subjects, *registry.controls)}
    images = 2 * len(nouns) * verify.class_images + 3 * verify.benign_images
    return total + images * recipe.sampling.steps * GUIDED


def seconds_per_forward(model: DiffusionModel) -> float:
    """Seconds of a row's forward pass through the denoiser on this machine: the fastest of a few timed calls."""
    few, many = ROWS
    seconds = _timed(model, few)
    return seconds if seconds * few > QUICK else min(seconds, _timed(model, many))


def in_words(hours: float) -> str:
    """A duration with two digits, in minutes where it is shorter than an hour."""
    return f"{hours:.2g} h" if hours >= 1 else f"{60 * hours:.2g} min"


@torch.no_grad()
def _timed(model: DiffusionModel, rows: int) -> float:
    """Seconds of each row of such a call: the fastest of a few, after one that is not timed."""
    shape = (
        rows,
        int(model.unet.config.in_channels),
        int(model.unet.config.sample_size),
        int(model.unet.config.sample_size),
    )
    context = PromptBank(model).encode(["a photo"] * rows)
    device = next(model.unet.parameters()).device
    inputs = torch.zeros(shape, device=device), torch.full((rows,), 500, device=device), context.to(device)
    model.unet(*inputs)
    times: list[float] = []
    while len(times) < TIMED_FORWARDS and sum(times) < TIMED_SECONDS:
        began = time.perf_counter()
        model.unet(*inputs, return_dict=False)[
            0
        ].sum().item()  # an accelerator has finished only when it gives a number
        times.append((time.perf_counter() - began) / rows)
    return min(times)


def other_seconds(spec: MethodSpec, base: DiffusionModel) -> float:
    """Seconds that a hardening takes beside its U-Net forwards (`HardeningMethod.other_seconds`)."""
    method = find_method(spec.name)
    return method.other_seconds(method.config(**spec.params), base)


def _hours(plan: Forecast, base: DiffusionModel, forwards: dict[str, int], hardening: Recipe | None) -> float:
    rate = seconds_per_forward(base)
    hours = {what: count * rate / 3600 for what, count in forwards.items()}
    if hardening is not None:
        with suppress(UserError):  # a base that does not fit is a problem of its own
            hours["hardening"] += other_seconds(hardening.method, base) / 3600
    plan.data |= {"seconds_per_forward": rate, "hours": hours | {"together": sum(hours.values())}}
    plan.add("time", f"{in_words(hours['hardening'])} to harden, {in_words(hours['verification'])} to verify (likewise), in one "
                     f"process at the {1 / rate:.3g} forwards a second that were measured just now")  # fmt: skip
    return float(sum(hours.values()))


def stored_gib(base: DiffusionModel, recipe: Recipe) -> float:
    """What a hardening writes at most, in GiB: the model twice (once for trial), its checkpoint with two moments, its state."""
    model = sum(file.stat().st_size for part in base.networks for file in weight_files(base.folder / part))
    denoiser = 4 * sum(parameter.numel() for parameter in base.unet.parameters())
    return float(2 * model + 4 * denoiser) / GIB


def _look_at_room(plan: Forecast, recipe: Recipe, output: Path, base: DiffusionModel | None, hardens: bool) -> None:
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not place.is_dir():
        plan.add("output", f"{place} is a file; name a folder for the output", "problem")
        return
    if not os.access(place, os.W_OK | os.X_OK):
        plan.add("output", f"{place} cannot be written to; name another folder for the output", "problem")
    plan.data["memory_gib"] = None
    if base is None or not hardens:
        return
    free, size = shutil.disk_usage(place).free / GIB, stored_gib(base, recipe)
    plan.data["disk_gib"] = {"needed": round(size, 3), "free": round(free, 1)}
    plan.add("disk", f"{size:.2f} GiB needed in {place}, {free:.1f} GiB free", "problem" if size > free else "fine")
    method = find_method(recipe.method.name)
    loaded = sum(
        weight.nbytes for part in base.networks.values() for weight in part.parameters() if weight.device.type == "cpu"
    )
    try:
        needs = estimate(recipe, method, method.config(**recipe.method.params), loaded=loaded)
    except RunFailed:
        return
    plan.data["memory_gib"] = {key: round(value, 2) for key, value in needs.items()}
    on_cpu = next(base.unet.parameters()).device.type == "cpu"
    room = (
        psutil.virtual_memory().total / GIB
        if on_cpu
        else torch.cuda.mem_get_info()[1] / GIB
        if torch.cuda.is_available()
        else None
    )
    detail = f"{needs['together']:.1f} GiB estimated" + (f", this machine has {room:.1f} GiB" if room else "")
    plan.add("memory", detail, "warning" if room and needs["together"] > room else "fine")


def _look_at_consents(plan: Forecast, registry: Registry, hours: float | None, today: date) -> None:
    end = (datetime.combine(today, datetime.now().astimezone().time()) + timedelta(hours=hours or 0)).date()
    ends = {
        subject.id: subject.consent.expires_on
        for subject in registry.subjects
        if subject.consent is not None and subject.consent.expires_on is not None
    }
    short = {name: until for name, until in ends.items() if until < end}
    for name, until in short.items():
        plan.add(
            "consents", f"the consent for {name} ends on {until}, before this run is expected to end ({end})", "problem"
        )
    if not short:
        first: Sequence[date] = sorted(ends.values())
        plan.add(
            "consents",
            f"hold through {end}, "
            + ("when the run is expected to end" if hours else "today; how long a run takes is unknown")
            + (f"; the first ends on {first[0]}" if first else ""),
        )
