"""Tripwire: stiffening changes no function, the wire is a flat step, recognition tells subjects from the rest."""

import copy
import functools
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from pydantic import ValidationError
from test_apdm import KilledError, make_benign, make_subject
from tiny import assert_one_sentence, harden_with, pictures, same_weights, weights

from guardsmith.attacks.lora import TARGETS
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import add_noise, noise_samples, predict, row_losses
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.diffusion.states import States
from guardsmith.methods import METHODS
from guardsmith.methods.tripwire import recognition, rehearsal
from guardsmith.methods.tripwire.ideal import imagined_by, with_ideal_states
from guardsmith.methods.tripwire.method import TripwireConfig
from guardsmith.methods.tripwire.recognition import (
    UNLIKE,
    Others,
    Sway,
    listen,
    put_state,
    recognition_loss,
    ridge_readouts,
)
from guardsmith.methods.tripwire.rehearsal import REHEARSALS, rehearse, rehearsed_by
from guardsmith.methods.tripwire.wiring import (
    ALARM,
    GATE,
    NEURONS,
    OFFSET,
    SHARP,
    WIDE,
    clear_channels,
    last_stream,
    mend,
    play,
    set_alarm,
    set_wire,
    silence,
    spare_channels,
    spare_neurons,
    stiffen,
    wired_layer,
)
from guardsmith.methods.variations import variations
from guardsmith.models.checkpoint import load_model
from guardsmith.training.loop import UNetCost, generator, optimizer_step, save_modules

harden = functools.partial(harden_with, "tripwire")
SMALL = TripwireConfig(
    steps=3,
    batch_size=2,
    rehearsal_steps=0,
    learning_rate=1e-4,
    stiffness=16,
    inner_stiffness=2,
    writer_stiffness=2,
    reader_stiffness=2,
    descent=2,
)


def some_rows(model, images, count=6, seed=0, prompt="a photo of person"):
    rng = generator(seed)
    return noise_samples(encode(model, images).draw(count, rng), PromptBank(model).encode([prompt]), rng)


