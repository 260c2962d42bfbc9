"""Small reports for tests: as little as can be, and whatever a test is about."""

import json
from pathlib import Path

from guardsmith.reports.report import Report

DEMO = Path(__file__).parent.parent / "docs" / "results" / "demo-report.json"


def score(side, subject, attack, point, value=0.5, n=8, **more):
    return {"side": side, "subject": subject, "attack": attack, "evaluation_point": point, "units": [[value] * n],
            "interval": None} | more  # fmt: skip


def check(name, subject, attack, status, value=None, low=None, high=None, limit=None, sentence="a sentence"):
    return {"name": name, "subject": subject, "attack": attack, "status": status, "sentence": sentence, "value": value,
            "low": low, "high": high, "limit": limit}  # fmt: skip


def report_data(**changes):
    """What a file with one protected subject and one control holds; a section that is a mapping is added to, not replaced."""
    data = {
        "schema": 2,
        "verdict": "fail",
        "exit_code": 1,
        "checks": [],
        "scores": [],
        "released": {},
        "steps_to_break": [],
        "attacked": {"protected": 1, "of": 1, "controls": 1},
        "subjects": [
            {"id": "mira", "class_noun": "person", "role": "protected"},
            {"id": "nora", "class_noun": "person", "role": "control"},
        ],
        "utility": {"kid_hardened": 0.1, "kid_base": 0.1, "kid_ratio": 1.0, "kid_ratio_low": 0.5, "kid_ratio_high": 1.5,
                    "collapsed": 0, "fidelity_hardened": 1.0, "fidelity_base": 1.0, "n": 24},
        "failed_units": {},
        "policy": {"name": "p", "dated": "2026-01-01", "measured_on": "", "judge": {"name": "avatar"}, "digest": "0"},
        "calibration": {"person": {"chance": 0.0, "chance_high": 0.15, "genuine": 0.6}},
        "hardening": {"base": "b", "base_digest": "sha256:1", "model_digest": "sha256:2", "registry_digest": "3",
                      "method": "tripwire", "params": {"steps": 3}, "seed": 0, "seconds": 1.0,
                      "unet_forward_equivalents": 1234},
        "recipe": {"base": "b"},
        "run": {"guardsmith": "1.2.3", "python": "3", "machine": "m", "finished": "2026-01-01T00:00:00+00:00",
                "packages": {"torch": "2"}},
    }  # fmt: skip
    replaced = ("released", "failed_units", "calibration")
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) and key not in replaced else value
    return data


def make_report(**changes):
    return Report.parse(report_data(**changes))


def demo_report():
    """The committed report of the demo, of schema 1."""
    return Report.parse(json.loads(DEMO.read_text()))
