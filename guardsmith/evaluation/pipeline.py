"""Attack the base and the hardened model, for protected subjects and controls; judge, write the report.

out/verify/hardened/   units of the attack matrix (see `matrix`), class pictures and ordinary pictures of that side
out/verify/base/       the same of the base, unless `--base-runs` names a folder that several verifications share
out/verify/report.json, and the same for others: report.html, report.md, report.junit.xml, report.sarif, grid.png
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from guardsmith.attacks import find_attack
from guardsmith.config.recipe import GateSpec, Recipe
from guardsmith.core.atomic_io import folder_digest, write_json
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.images import to_pil
from guardsmith.core.progress import console, stage
from guardsmith.diffusion.cache import drawn_by
from guardsmith.diffusion.prompts import ORDINARY_VERIFICATION, OrdinaryPrompt, class_prompt, ordinary_prompts
from guardsmith.evaluation.no_attack import likeness_of, released_pictures
from guardsmith.evaluation.runs import (
    SIDES,
    Judged,
    Side,
    Unit,
    attacked_subjects,
    class_file,
    collect,
    plan_units,
    run_units,
)
from guardsmith.gate.policy import Policy, default_policy
from guardsmith.gate.rules import (
    EXIT_CODES,
    Check,
    Interval,
    Levels,
    Units,
    attack_at,
    calibration,
    check_control,
    check_learnt,
    check_prompt_fit,
    check_protected,
    check_released,
    check_utility,
    half_way,
    interval,
    learnt_level,
    verdict,
)
from guardsmith.hardening.compatibility import check_against_base
from guardsmith.hardening.record import read_hardening, run_info
from guardsmith.metrics import Judge, load_judge
from guardsmith.metrics.collapse import destroyed
from guardsmith.metrics.identity import SIZE
from guardsmith.metrics.kid import kid, kid_ratio_interval
from guardsmith.models.checkpoint import DiffusionModel, file_digests, load_model, weights_digest
from guardsmith.models.contents import in_words
from guardsmith.models.release_files import check_hardened_files, known_in, surplus_of
from guardsmith.registry.loader import Registry
from guardsmith.reports.ci_formats import save_exports
from guardsmith.reports.html import Evidence, page_data, save_page
from guardsmith.reports.redaction import salt_of, save_public
from guardsmith.reports.terminal import print_report, save_grid
from guardsmith.runtime.executors import check_executor
from guardsmith.runtime.output import lock_output

ORDINARY_SHOWN = 12  # pairs of pictures on the page
RECORDED = ("base", "base_digest", "model_digest", "registry_digest", "method", "params", "seed", "seconds",
            "unet_forward_equivalents", "files", "carries")  # fmt: skip


def draw_ordinary(models: dict[Side, Judged], recipe: Recipe) -> tuple[list[OrdinaryPrompt], dict[str, Tensor]]:
    """Ordinary prompts, and pictures of them by "base", "base again" (other seeds) and "hardened" (the same seeds as that)."""
    base = models["base"].model
    asked = ordinary_prompts(base, ORDINARY_VERIFICATION, recipe.verify.ordinary_images, recipe.seed + 1)
    texts = [prompt.text for prompt in asked]
    drawn: dict[str, Tensor] = {}
    sets: tuple[tuple[str, Side, int], ...] = (
        ("base", "base", 40_000), ("base again", "base", 50_000), ("hardened", "hardened", 50_000)
    )  # fmt: skip
    for name, side, seed in sets:
        judged = models[side]
        key = folder_digest(judged.digest, texts, seed, recipe.sampling.model_dump())
        file = judged.root / f"ordinary-{key}.safetensors"
        drawn[name] = drawn_by(judged.model, recipe.sampling, texts, seed, file, f"ordinary prompts: {name}")
    return asked, drawn


def measure_ordinary(asked: Sequence[OrdinaryPrompt], drawn: dict[str, Tensor], judge: Judge) -> dict[str, Any]:
    """KID to the base, prompt fidelity and CLIP-T, of what `draw_ordinary` gave."""
    seen = {name: judge.features(images) for name, images in drawn.items()}
    values: dict[str, Any] = {
        "kid_hardened": kid(seen["base"], seen["hardened"]),
        "kid_base": kid(seen["base"], seen["base again"]),
        "kid_ratio": None,
        "kid_ratio_low": None,
        "kid_ratio_high": None,
        "destroyed": int(destroyed(seen["base"], seen["base again"], seen["hardened"]).sum()),
        "fidelity_hardened": None,
        "fidelity_base": None,
        "n": len(asked),
    }
    if values["kid_base"]:
        found = kid_ratio_interval(seen["base"], seen["base again"], seen["hardened"])
        values |= dict(zip(("kid_ratio", "kid_ratio_low", "kid_ratio_high"), found, strict=True))
    if judge.fidelity is not None and all(prompt.asked for prompt in asked):
        wanted = [prompt.asked for prompt in asked]
        for name, key in (("base again", "fidelity_base"), ("hardened", "fidelity_hardened")):
            # a picture that cannot be read shows nothing of what was asked for
            values[key] = sum(score or 0.0 for score in judge.fidelity(drawn[name], wanted)) / len(asked)
    if judge.prompt_fit is not None:
        for name, key in (("base again", "clip_t_base"), ("hardened", "clip_t_hardened")):
            values[key] = judge.prompt_fit(drawn[name], [prompt.text for prompt in asked])
    return values


Scores = dict[tuple[Side, str, str, float], Units]


def make_checks(
    registry: Registry,
    recipe: Recipe,
    scores: Scores,
    released: Mapping[str, Sequence[float | None]],
    utility: dict[str, Any],
    policy: Policy,
) -> list[Check]:
    """All checks of the gate, protected subjects first."""
    levels, rules = policy.classes, policy.rules
    nouns = {subject.id: subject.class_noun for subject in registry.subjects}
    checks = [check_released(name, [drawn], levels[nouns[name]], rules) for name, drawn in released.items()]
    further = [look for look in sorted(recipe.verify.looks) if look > 1]
    for label, spec in recipe.verify.attacks.items():
        trains = find_attack(spec.name).trains
        for subject in attacked_subjects(registry, recipe.verify, recipe.seed):
            level = levels[subject.class_noun]
            if trains:
                checks.append(check_learnt(subject.id, label, scores["base", subject.id, label, 1], level, rules))
            for look in (1, *further):
                hardened = scores["hardened", subject.id, label, look]
                checks.append(check_protected(subject.id, attack_at(label, look), hardened, level, rules))
        for control in registry.controls if trains else ():
            level = levels[control.class_noun]
            base, hardened = (scores[side, control.id, label, 1] for side in ("base", "hardened"))
            checks.append(check_learnt(control.id, label, base, level, rules))
            checks.append(check_control(control.id, label, hardened, base, level, rules))
    if not registry.controls:
        sentence = "the registry has no controls: breakage cannot be told from protection"
        checks.append(Check("control learnable", "", "", "inconclusive", sentence))
    checks += check_utility(utility, rules)
    if "clip_t_base" in utility:
        checks.append(check_prompt_fit(utility["clip_t_base"], utility["clip_t_hardened"], rules))
    return checks


def faceless(units: Units, judge: Judge) -> dict[str, float]:
    """Share of pictures in which a judge of faces finds none (FDFR); nothing for other judges."""
    scored = [score for unit in units for score in unit if score is not None]
    if judge.nobody is None or not scored:
        return {}
    return {"faceless": scored.count(judge.nobody) / len(scored)}


def steps_to_break(
    units: Sequence[Unit],
    intervals: Mapping[tuple[Side, str, str, float], Interval | None],
    classes: Mapping[str, Levels],
    rules: GateSpec,
) -> list[dict[str, Any]]:
    """After how many steps an attack has learnt half of what it usually learns on the base, for protected subjects.

    That is the first look at which the mean similarity is half-way from chance to the level that the attack reaches on the
    base with its usual steps; `None` where no look shows it ("tried" says how far they went).

    Args:
        units: of both sides.
        intervals: what they reached, by (side, subject, attack label, look).
        classes: levels of every class noun.
        rules: an attack that has not learnt the subject on the base by them breaks nothing.
    """
    looks = {(unit.side, unit.subject, unit.label): unit.looks for unit in units}
    found = []
    for subject, label, noun in dict.fromkeys((u.subject, u.label, u.class_noun) for u in units if max(u.looks) > 1):
        usual = intervals["base", subject, label, 1]
        told: dict[str, Any] = {"subject": subject, "attack": label}
        told["tried"] = max(looks["hardened", subject, label].values())
        for side in SIDES:
            reached = []
            for look, steps in looks[side, subject, label].items():
                level = intervals[side, subject, label, look]
                if usual is None or level is None or usual.mean < learnt_level(classes[noun], rules):
                    continue  # unscored, or an attack that does not learn the subject on the base
                if level.mean >= half_way(classes[noun], usual.mean):
                    reached.append(steps)
            told[side] = min(reached, default=None)
        found.append(told)
    return found


def hardened_here(output: Path, registry: Registry) -> tuple[DiffusionModel, DiffusionModel, dict[str, Any]]:
    """Base and hardened model of a hardening, and what its harden.json says.

    Raises:
        UserError: it is not finished, was changed since, or is of another base or registry.
    """
    record = output / "harden.json"
    if not record.is_file() or not (output / "model").is_dir():
        raise UserError(
            f"{output} holds no finished hardening (no harden.json and model/); run `guardsmith harden` first, or name the "
            "model to verify with --model."
        )
    told = read_hardening(record)
    if told["registry_digest"] != registry.digest:
        raise UserError(f"{registry.path} is not the registry that {output} was hardened on (the digests differ).")
    if weights_digest(output / "model") != told["model_digest"]:
        raise UserError(
            f"{output / 'model'} was changed after hardening (its digest differs from harden.json); harden again."
        )
    base = load_model(told["base"], told["base_revision"])
    if weights_digest(base.folder) != told["base_digest"]:
        raise UserError(f"{told['base']} is not the base that {output} was hardened from (the digests differ).")
    told["files"], told["carries"] = check_hardened_files(output / "model", told, base), []
    return base, load_model(str(output / "model")), told


def made_elsewhere(
    source: str, revision: str | None, output: Path, registry: Registry, recipe: Recipe
) -> tuple[DiffusionModel, DiffusionModel, dict[str, Any]]:
    """Base and any other checkpoint of its kind, which guardsmith need not have made; the record says how little is known.

    Raises:
        UserError: one of them cannot be read, they do not belong together, or `output` holds a hardening.
    """
    if (output / "harden.json").exists():
        raise UserError(f"{output} holds a hardening of its own; give the verification of {source} another folder.")
    base, model = load_model(recipe.base, recipe.revision), load_model(source, revision)
    for what, ours, theirs in (
        ("pictures of {} px", base.image_size, model.image_size),
        ("{} latent channels", base.unet.config.in_channels, model.unet.config.in_channels),
    ):
        if ours != theirs:
            raise UserError(
                f"{source} has {what.format(theirs)} and its base {recipe.base} {what.format(ours)}; "
                "they do not belong together."
            )
    told: dict[str, Any] = dict.fromkeys(RECORDED) | {
        "base": recipe.base, "base_digest": weights_digest(base.folder), "model_digest": weights_digest(model.folder),
        "registry_digest": registry.digest, "carries": surplus_of(model.folder, base),
        "files": file_digests(model.folder, known_in(model.folder)),
    }  # fmt: skip
    if told["carries"]:
        console.print(
            f"warning: {source} carries what is no part of the model: {in_words(told['carries'])}",
            markup=False,
            soft_wrap=True,
        )
    return base, model, told


def verify(
    registry: Registry,
    recipe: Recipe,
    output: Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    base_runs: Path | None = None,
    workers: int | None = None,
    executor: str = "local",
    policy: Policy | None = None,
    include_images: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Verify a model against its base; returns what `report.json` says (`exit_code` in it is the command's).

    Args:
        registry: the one that the model was hardened on.
        recipe: its attacks and gate, and the base where `model` is given.
        output: folder of a hardening, whose model is verified; or a folder for the report on `model`.
        model: any checkpoint, as a folder or a Hub id.
        revision: commit, tag or branch of that Hub id.
        base_runs: where the attacks on the base are, or will be; several verifications may share it.
        workers: processes; by default see `guardsmith.runtime.processes`.
        executor: where attacks run, see `guardsmith.runtime.executors`.
        policy: rules and levels of the gate, in place of the recipe's and the embedded ones.
        include_images: put pictures of real persons into report.html too.
        quiet: print no table.

    Raises:
        UserError: there is no such model, the registry is not the one it was hardened on, a class has no calibration.
        RunFailed: a worker process was killed.
    """
    with ExitStack() as stack:
        if output.is_dir():
            lock_output(output, stack)  # before `harden --overwrite` deletes what is read and written here
        return _verify(
            registry, recipe, output, model=model, revision=revision, base_runs=base_runs, workers=workers,
            executor=executor, policy=policy, include_images=include_images, quiet=quiet,
        )  # fmt: skip


