"""The benchmarks: the plain loop computes what guardsmith's APDM does, and pages say what was measured, and what was not."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_apdm import make_subject
from tiny import harden_with, same_weights, weights

from guardsmith.methods.apdm import ApdmConfig
from guardsmith.models.checkpoint import load_model
from guardsmith.models.single_file import unet_names
from guardsmith.models.tensor_files import read_header

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "benchmark"))
import benchmark
import full_size
import gpu
import lean_trunk
import protection
import scale
import tripwire_parts
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


def test_the_page_of_a_gpu_says_that_there_was_none(monkeypatch, v_folder):
    """Everything is measured on what there is: seconds and peaks of every method and attack, in every precision asked for."""
    monkeypatch.setenv("GUARDSMITH_DEVICE", "cpu")
    found = gpu.run(str(v_folder), 2, ("float32", "bfloat16"))
    assert not found["measured_on_a_gpu"]
    assert len(found["lines"]) == 2 * (len(gpu.HARDENINGS) + len(gpu.ATTACKERS))
    for line in found["lines"]:
        assert len(line["all_seconds"]) == 2 and line["seconds"] > 0 and line["peak_gib"] > 0, line
        assert line["what"] in gpu.ATTACKERS or line["planned_gib"] > 0
    page = gpu.markdown(found)
    assert "Not measured on a GPU yet" in page and page.count("\n| ") == 2 + len(found["lines"])
    assert "Not measured" not in gpu.markdown(found | {"measured_on_a_gpu": True})


def test_what_does_not_fit_is_said_on_the_page():
    def run(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    line = gpu.measured(run)
    assert line["failed"] == "out of memory" and line["seconds"] is None


@pytest.fixture(scope="module")
def small():
    """Of Stable Diffusion 1.5's layout, narrow, with latents of 8 x 8."""
    return benchmark.stable_diffusion(32, 8)


def test_the_names_of_the_single_file_are_those_that_diffusers_reads(small, tmp_path):
    names = [full_size.in_single_file(name) for name in small.unet.state_dict()]
    file = tmp_path / "one.safetensors"
    save_file(dict(zip(names, small.unet.state_dict().values(), strict=True)), file)
    found = unet_names(read_header(file), dict(small.unet.config), file)
    assert found == dict(zip(names, small.unet.state_dict(), strict=True))


def test_a_base_that_is_written_is_one_that_guardsmith_reads(small, tmp_path):
    benchmark.save_base(small, tmp_path / "base")
    loaded = load_model(str(tmp_path / "base"))
    assert same_weights(weights(loaded.unet), weights(small.unet))


def test_a_base_of_full_size_stays_below_the_limit():
    told = json.loads(full_size.RESULTS.read_text())
    assert (told["width"], told["latent_size"], told["weights"]) == (320, 64, 859_520_964)
    assert 0 < told["peak_gib"] <= told["limit_gib"] == full_size.LIMIT and told["changed_weights"] > 0
    assert set(told["precision"].values()) == {"float16"} and told["stored_gib"]["model"] == told["stored_gib"]["base"]
    assert set(told["stages"]) == {"base", "plan", "harden", "load", "export"}
    assert told["method"] == full_size.METHOD


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


def test_what_protection_costs_follows_from_the_committed_records(monkeypatch):
    committed = json.loads((protection.RESULTS / "protection-cost.json").read_text())
    monkeypatch.setattr(protection, "recogniser_equivalents", lambda: committed["recogniser"])
    found = protection.run()
    assert found == committed
    assert found["published_apdm"] == 288_000
    own = json.loads((protection.RESULTS / "tripwire-demo-harden.json").read_text())["unet_forward_equivalents"]
    whole = found["methods"]["Tripwire, with recogniser and trunk"]["forward_equivalents"]
    assert whole == pytest.approx(own + found["recogniser"]["together"] + found["trunk"]["forward_equivalents"])
    assert found["at_most_a_hundredth"] == (own <= 2_880)
    checks = json.loads((protection.RESULTS / "tripwire-demo-report.json").read_text())["checks"]
    held = sum(check["name"] == "protected" and check["status"] == "pass" for check in checks)
    assert held >= 1
    for name, line in found["methods"].items():
        if "protected" in line:
            assert line["protected"] == (held if name.startswith("Tripwire") else 0), name
    assert protection.table(found).count("\n| ") == 1 + len(found["methods"]) - 1


def test_the_recognisers_training_is_counted_by_its_flops():
    """A step takes hundreds of small rows, there and back: more than one row through the U-Net and less than all of them."""
    found = protection.recogniser_equivalents()
    assert 1 < found["of_a_step"] < 3 * 288 and found["together"] == found["steps"] * found["of_a_step"]


def test_parts_of_a_hardening_by_the_tripwire_are_scaled_to_what_a_run_has(monkeypatch):
    for name, value in {"TRUNK": {"steps": 100, "rows": 1}, "PERIOD": 2, "SOME": 2, "COUNTS": (1, 5)}.items():
        monkeypatch.setattr(tripwire_parts, name, value)
    found = tripwire_parts.run()
    assert found["trunk"]["together"] == pytest.approx(100 * found["trunk"]["seconds"])
    assert len(found["trunk"]["samples"]) == 2
    fixed = {n: found["hardening"][n] - n * found["subject"]["seconds"] - found["install"] for n in (1, 5)}
    for number, seconds in fixed.items():
        samples = found["recogniser"]["samples"][number]
        assert seconds == pytest.approx(found["recogniser"]["of"] * sum(samples) / 2)
    assert found["one_more_of_six"] > found["hardening"][5]
    drawn = found["subject"]["parts"]["drawing it early"]
    assert drawn["of"] == 3 * 48 and drawn["seconds"] > 0


def test_a_lean_step_of_a_trunk_says_what_it_needed(wide_folder, monkeypatch):
    monkeypatch.setattr(lean_trunk.trunk, "LeanTraining", lean_trunk.trunk.LeanTraining)  # put back afterwards
    found = lean_trunk.step(wide_folder)
    assert found["loss"] > 0 and found["peak_gib"] >= found["peak_gib_loaded"] > 0
    assert found["estimated_gib"]["together"] > found["estimated_gib"]["weights"] > 0


def test_precisions_are_compared_with_the_published_loop(tiny, monkeypatch):
    config = ApdmConfig(
        outer_steps=1, inner_steps=2, batch_size=1, identifiers=("sks",), reduction="element", leak=True
    )
    monkeypatch.setattr(benchmark, "subject_of", lambda _: make_subject())
    exact, halved = (benchmark.by_turns(tiny, config, 1, precision) for precision in ("float32", "bfloat16"))
    assert max(exact["losses_apart"].values()) < 1e-4
    assert 1e-5 < max(halved["losses_apart"].values()) < 0.05
    assert halved["precision"] == "bfloat16" and tiny.unet.precision == torch.float32
    where = benchmark.where_time_goes(tiny, config)
    assert 0.5 < sum(part["share"] for part in where["operations"].values()) <= 1.001
