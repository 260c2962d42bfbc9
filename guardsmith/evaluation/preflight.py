"""What can be refused before anything is drawn: recipe, models, registry and policy have to belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardsmith.attacks import find_attack
from guardsmith.config.recipe import Recipe
from guardsmith.config.threat_model import threat_model_of
from guardsmith.core.console import in_words, warn
from guardsmith.core.errors import UserError
from guardsmith.core.sources import check_source
from guardsmith.evaluation.planning import TargetModel, attacked_subjects, check_others, with_rate
from guardsmith.gate.calibration import calibration
from guardsmith.gate.evidence import Side
from guardsmith.gate.policy import Policy, recipe_policy
from guardsmith.hardening.compatibility import check_against_base
from guardsmith.hardening.record import read_hardening
from guardsmith.metrics import Judge, load_judge
from guardsmith.metrics.identity import SIZE
from guardsmith.models.checkpoint import DiffusionModel, file_digests, load_model, weights_digest
from guardsmith.models.release_files import check_hardened_files, known_in, surplus_of
from guardsmith.registry.loader import Registry, Subject
from guardsmith.reports.report import Hardening


@dataclass(frozen=True)
class Plan:
    """A verification that may begin.

    Attributes:
        registry: who is protected, and the controls.
        recipe: attacks and sampling, with the policy's rules as its gate.
        policy: limits, levels and judge.
        judge: loaded.
        models: base and hardened model, with their folders.
        hardening: how the hardened model came about.
        record: its `harden.json`; `None` where guardsmith did not make it.
        attacked: the protected subjects that are attacked.
        output: folder of the hardening, or for the report.
    """

    registry: Registry
    recipe: Recipe
    policy: Policy
    judge: Judge
    models: dict[Side, TargetModel]
    hardening: Hardening
    record: Mapping[str, Any] | None
    attacked: list[Subject]
    output: Path

    @property
    def root(self) -> Path:
        """Folder of everything that the verification writes."""
        return self.output / "verify"

    @property
    def image_size(self) -> int:
        """Pixels of what the models draw."""
        return self.models["base"].model.image_size


def preflight(
    registry: Registry,
    recipe: Recipe,
    output: Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    base_runs: Path | None = None,
    policy: Policy | None = None,
) -> Plan:
    """Check everything and load the models; nothing is written.

    Args:
        registry: see `pipeline.verify`, like all others.
        recipe: likewise.
        output: likewise.
        model: likewise.
        revision: likewise.
        base_runs: likewise.
        policy: likewise.

    Raises:
        UserError: what is wrong, and what to do.
    """
    check_attacks(recipe)
    check_others(registry, recipe)
    if model is None:
        base, hardened, record = hardened_here(output, registry)
        hardening = Hardening.model_validate(record | {"carries": []})
    else:
        base, hardened, hardening = made_elsewhere(model, revision, output, registry, recipe)
        record = None
    policy = recipe_policy(recipe, policy)
    check_policy(policy, registry, base.image_size)
    check_threat_model(policy, recipe)
    recipe = recipe.model_copy(update={"gate": policy.rules})
    judge = load_judge(policy.judge.name, policy.judge.model, policy.judge.clip_t)
    check_against_base(base, registry, recipe)
    root = output / "verify"
    models: dict[Side, TargetModel] = {
        "base": TargetModel(base, hardening.base_digest, base_runs or root / "base"),
        "hardened": TargetModel(hardened, hardening.model_digest, root / "hardened"),
    }
    attacked = attacked_subjects(registry, recipe.verify, recipe.seed)
    return Plan(registry, recipe, policy, judge, models, hardening, record, attacked, output)


def check_attacks(recipe: Recipe) -> None:
    """The recipe has to attack, and not with prompts alone; the networks that it names for everyday use have to be there.

    Attacks that run at several learning rates need one.

    Raises:
        UserError: it does not, or a path leads nowhere.
    """
    if not recipe.verify.attacks:
        raise UserError("The recipe names no attacks (verify.attacks); nothing would be verified.")
    if not any(find_attack(spec.name).trains for spec in recipe.verify.attacks.values()):
        raise UserError("No attack of the recipe trains the model; add one that does, such as dreambooth.")
    everyday = recipe.verify.deployability
    for setting, source in (("controlnet", everyday.controlnet), ("t2i_adapter", everyday.t2i_adapter)):
        if source is not None and "controlnet" in everyday.checks:
            check_source(source, f"verify.deployability.{setting}")
    for label in recipe.verify.displacement.attacks:
        with_rate(label, recipe.verify.attacks[label], 1.0)


def check_threat_model(policy: Policy, recipe: Recipe) -> None:
    """The attacks have to be of the threat model that the policy judges, if it names one.

    Raises:
        UserError: they are not.
    """
    threat_model = threat_model_of(recipe.verify)
    if policy.threat_model not in (None, threat_model):
        raise UserError(
            f"The policy '{policy.name}' judges the threat model {policy.threat_model}, and the recipe's attacks test "
            f"{threat_model}; choose a recipe with such attacks, or another policy."
        )


def check_policy(policy: Policy, registry: Registry, image_size: int) -> None:
    """The policy's judge and levels have to be for this base and these classes.

    Raises:
        UserError: they are not.
    """
    nouns = {subject.class_noun for subject in (*registry.subjects, *registry.controls)}
    if policy.judge.name == "avatar" and (image_size != SIZE or nouns - calibration().keys()):
        raise UserError(
            f"The embedded judges read 64 px avatars of class {', '.join(calibration())}; this registry or base is of another "
            "kind: give the recipe another judge (`judge`), whose levels `guardsmith levels FOLDER --judge dino` measures."
        )
    unknown = sorted(nouns - policy.classes.keys())
    if unknown:
        raise UserError(
            f"The policy '{policy.name}' has no levels for {', '.join(unknown)}; measure them (`guardsmith levels`)."
        )


def hardened_here(output: Path, registry: Registry) -> tuple[DiffusionModel, DiffusionModel, dict[str, Any]]:
    """Base and hardened model of a hardening, and its harden.json, with a digest of every file of the model under `files`.

    Raises:
        UserError: it is not finished, was changed since, holds other files, or is of another base or registry.
    """
    file = output / "harden.json"
    if not file.is_file() or not (output / "model").is_dir():
        raise UserError(
            f"{output} holds no finished hardening (no harden.json and model/); run `guardsmith harden` first, or name the "
            "model to verify with --model."
        )
    record = read_hardening(file)
    if record["registry_digest"] != registry.digest:
        raise UserError(f"{registry.path} is not the registry that {output} was hardened on (the digests differ).")
    if weights_digest(output / "model") != record["model_digest"]:
        raise UserError(
            f"{output / 'model'} was changed after hardening (its digest differs from harden.json); harden again."
        )
    base = load_model(record["base"], record["base_revision"])
    if weights_digest(base.folder) != record["base_digest"]:
        raise UserError(f"{record['base']} is not the base that {output} was hardened from (the digests differ).")
    files = check_hardened_files(output / "model", record, base)
    return base, load_model(str(output / "model")), record | {"files": files}


def made_elsewhere(
    source: str, revision: str | None, output: Path, registry: Registry, recipe: Recipe
) -> tuple[DiffusionModel, DiffusionModel, Hardening]:
    """Base and any other checkpoint of its kind, which guardsmith need not have made, and how little is known of it.

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
    carries = surplus_of(model.folder, base)
    if carries:
        warn(f"{source} carries what is no part of the model: {in_words(carries)}")
    hardening = Hardening(
        base=recipe.base, base_digest=weights_digest(base.folder), model_digest=weights_digest(model.folder),
        registry_digest=registry.digest, method=None, params=None, seed=None, seconds=None, unet_forward_equivalents=None,
        files=file_digests(model.folder, known_in(model.folder)), carries=carries,
    )  # fmt: skip
    return base, model, hardening