def trained(model):
    """A copy whose weights are not the ones of a fresh start (zero biases would hide a forgotten factor)."""
    unet = copy.deepcopy(model.unet)
    rng = generator(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return unet


FACTORS = [
    (1, 1, 1, 1, 1), (64, 1, 1, 1, 1), (64, 4, 4, 1, 1), (64, 1, 8, 1, 1), (64, 4, 4, 4, 1), (64, 4, 2, 2, 8),
    (65536, 16, 128, 8, 8), (2**24, 256, 2048, 8, 8),
]  # fmt: skip


@pytest.mark.parametrize("factors", FACTORS)
def test_stiffening_changes_no_prediction(tiny, factors):
    unet = trained(tiny)
    rows = some_rows(tiny, pictures(3))
    with torch.no_grad():
        before = predict(unet, tiny.scheduler, rows)
        stiffen(unet, *factors)
        after = predict(unet, tiny.scheduler, rows)
    assert (after - before).abs().max() < 2e-3 * before.abs().max()


@pytest.mark.parametrize("factors", FACTORS[-2:])
def test_stiffening_holds_where_groups_are_shared_with_a_skip_connection(factors):
    """The embedded base joins 160 channels with 128 in groups of 9: one group has channels of both."""
    unet = copy.deepcopy(load_model("builtin:avatar").unet)
    rng = generator(1)
    noisy, context = torch.randn(2, 16, 8, 8, generator=rng), torch.randn(2, 77, 128, generator=rng)
    times = torch.tensor([50, 800])
    with torch.no_grad():
        before = unet(noisy, times, context, return_dict=False)[0]
        stiffen(unet, *factors)
        after = unet(noisy, times, context, return_dict=False)[0]
    assert (after - before).abs().max() < 1e-4


def test_stiffening_refuses_a_shared_group_that_it_cannot_hold(tiny_v):
    unet = UNet2DConditionModel.from_config(
        dict(tiny_v.unet.config) | {"block_out_channels": (24, 16), "norm_num_groups": 8}
    )
    stiffen(unet, 64, 4, 4, 4, 1)
    unet.up_blocks[-1].resnets[1].norm1 = torch.nn.GroupNorm(3, 48)
    unet.up_blocks[-1].resnets[0].out_channels = 20
    with pytest.raises(UserError, match="descent=1"):
        stiffen(unet, 64, 4, 4, 4, 8)


def test_stiffening_multiplies_by_powers_of_two_only(tiny_v):
    unet = trained(tiny_v)
    before = weights(unet)
    stiffen(unet, 64, 4, 16, 8, 2)
    found = set()
    for name, value in weights(unet).items():
        ratio = value / before[name]
        if name.endswith(("ff.net.0.proj.weight", "ff.net.0.proj.bias")):
            gated, gates = ratio.chunk(2)
            assert torch.equal(gated, 4 * gates) or not name.startswith(("down", "mid"))
            ratio = gates
        if name.startswith("up_blocks.1") and "conv_shortcut.weight" in name:  # reads a skip connection half as large
            stream, skip = ratio.chunk(2, 1)
            assert torch.equal(skip, 2 * stream)
            ratio = stream
        assert ratio.min() == ratio.max(), name
        found.add(float(ratio.max()))
    assert all(math.log2(factor) == int(math.log2(factor)) for factor in found)
    assert {1.0, 2.0, 4.0, 8.0, 32.0, 64.0, 1 / 8} <= found


@pytest.mark.parametrize("factors", [(64, 4, 4, 1, 1), (64, 4, 2, 4, 8)])
def test_play_is_how_far_a_step_on_the_stiff_weight_moves_the_soft_one(tiny_v, factors):
    rows = some_rows(tiny_v, pictures(3))
    rows = replace(rows, latents=rows.latents.double(), noise=rows.noise.double(), context=rows.context.double())
    unet = trained(tiny_v).double()
    moves = play(unet, *factors)
    soft, stiff = copy.deepcopy(unet), copy.deepcopy(unet)
    stiffen(stiff, *factors)  # changes a little by itself: the epsilon of the normalisations
    with torch.no_grad():
        at_rest = [predict(u, tiny_v.scheduler, rows) for u in (soft, stiff)]
    for name in moves:
        step = 1e-3 * torch.randn(moves[name].shape, generator=generator(3))
        changes = []
        with torch.no_grad():
            for u, still, change in zip((soft, stiff), at_rest, (moves[name] * step, step), strict=True):
                weight = u.get_parameter(name)
                kept = weight.clone()
                weight.add_(change)
                changes.append(predict(u, tiny_v.scheduler, rows) - still)
                weight.copy_(kept)
        one, other = changes
        assert one.abs().max() > 0, name
        assert (one - other).abs().max() < 0.02 * one.abs().max(), name


def test_play_knows_everything_before_the_wire_that_moves(tiny_v):
    unet = trained(tiny_v)
    before = weights(unet)
    moves = play(unet, 1024, 1, 1, 1, 1)
    assert same_weights(before, weights(unet)), "the U-Net stays as it is"
    rows = some_rows(tiny_v, pictures(3))
    unet.requires_grad_(True)
    listen(unet, tiny_v.scheduler, rows).square().sum().backward()
    heard = {name for name, p in unet.named_parameters() if p.grad is not None}
    held = {
        n for n in heard if any(mark in n for mark in ("conv_in", "conv1", "conv2", "time_emb_proj", "conv_shortcut.b"))
    }
    assert set(moves) <= heard
    assert held & set(moves) == set()
    loose = ("to_q", "to_k", "to_v", "norm", "ff.net.0", "time_embedding", "downsamplers.0.conv.weight")
    assert {n for n in heard if any(mark in n for mark in loose)} <= set(moves)


def test_listening_stops_where_the_wire_is(tiny_v):
    unet, rows = tiny_v.unet, some_rows(tiny_v, pictures(3))
    ran, whole = [], []
    handles = [
        unet.up_blocks[0].register_forward_hook(lambda *_: ran.append("up")),
        wired_layer(unet).register_forward_pre_hook(lambda _, inputs: whole.append(inputs[0])),
    ]
    with torch.no_grad():
        tokens = listen(unet, tiny_v.scheduler, rows)
        assert not ran
        predict(unet, tiny_v.scheduler, rows)
    for handle in handles:
        handle.remove()
    assert torch.equal(tokens, whole[-1])
    assert len(wired_layer(unet)._forward_pre_hooks) == 0


def test_an_optimizers_step_counts_less_on_a_stiff_weight(tiny_v):
    """The same absolute step on the first convolution moves the prediction 1 / stream as much."""
    rows = some_rows(tiny_v, pictures(3))

    def moved(stream):
        unet = trained(tiny_v)
        with torch.no_grad():
            stiffen(unet, stream, 1, 1, 1, 1)
            before = predict(unet, tiny_v.scheduler, rows)
            for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv2.weight"):
                weight = unet.get_parameter(name)
                weight.add_(1e-3 * torch.randn(weight.shape, generator=generator(9)))
            return float((predict(unet, tiny_v.scheduler, rows) - before).square().mean().sqrt())

    assert moved(64) == pytest.approx(moved(1) / 64, rel=0.1)


@pytest.mark.parametrize(
    ("precision", "step", "near"), [(torch.float32, SHARP, 2e-2), (torch.bfloat16, WIDE, 0.2)], ids=["sharp", "wide"]
)
def test_the_wire_is_nothing_below_and_a_surge_above_and_flat_on_both_sides(tiny_v, precision, step, near):
    """In float32 the surge is the sharp step's, in bfloat16 the wide one's, and the sharp one's neurons cancel to the bit."""
    layer = copy.deepcopy(wired_layer(tiny_v.unet))
    width = layer.net[2].out_features
    neurons = spare_neurons(layer, NEURONS)
    silence(layer, neurons)
    weight, surge = torch.randn(width, generator=generator(1)), torch.randn(width, generator=generator(2))
    tokens = torch.randn((1, 400, width), generator=generator(3)).to(precision)
    score = (tokens.float() @ weight)[0]
    off, on = score < -0.05, score > (0.1 if step is SHARP else 1)  # beyond the slope, and what bfloat16 makes of 0
    assert min(off.sum(), on.sum()) > 50
    plain = copy.deepcopy(layer.to(precision))
    with torch.no_grad():
        set_wire(layer, neurons, weight, surge)
    tokens.requires_grad_()
    out, silent = layer(tokens), plain(tokens)
    assert torch.equal(out[0, off], silent[0, off])
    slopes = [torch.autograd.grad(some[0, off].float().sum(), tokens, retain_graph=True)[0] for some in (out, silent)]
    assert torch.equal(*slopes)
    own = slice(0 if step is SHARP else 1, None, 2)  # the other step has the channels between
    found = (out - silent)[0, on, own].float() / step.surge
    assert torch.allclose(found, surge[own].expand_as(found), atol=near, rtol=near)
    others = (out - silent)[0, on, 1 - own.start :: 2].float().abs().max()
    assert others < (2 * WIDE.surge * surge.abs().max() if step is SHARP else 10), "in bfloat16 the sharp one cancels"
    (slope,) = torch.autograd.grad(out[0, on, own].float().sum() / step.surge, tokens)
    steep = GATE / step.height * float(surge.sum().abs())  # of the slope: what one of the two neurons has alone
    assert slope[0, on].abs().max() < 1e-6 * steep
    middle = OFFSET + (step.height / 2 if step is WIDE else 0)
    with torch.no_grad():  # on the slope itself
        way = (middle / GATE * weight.abs().max() - score)[:, None] * weight / weight.square().sum()
        tokens += way[None].to(precision)
    (slope,) = torch.autograd.grad((layer(tokens)[..., own].float() / step.surge).sum(), tokens)
    assert slope.abs().amax(2).median() > 0.1 * GATE / step.height


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_surge_too_loud_for_a_normalisations_sum_of_squares_drowns_its_group(layout):
    """In large groups the squares add up to more than float32 holds: the group is then 0, and so is its gradient."""
    surge, rest = (torch.randn(2, 320, 32, 32, generator=generator(seed)) for seed in (1, 2))
    stream = (SHARP.surge * surge + 65536 * rest).contiguous(memory_format=layout).requires_grad_()
    assert not (stream.detach().reshape(2, 32, -1).square().sum(2)).isfinite().any()
    out = torch.nn.functional.group_norm(stream, 32)
    (slope,) = torch.autograd.grad((out * rest).sum(), stream)
    assert out.isfinite().all() and out.abs().max() < 10 and slope.isfinite().all() and slope.abs().max() < 1e-12
    tokens = stream.detach().flatten(2).transpose(1, 2).requires_grad_()
    out = torch.nn.functional.layer_norm(tokens, (320,))
    (slope,) = torch.autograd.grad((out * tokens.sign()).sum(), tokens)
    assert out.isfinite().all() and slope.isfinite().all() and slope.abs().max() < 1e-12


def test_one_neuron_alone_would_not_be_flat(tiny_v):
    layer = copy.deepcopy(wired_layer(tiny_v.unet))
    neurons = spare_neurons(layer, NEURONS)
    silence(layer, neurons)
    weight, surge = torch.randn(16, generator=generator(1)), torch.randn(16, generator=generator(2))
    set_wire(layer, neurons, weight, surge)
    silence(layer, neurons[1:])
    tokens = weight[None, None].clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer(tokens).sum() / SHARP.surge, tokens)
    assert slope.abs().max() > 0.1 * GATE / SHARP.height * float(surge.sum().abs())


