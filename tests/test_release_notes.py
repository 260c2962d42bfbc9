"""Release notes: the figures of the report, what changed, and nobody who has to stay hidden."""

import copy
import json
from pathlib import Path

import pytest

from guardsmith.cli import app as cli
from guardsmith.release.notes import release_notes
from guardsmith.reports.report import Report

REPORT = json.loads((Path(__file__).parent.parent / "docs" / "results" / "demo-report.json").read_text())


def checked(attack):
    [check] = [c for c in REPORT["checks"] if (c["name"], c["attack"]) == ("protected", attack)]
    return check


def test_figures_limits_and_digests():
    text = release_notes(Report.parse(REPORT), name="acme/avatar")
    assert text.startswith("## acme/avatar: pass\n")
    assert "builtin:avatar, hardened with tripwire. Protected subjects: 1, of whom 1 were attacked" in text
    assert "| question | now |\n|---|---|\n" in text
    told = "| dreambooth: protected | {value:.2f} [{low:.2f}, {high:.2f}]; 1 of 1 pass |".format(
        **checked("dreambooth")
    )
    assert told in text
    assert "has the weights removes the protection completely" in text
    assert REPORT["hardening"]["model_digest"] in text and REPORT["hardening"]["registry_digest"] in text
    assert "What changed" not in text and "(before:" not in text


def test_the_release_before_has_a_column_and_what_changed_is_told():
    earlier = copy.deepcopy(REPORT)
    earlier["hardening"] |= {"model_digest": "sha256:older", "unet_forward_equivalents": 1234}
    earlier["verdict"] = "fail"
    [check] = [c for c in earlier["checks"] if (c["name"], c["attack"]) == ("protected", "lora")]
    check |= {"status": "fail", "value": 0.4, "low": 0.3, "high": 0.5}
    text = release_notes(Report.parse(REPORT), Report.parse(earlier))
    assert text.startswith("## Hardened model: pass\n")
    assert "| question | before | now |" in text
    assert "| cost, U-Net forward equivalents | 1,234 | 36,572 |" in text
    assert "| verdict of the gate | fail (falls short) | pass |" in text
    assert "Different besides the figures: model." in text
    assert f"- better: protected mira lora (fail, 0.400 -> pass, {checked('lora')['value']:.3f})" in text
    assert "(before: `sha256:older`)" in text


def test_the_command_reads_the_public_evidence(tmp_path, capsys):
    assert cli.main(["release-notes", str(tmp_path)]) == 2
    assert "run `guardsmith verify` first" in capsys.readouterr().err
    public = tmp_path / "verify" / "public"
    public.mkdir(parents=True)
    names = {"mira": "subject-1", "nora": "control-1"}
    (public / "report.json").write_text(json.dumps(Report.parse(REPORT).redacted(names).as_json()))
    assert cli.main(["release-notes", str(tmp_path), "--since", str(public / "report.json"), "--repo-id", "a/b"]) == 0
    told = capsys.readouterr().out
    assert "## a/b: pass" in told and "Different besides the figures: nothing." in told
    assert "mira" not in told and "nora" not in told
    for wrong, said in ((["--repo-id", "b"], "organisation/name"), (["--since", "nowhere"], "no report")):
        assert cli.main(["release-notes", str(tmp_path), *wrong]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"schema": 3}, {"scores": [{}]}])
def test_a_report_of_another_version_is_a_sentence(tmp_path, change, capsys):
    (tmp_path / "report.json").write_text(json.dumps(REPORT | change))
    assert cli.main(["release-notes", str(tmp_path / "report.json")]) == 2
    assert "not a report of this version" in capsys.readouterr().err
