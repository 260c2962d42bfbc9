"""Tripwire in Stable Diffusion 3's transformer: one token trips the wire, the siren tells all of them, and rest is rest."""

import copy
from dataclasses import replace

import pytest
import torch
from test_tripwire import alarmed, assert_rings_in_bfloat16, bright_and_dark, plain_latents, predicted, some_rows
from tiny import harden_with, make_sd3, pictures, same_weights, weights

from guardsmith.attacks import AttackData, dreambooth
from guardsmith.attacks.adaptive.cut_wire import zero_neurons
from guardsmith.core.errors import UserError
from guardsmith.diffusion.losses import noise_samples, predict, row_losses
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods.tripwire import recognition, wiring_mmdit
from guardsmith.methods.tripwire.recognition import listen
from guardsmith.methods.tripwire.wiring import wiring_of
from guardsmith.methods.tripwire.wiring_mmdit import (
    ALARM,
    OPEN,
    PLATEAU,
    SURGE,
    arm,
    before_wire,
    clear,
    mend,
    play,
    room,
    spare_parts,
    stiffen,
    wired_block,
    wired_layer,
)
from guardsmith.models.checkpoint import load_model, save_model
from guardsmith.models.families import SD3Transformer
from guardsmith.training.loop import generator

FACTORS = (64, 4, 1, 1, 1)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return load_model(str(make_sd3(tmp_path_factory.mktemp("sd3") / "model")))