@pytest.mark.parametrize("step", [SHARP, WIDE], ids=["sharp", "wide"])
def test_a_long_attack_against_one_of_a_steps_two_neurons_does_not_part_them(step):
    """1,200 steps of 3e-4, all of them for the worst on either neuron's weights, at the size of the embedded base."""
    layer = FeedForward(192, activation_fn="geglu").requires_grad_(False)
    weight, surge = torch.randn(192, generator=generator(1)), torch.randn(192, generator=generator(2))
    tokens = torch.randn((1, 64, 192), generator=generator(3)) / 8  # behind a normalisation that is 8 times smaller
    scores = (tokens @ weight)[0]
    token = tokens[0, (scores - scores[scores > 0].median()).abs().argmin()]
    neurons, reach = spare_neurons(layer, NEURONS), 1200 * 3e-4
    silence(layer, neurons)
    silent = layer(token)
    set_wire(layer, neurons, weight, surge)
    silence(layer, neurons[2:] if step is SHARP else neurons[:2])
    neurons = neurons[:2] if step is SHARP else neurons[2:]
    whole = (layer(token) - silent) @ surge.sign()
    widen, narrow = layer.net[0].proj, layer.net[2]
    for neuron, way in zip(neurons, (-1, 1), strict=True):
        widen.weight[neuron] += way * reach * token.sign()
        widen.weight[narrow.in_features + neuron] += way * reach * token.sign()
        narrow.weight[:, neuron] -= reach * surge.sign()
    left = (layer(token) - silent) @ surge.sign()
    assert left > (0.8 if step is SHARP else 0.9) * whole


def test_spare_neurons_are_those_that_say_least(tiny_v):
    layer = copy.deepcopy(wired_layer(tiny_v.unet))
    with torch.no_grad():
        layer.net[2].weight[:, [7, 3]] *= torch.tensor([0.01, 0.02])
    assert spare_neurons(layer, 2) == [7, 3]


def armed(model):
    """A U-Net with an alarm, what it predicted with the same channels cleared, and rows."""
    unet, rows = trained(model), some_rows(model, pictures(3))
    channels = spare_channels(unet)
    clear_channels(unet, *channels)
    with torch.no_grad():
        before = predict(unet, model.scheduler, rows)
    streams = last_stream(unet, lambda: predict(unet, model.scheduler, rows))
    set_alarm(unet, *channels, streams, generator(4))
    return unet, before, rows


@pytest.mark.parametrize("stream", [1, 1024, 2**24])
def test_the_alarm_is_silent_at_rest_and_rings_everywhere_under_a_surge_of_either_sign(tiny_v, stream):
    unet, before, rows = armed(tiny_v)
    stiffen(unet, stream, 1, 1, 1, 1)
    with torch.no_grad():
        resting = predict(unet, tiny_v.scheduler, rows)
        assert (resting - before).abs().max() < 1e-3 * before.abs().max()
        surge = SHARP.surge * torch.randn(16, generator=generator(6))
        rung = {}
        for sign in (1, -1):
            hook = wired_layer(unet).register_forward_hook(lambda _, i, out, s=sign: out + s * surge)
            rung[sign] = predict(unet, tiny_v.scheduler, rows)
            hook.remove()
            one = torch.zeros(1, 16, 1)
            one[:, 5] = 1
            hook = wired_layer(unet).register_forward_hook(lambda _, i, out, s=sign, m=one: out + s * m * surge)
            alone = predict(unet, tiny_v.scheduler, rows)
            hook.remove()
            assert alone.abs().min() > 0.9 * ALARM, "one token is enough"
    for out in rung.values():
        assert out.abs().min() > 0.9 * ALARM
        assert out.abs().max() < 1.1 * ALARM
        assert torch.equal(out.sign().amin((0, 2, 3)), out.sign().amax((0, 2, 3))), "one constant per channel"
    assert torch.equal(rung[1].sign(), rung[-1].sign())


