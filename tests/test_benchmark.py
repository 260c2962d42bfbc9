"""The plain loop that the benchmark compares with: the same rows, losses and weights as guardsmith's APDM."""

import json
import sys
from pathlib import Path

import pytest
from test_apdm import make_subject
from tiny import harden_with

from guardsmith.methods.apdm import ApdmConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "benchmark"))
import scale
from plain_apdm import Plain


@pytest.mark.parametrize("beta", [1.0, 20.0])
def test_the_plain_loop_and_guardsmith_do_the_same(tiny, beta):
    config = ApdmConfig(
        outer_steps=3, inner_steps=4, batch_size=1, identifiers=("sks",), reduction="element", leak=True, beta=beta,
        learning_rate=1e-4, personalization_learning_rate=1e-3,
    )  # fmt: skip
    subject = make_subject()
    hardened, history = harden_with("apdm", tiny, [subject], None, config, seed=3)
    plain = Plain(tiny, subject, config, seed=3)
    for j in range(config.outer_steps):
        told = plain.step(j)
        for key in ("dpo", "prior"):
            assert sum(step[key] for step in told) / len(told) == pytest.approx(history[j][key], abs=1e-4), (j, key)
        assert told[0]["personalization"] == pytest.approx(history[j]["personalization"], abs=1e-4)
    base = dict(tiny.unet.named_parameters())
    moved = sum(float((p - base[name]).detach().norm()) for name, p in plain.unet.named_parameters())
    apart = sum(
        float((p - q).detach().norm())
        for (_, p), q in zip(plain.unet.named_parameters(), hardened.unet.parameters(), strict=True)
    )
    assert moved > 0
    assert apart < 0.05 * moved


def test_the_page_on_scale_says_what_the_methods_count_now():
    told = json.loads(scale.RESULTS.read_text())
    assert told == json.loads(json.dumps(scale.estimate()))
    page = (Path(__file__).parent.parent / "docs" / "explanation" / "large-registries.md").read_text()
    assert scale.markdown(told) in page
    verified = told["verification"]
    assert (
        f"{verified['unet_forward_equivalents'] / 1e6:.0f} million forward equivalents, {verified['hours']:.0f} hours"
        in page
    )