def _verify(
    registry: Registry, recipe: Recipe, output: Path, *, model: str | None, revision: str | None, base_runs: Path | None,
    workers: int | None, executor: str, policy: Policy | None, include_images: bool, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    check_executor(executor)
    if not recipe.verify.attacks:
        raise UserError("The recipe names no attacks (verify.attacks); nothing would be verified.")
    if not any(find_attack(spec.name).trains for spec in recipe.verify.attacks.values()):
        raise UserError("No attack of the recipe trains the model; add one that does, such as dreambooth.")
    if model is None:
        base, hardened, told = hardened_here(output, registry)
    else:
        base, hardened, told = made_elsewhere(model, revision, output, registry, recipe)
    if policy is None:
        policy = default_policy(recipe.gate)
    nouns_there = {s.class_noun for s in (*registry.subjects, *registry.controls)}
    if policy.judge.name == "avatar" and (base.image_size != SIZE or nouns_there - calibration().keys()):
        raise UserError(
            f"The embedded judges read 64 px avatars of class {', '.join(calibration())}; this registry or base is of another "
            "kind: judge it by a policy with another judge (`guardsmith policy --judge dino --subjects REGISTRY`)."
        )
    unknown = sorted(nouns_there - policy.classes.keys())
    if unknown:
        raise UserError(f"The policy '{policy.name}' has no levels for {', '.join(unknown)}; add them under `classes`.")
    recipe = recipe.model_copy(update={"gate": policy.rules})
    judge = load_judge(policy.judge.name, policy.judge.model, policy.judge.clip_t)
    check_against_base(base, registry, recipe)
    root = output / "verify"
    models: dict[Side, Judged] = {
        "base": Judged(base, told["base_digest"], base_runs or root / "base"),
        "hardened": Judged(hardened, told["model_digest"], root / "hardened"),
    }
    attacked = attacked_subjects(registry, recipe.verify, recipe.seed)
    nouns = dict.fromkeys(s.class_noun for s in (*attacked, *registry.controls))
    nouns |= dict.fromkeys(spec.class_noun for spec in recipe.verify.attacks.values() if spec.class_noun)
    for side, judged in models.items():
        judged.root.mkdir(parents=True, exist_ok=True)
        for noun in nouns if recipe.verify.class_images else ():
            prompts = [class_prompt(noun)] * recipe.verify.class_images
            file = class_file(judged, noun, recipe)
            drawn_by(judged.model, recipe.sampling, prompts, 60_000, file, f"class pictures ({side}): {noun}")
    units = list(plan_units(registry, recipe, models, policy))
    failed = run_units(units, workers, executor)
    asked, drawn = draw_ordinary(models, recipe)
    utility = measure_ordinary(asked, drawn, judge)
    released: dict[str, list[Path]] = {}
    without_attack: dict[str, list[float | None]] = {}
    with stage("released weights", len(attacked)) as bar:
        for subject in attacked:
            released[subject.id] = released_pictures(models["hardened"], recipe, subject)
            without_attack[subject.id] = likeness_of(
                released[subject.id], subject, judge, judge.size or base.image_size
            )
            bar()
    scores = collect(units)
    intervals = {key: interval(values) for key, values in scores.items()}
    checks = make_checks(registry, recipe, scores, without_attack, utility, policy)
    status = verdict(checks)
    report = {
        "schema": 1,
        "verdict": status,
        "exit_code": EXIT_CODES[status],
        "checks": [check._asdict() for check in checks],
        "scores": [
            {
                "side": side,
                "subject": subject,
                "attack": label,
                "look": look,
                "units": scores[side, subject, label, look],
                "interval": None if level is None else level._asdict(),
                **faceless(scores[side, subject, label, look], judge),
            }
            for (side, subject, label, look), level in intervals.items()
        ],
        "released": without_attack,
        "steps_to_break": steps_to_break(units, intervals, policy.classes, policy.rules),
        "attacked": {"protected": len(attacked), "of": len(registry.subjects), "controls": len(registry.controls)},
        "subjects": [
            {"id": subject.id, "class_noun": subject.class_noun, "role": role}
            for role, group in (("protected", attacked), ("control", registry.controls))
            for subject in group
        ],
        "utility": utility,
        "failed_units": failed,
        "policy": policy.told(),
        "calibration": {noun: level._asdict() for noun, level in policy.classes.items()},
        "hardening": {k: told[k] for k in RECORDED},
        "recipe": recipe.model_dump(mode="json", exclude={"subjects", "bystanders"}),
        "run": run_info(),
    }
    write_json(root / "report.json", report)
    save_grid(root / "grid.png", attacked, registry.controls, units, base.image_size)
    pairs = zip(asked[:ORDINARY_SHOWN], drawn["base again"], drawn["hardened"], strict=False)
    ordinary = [(prompt.text, to_pil(before), to_pil(after)) for prompt, before, after in pairs]
    evidence = Evidence(report, units, include_images, released)
    save_page(root / "report.html", page_data(evidence, attacked, registry.controls, ordinary))
    save_exports(root, report, registry.path, registry.lines)
    record = None if model is not None else read_hardening(output / "harden.json")
    everyone = registry.subjects, registry.controls
    shutil.rmtree(root / "public", ignore_errors=True)
    try:
        save_public(root / "public", evidence, record, *everyone, ordinary, salt_of(output))
    except RunFailed as error:  # the verdict stands; only publishing has to wait
        console.print(f"warning: {error}", markup=False, soft_wrap=True)
    if not quiet:
        print_report(report, root)
    return report