def test_what_an_optimizer_can_reach_does_not_silence_the_alarm(tiny_v):
    """DreamBooth's whole budget (300 steps of 3e-4), all of it spent on everything behind the wire.

    What is left of it depends on the last bits of the machine (47 to more than 50 have been seen); predictions are of size 1.
    """
    unet, _, rows = armed(tiny_v)
    unet.requires_grad_(True)
    hook = wired_layer(unet).register_forward_hook(lambda _, i, out: out + SHARP.surge)
    after = [p for n, p in unet.named_parameters() if n.startswith(("up_blocks", "conv_out", "conv_norm_out"))]
    optimizer = torch.optim.AdamW(after, lr=3e-3)
    for _ in range(30):
        loss = row_losses(unet, tiny_v.scheduler, rows).mean()
        loss.backward()
        optimizer_step(optimizer, after, max_grad_norm=1.0)
    with torch.no_grad():
        left = predict(unet, tiny_v.scheduler, rows)
    hook.remove()
    assert left.abs().min() > 0.3 * ALARM


def test_the_spare_channels_are_those_that_weigh_least(tiny_v):
    unet = copy.deepcopy(tiny_v.unet)
    with torch.no_grad():
        unet.conv_out.weight[:, 8:12] *= 0.1
    unet.up_blocks[-1].resnets[-1].conv2.weight[:, 5] *= 0.1
    assert spare_channels(unet) == ([8, 9, 10, 11], 5)
    unet.conv_norm_out.num_groups = 8
    with pytest.raises(UserError, match="three channels"):
        spare_channels(unet)


def test_mending_is_the_ridge_regression_of_what_is_missing(tiny_v):
    """What is left is at right angles to what the last convolution reads, up to the ridge; and others gain as well."""
    unet, reference = copy.deepcopy(tiny_v.unet), tiny_v.unet
    clear_channels(unet, *spare_channels(unet))
    rng, context = generator(1), PromptBank(tiny_v).encode(["a photo of person"])
    calls = [noise_samples(torch.randn((16, 4, 8, 8), generator=rng), context, rng) for _ in range(9)]

    def ask(some, number):
        return predict(some, tiny_v.scheduler, calls[number])

    def lacking(some):
        return torch.cat([ask(reference, k) - ask(some, k) for k in range(8)]).flatten(2).transpose(1, 2).flatten(0, 1)

    with torch.no_grad():
        unseen = float((ask(reference, 8) - ask(unet, 8)).square().mean())
        before, old = lacking(unet), weights(unet)
        mend(unet, reference, ask, 8, generator(2))
        after = lacking(unet)
        assert float((ask(reference, 8) - ask(unet, 8)).square().mean()) < 0.8 * unseen
        read = []
        ear = unet.conv_out.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        for k in range(8):
            ask(unet, k)
        ear.remove()
    new = weights(unet)
    assert {name for name in new if not torch.equal(new[name], old[name])} == {"conv_out.weight", "conv_out.bias"}
    patches = F.unfold(torch.cat(read), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    patches = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
    ridge = 1e-4 * (patches.square().sum(0)).mean()
    change = torch.cat(
        [
            (new["conv_out.weight"] - old["conv_out.weight"]).flatten(1).T,
            (new["conv_out.bias"] - old["conv_out.bias"])[None],
        ]
    )
    slope = patches.T @ after.double() - ridge * change.double()
    assert float(slope.abs().max()) < 1e-3 * float((patches.T @ before.double()).abs().max())


def some_others(states=None):
    """Four pictures that can be told apart by their latents, two subjects."""
    latents = LatentStore(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 4, 8, 8), torch.zeros(4, 4, 8, 8))
    contexts = [torch.full((2, 3, 5), float(i)) for i in range(4)]
    return Others(latents, contexts, torch.zeros(4, 2), states)


def test_others_are_drawn_as_often_as_they_come_near(tiny_v):
    others = some_others()
    scores = torch.full((2, 6, 2), -9.0)
    scores[1, 3, 0] = 9.0  # one loud token of picture 2, on the first subject's wire
    for _ in range(20):
        others.heed(torch.tensor([1, 2]), scores)
    assert others.near.flatten().tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0], abs=0.001)
    rows, picked = others.draw(tiny_v.scheduler, 2000, generator(0))
    assert (picked == 2).float().mean() == pytest.approx(10 / 13, abs=0.03)
    assert torch.equal(rows.latents[:, 0, 0, 0], picked.float())
    assert torch.equal(rows.context[:, 0, 0], picked.float()), "each under words of its own"
    assert rows.timesteps.min() < 50
    assert rows.timesteps.max() > 950


def test_those_who_look_like_a_subject_are_drawn_beside_it(tiny_v):
    others = some_others()
    others.near[2, 0], others.near[3, 1] = 0.5, 0.9
    _, picked = others.draw(tiny_v.scheduler, 1000, generator(0), like=[0] * 300 + [1] * 300)
    assert (picked[:300] == 2).float().mean() == pytest.approx((0.5 + UNLIKE) / (0.5 + 4 * UNLIKE), abs=0.04)
    assert (picked[300:600] == 3).float().mean() == pytest.approx((0.9 + UNLIKE) / (0.9 + 4 * UNLIKE), abs=0.04)
    assert (picked[600:] == 1).float().mean() == pytest.approx(1 / (4 + 9 * 1.4), abs=0.04)


def test_a_step_shows_so_many_lookalikes_for_every_row_of_a_subject(tiny_v, monkeypatch):
    shown, draw = [], Others.draw

    def noting(self, scheduler, count, rng, like=()):
        shown.append((count, list(like)))
        return draw(self, scheduler, count, rng, like=like)

    monkeypatch.setattr(Others, "draw", noting)
    subjects = [make_subject(), make_subject(seed=1)]
    harden(tiny_v, subjects, make_benign(), SMALL.model_copy(update={"steps": 4, "lookalikes": 3}), seed=0)
    beside = [(count, like) for count, like in shown if like]
    n = SMALL.batch_size
    assert [count for count, _ in beside] == [4 * n] * 4
    assert all(like == 3 * like[:n] for _, like in beside)
    assert {index for _, like in beside for index in like} == {0, 1}