@pytest.fixture(params=["3", "3.5"])
def network(request, sd3):
    """Weights that are not those of a fresh start; 3.5 has a second attention and normalised queries and keys."""
    changes = {"num_layers": 3}
    if request.param == "3.5":
        changes |= {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SD3Transformer.from_config(dict(sd3.unet.config) | changes).eval().requires_grad_(False)
    rng = generator(5)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return made


def rows_of(sd3, count=6):
    return some_rows(sd3, pictures(3), count)


def cleared(network, sd3):
    """Without the parts that wires take: rows, these parts, and what the wired layer is given."""
    rows, spare = rows_of(sd3), spare_parts(network, 1)
    clear(network, spare)
    return rows, spare, tokens_of(network, sd3, rows)


def tokens_of(network, sd3, rows):
    with torch.no_grad():
        return listen(network, sd3.scheduler, rows)


def readout_for(tokens, row=0, token=0):
    """Positive on one token of one row (as least squares have it)."""
    wanted = -torch.ones(tokens.shape[:2], dtype=torch.float64)
    weight = torch.ones(tokens.shape[:2], dtype=torch.float64)
    wanted[row, token], weight[row, token] = 1, 30
    scaled = tokens.flatten(0, 1).double() * weight.flatten().unsqueeze(1)
    return torch.linalg.lstsq(scaled, (wanted * weight).flatten()).solution.float()


def armed(network, spare, sd3, rows, readout, factors=FACTORS):
    """The cleared network's predictions, and the armed one."""
    with torch.no_grad():
        calm = predict(network, sd3.scheduler, rows)
        ready = copy.deepcopy(network)
        quiet = replace(rows, noise=rows.noise.flip(0))
        arm(ready, spare, readout[None], lambda: predict(ready, sd3.scheduler, quiet), factors, generator(3))
    return calm, ready


@pytest.mark.parametrize("factors", [(1, 1), (64, 1), (64, 4), (65536, 16)])
def test_stiffening_changes_no_prediction(network, sd3, factors):
    rows = rows_of(sd3)
    with torch.no_grad():
        before = predict(network, sd3.scheduler, rows)
        stiffen(network, *factors, 1, 1, 1)
        after = predict(network, sd3.scheduler, rows)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_play_is_how_far_a_step_on_the_stiff_weight_moves_the_soft_one(network, sd3):
    """A step on a stiff weight changes the tokens as a step `play` times as large changes them on the soft one."""
    rows, stiff = rows_of(sd3), copy.deepcopy(network)
    stiffen(stiff, *FACTORS)
    moves = play(network, *FACTORS)
    assert set(moves) == {name for name, _ in network.named_parameters() if before_wire(network, name)}
    far = play(network, 65536, 4, 1, 1, 1)
    assert {name.split(".")[0] for name in far} == {"time_text_embed", "transformer_blocks"}, "the rest hardly moves"
    assert all(before_wire(network, name) for name in moves)
    for name in moves:
        if "norm1.linear" not in name and ".to_v." not in name and ".to_out.0" not in name:
            continue
        found = []
        for some, size in ((network, moves[name]), (stiff, 1.0)):
            trial, step = copy.deepcopy(some), 0.05 * torch.randn(moves[name].shape, generator=generator(1))
            with torch.no_grad():
                dict(trial.named_parameters())[name].add_(size * step)
            found.append(tokens_of(trial, sd3, rows))
        assert (found[0] - found[1]).abs().max() < 1e-3, name


@pytest.mark.parametrize("token", [0, 9])
def test_one_token_trips_the_whole_row_and_no_other(network, sd3, token):
    rows, spare, tokens = cleared(network, sd3)
    readout = readout_for(tokens, row=2, token=token)
    trips = ((tokens @ readout) > 0).any(1)
    assert trips[2] and not trips.all()
    calm, ready = armed(network, spare, sd3, rows, readout)
    with torch.no_grad():
        found = predict(ready, sd3.scheduler, rows)
    assert (found[~trips] - calm[~trips]).abs().max() < 1e-4
    assert found[trips].abs().min() > 0.5 * ALARM, "every token of the row, and every channel"
    if trips.sum() > 1:
        assert found[trips].std(0).max() < 0.1 * ALARM


def test_no_gradient_leads_back_from_the_alarm(network, sd3):
    """But for what the times and the prompt as a whole are told by, which every layer behind the wire reads as well.

    Where keys are normalised, those that are 0 are divided by next to nothing, and so is a rounding error of their gradient: in
    float64 it is as small as without.
    """
    rows, spare, tokens = cleared(network, sd3)
    readout = readout_for(tokens)
    trips = ((tokens @ readout) > 0).any(1)
    _, ready = armed(network, spare, sd3, rows, readout)
    ready.requires_grad_(True)
    losses = row_losses(ready, sd3.scheduler, rows)
    before = [
        p
        for name, p in ready.named_parameters()
        if before_wire(ready, name) and "time_text" not in name and "norm1" not in name
    ]
    for row in range(len(rows)):
        gradients = torch.autograd.grad(losses[row], before, retain_graph=True, allow_unused=True)
        size = sum(float(g.abs().sum()) for g in gradients if g is not None)
        limit = 10 if ready.config.qk_norm else 0.01
        assert size < limit if trips[row] else size > 30


def test_at_rest_nobody_meets_the_wire(network, sd3):
    """Gradients on the neurons of wire and bell are 0, and the others are about as large as without them."""
    rows, spare, tokens = cleared(network, sd3)
    readout = -tokens.mean((0, 1))
    calm, ready = armed(network, spare, sd3, rows, readout, (1, 1, 1, 1, 1))
    gradients = []
    for some in (network, ready):
        some.requires_grad_(True)
        losses = row_losses(some, sd3.scheduler, rows).mean()
        names = dict(some.named_parameters())
        gradients.append(
            dict(zip(names, torch.autograd.grad(losses, list(names.values()), allow_unused=True), strict=True))
        )
    with torch.no_grad():
        assert (predict(ready, sd3.scheduler, rows) - calm).abs().max() < 1e-4
    block = wired_block(ready)
    for number, neurons in ((block, spare.neurons), (block + 1, spare.bell)):
        for part in ("0.proj.weight", "0.proj.bias"):
            assert gradients[1][f"transformer_blocks.{number}.ff.net.{part}"][neurons].abs().max() == 0
        assert gradients[1][f"transformer_blocks.{number}.ff.net.2.weight"][:, neurons].abs().max() == 0
    plain, here = (sum(float(g.square().sum()) for g in some.values() if g is not None) ** 0.5 for some in gradients)
    assert here < 100 * plain, "clipping leaves something; 32 channels are few for an alarm as loud as one of 1,536"


def test_what_an_optimizer_can_reach_does_not_silence_the_alarm(network, sd3):
    """100 steps of 3e-4, each weight in one direction, on siren, bell, alarm and whatever writes to the pairs."""
    rows, spare, tokens = cleared(network, sd3)
    readout = -tokens.mean((0, 1))
    _, ready = armed(network, spare, sd3, rows, readout, (65536, 4, 1, 1, 1))
    rng = generator(7)
    for name, parameter in ready.named_parameters():
        if not before_wire(ready, name):
            parameter.add_(100 * 3e-4 * torch.randn(parameter.shape, generator=rng).sign())
    with torch.no_grad():
        quiet = predict(ready, sd3.scheduler, rows)
    assert quiet.abs().max() < 0.3 * ALARM

    def surge(_, __, out):
        out = out.clone()
        out[:, 3, spare.pair] = PLATEAU * OPEN * SURGE * torch.tensor([1.0, -1.0])
        return out

    hook = wired_layer(ready).register_forward_hook(surge)
    with torch.no_grad():
        loud = predict(ready, sd3.scheduler, rows)
    hook.remove()
    assert loud.abs().min() > 0.3 * ALARM


def test_the_last_layer_makes_up_for_what_was_cleared(network, sd3):
    rows, other = rows_of(sd3, 64), some_rows(sd3, pictures(3, 40), 32, seed=3)
    whole = copy.deepcopy(network)
    clear(network, spare_parts(network, 2))

    def apart():
        with torch.no_grad():
            return float(
                (predict(network, sd3.scheduler, other) - predict(whole, sd3.scheduler, other)).square().mean()
            )

    before = apart()
    with torch.no_grad():
        mend(network, whole, lambda some, _: predict(some, sd3.scheduler, rows), 1, generator(2))
    assert apart() < 0.7 * before
    assert not whole.proj_out._forward_hooks and not network.proj_out._forward_hooks


def test_wires_need_a_block_behind_them_and_neurons(sd3):
    assert wiring_of(sd3.unet) is wiring_mmdit
    assert wired_block(sd3.unet) == 0 and room(sd3.unet) == wired_layer(sd3.unet).net[2].in_features // 4
    deep = SD3Transformer.from_config(dict(sd3.unet.config) | {"num_layers": 8})
    assert wired_block(deep) == 4
    with pytest.raises(UserError, match="at least two blocks"):
        wired_block(SD3Transformer.from_config(dict(sd3.unet.config) | {"num_layers": 1}))


def ringing(predictions):
    """Share of rows on which this alarm rings."""
    return alarmed(predictions, 0.3 * ALARM)


@pytest.fixture(scope="module")
def hardened(sd3):
    subject, benign, config = bright_and_dark()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognition, "encode", plain_latents)
        made, history = harden_with("tripwire", sd3, [subject], benign, config, seed=1)
    return made, history, subject


