"""Everyday use: what the checks measure, and that broken models fail them while the base passes against itself."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from guardsmith.config.deployability import DeployabilityLimits, DeployabilitySpec
from guardsmith.core.errors import UserError
from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, benign_prompts
from guardsmith.evaluation.deployability import (
    CHECKS,
    Bench,
    controlnet,
    measure,
    merges,
    precision,
    quantization,
    samplers,
)
from guardsmith.evaluation.deployability.bench import attempt, broken, compared_collapse, differences
from guardsmith.evaluation.deployability.edges import edge_maps, followed
from guardsmith.evaluation.deployability.half import as_half
from guardsmith.evaluation.deployability.intervals import paired_excess, paired_ratio
from guardsmith.evaluation.deployability.merges import merge
from guardsmith.evaluation.deployability.quantization import int8_rows, q8_0_blocks
from guardsmith.gate.deployability import Measurement
from guardsmith.gate.rules.control import RULE as CONTROL
from guardsmith.gate.rules.deployability import title_of
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import builtin_path, load_model
from guardsmith.registry.loader import NEED_CONTROLS, load_registry

LIMITS = DeployabilityLimits()


@pytest.fixture(scope="module")
def base():
    return load_model("builtin:avatar")


def bench_of(base, hardened, root, kind=Bench, **spec):
    """Four pictures of two steps, which are fewer than a recipe may ask for; collapse is measured on sixteen."""
    prompts = [prompt.text for prompt in benign_prompts(base, VERIFICATION_TEMPLATES, 16, 1)]
    spec = DeployabilitySpec(**{"trained": False} | spec).model_copy(update={"images": 4})
    return kind({"base": base, "hardened": hardened}, prompts, load_judge("avatar"), spec, 2, 3.0, 16, root)


@pytest.fixture(scope="module")
def against_itself(base, tmp_path_factory):
    """The bench of the base against itself."""
    return bench_of(base, base, tmp_path_factory.mktemp("itself"), compile="eager")


def copied(folder):
    """A copy of the embedded base to break."""
    shutil.copytree(builtin_path("avatar"), folder)
    return folder


def broken_model(folder, part, change, dtype=torch.float16):
    """A copy of the embedded base, one of whose weight files a function has changed."""
    file = copied(folder) / part / "diffusion_pytorch_model.safetensors"
    weights = {name: value.to(dtype) for name, value in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return load_model(str(folder))


@pytest.fixture(scope="module")
def black(tmp_path_factory):
    """A model whose every picture is black."""

    def change(weights):
        weights["decoder.conv_out.weight"].zero_()
        weights["decoder.conv_out.bias"].fill_(-10)

    return broken_model(tmp_path_factory.mktemp("black") / "model", "vae", change)


def negate_values(weights):
    """The same function, with values and what reads them negated: a merge with the base has no attention left."""
    for name, value in weights.items():
        if name.endswith(("to_v.weight", "to_out.0.weight")):
            value.neg_()
        if name.endswith(("ff.net.0.proj.weight", "ff.net.0.proj.bias")):
            value[: len(value) // 2].neg_()  # the half that is multiplied by the gate
        if name.endswith("ff.net.2.weight"):
            value.neg_()


def enlarge_values(weights):
    """The same function, with values that float16 cannot hold on the way, though it holds every weight."""
    for name, value in weights.items():
        if name.endswith("attn1.to_v.weight"):
            value.mul_(2**17)
        if name.endswith("attn1.to_out.0.weight"):
            value.div_(2**17)


def statuses(measured):
    return {m.case: m.status(LIMITS) for m in measured}


# What is measured


def test_ratio_of_the_same_rows_is_one_and_of_noise_without_a_base_is_nothing():
    values = [0.2, 0.5, 0.9, 0.4]
    same = paired_ratio(values, values)
    assert (same.mean, same.low, same.high) == pytest.approx((1, 1, 1))
    half = paired_ratio([v / 2 for v in values], values)
    assert half.mean == pytest.approx(0.5) and half.high == pytest.approx(0.5)
    assert paired_ratio(values, [-0.1, 0.1, 0.05, -0.06]) is None


def test_excess_covers_the_truth_as_often_as_it_says():
    rng, hit = np.random.default_rng(0), 0
    for _ in range(400):
        shared, own, other = rng.random((3, 60))
        base = shared < 0.15
        first, second = base | (own < 0.2), base | (other < 0.05)  # 0.32 and 0.1925 of all rows
        found = paired_excess(first.tolist(), second.tolist())
        hit += found.low <= 0.85 * 0.15 <= found.high
    assert 0.92 <= hit / 400 <= 0.99


def test_excess_needs_about_eighty_faultless_pictures():
    assert paired_excess([False] * 80, [False] * 80).high < 0.05 < paired_excess([False] * 40, [False] * 40).high
    assert paired_excess([True] * 80, [False] * 80).low > 0.9


def test_pictures_without_content_are_broken():
    fine = torch.rand(1, 3, 8, 8) * 2 - 1
    pictures = torch.cat(
        [fine, torch.full((1, 3, 8, 8), -1.0), torch.full((1, 3, 8, 8), torch.nan), torch.ones(1, 3, 8, 8)]
    )
    assert broken(pictures).tolist() == [False, True, True, True]
    assert differences(pictures, fine.expand(4, -1, -1, -1))[[0, 2]].tolist() == [0, 255]


def test_edges_are_followed_by_their_own_picture_only():
    pictures = torch.full((2, 3, 32, 32), -1.0)
    pictures[0, :, 8:24, 8:24] = 1
    pictures[1, :, 2:6, 2:30] = 1
    maps = edge_maps(pictures)
    assert set(maps.unique().tolist()) == {0, 1} and maps[0, 0, 16, 16] == 0 and maps[0, 0, 8, 16] == 1
    assert (followed(pictures, maps) > 0.9).all()
    assert (followed(pictures.flip(0), maps) < 0.2).all()
    nothing = torch.stack([torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), torch.nan)])
    assert followed(nothing, maps).tolist() == [0, 0]


def test_formats_of_eight_bits_lose_what_they_have_to():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1] *= 1000
    for through in (int8_rows, q8_0_blocks):
        away = (through(weight) - weight).abs().amax(1) / weight.abs().amax(1)
        assert (away < 0.005).all() and (away > 0).all()
    assert torch.equal(q8_0_blocks(torch.ones(3, 3)), torch.ones(3, 3))  # fills no block
    assert q8_0_blocks(torch.full((32,), 1e9)).isinf().all()  # the scale is a float16
    assert int8_rows(torch.zeros(2, 4)).tolist() == [[0] * 4] * 2


def test_emulated_float16_rounds_overflows_and_leaves_timesteps_alone():
    torch.manual_seed(0)
    line = torch.nn.Linear(8, 8).requires_grad_(False)
    plain = line(torch.ones(2, 8))
    half = as_half(copy.deepcopy(line))(torch.ones(2, 8))
    assert torch.equal(half, half.half().float()) and 0 < (half - plain).abs().max() < 1e-3
    line.weight.fill_(3e4)
    assert as_half(line)(torch.ones(2, 8)).isinf().all()
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    rows, context = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8)
    with torch.no_grad():
        before = unet(rows, 999, context).sample
        after = as_half(unet)(rows, torch.tensor(999), context).sample
    assert 0 < (after - before).abs().max() < 0.01 * before.abs().max()


def test_the_limits_decide_by_the_unfavourable_end():
    def status(**values):
        return Measurement(check="merges", case="", **values).status(LIMITS)

    assert status(measure="difference", value=1.5, low=1.2, high=1.9) == "pass"
    assert status(measure="difference", value=1.5, low=1.2, high=2.1) == "inconclusive"
    assert status(measure="difference", value=3.0, low=2.1, high=4.0) == "fail"
    assert status(measure="retention", value=0.97, low=0.96, high=1.0) == "pass"
    assert status(measure="retention", value=0.5, low=0.4, high=0.6) == "fail"
    assert status(measure="faults", value=0) == "pass" and status(measure="faults", value=1) == "fail"
    assert status(measure="collapsed", value=0.0, low=0.0, high=0.2) == "inconclusive"
    assert status(measure="collapsed", value=0.0, low=0.0, high=0.2, part=True) == "pass"
    assert status(measure="collapsed", value=0.5, low=0.3, high=0.7, part=True) == "fail"
    assert status(measure="collapsed", part=True, error="it broke") == "inconclusive"


def test_what_raises_failed_to_run(against_itself, monkeypatch):
    def explode(_):
        raise ValueError("no\nsuch pipeline")

    found = attempt("samplers", "DDIM", "collapsed", lambda: explode(None))
    assert [(m.case, m.error, m.status(LIMITS)) for m in found] == [
        ("DDIM", "ValueError: no such pipeline", "inconclusive")
    ]
    monkeypatch.setitem(CHECKS, "merges", CHECKS["merges"]._replace(run=explode))
    monkeypatch.setitem(CHECKS, "samplers", CHECKS["samplers"]._replace(run=lambda bench: []))
    bench = copy.copy(against_itself)
    bench.spec = bench.spec.model_copy(update={"checks": ("merges", "samplers")})
    assert [m.error for m in measure(bench)] == ["ValueError: no such pipeline", "nothing was measured"]


# The base against itself, and broken models


def test_the_base_passes_against_itself(against_itself, few_steps):
    found = measure(against_itself)
    assert few_steps == [steps for steps in (20, 20, 4, 4, 8, 50, 2, 2, 2) for _ in range(2)]
    assert {m.check for m in found} == {"precision", "controlnet", "merges", "quantization", "samplers"}
    assert not [m for m in found if m.error], found
    few = {merges.WITH_BASE, samplers.TOGETHER}  # sixteen pictures cannot show that under five in a hundred collapse
    assert {m.case for m in found if m.status(LIMITS) != "pass" and m.measure == "collapsed"} <= few
    assert not [m for m in found if m.status(LIMITS) != "pass" and m.measure != "collapsed"]
    assert all(m.value == 0 for m in found if m.measure == "collapsed")
    assert all((against_itself.root / m.pictures).is_file() for m in found if m.pictures)
    json.dumps([m.model_dump(mode="json") for m in found], allow_nan=False)


def test_plain_pictures_are_drawn_once_and_are_those_of_one_drawing(base, tmp_path, monkeypatch):
    bench = bench_of(base, base, tmp_path)
    at_once, drawn, draw = bench.draw(bench.pipeline("base"), count=6), [], Bench.draw

    def counted(self, *args, **options):
        pictures = draw(self, *args, **options)
        drawn.append(len(pictures))
        return pictures

    monkeypatch.setattr(Bench, "draw", counted)
    few, more, few_again = (bench.plain("base", count=count) for count in (4, 6, 4))
    assert drawn == [4, 2]
    assert torch.equal(few, more[:4]) and torch.equal(few, few_again)
    assert differences(more, at_once).max() < 0.1, "every picture has its own prompt and noise"


def test_a_denoiser_is_changed_in_a_copy(base, tmp_path):
    bench = bench_of(base, base, tmp_path)
    own, usual = bench.own_denoiser("base"), bench.pipeline("base")
    own.unet.conv_in.weight.data.zero_()
    assert torch.equal(usual.unet.conv_in.weight, base.unet.conv_in.weight)
    assert own.unet.conv_in.weight.count_nonzero() == 0 and own.vae is usual.vae


def test_a_black_model_passes_nothing_that_looks_at_pictures(base, black, tmp_path):
    bench = bench_of(base, black, tmp_path)
    found = [m for run in (precision, controlnet, merges, quantization) for m in run.run(bench)]
    found += attempt("samplers", "DDIM", "collapsed", lambda: _compared(bench, samplers.sliced))
    assert not [m for m in found if m.error]
    passed = {(m.check, m.case) for m in found if m.status(LIMITS) == "pass"}
    # The files are sound, and a merge with black is nearer to the base than black; that it collapses is its other case.
    assert passed <= {("precision", precision.STORED), ("precision", precision.FILES), ("merges", merges.WITH_BASE)}
    failed = {(m.check, m.measure) for m in found if m.status(LIMITS) == "fail"}
    assert failed >= {("precision", "difference"), ("precision", "faults"), ("controlnet", "control"), ("merges", "collapsed"),
                      ("quantization", "difference"), ("samplers", "collapsed")}  # fmt: skip


def _compared(bench, draw):
    return compared_collapse(bench, "samplers", "", *(draw(bench, side) for side in ("base", "hardened")))


def test_float16_that_overflows_is_seen(base, tmp_path):
    model = broken_model(tmp_path / "model", "unet", enlarge_values, torch.float32)
    found = statuses(precision.run(bench_of(base, model, tmp_path)))
    assert found["float16"] == found["float16: black or NaN pictures"] == "fail"
    assert found["float32: black or NaN pictures"] == found["bfloat16: black or NaN pictures"] == "pass"
    assert found[precision.STORED] == "pass"
    assert found[precision.FILES] == "fail"  # float32 in place of the base's float16


def test_values_beyond_float16_are_counted(base, tmp_path):
    def change(weights):
        weights["conv_in.weight"][0, 0, 0, :2] = 1e5

    model = broken_model(tmp_path / "model", "unet", change, torch.float32)
    assert precision.beyond_half(model) == (2, precision.beyond_half(base)[1])


def test_a_model_that_hears_no_control_is_seen(base, tmp_path):
    class Deaf(Bench):
        def load(self, side, dtype=torch.float32):
            pipeline = super().load(side, dtype)
            if side == "hardened":
                forward = pipeline.unet.forward

                def without(*args, **kwargs):
                    return forward(*args, **{k: v for k, v in kwargs.items() if "additional_residual" not in k})

                pipeline.unet.forward = without
            return pipeline

    bench = bench_of(base, base, tmp_path, Deaf)
    bench.steps = 4  # in fewer the base itself hardly follows
    found = controlnet.run(bench)
    assert statuses(found) == {"ControlNet": "fail", "T2I-Adapter": "fail"}
    assert all(abs(m.value) < 0.01 and m.base > 0.1 for m in found)


def test_a_control_for_another_base_has_to_be_named(tmp_path, tiny_v):
    bench = bench_of(tiny_v, tiny_v, tmp_path)
    assert all(
        "deployability.controlnet" in m.error or "deployability.t2i_adapter" in m.error for m in controlnet.run(bench)
    )


def test_a_model_that_merging_destroys_is_seen(base, tmp_path):
    model = broken_model(tmp_path / "model", "unet", negate_values)
    bench = bench_of(base, model, tmp_path)
    assert differences(bench.plain("hardened"), bench.plain("base")).max() < 1  # it draws what the base draws
    assert "fail" in [m.status(LIMITS) for m in merges.run(bench)]


def test_merging_is_the_mean_of_weights(base):
    one, other = copy.deepcopy(base.unet), copy.deepcopy(base.unet)
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    merge(one, other)
    assert torch.allclose(one.conv_in.weight, base.unet.conv_in.weight + 0.5, atol=1e-6)


def test_weights_that_quantizing_ruins_are_seen(base, tmp_path):
    def change(weights):
        for name, value in weights.items():
            if name.endswith("attn2.to_k.weight"):
                value[:, 0] = 300  # one column sets the scale of every row
                value[:, 0] *= 1 - 2 * (torch.arange(len(value)) % 2)

    model = broken_model(tmp_path / "model", "unet", change)
    found = quantization.run(bench_of(base, model, tmp_path))
    assert statuses(found)["int8"] == "fail"


RATES = {"lora": 2e-3, "lora_conv": 1e-3, "loha": 1e-2, "textual_inversion": 2e-2, "custom_diffusion": 2e-3}
SLOW = [kind for kind in RATES if kind != "lora"]


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_adapters_are_kept_by_the_base_and_lost_by_a_model_that_ignores_them(base, tmp_path, kind):
    class Frozen(Bench):
        """The hardened side is the base, whose denoiser goes on as it was whatever is loaded."""

        def load(self, side, dtype=torch.float32):
            pipeline = super().load(side, dtype)
            if side == "hardened":
                pipeline.unet.forward = copy.deepcopy(pipeline.unet).forward
            return pipeline

    registry = load_registry(builtin_path("avatar").parents[2] / "registries" / "demo.yaml")
    adapters = {kind: {"learning_rate": RATES[kind], "steps": 40, "batch_size": 4}}
    bench = bench_of(base, base, tmp_path, Frozen, trained=True, adapters=adapters, adapter_images=8)
    bench.controls, bench.steps = registry.controls, 4
    onto_hardened, onto_base = CHECKS["adapters"].run(bench)
    assert onto_base.error is None and onto_base.value == 1 and onto_base.status(LIMITS) == "pass"
    assert onto_base.case.endswith("made on the hardened, used on the base") and onto_base.base > 0.1
    if kind == "textual_inversion":  # nothing of it is in the denoiser
        assert onto_hardened.value == 1
    else:
        assert onto_hardened.status(LIMITS) == "fail" and onto_hardened.value < 0.6


def test_trained_checks_without_controls_say_so(base, tmp_path):
    bench = bench_of(base, base, tmp_path, trained=True)
    assert [m.error for m in CHECKS["adapters"].run(bench)] == ["the registry has no controls to make adapters for"]
    with pytest.raises(UserError, match="the registry has no controls to make another fine-tune of"):
        merges.with_sibling(bench)
    # `check` says beforehand which rules these are.
    assert set(NEED_CONTROLS) == {CONTROL.title, title_of("adapters"), title_of("merges")}
