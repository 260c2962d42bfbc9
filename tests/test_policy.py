"""The gate's policy as a file: what it stands for and what is refused (what it changes is tested in test_verify)."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import assert_one_sentence

from guardsmith.cli import app as cli
from guardsmith.config.recipe import GateSpec
from guardsmith.core.errors import UserError
from guardsmith.gate.calibration import calibration
from guardsmith.gate.policy import as_yaml, default_policy, load_policy


def written(tmp_path, **changes):
    told = yaml.safe_load(as_yaml(default_policy())) | changes
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(told))
    return file


def test_the_printed_policy_is_the_default_one(capsys, tmp_path):
    assert cli.main(["policy"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "policy.yaml").write_text(printed)
    assert load_policy(tmp_path / "policy.yaml") == default_policy()
    assert default_policy().classes == calibration()
    assert default_policy(GateSpec(kid_ratio=3)).rules.kid_ratio == 3


def test_the_digest_stands_for_what_decides(tmp_path):
    digest = default_policy().digest
    assert load_policy(written(tmp_path, name="another", measured_on="elsewhere")).digest == digest
    assert load_policy(written(tmp_path, rules={"control_retention": 0.95})).digest != digest
    stricter = {"person": {"chance": 0.0, "chance_high": 0.1, "genuine": 0.5}}
    assert load_policy(written(tmp_path, classes=stricter)).digest != digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rules": {"control_retention": 1.5}}, "rules.control_retention"),
        ({"rules": {"control_retentoin": 0.9}}, "did you mean"),
        ({"classes": {}}, "classes"),
        ({"classes": {"person": {"chance": 0.3, "chance_high": 0.2, "genuine": 0.5}}}, "'person' must rise"),
        ({"classes": {"person": {"chance": 0.1, "chance_high": 0.2}}}, "genuine"),
        ({"classes": {"person": {"chance": 0.1, "chance_high": 0.2, "genuine": float("nan")}}}, "person"),
        ({"dated": "some day"}, "dated"),
        ({"name": ""}, "name"),
        ({"level": 3}, "level"),
    ],
)
def test_a_bad_policy_is_refused_in_one_sentence(tmp_path, changes, said):
    with pytest.raises(UserError) as caught:
        load_policy(written(tmp_path, **changes))
    assert_one_sentence(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "rules: [", "\x00"])
def test_a_file_that_is_no_policy_is_refused(tmp_path, text):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(UserError, match=r"policy\.yaml"):
        load_policy(tmp_path / "policy.yaml")


def test_a_policy_that_is_not_there_is_a_sentence(tmp_path, capsys):
    assert cli.main(["run", "demo", "--policy", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rules_of_earlier_versions_are_read_by_their_old_names(tmp_path, capsys):
    """A policy that was signed off under the old names stays the same policy: its digest does not change."""
    old = load_policy(written(tmp_path, rules={"learnt_share": 0.4, "destroyed_share": 0.1}))
    warnings = capsys.readouterr().err
    assert "'rules.learnt_share' is called 'rules.personalized_share' now" in warnings
    assert "'rules.destroyed_share' is called 'rules.collapsed_share' now" in warnings
    assert old.rules == GateSpec(personalized_share=0.4, collapsed_share=0.1)
    assert (
        old.digest == load_policy(written(tmp_path, rules={"personalized_share": 0.4, "collapsed_share": 0.1})).digest
    )


def test_the_digest_is_that_of_reports_written_before():
    """Of the demo's report, made by an earlier version with the same levels and rules."""
    report = json.loads((Path(__file__).parent.parent / "docs/results/demo-report.json").read_text())
    assert default_policy().digest == report["policy"]["digest"]
