"""The command line. Data goes to stdout, talk to stderr; each command ends by naming the next one.

Nothing heavy is imported here: every command imports what it needs, so that `--help` and `check` stay quick.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardsmith import __version__
from guardsmith.cli.audit import audit_release
from guardsmith.cli.images import cloak, redteam, train_rid
from guardsmith.cli.registry import check, registry_app
from guardsmith.cli.release import (
    CONTACT,
    LICENCE,
    LICENCE_FILE,
    check_repo_id,
    export,
    import_file,
    publish,
    release_notes,
    verify_signature,
)
from guardsmith.cli.screen import screen
from guardsmith.cli.tables import compare, complete_recipe, list_table, print_policy
from guardsmith.core.console import DAY, day, first_process, launched, print_line, print_schema, unfailing_stderr, warn
from guardsmith.core.errors import GuardsmithError, RunFailed, UserError, out_of_memory, system_errno

if TYPE_CHECKING:
    from guardsmith.config.recipe import Recipe
    from guardsmith.registry.loader import Registry

app = typer.Typer(
    name="guardsmith",
    help=(
        "Harden a Stable Diffusion checkpoint against personalization on protected subjects, attack the result, and let "
        "the release depend on what was measured."
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(registry_app, name="registry")
report_app = typer.Typer(help="The format of report.json.", no_args_is_help=True)
app.add_typer(report_app, name="report")


@report_app.callback()
def _report() -> None:
    pass


NO_MEMORY = (
    "out of memory: close other programs, or choose a smaller batch, compute.gradient_checkpointing or another "
    "compute.optimizer; what was saved is kept, and --resume goes on from it"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default with sys.argv) and return the exit code.

    0 done, 1 gate failed, 2 wrong usage or input, 3 inconclusive, 4 run failed, 130 interrupted.
    """
    with unfailing_stderr():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="guardsmith", standalone_mode=False)
        if code == 130:  # Typer's answer to Ctrl-C
            return _fail("interrupted", 130)
        return code if isinstance(code, int) else 0
    except GuardsmithError as error:
        return _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except typer.Abort:
        return _fail("aborted", 130)
    except SystemExit as stop:
        # A command's verdict is a `typer.Exit`, which arrives above as a code. Here the reader of stdout went away.
        return 4 if stop.code == 1 else int(stop.code or 0)
    except Exception as error:
        if out_of_memory(error):
            return _fail(NO_MEMORY, 4, error)
        if hasattr(error, "format_message"):  # wrong usage; Typer's exception class is not public in every version
            return _usage(error)
        number = system_errno(error)
        if number == errno.ENOSPC:
            return _fail(f"no space left on the disk{_of(error)}: free some space and run again", 4, error)
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _fail(f"no permission to write or read{_of(error)}: choose another place", 2, error)
        return _bug(error)


def _of(error: Exception) -> str:
    name = getattr(error, "filename", None)
    return f" ({name})" if name else ""


def _usage(error: Any) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if not context:
        return _fail(message, 2)
    if message == context.get_help():  # no command at all
        print_line(message)
        return 2
    return _fail(f"{message.rstrip('.')}: see `{context.command_path} --help`", 2)


def _bug(error: Exception) -> int:
    reason = str(error).strip().split("\n")[0]
    sentence = f"{type(error).__name__}: {reason}: this is a bug in guardsmith, please report it"
    return _fail(f"{sentence} with what GUARDSMITH_DEBUG=1 prints", 4, error)


def _fail(sentence: str, code: int, error: BaseException | None = None) -> int:
    if error is not None and os.environ.get("GUARDSMITH_DEBUG") == "1":
        traceback.print_exception(error)
    if first_process() or not isinstance(error, UserError):  # a user's mistake is every process's
        print_line(sentence, style="red")
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"guardsmith {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    progress: Annotated[
        str,
        typer.Option(help="Progress on stderr: auto (bars on a terminal, lines elsewhere), lines, or json."),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            help="Device for the networks: cpu, cuda, cuda:1, mps, xpu.  [default: an accelerator if there is one]"
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Bit-identical results on any number of cores: one thread, slower."),
    ] = False,
) -> None:
    from guardsmith.core.progress import STYLES, show_as

    if progress not in STYLES:
        raise UserError(f"--progress {progress}: choose {', '.join(STYLES)}")
    show_as(progress)
    if launched() > 1 and context.invoked_subcommand != "harden":
        raise UserError(
            f"several processes can harden together; run guardsmith {context.invoked_subcommand} without a launcher"
        )
    if device is not None:
        # Processes inherit it. It is guardsmith.runtime.device.VARIABLE, spelt out because torch takes long to import.
        os.environ["GUARDSMITH_DEVICE"] = device
    if deterministic:
        os.environ["GUARDSMITH_DETERMINISTIC"] = "1"


