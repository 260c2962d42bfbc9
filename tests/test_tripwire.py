"""Reserved channels, the recogniser in them, and what carries its answer to the output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from guardsmith.core.errors import UserError
from guardsmith.methods.tripwire.install import ANSWER_PUSH, ANSWERED, Scales, answer_slope, install
from guardsmith.methods.tripwire.layout import Layout, down_parts, layout_of, reserve, up_sites
from guardsmith.methods.tripwire.recogniser import Drift, Recogniser, activated
from guardsmith.methods.tripwire.training import Examples, RecogniserTraining, drift_at, mixed, train, tripped
from guardsmith.models.checkpoint import load_model

GROUPS, OUTER = 8, 4
Call = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return load_model("builtin:avatar").unet


@pytest.fixture(scope="module")
def layout(base: UNet2DConditionModel) -> Layout:
    return layout_of(base, GROUPS, OUTER)


@pytest.fixture(scope="module")
def cut(base: UNet2DConditionModel, layout: Layout) -> UNet2DConditionModel:
    unet = copy.deepcopy(base)
    reserve(unet, layout)
    return unet


@pytest.fixture(scope="module")
def call() -> Call:
    rng = torch.Generator().manual_seed(3)
    shape = torch.randn((24, 16, 8, 8), generator=rng)
    return shape, torch.randint(1000, (24,), generator=rng), torch.randn((24, 32, 128), generator=rng)


@pytest.fixture(scope="module")
def recogniser(base: UNet2DConditionModel, layout: Layout, call: Call) -> Recogniser:
    """A random one that takes a part of the rows for somebody."""
    torch.manual_seed(1)
    found = Recogniser(base, layout).requires_grad_(False)
    with torch.no_grad():
        highest = found(call[0]).flatten(1).amax(1)
        found.readout.bias -= highest.sort().values[10:12].mean()
        for parameter in found.parameters():
            parameter.copy_(parameter.half().float())
    found.measure(call[0])
    return found


@pytest.fixture(scope="module")
def armed(cut: UNet2DConditionModel, layout: Layout, recogniser: Recogniser) -> UNet2DConditionModel:
    unet = copy.deepcopy(cut)
    install(unet, layout, recogniser, Scales(), torch.Generator().manual_seed(0))
    return unet


@torch.no_grad()
def predict(unet: UNet2DConditionModel, call: Call, dtype: torch.dtype = torch.float32) -> Tensor:
    noisy, times, context = call
    found: Tensor = copy.deepcopy(unet).to(dtype)(noisy.to(dtype), times, context.to(dtype))[0]
    return found.float()


def test_rows_that_do_not_trip_are_the_trunks_to_the_bit(
    cut: UNet2DConditionModel, armed: UNet2DConditionModel, recogniser: Recogniser, call: Call
) -> None:
    scores = recogniser(call[0])
    trips, rests = recogniser.tripping(scores) > 0.3, scores.flatten(1).amax(1) <= 0
    assert int(trips.sum()) >= 2 and int(rests.sum()) >= 8
    trunk, found = predict(cut, call), predict(armed, call)
    assert torch.equal(trunk[rests], found[rests])
    assert float((found[trips] - trunk[trips]).abs().flatten(1).mean(1).min()) > 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trips_are_the_same_in_half_precision(
    cut: UNet2DConditionModel, armed: UNet2DConditionModel, recogniser: Recogniser, call: Call, dtype: torch.dtype
) -> None:
    call = (call[0][::2], call[1][::2], call[2][::2])  # float16 is slow on CPUs
    beyond = recogniser.tripping(recogniser(call[0]))
    clear = beyond.abs() > 0.2  # a row at the threshold may fall on either side of it
    assert int(clear.sum()) > 4
    assert int((beyond[clear] > 0).sum()) > 0
    found = predict(armed, call, dtype)
    assert torch.isfinite(found).all()
    overridden = (found - predict(cut, call, dtype)).abs().flatten(1).mean(1) > 5
    assert torch.equal(overridden[clear], (beyond > 0)[clear])


def test_every_weight_is_a_float16_number(armed: UNet2DConditionModel, cut: UNet2DConditionModel) -> None:
    before = dict(cut.named_parameters())
    for name, parameter in armed.named_parameters():
        changed = parameter != before[name]
        assert torch.equal(parameter[changed].half().float(), parameter[changed]), name


def test_at_rest_no_gradient_reaches_the_scores_and_what_lies_behind(
    armed: UNet2DConditionModel, layout: Layout, recogniser: Recogniser, call: Call
) -> None:
    rests = recogniser(call[0]).flatten(1).amax(1) <= 0
    unet = copy.deepcopy(armed).requires_grad_(True)
    out = unet(call[0][rests], call[1][rests], call[2][rests])[0]
    out.square().mean().backward()
    site = next(up_sites(unet)).resnet
    own = layout.up_channels(site.out_channels)
    assert not site.conv1.weight.grad[own].any()
    assert not site.conv2.weight.grad[:, own].any()
    assert not unet.conv_norm_out.bias.grad[layout.up_channels(128)].any()
    trunk = site.conv1.weight.grad[: own[0]]
    assert trunk.any()


def test_what_adapters_reach_does_not_move_the_scores(
    armed: UNet2DConditionModel, layout: Layout, recogniser: Recogniser, call: Call
) -> None:
    unet = copy.deepcopy(armed)
    site, seen = next(up_sites(unet)).resnet, []
    site.norm2.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0][:, layout.up_channels(site.out_channels)])
    )
    predict_with = (call[0], call[1], call[2])
    with torch.no_grad():
        unet(*predict_with)
        for name, parameter in unet.named_parameters():
            if "transformer_blocks" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        unet(call[0], call[1], torch.randn(call[2].shape))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("side", [6, 12, 16])
def test_pictures_of_other_sizes_trip_and_rest_as_well(
    cut: UNet2DConditionModel, layout: Layout, recogniser: Recogniser, call: Call, side: int
) -> None:
    """The flag travels in a corner, which is a larger or smaller part of other pictures, and float16 has an end."""
    noisy, own, unet = (
        F.interpolate(call[0], (side, side), mode="nearest"),
        copy.deepcopy(recogniser),
        copy.deepcopy(cut),
    )
    own.readout.bias -= own(noisy).flatten(1).amax(1).sort().values[4:6].mean()
    own.readout.bias.copy_(own.readout.bias.half().float())
    install(unet, layout, own, Scales(), torch.Generator().manual_seed(0))
    scores = own(noisy)
    trips, rests = own.tripping(scores) > 0.25, scores.flatten(1).amax(1) <= 0
    assert trips.any() and rests.any()
    some = trips | rests
    for dtype in (torch.float32, torch.float16):
        here = noisy[some], call[1][some], call[2][some]
        away = (predict(unet, here, dtype) - predict(cut, here, dtype)).abs().flatten(1).mean(1)
        assert torch.isfinite(away).all()
        assert torch.equal(away > 5, trips[some])


def test_the_reserved_stream_is_read_as_the_trunks_own_is(
    armed: UNet2DConditionModel, layout: Layout, recogniser: Recogniser, call: Call
) -> None:
    """Adapters of the base and models that are merged in read it with weights that were made for the base's activations."""
    sizes: list[tuple[str, float, float]] = []

    def note(name: str, own: list[int]) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, out: Tensor) -> None:
            rest = [channel for channel in range(out.shape[1]) if channel not in set(own)]
            sizes.append((name, float(out[:, own].square().mean().sqrt()), float(out[:, rest].square().mean().sqrt())))

        return hook

    unet = copy.deepcopy(armed)
    for kind, name, module in down_parts(unet):
        if kind != "attention" and module is not unet.mid_block.resnets[-1]:
            module.register_forward_hook(note(name, layout.channels(module.out_channels)))
    for site in list(up_sites(unet))[:-1]:
        site.resnet.register_forward_hook(note(site.name, layout.up_channels(site.resnet.out_channels)))
    rests = recogniser(call[0]).flatten(1).amax(1) <= 0
    with torch.no_grad():
        unet(call[0][rests], call[1][rests], call[2][rests])
    for name, reserved, trunk in sizes:
        limit = 5 if name.startswith("down_blocks.0.resnets") else 0 if name.startswith("up") else 20
        assert reserved <= limit * trunk, (name, reserved, trunk)


