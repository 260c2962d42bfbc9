"""What a verification leaves: the report, the same for others, and the evidence for the public."""

from __future__ import annotations

import shutil

from guardsmith.core.console import warn
from guardsmith.core.errors import RunFailed
from guardsmith.core.images import to_pil
from guardsmith.evaluation.measuring import Measurements
from guardsmith.evaluation.preflight import Plan
from guardsmith.reports.ci_formats import save_exports
from guardsmith.reports.html import Evidence, page_data, save_page
from guardsmith.reports.redaction import salt_of, save_public
from guardsmith.reports.report import Report
from guardsmith.reports.terminal import save_grid

BENIGN_PAIRS = 12  # pairs of pictures on the page


def write(plan: Plan, measurements: Measurements, report: Report, *, include_images: bool) -> None:
    """Write everything; the report first, so that a verdict is there whatever happens to the rest.

    Args:
        plan: of the verification.
        measurements: its pictures.
        report: its verdict.
        include_images: put pictures of real persons into report.html too.
    """
    root, registry = plan.root, plan.registry
    report.save(root / "report.json")
    save_grid(root / "grid.png", plan.attacked, registry.controls, measurements.units, plan.image_size)
    pictures = measurements.benign["base again"], measurements.benign["hardened"]
    pairs = zip(measurements.prompts[:BENIGN_PAIRS], *pictures, strict=False)
    benign = [(prompt.text, to_pil(before), to_pil(after)) for prompt, before, after in pairs]
    evidence = Evidence(report, measurements.units, include_images, measurements.released, root=root)
    save_page(root / "report.html", page_data(evidence, plan.attacked, registry.controls, benign))
    save_exports(root, report, registry.path, registry.lines)
    shutil.rmtree(root / "public", ignore_errors=True)
    try:
        save_public(
            root / "public", evidence, plan.record, registry.subjects, registry.controls, benign, salt_of(plan.output)
        )
    except RunFailed as error:  # the verdict stands; only publishing has to wait
        warn(f"{error}")