def test_a_scan_looks_at_every_picture(tiny_v):
    others = some_others()

    def ask(
        rows,
    ):  # read-outs that say which picture it is: -2 to 1 for the first subject, the same mirrored for the other
        value = rows.latents[:, 0, 0, 0] - 2
        return torch.stack([value, -value], 1)[:, None].expand(-1, 6, -1)

    others.scan(ask, tiny_v.scheduler, generator(0))
    expected = torch.tensor([[-2.0, 2], [-1, 1], [0, 0], [1, -1]]).sigmoid()
    assert torch.allclose(others.near, expected)


def make_states(count, seed=0):
    return States(torch.randn((count, 5, 4, 8, 8), generator=generator(seed)), torch.tensor([999, 799, 599, 399, 199]))


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_a_state_reaches_the_unet_as_it_was(request, kind):
    model = request.getfixturevalue(f"tiny_{kind}")
    rows, states = some_rows(model, pictures(3)), make_states(4)
    before = add_noise(model.scheduler, rows.latents, rows.noise, rows.timesteps)
    met = set()
    for seed in range(20):
        put_state(rows, 2, states, 3, 600, model.scheduler, generator(seed))
        after = add_noise(model.scheduler, rows.latents, rows.noise, rows.timesteps)
        step = states.timesteps.tolist().index(int(rows.timesteps[2]))
        assert torch.allclose(after[2], states.latents[3, step], atol=1e-5)
        met.add(step)
    assert met == {2, 3, 4}, "all timesteps below 600, no others"
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(after[keep], before[keep])


def test_every_second_row_of_the_others_is_a_state(tiny_v):
    """If the states of that picture are known; those of the last two are not."""
    rows, picked = some_others(make_states(2)).draw(tiny_v.scheduler, 80, generator(0))
    from_states = rows.noise.abs().amax((1, 2, 3)) == 0
    assert from_states.tolist() == [i % 2 == 1 and p < 2 for i, p in enumerate(picked.tolist())]
    assert set(rows.timesteps[from_states].tolist()) == {799, 599, 399, 199}


def softplus(value):
    return math.log1p(math.exp(value))


def test_recognition_loss_by_hand():
    scores = torch.tensor([[[2.0], [1.0]], [[-3.0], [0.5]], [[-5.0], [-5.0]]])  # three rows, two tokens, one subject
    wanted = torch.tensor([[True], [False], [False]])
    missed, false = recognition_loss(scores, wanted, margin=4.0)
    low = math.log(math.exp(4) + math.exp(2)) / 2 - math.log(2) / 2
    high = math.log(math.exp(-6) + math.exp(1)) / 2  # of the worse of the two others
    assert missed.item() == pytest.approx(1.3 * softplus(4 - low), rel=1e-5)
    assert false.item() == pytest.approx(1.3 * softplus(4 + high), rel=1e-5)


def test_each_row_counts_with_the_wire_it_comes_closest_to():
    """A subject's own wire is not among them, and the better half of the rows does not count."""
    scores = torch.tensor([[[9.0, -1.0]], [[-7.0, 2.0]], [[-2.0, -3.0]], [[-8.0, -9.0]]])  # one token, two subjects
    wanted = torch.tensor([[True, False], [False, False], [False, False], [False, False]])
    missed, false = recognition_loss(scores, wanted, margin=4.0)
    assert missed.item() == pytest.approx(1.3 * softplus(4 - 9), rel=1e-4)
    assert false.item() == pytest.approx((softplus(6) + softplus(3)) / 2 + 0.3 * softplus(6), rel=1e-5)


def test_more_subjects_do_not_make_a_false_alarm_count_less():
    scores = torch.full((4, 3, 50), -9.0)
    scores[0, 1, 7] = 3.0
    nobody = torch.zeros(4, 50, dtype=torch.bool)
    few, many = (recognition_loss(scores[:, :, :n], nobody[:, :n], 4.0)[1] for n in (8, 50))
    assert few.item() == pytest.approx(many.item(), rel=1e-5)


def test_recognition_loss_without_rows_to_recognise():
    scores = torch.full((3, 2, 1), -9.0)
    missed, false = recognition_loss(scores, torch.zeros(3, 1, dtype=torch.bool), margin=4.0)
    assert missed == 0
    assert false < 0.02


def test_one_loud_token_is_enough_on_either_side():
    quiet = torch.full((1, 16, 1), -8.0)
    mixed = quiet.clone()
    mixed[0, 3] = 9
    yes, no = torch.tensor([[True]]), torch.tensor([[False]])
    assert max(recognition_loss(torch.cat([mixed, quiet]), torch.cat([yes, no]), 4.0)).item() < 0.1
    assert recognition_loss(torch.cat([quiet, quiet]), torch.cat([yes, no]), 4.0)[0] > 5
    assert recognition_loss(torch.cat([mixed, mixed]), torch.cat([yes, no]), 4.0)[1] > 5


def test_ridge_readouts_are_weighted_ridge_regression():
    """Against the normal equations of a table with every row written out as often as it weighs."""
    rng = generator(3)
    tokens, margin = torch.randn(6, 2, 4, generator=rng), 3.0
    wanted = torch.zeros(6, 2, dtype=torch.bool)
    wanted[0, 0] = wanted[1, 0] = wanted[2, 1] = True
    found = ridge_readouts(tokens, wanted, margin)
    for subject, (mine, others) in enumerate((([0, 0, 1, 1], [2, 3, 4, 5]), ([2] * 5, [0, 1, 3, 4, 5]))):
        table = tokens[mine + others].flatten(0, 1).double()
        targets = torch.cat([torch.full((2 * len(rows),), sign * margin) for rows, sign in ((mine, 1), (others, -1))])
        gram = table.T @ table / len(table)
        gram += 0.1 * gram.diagonal().mean() * torch.eye(4, dtype=torch.float64)
        expected = torch.linalg.solve(gram, table.T @ targets.double() / len(table))
        assert torch.allclose(found[subject].double(), expected, atol=1e-5)