def test_half_and_half_with_the_base_is_between_the_two(
    base: UNet2DConditionModel, armed: UNet2DConditionModel, call: Call
) -> None:
    merged = copy.deepcopy(armed)
    with torch.no_grad():
        for parameter, other in zip(merged.parameters(), base.parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    own, found = predict(base, call), predict(merged, call)
    assert float((found - own).square().sum() / own.square().sum()) < 0.2


def test_training_the_trunk_leaves_the_cut_entries(base: UNet2DConditionModel, layout: Layout) -> None:
    unet = copy.deepcopy(base)
    masks = reserve(unet, layout)
    assert {
        name for name, parameter in unet.named_parameters() if not masks.get(name, torch.ones(())).all()
    } <= masks.keys()
    original = dict(base.named_parameters())
    for name, parameter in unet.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[mask], original[name][mask]), name


def test_groups_that_do_not_fit_are_refused(base: UNet2DConditionModel) -> None:
    for groups, outer in ((0, 0), (1, 1), (18, 4), (4, 6), (8, 1)):
        with pytest.raises(UserError, match="cannot reserve"):
            layout_of(base, groups, outer)


def test_a_recogniser_learns_one_picture_and_leaves_others_alone(base: UNet2DConditionModel, layout: Layout) -> None:
    scheduler = load_model("builtin:avatar").scheduler
    rng = torch.Generator().manual_seed(0)
    subject = torch.randn((1, 16, 1, 1), generator=rng) + 0.3 * torch.randn((40, 16, 8, 8), generator=rng)
    others = torch.randn((300, 16, 1, 1), generator=rng) + 0.3 * torch.randn((300, 16, 8, 8), generator=rng)
    torch.manual_seed(0)
    found = Recogniser(base, layout)
    train(
        found,
        Examples([subject[:20]], others[:200]),
        scheduler,
        RecogniserTraining(steps=60, positives=16, negatives=48, drift=0.0),
        seed=0,
    )
    assert tripped(found, subject[20:], scheduler, (50, 300), 1).float().mean() > 0.95
    assert tripped(found, others[200:], scheduler, (50, 300), 1).float().mean() < 0.05