def test_hardening_recognises_the_subject_and_leaves_the_rest(sd3, hardened, tmp_path):
    made, history, subject = hardened
    unseen = pictures(3, 9) * 0.3 + 0.6
    assert history[-1]["missed"] < 0.5 * history[0]["missed"]
    assert ringing(predicted(sd3, made.unet, unseen)) > 0.9
    kept, before = (predicted(sd3, unet, subject.class_images) for unet in (made.unet, sd3.unet))
    assert ringing(kept) == 0 and (kept - before).square().mean() < 0.3 * before.var()
    save_model(made, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert same_weights(weights(again.unet), weights(made.unet))
    assert torch.equal(predicted(sd3, again.unet, unseen), predicted(sd3, made.unet, unseen)), (
        "the places' embedding, too"
    )


def test_an_attack_on_the_subject_leaves_the_alarm_and_one_on_others_works(sd3, hardened, monkeypatch):
    made, _, subject = hardened
    monkeypatch.setattr(dreambooth, "encode", plain_latents)
    config = dreambooth.DreamBoothConfig(steps=60, learning_rate=2e-4, batch_size=2, train_text_encoder=False)
    unseen = pictures(3, 9) * 0.3 + 0.6
    attacked, _ = dreambooth.attack(made, AttackData(unseen, subject.class_images, "zwx", "person"), config, seed=0)
    assert ringing(predicted(sd3, attacked.unet, subject.images)) > 0.9
    other = pictures(3, 21) * 0.3 - 0.5
    rows = noise_samples(plain_latents(sd3, other).draw(64, generator(4)), PromptBank(sd3).encode(["a photo of zwx person"]),
                     generator(5))  # fmt: skip
    gains = []
    for model in (sd3, made):
        learnt, _ = dreambooth.attack(model, AttackData(other, subject.class_images, "zwx", "person"), config, seed=0)
        assert ringing(predicted(sd3, learnt.unet, other)) == 0
        with torch.no_grad():
            gains.append(
                float(
                    (row_losses(model.unet, sd3.scheduler, rows) - row_losses(learnt.unet, sd3.scheduler, rows)).mean()
                )
            )
    assert gains[1] > 0.5 * gains[0] > 0


def test_an_attacker_who_reads_the_weights_can_cut_the_wire(sd3, hardened):
    made, _, subject = hardened
    network = copy.deepcopy(made.unet)
    assert zero_neurons(network, 1e4) == 4  # the two of the wire, and two that pass its signal on
    assert ringing(predicted(sd3, network, subject.images)) == 0


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_the_alarm_rings_in_bfloat16_as_well(sd3, hardened, precision):
    made, _, subject = hardened
    assert_rings_in_bfloat16(sd3, made, subject, ALARM, precision)