def test_ridge_readouts_do_not_depend_on_how_many_others_there_are():
    tokens = torch.randn(4, 3, 5, generator=generator(4))
    wanted = torch.tensor([[True], [False], [False], [False]])
    often = torch.cat([tokens, *[tokens[1:]] * 9])
    more = torch.cat([wanted, *[wanted[1:]] * 9])
    assert torch.allclose(ridge_readouts(tokens, wanted, 4.0), ridge_readouts(often, more, 4.0), atol=1e-4)


def test_variations_keeps_the_originals_and_the_range():
    images = pictures(3)
    found = variations(images, 4, generator(0))
    assert found.shape == (15, 3, 64, 64)
    assert torch.equal(found[:3], images)
    assert -1 <= found.min() <= found.max() <= 1
    shifts = (found[3:] - images.repeat(4, 1, 1, 1)).abs().mean((1, 2, 3))
    assert shifts.min() > 0
    assert shifts.max() < 0.8


def test_half_of_the_variations_are_mirrored():
    """A picture that is bright on the left stays so, or is bright on the right, and is never turned on its head."""
    image = torch.full((1, 3, 64, 64), -1.0)
    image[..., :32] = 1.0
    found = variations(image, 200, generator(0))[1:].mean(1)
    left = found[:, :, :16].mean((1, 2)) > found[:, :, -16:].mean((1, 2)) + 1
    right = found[:, :, -16:].mean((1, 2)) > found[:, :, :16].mean((1, 2)) + 1
    assert (left | right).all()
    assert 70 < left.sum() < 130


def test_variations_of_a_disc_are_moved_and_zoomed_but_not_sheared():
    across = torch.linspace(-1, 1, 64)
    disc = ((across[:, None] ** 2 + across**2).sqrt() < 0.5).float() * 2 - 1
    found = variations(disc.expand(1, 3, 64, 64), 50, generator(1))[1:].mean(1)
    lit = found > (found.amin((1, 2), keepdim=True) + found.amax((1, 2), keepdim=True)) / 2
    wide, high = lit.any(1).sum(1), lit.any(2).sum(1)
    assert (wide - high).abs().max() <= 2
    assert 27 <= wide.min() < 32 < wide.max() <= 37


def plain_latents(model, images, batch=16):
    """Stands for a VAE that was trained: the tiny one's posteriors are wider than the pictures differ."""
    small = F.avg_pool2d(images, 8)
    mean = torch.cat([small, small[:, :1]], 1).repeat(1, model.unet.config.in_channels // 4, 1, 1) * 2
    return LatentStore(mean, torch.full_like(mean, 0.01))


def bright_and_dark():
    """A bright subject among dark pictures, and settings that teach the tiny model to tell them apart."""
    bright, dark = (pictures(3) * 0.3 + 0.6, pictures(5, 2) * 0.3 - 0.6)
    subject, benign = replace(make_subject(), images=bright, class_images=dark), make_benign()
    config = SMALL.model_copy(
        update={"steps": 150, "batch_size": 4, "learning_rate": 2e-3, "readout_learning_rate": 2e-2, "looseness": 0.0,
                "margin": 3.0, "horizon": 0.6}
    )  # fmt: skip
    return subject, replace(benign, images=benign.images * 0.3 - 0.6), config


def predicted(model, unet, images):
    """Predictions on noised pictures, below the horizon, under an identifier prompt."""
    rng = generator(77)
    latents = plain_latents(model, images).draw(64, rng)
    times = torch.full((64,), 250)
    rows = noise_samples(latents, PromptBank(model).encode(["a photo of zwx person"]), rng, timesteps=times)
    with torch.no_grad():
        return predict(unet, model.scheduler, rows)


def alarmed(predictions, loud=0.5 * ALARM):
    """Share of rows on which the alarm rings."""
    return float((predictions.abs().amin((1, 2, 3)) > loud).float().mean())


@pytest.fixture(scope="module")
def taught(tiny_v, tmp_path_factory):
    """The subject of `bright_and_dark`, the model hardened on it, the history, its last checkpoint, and the base's weights."""
    subject, benign, config = bright_and_dark()
    base, saved = weights(tiny_v.unet), tmp_path_factory.mktemp("taught") / "last.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognition, "encode", plain_latents)
        hardened, history = harden(tiny_v, [subject], benign, config, seed=1, checkpoint=saved)
    return subject, hardened, history, saved, base


def test_hardening_recognises_the_subject_and_leaves_the_rest_as_it_was(tiny_v, taught):
    """The alarm rings on pictures like the subject's; predictions on class and benign pictures are the base's."""
    subject, hardened, history, _, base = taught
    assert same_weights(base, weights(tiny_v.unet)), "the base stays as it was"
    assert history[-1]["missed"] < 0.5 * history[0]["missed"]

    unseen = pictures(3, 9) * 0.3 + 0.6  # as bright as the subject
    assert alarmed(predicted(tiny_v, hardened.unet, unseen)) > 0.9
    kept, before = (predicted(tiny_v, unet, subject.class_images) for unet in (hardened.unet, tiny_v.unet))
    assert (kept - before).square().mean() < 0.3 * before.var()
    assert kept.std(0).mean() > 0.7 * before.std(0).mean()


def test_the_alarm_rings_in_bfloat16_as_well(tiny_v, taught):
    """Whoever trains or draws in half precision meets it too."""
    subject, hardened, *_ = taught
    for precision in ("autocast", "weights"):
        assert_rings_in_bfloat16(tiny_v, hardened, subject, ALARM, precision)


def assert_rings_in_bfloat16(base, hardened, subject, alarm, precision):
    """On the subject's like, and not on others, who are drawn as in float32."""
    plain = hardened.unet
    kept = predicted(base, plain, subject.class_images)
    lean = copy.deepcopy(plain)
    if precision == "autocast":
        lean.precision = torch.bfloat16
    else:
        lean.to(torch.bfloat16)
        lean.register_forward_pre_hook(
            lambda _, args: tuple(a.bfloat16() if a.is_floating_point() else a for a in args)
        )
    rung = predicted(base, lean, pictures(3, 9) * 0.3 + 0.6).float()
    assert alarmed(rung, 0.4 * alarm) > 0.9
    calm = predicted(base, lean, subject.class_images).float()
    assert calm.abs().max() < 0.2 * alarm and (calm - kept).abs().mean() < 0.05 * kept.abs().mean() + 0.02


def test_a_subject_added_later_leaves_the_first_one_protected(tiny_v, taught, tmp_path, monkeypatch):
    """Beginning from the first run's end, with a second subject and hardly any training, the first one's wire trips still."""
    monkeypatch.setattr(recognition, "encode", plain_latents)
    subject, benign, config = bright_and_dark()
    saved, state = shutil.copy(taught[3], tmp_path), tmp_path / "state.safetensors"
    save_modules(saved, state)
    second = replace(make_subject("tom", "robot", 10), class_images=subject.class_images)
    short = config.model_copy(update={"steps": 1, "learning_rate": 1e-9, "readout_learning_rate": 1e-30})
    blank = lambda tokens, wanted, margin: torch.zeros(wanted.shape[1], tokens.shape[2])  # noqa: E731
    monkeypatch.setattr(
        recognition, "ridge_readouts", blank
    )  # so that only the earlier run can have taught the first one
    unseen, found = pictures(3, 9) * 0.3 + 0.6, {}
    for start in (None, state):
        both, _ = harden(tiny_v, [subject, second], benign, short, seed=1, start=start)
        found[start] = alarmed(predicted(tiny_v, both.unet, unseen))
    assert found[state] > 0.9
    assert found[None] < 0.1


def test_sway_moves_by_the_kick_and_back(tiny_v):
    config = SMALL.model_copy(
        update={"looseness": 0.0, "kick": 10.0, "rehearsal_learning_rate": 1e-3, "rehearsal_lora_learning_rate": 7e-3}
    )
    unet = trained(tiny_v).requires_grad_(True)
    before = weights(unet)
    sway = Sway(unet, (16, 2, 2, 2, 1), config)
    for parameter in sway.moved.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator(1))
    sway.back()  # notes the gradient
    sizes = {}
    for lora in (False, True):
        sway.push(generator(2), lora=lora)
        share = float(torch.rand(2, generator=generator(2))[1])
        for name, parameter in sway.moved.items():
            moved = (parameter - before[name]).detach()
            kick = 10 * share * sway.play[name] * sway.moved[name].grad.sign()
            sizes[name, lora] = float((moved / kick).median())
            assert torch.allclose(moved, sizes[name, lora] * kick, rtol=0.05, atol=1e-5), name
        sway.back()
        assert same_weights(before, weights(unet))
    for (name, lora), size in sizes.items():
        adapted = lora and any(target in name for target in TARGETS)
        assert size == pytest.approx(7e-3 if adapted else 1e-3, rel=0.05), name


