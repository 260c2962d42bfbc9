"""Attack the base and the hardened model, for protected subjects and controls; judge, write the report.

out/verify/hardened/   units of the attack matrix (see `units`), class pictures and pictures of benign prompts of that side
out/verify/base/       the same of the base, unless `--base-runs` names a folder that several verifications share
out/verify/report.json, and the same for others: report.html, report.md, report.junit.xml, report.sarif, grid.png, public/

Five steps, a module each: `preflight` refuses what cannot work, `just_enough` searches for further attacks, `measuring` attacks
and scores, `judging` makes the report, `writing` writes it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from guardsmith.config.recipe import Recipe
from guardsmith.core.console import warn
from guardsmith.evaluation.judging import judged_report
from guardsmith.evaluation.just_enough import with_just_enough
from guardsmith.evaluation.measuring import measure
from guardsmith.evaluation.preflight import preflight
from guardsmith.evaluation.writing import write
from guardsmith.gate.policy import Policy
from guardsmith.registry.loader import Registry, missing_controls
from guardsmith.reports.report import Report
from guardsmith.reports.terminal import print_report
from guardsmith.runtime.executors import check_executor
from guardsmith.runtime.output import lock_output


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
) -> Report:
    """Verify a model against its base; returns the report (`exit_code` in it is the command's).

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
) -> Report:  # fmt: skip
    check_executor(executor)
    began = time.perf_counter()
    plan = preflight(registry, recipe, output, model=model, revision=revision, base_runs=base_runs, policy=policy)
    if sentence := missing_controls(registry):
        warn(sentence)
    plan, searches = with_just_enough(plan, workers=workers, executor=executor)
    measurements = measure(plan, workers=workers, executor=executor)
    report = judged_report(plan, measurements, searches, seconds=time.perf_counter() - began)
    write(plan, measurements, report, include_images=include_images)
    if not quiet:
        print_report(report, plan.root)
    return report.beside(plan.root)