@report_app.command("schema")
def report_schema(
    output: Annotated[Path | None, typer.Option(help="File to write; by default stdout.")] = None,
) -> None:
    """Print the JSON schema of report.json."""
    from guardsmith.reports.report import json_schema

    print_schema(json_schema(), output)


# Words shared by harden, verify and run. Underscore spellings are those of diffusers' scripts.
SUBJECTS = Annotated[Path | None, typer.Option("--subjects", help="Registry file; by default the recipe's.")]
OUTPUT = Annotated[Path, typer.Option("--output", "--output_dir", "-o", help="Output folder.")]
RECIPE = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Recipe name or file (see `guardsmith list recipes`).", autocompletion=complete_recipe
    ),
]
CHANGES = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be repeated.")
]
NEGATIVES = Annotated[
    str | None,
    typer.Option(
        "--negatives",
        "--bystanders",
        help="Images of unprotected people, used as negatives: folder, glob, parquet:FILE or hub:DATASET.",
    ),
]
RESUME = Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in the output folder.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Delete the output folder's earlier run first.")]
BASE_RUNS = Annotated[
    Path | None,
    typer.Option(
        help="Cache folder for the attacks on the base; verifications can share it.  [default: in the output folder]"
    ),
]
WORKERS = Annotated[
    int | None, typer.Option(min=1, help="Number of attacks that run at the same time; by default one per core.")
]
EXECUTOR = Annotated[
    str, typer.Option(help="local, or ray (the cluster at RAY_ADDRESS, or a new one on this machine).")
]
BUDGET = Annotated[
    str | None,
    typer.Option(help="Size of the verification: quick, standard (the recipe's values) or audit; --set overrides it."),
]
POLICY = Annotated[
    Path | None,
    typer.Option(
        help="Policy file: rules and levels of the gate (see `guardsmith policy`).  [default: the recipe's rules]"
    ),
]
REPORT_TO = Annotated[
    str | None,
    typer.Option(
        "--report-to",
        "--report_to",
        help="Trackers for losses and settings, separated by commas: tensorboard, trackio, wandb, ...",
    ),
]
INCLUDE_IMAGES = Annotated[
    bool,
    typer.Option(
        "--include-images",
        help="Include pictures of real persons in report.html; those of invented persons are always included.",
    ),
]
TODAY = Annotated[datetime | None, typer.Option(formats=DAY, hidden=True)]


def _recipe(name: str | None, base: str | None, changes: list[str] | None, **values: Any) -> Recipe:
    """The recipe with the flags that were given; without a name, the one that fits base and method."""
    from guardsmith.config.loading import beside, choose_recipe

    if values.get("negatives") is not None:
        values["negatives"] = beside(Path(), values["negatives"])
    flags = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    return choose_recipe(name, base, [*(changes or []), *flags])


def _verified_recipe(output: Path, name: str | None, changes: list[str]) -> Recipe:
    """The recipe that a hardening is verified with: the one it was hardened with, unless another is named."""
    from guardsmith.config.loading import choose_recipe
    from guardsmith.hardening.record import read_hardening, recorded_recipe

    record = output / "harden.json"
    if name is not None or not record.is_file():
        return _recipe(name, None, changes)
    recipe = recorded_recipe(read_hardening(record))
    if recipe is None:
        warn(f"{record} does not say which recipe it is of: the attacks are those of `demo`; name yours with --recipe")
    return choose_recipe(recipe, None, changes)


def _budget(name: str | None) -> list[str]:
    """The changes to a recipe that a budget stands for."""
    from guardsmith.config.loading import budget_changes

    return [f"{key}={json.dumps(value)}" for key, value in budget_changes(name).items()]