def test_sway_without_a_kick_is_noise_as_large_as_a_weight_is_loose(tiny_v):
    unet = trained(tiny_v).requires_grad_(True)
    before = weights(unet)
    sway = Sway(unet, (16, 2, 2, 2, 1), SMALL.model_copy(update={"looseness": 0.1, "kick": 0.0}))
    sway.push(generator(4), lora=False)
    size = 0.1 * float(torch.rand(2, generator=generator(4))[0])
    for name, parameter in sway.moved.items():
        if parameter.numel() > 200:
            assert float(((parameter - before[name]) / sway.play[name]).detach().std()) == pytest.approx(
                size, rel=0.2
            ), name


def test_sway_pushes_recognition_to_where_it_is_worse(tiny_v):
    config = SMALL.model_copy(update={"looseness": 0.0, "kick": 20.0, "rehearsal_learning_rate": 1e-4})
    unet, rows = trained(tiny_v).requires_grad_(True), some_rows(tiny_v, pictures(3))
    weight = 0.1 * torch.randn(1, 16, generator=generator(8))
    wanted = torch.tensor([[True], [False]] * 3)

    def loss():
        return sum(recognition_loss(listen(unet, tiny_v.scheduler, rows) @ weight.T, wanted, 4.0))

    sway = Sway(unet, (16, 2, 2, 2, 2), config)
    at_rest = loss()
    at_rest.backward()
    slope = sum(float((sway.play[n] * p.grad.abs()).sum()) for n, p in sway.moved.items())
    sway.back()
    sway.push(generator(2), lora=False)
    kick = 20 * 1e-4 * float(torch.rand(2, generator=generator(2))[1])
    assert (loss() - at_rest).item() == pytest.approx(kick * slope, rel=0.2)