@pytest.mark.parametrize(("size", "places"), [(10, 16), (80, 64), (80, 1024)])
def test_what_the_relay_reads_of_one_place_fits_float16(size: int, places: int) -> None:
    """The embedded base, Stable Diffusion 1.5, Stable Diffusion XL: a picture that trips at a single place is no NaN."""
    answer = torch.zeros(1, size, places)
    answer[0, 0, 0] = 1.0
    normal = float(F.group_norm(answer, 1)[0, 0, 0])
    slope = answer_slope(size, places)
    assert ANSWER_PUSH * slope * (normal - ANSWERED * math.sqrt(size / 2)) < 65_504


def test_the_way_up_gives_back_what_carrying_the_answer_does_not_take(base: UNet2DConditionModel) -> None:
    for groups, outer in ((4, 4), (8, 4), (12, 2), (16, 6)):
        layout = layout_of(base, groups, outer)
        assert layout.upward == {160: 4, 128: 2}
        assert len(layout.channels(160)) == 5 * groups and len(layout.up_channels(160)) == 20
        assert len(layout.channels(128)) == 4 * outer and len(layout.up_channels(128)) == 8
        assert all(layout.inner(site) for site in list(up_sites(base))[1:])


def test_the_drift_grows_to_its_size() -> None:
    shares = [drift_at(step, RecogniserTraining(steps=100)) for step in range(100)]
    assert shares[:11] == [0.0] * 11 and shares == sorted(shares)
    assert shares[35] == pytest.approx(0.5) and shares[60:] == [1.0] * 40


def test_the_drift_moves_gains_and_biases_of_every_channel_by_its_size(call: Call) -> None:
    norm = torch.nn.GroupNorm(4, 16).requires_grad_(False)
    moved = Drift(0.0, 0.1, call[0], torch.Generator().manual_seed(0)).of_norm(norm, call[0])
    normal = F.group_norm(call[0], 4)
    gains = (moved[1] - moved[0]).flatten(1)[:, 0] / (normal[1] - normal[0]).flatten(1)[:, 0]
    biases = (moved - gains[None, :, None, None] * normal)[0].flatten(1).mean(1)
    assert torch.allclose(moved, gains[None, :, None, None] * normal + biases[None, :, None, None], atol=1e-5)
    for some in (gains, biases):
        assert float(some.abs().mean()) > 0.04 and float(some.abs().max()) <= 0.1 + 1e-5 and some.std() > 0.03
    still = Drift(0.0, 0.0, call[0], torch.Generator().manual_seed(0))
    assert torch.equal(activated(norm, call[0], still), activated(norm, call[0], None))


def test_mixtures_have_one_side_of_a_subject(call: Call) -> None:
    subjects, others = torch.ones(3, 2, 8, 8), torch.zeros(400, 2, 8, 8)
    rows = mixed(subjects, others, torch.Generator().manual_seed(0))
    shares = rows.mean((1, 2, 3))
    assert shares.min() >= 0.25 and shares.max() <= 0.5
    map_of = rows[:, 0]
    sides = torch.stack([side.mean(1) for side in (map_of[:, 0], map_of[:, -1], map_of[:, :, 0], map_of[:, :, -1])])
    assert ((sides == 1).sum(0) == 1).all()
    assert (sides == 1).float().mean(1).min() > 0.15


def test_training_leaves_little_in_the_stream_that_is_the_same_in_every_picture(
    base: UNet2DConditionModel, layout: Layout, call: Call
) -> None:
    subject = torch.randn((6, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    scheduler, shares = load_model("builtin:avatar").scheduler, {}
    rng = torch.Generator().manual_seed(0)
    for weight in (0.0, 1.0):
        torch.manual_seed(2)
        found = Recogniser(base, layout)
        config = RecogniserTraining(steps=60, positives=8, negatives=16, constancy_weight=weight)
        train(found, Examples([subject], call[0]), scheduler, config, seed=0)
        with torch.no_grad():
            shares[weight] = float(found.scores_and_constancy(call[0], Drift(0.0, 0.0, call[0], rng))[1])
    assert shares[1.0] < 0.6 * shares[0.0]