def _named(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _registry(subjects: Path | None, recipe: Recipe, today: datetime | None) -> Registry:
    from guardsmith.registry.loader import load_registry

    if subjects is None and recipe.subjects is None:
        raise UserError("no registry: name one with --subjects, or in the recipe as `subjects`")
    registry = load_registry(subjects or str(recipe.subjects), today=day(today))
    for warning in registry.warnings:
        print_line(f"warning: {warning}", style="yellow")
    return registry


@app.command()
def harden(
    subjects: SUBJECTS = None,
    output: OUTPUT = Path("out"),
    recipe: RECIPE = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", "--pretrained_model_name_or_path", help="builtin:avatar, a diffusers folder or a Hub id."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="Hardening method (see `guardsmith list methods`).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    negatives: NEGATIVES = None,
    changes: CHANGES = None,
    add_to: Annotated[
        Path | None,
        typer.Option(
            "--add-to", help="Start from this earlier output folder; the registry must contain its subjects too."
        ),
    ] = None,
    resume: RESUME = False,
    overwrite: OVERWRITE = False,
    report_to: REPORT_TO = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with its cost and memory estimate, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print harden.json on stdout at the end.")] = False,
    today: TODAY = None,
) -> None:
    """Harden a base model on the subjects of a registry: OUTPUT/model and OUTPUT/harden.json."""
    flags = {"revision": revision, "method.name": method, "seed": seed, "negatives": negatives}
    chosen = _recipe(recipe, base, changes, **flags)
    registry = _registry(subjects, chosen, today)
    if dry_run:
        _print_plan(chosen, registry, output)
        return
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.hardening.pipeline import harden as run_hardening

    quiet_libraries()
    info = run_hardening(
        registry, chosen, output, resume=resume, overwrite=overwrite, add_to=add_to, report_to=_named(report_to)
    )
    if not first_process():
        return
    if as_json:
        typer.echo(json.dumps(info, indent=1, sort_keys=True))
    print_line(f"hardened on {len(registry.subjects)} subjects in {info['seconds']:.0f} s: {output / 'model'}")
    print_line(f"next: guardsmith verify {shlex.quote(str(output))} --subjects {shlex.quote(str(registry.path))}")


def _print_plan(recipe: Recipe, registry: Registry, output: Path) -> None:
    from guardsmith.hardening.data import bystander_files
    from guardsmith.methods import find_method

    method = find_method(recipe.method.name)
    config = method.config(**recipe.method.params)
    nouns = [subject.class_noun for subject in registry.subjects]
    cost = method.cost(config, nouns)
    if recipe.negatives is not None:
        cost += method.negatives_cost(config, nouns, len(bystander_files(recipe.negatives)), recipe.sampling.steps)
    plan = {
        "base": recipe.base,
        "subjects": [subject.id for subject in registry.subjects],
        "controls": [subject.id for subject in registry.controls],
        "method": recipe.method.name,
        "params": config.model_dump(mode="json"),
        "unet_forward_equivalents": cost,
        "memory_gib": _memory(recipe, method, config),
        "output": str(output),
    }
    typer.echo(json.dumps(plan, indent=1))
    print_line("nothing was written; run again without --dry-run")


def _memory(recipe: Recipe, method: Any, config: Any) -> dict[str, float] | None:
    from guardsmith.hardening.memory import estimate

    try:
        found = estimate(recipe, method, config)
    except RunFailed:  # it would have to be fetched from the Hub first
        print_line(f"{recipe.base} is not on this machine: its memory cannot be estimated")
        return None
    return {key: round(value, 2) for key, value in found.items()}


@app.command()
def verify(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Output folder of `guardsmith harden`; with --model, the folder for the report."
        ),
    ],
    subjects: SUBJECTS = None,
    recipe: RECIPE = None,
    model: Annotated[
        str | None,
        typer.Option(help="Verify this checkpoint (folder or Hub id) against --base, whatever tool made it."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of --model.")] = None,
    base: Annotated[str | None, typer.Option(help="Base of --model.  [default: the recipe's]")] = None,
    changes: CHANGES = None,
    base_runs: BASE_RUNS = None,
    workers: WORKERS = None,
    executor: EXECUTOR = "local",
    policy: POLICY = None,
    budget: BUDGET = None,
    include_images: INCLUDE_IMAGES = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json on stdout instead of the table.")] = False,
    today: TODAY = None,
) -> None:
    """Attack the base and the hardened model and compare; exit 0 (pass), 1 (fail) or 3 (inconclusive)."""
    if model is None and (base or revision):
        raise UserError("--base and --revision belong to --model; a hardening's own base is on record.")
    flags = [*_budget(budget), *(changes or [])]
    chosen = _verified_recipe(output, recipe, flags) if model is None else _recipe(recipe, base, flags)
    registry = _registry(subjects, chosen, today)
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.pipeline import verify as run_verification
    from guardsmith.gate.policy import load_policy

    rules = None if policy is None else load_policy(policy)

    quiet_libraries()
    report = run_verification(
        registry,
        chosen,
        output,
        model=model,
        revision=revision,
        base_runs=base_runs,
        workers=workers,
        executor=executor,
        policy=rules,
        include_images=include_images,
        quiet=as_json,
    )
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1, sort_keys=True))
    raise typer.Exit(report.exit_code)


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe name or file.", autocompletion=complete_recipe)
    ],
    output: OUTPUT = Path("out"),
    subjects: SUBJECTS = None,
    negatives: NEGATIVES = None,
    changes: CHANGES = None,
    resume: RESUME = False,
    overwrite: OVERWRITE = False,
    base_runs: BASE_RUNS = None,
    workers: WORKERS = None,
    executor: EXECUTOR = "local",
    policy: POLICY = None,
    budget: BUDGET = None,
    include_images: INCLUDE_IMAGES = False,
    report_to: REPORT_TO = None,
    repo_id: Annotated[
        str | None,
        typer.Option("--publish", metavar="REPO_ID", help="Publish to this repository if the verdict is pass."),
    ] = None,
    contact: Annotated[str | None, CONTACT] = None,
    licence: Annotated[str | None, LICENCE] = None,
    licence_file: Annotated[Path | None, LICENCE_FILE] = None,
    today: TODAY = None,
) -> None:
    """Harden and verify as a recipe says; exit 0 (pass), 1 (fail) or 3 (inconclusive)."""
    if repo_id is not None:
        check_repo_id(repo_id)
    if (repo_id is None) != (contact is None):
        raise UserError("--publish and --contact belong together: the model card says whom to write to")
    chosen = _recipe(recipe, None, [*_budget(budget), *(changes or [])], negatives=negatives)
    registry = _registry(subjects, chosen, today)
    from guardsmith.core.progress import quiet_libraries
    from guardsmith.evaluation.pipeline import verify as run_verification
    from guardsmith.gate.policy import load_policy
    from guardsmith.hardening.pipeline import harden as run_hardening
    from guardsmith.runtime.executors import check_executor

    rules = None if policy is None else load_policy(policy)
    check_executor(executor)
    quiet_libraries()
    run_hardening(registry, chosen, output, resume=resume, overwrite=overwrite, report_to=_named(report_to))
    report = run_verification(
        registry,
        chosen,
        output,
        base_runs=base_runs,
        workers=workers,
        executor=executor,
        policy=rules,
        include_images=include_images,
    )
    if repo_id is not None and contact is not None and report.exit_code == 0:
        from guardsmith.registry.loader import present_day
        from guardsmith.release.publish import publish as run_publishing

        on = day(today) or present_day()
        done = run_publishing(
            output, registry, repo_id, today=on, contact=contact, licence=licence, licence_file=licence_file
        )
        print_line(f"published: {done.url} at {done.commit}")
    elif repo_id is not None:
        print_line(f"not published: the verdict is {report.verdict}")
    raise typer.Exit(report.exit_code)


app.command()(check)
app.command()(compare)
app.command("policy")(print_policy)
app.command("list")(list_table)
app.command()(cloak)
app.command()(redteam)
app.command("train-rid")(train_rid)
app.command()(screen)
app.command()(publish)
app.command("verify-signature")(verify_signature)
app.command("audit-release")(audit_release)
app.command()(export)
app.command("import")(import_file)
app.command("release-notes")(release_notes)
