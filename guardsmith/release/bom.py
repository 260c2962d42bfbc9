"""A bill of materials of a hardened model (CycloneDX 1.6, an ML-BOM): which weights, from which base, measured how."""

from __future__ import annotations

import uuid
from typing import Any

from guardsmith.release.card import Licence, limits, measured
from guardsmith.reports.report import Report

CUSTOM = uuid.UUID("6f1d3c3e-7c1b-4f61-9f5e-0d8f6f3a2b11")  # name space of our serial numbers


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def bill_of_materials(report: Report, licence: Licence, repo_id: str) -> dict[str, Any]:
    """The document; the same report gives the same one.

    Args:
        report: `verify/public/report.json`.
        licence: of the model.
        repo_id: where it will be.
    """
    hardening, run = report.hardening, report.run
    model = f"model:{hardening.model_digest}"
    policy = [] if report.policy is None else [{"name": "guardsmith:policy-digest", "value": report.policy.digest}]
    metrics = [
        {
            "type": each.kind, "slice": each.name, "value": f"{each.value:.4f}",
            "confidenceInterval": {"lowerBound": f"{each.low:.4f}", "upperBound": f"{each.high:.4f}"},
        }
        for each in measured(report)
    ]  # fmt: skip
    packages = [
        {"type": "library", "bom-ref": f"pypi:{name}", "name": name, "version": version}
        for name, version in sorted(run.packages.items())
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(CUSTOM, hardening.model_digest + run.finished)}",
        "version": 1,
        "metadata": {
            "timestamp": run.finished,
            "tools": {"components": [{"type": "application", "name": "guardsmith", "version": run.guardsmith}]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": model,
                "name": repo_id,
                "hashes": [_sha256(hardening.model_digest)],
                "components": [
                    {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_sha256(digest)]}
                    for name, digest in sorted((hardening.files or {}).items())
                    if name.endswith(".safetensors")
                ],
                "licenses": [{"license": {"name": licence.id}}],
                "pedigree": {
                    "ancestors": [
                        {
                            "type": "machine-learning-model",
                            "name": hardening.base,
                            "hashes": [_sha256(hardening.base_digest)],
                        }
                    ],
                    "notes": f"hardened with {hardening.method}" if hardening.method else "not made by guardsmith",
                },
                "modelCard": {
                    "modelParameters": {"task": "text-to-image", "architectureFamily": "latent diffusion"},
                    "quantitativeAnalysis": {"performanceMetrics": metrics},
                    "considerations": {"technicalLimitations": limits(report)},
                },
                "properties": [
                    {"name": "guardsmith:verdict", "value": report.verdict},
                    {"name": "guardsmith:registry-digest", "value": hardening.registry_digest},
                    *policy,
                ],
            },
        },
        "components": packages,
        "dependencies": [{"ref": model}, *({"ref": package["bom-ref"]} for package in packages)],
    }