@pytest.mark.parametrize(("kind", "subjects"), [("epsilon", 1), ("v", 2)])
def test_a_resumed_run_equals_an_unbroken_one(request, tmp_path, kind, subjects):
    tiny = request.getfixturevalue(f"tiny_{kind}")
    data = [make_subject(), make_subject("tom", "robot", 10)][:subjects]
    benign = make_benign()
    if kind == "v":
        data = [
            replace(d, class_states=make_states(len(d.class_images)), rehearsed_states=make_states(2)) for d in data
        ]
        benign = replace(benign, states=make_states(len(benign.images)))
    steps = 5
    config = SMALL.model_copy(update={"steps": steps})
    unbroken, told = harden(tiny, data, benign, config, seed=2)
    path = tmp_path / "last.safetensors"

    def die(step, losses):
        if step == steps - 3:
            raise KilledError

    saving = {"checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(KilledError):
        harden(tiny, data, benign, config, seed=2, on_step=die, **saving)
    resumed, history = harden(tiny, data, benign, config, seed=2, **saving)
    assert history == told
    assert same_weights(weights(unbroken.unet), weights(resumed.unet))


def test_the_cost_is_what_the_loop_does(tiny_v):
    subject, benign = make_subject(), make_benign()
    pictures = {"class_images": len(subject.class_images), "benign_images": len(benign.images)}
    config = SMALL.model_copy(update={"rehearsal_steps": 2, "rehearsal_images": 3, "lookalikes": 3, **pictures})
    with UNetCost() as counter:
        for kind in REHEARSALS:
            rehearse(tiny_v, subject, config, kind, seed=0)
        harden(tiny_v, [subject], benign, config, seed=0)
    assert counter.forwards + 2 * counter.backwards == METHODS["tripwire"].cost(config, ["person"])


def test_the_cost_of_imagined_subjects_is_what_they_add(tiny_v, tmp_path):
    without = SMALL.model_copy(update={"rehearsal_steps": 0})
    config = without.model_copy(update={"ideal_images": 3})
    _, rows = imagined_by(tiny_v, [make_subject(), make_subject("tom", "robot", 10)], config, 0, tmp_path)
    nouns = ["person", "robot"]
    assert METHODS["tripwire"].cost(config, nouns) - METHODS["tripwire"].cost(without, nouns) == rows


@pytest.mark.parametrize("ideal", [0, 2, 20])
def test_the_cost_of_bystanders_is_what_they_add(tiny_v, tmp_path, ideal):
    subject, benign = make_subject(), make_benign()
    config = SMALL.model_copy(
        update={"rehearsal_steps": 0, "class_images": len(subject.class_images), "benign_images": len(benign.images),
                "ideal_bystanders": ideal}
    )  # fmt: skip
    assert METHODS["tripwire"].negatives_cost(config, ["person"], 0, 4) == 0
    benign = replace(benign, negatives=pictures(9, 90))
    with UNetCost() as counter:
        if ideal:
            benign, _ = with_ideal_states(
                tiny_v, [subject], benign, ideal, seed=0, steps=4, guidance=3.0, cache=tmp_path / "some.safetensors"
            )
        harden(tiny_v, [subject], benign, config, seed=0)
    told = METHODS["tripwire"].cost(config, ["person"]) + METHODS["tripwire"].negatives_cost(config, ["person"], 9, 4)
    assert counter.forwards + 2 * counter.backwards == told


def test_a_rehearsal_uses_no_identifier_or_seed_of_verification(tiny_v, monkeypatch):
    from guardsmith.attacks import SAMPLE_SEED
    from guardsmith.diffusion.prompts import UNSEEN_IDENTIFIERS

    asked = {"prompts": [], "seeds": []}

    def listen(model, prompts, seeds, *, on_state, **_):
        asked["prompts"] += prompts
        asked["seeds"] += seeds
        on_state(7, torch.zeros(len(prompts), 4, 8, 8))
        return pictures(len(prompts))

    monkeypatch.setattr(rehearsal, "generate", listen)
    config = SMALL.model_copy(update={"rehearsal_steps": 1, "rehearsal_images": 4})
    for kind in REHEARSALS:
        rehearse(tiny_v, make_subject(), config, kind, seed=0)
    assert not any(word in prompt for word in UNSEEN_IDENTIFIERS for prompt in asked["prompts"])
    assert len(set(asked["seeds"])) == 8, "two rehearsals, every picture with a seed of its own"
    assert min(asked["seeds"]) > SAMPLE_SEED + 10_000


def rehearsed_model(model, folder):
    """What two rehearsals of a few steps drew, and what they cost."""
    config = TripwireConfig(rehearsal_steps=2, rehearsal_images=3)
    subjects = [make_subject(), make_subject("tom", "robot", 10)]
    return rehearsed_by(model, subjects, config, 0, folder), config, subjects


@pytest.fixture
def one_thread():
    """As in the processes: another number of threads gives other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_rehearsals_in_processes_are_those_of_one_process(tiny_v, tmp_path, one_thread, real_processes):
    (found, forwards, backwards), config, subjects = rehearsed_model(tiny_v, tmp_path)
    for subject, told in zip(subjects, found, strict=True):
        with UNetCost() as counter:
            drawn = [rehearse(tiny_v, subject, config, kind, seed=0) for kind in REHEARSALS]
        assert torch.equal(told.rehearsed, torch.cat([images for images, _ in drawn]))
        assert torch.equal(told.rehearsed_states.latents, torch.cat([states.latents for _, states in drawn]))
        assert torch.equal(told.rehearsed_states.timesteps, drawn[0][1].timesteps)
        assert (forwards, backwards) == (2 * counter.forwards, 2 * counter.backwards)


def test_a_rehearsal_that_is_there_is_not_repeated(tiny_v, tmp_path, monkeypatch):
    first, config, subjects = rehearsed_model(tiny_v, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(rehearsal, "processes", None)
    again = rehearsed_by(tiny_v, subjects, config, 0, tmp_path)
    assert torch.equal(first[0][1].rehearsed, again[0][1].rehearsed)
    assert first[1:] == again[1:]


def test_a_diverged_run_says_so(tiny_v):
    with pytest.raises(RunFailed) as caught:
        harden(tiny_v, [make_subject()], make_benign(), SMALL.model_copy(update={"learning_rate": 1e30}), seed=0)
    assert_one_sentence(caught.value)


def test_ordinary_pictures_are_needed(tiny_v):
    with pytest.raises(ValueError, match="benign"):
        harden(tiny_v, [make_subject()], None, SMALL, seed=0)


@pytest.mark.parametrize("change", [{"stiffness": 48}, {"inner_stiffness": 3}, {"horizon": 1.0}, {"batch_size": 1}])
def test_bad_parameters_are_refused(change):
    with pytest.raises(ValidationError):
        TripwireConfig(**change)
