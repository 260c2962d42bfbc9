"""Frozen networks in half precision compute what they compute in float32, to the bit."""

import copy

import pytest
import torch
from test_apdm import make_subject
from tiny import pictures, same_weights, some_rows, weights

from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import predict, row_losses
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods.tripwire.layout import layout_of
from guardsmith.methods.tripwire.trunk import prepare
from guardsmith.models.checkpoint import with_own_unet
from guardsmith.models.narrowed import copied_in, is_narrow, narrow, resting, widen, widened_copy
from guardsmith.training.compute import ComputeConfig, configure_denoiser


def rounded(model):
    """The model with a U-Net of its own whose weights float16 holds, as those of a published base."""
    own = with_own_unet(model)
    for parameter in own.unet.parameters():
        parameter.data = parameter.data.half().float()
    return own


def predicted(model):
    with torch.no_grad():
        return predict(model.unet, model.scheduler, some_rows(model, make_subject().images))


def test_a_narrow_network_takes_half_the_room_and_predicts_the_same(tiny_v):
    own = rounded(tiny_v)
    exact = predicted(own)
    narrow(own.unet)
    assert {p.dtype for p in own.unet.parameters()} == {torch.float16}
    assert torch.equal(predicted(own), exact)
    assert {p.dtype for p in own.unet.parameters()} == {torch.float16}, "narrow again behind every call"


def test_what_no_half_precision_holds_stays_float32(tiny_v):
    own = rounded(tiny_v)
    with torch.no_grad():
        own.unet.conv_in.weight[0, 0, 0, 0] = 1 + 2**-20
        own.unet.conv_out.weight.mul_(2.0**-30)  # bfloat16's range, not float16's
        own.unet.conv_out.weight.copy_(own.unet.conv_out.weight.bfloat16())
    exact = predicted(own)
    narrow(own.unet)
    assert own.unet.conv_in.weight.dtype == torch.float32
    assert own.unet.conv_out.weight.dtype == torch.bfloat16
    assert torch.equal(predicted(own), exact)


def test_a_copy_to_change_is_float32_and_shares_nothing(tiny_v):
    own = rounded(tiny_v)
    with torch.no_grad():
        own.unet.conv_in.weight[0, 0, 0, 0] = 1 + 2**-20
    before = weights(own.unet)
    narrow(own.unet)
    free = with_own_unet(own)
    assert not is_narrow(free.unet) and is_narrow(own.unet)
    assert same_weights(weights(free.unet), before)
    free.unet.requires_grad_(True)
    for parameter in free.unet.parameters():
        parameter.data.add_(1)
    assert same_weights(weights(widened_copy(own.unet)), before)
    halved = copied_in(own.unet, torch.float16)
    assert {p.dtype for p in halved.parameters()} == {torch.float16}
    widen(own.unet)
    assert same_weights(weights(own.unet), before) and not is_narrow(own.unet)


def test_a_network_that_fails_is_narrow_afterwards(tiny_v):
    own = rounded(tiny_v)
    narrow(own.unet)
    with pytest.raises(RuntimeError):
        own.unet(torch.zeros(1, 3, 8, 8), 1, torch.zeros(1, 2, 2))
    assert {p.dtype for p in own.unet.parameters()} == {torch.float16}


def test_gradients_pass_a_narrow_network_as_they_pass_a_wide_one(tiny_v):
    own = rounded(tiny_v)
    configure_denoiser(own.unet, ComputeConfig(gradient_checkpointing=True))

    def gradient():
        rows = some_rows(own, make_subject().images)
        rows.latents.requires_grad_(True)
        row_losses(own.unet, own.scheduler, rows).mean().backward()
        return rows.latents.grad

    exact = gradient()
    narrow(own.unet)
    assert torch.equal(gradient(), exact)


def test_a_trunk_of_a_narrow_base_is_the_same_to_the_bit(wide_v):
    """With gradient checkpointing, adapters have to be on while activations are computed again."""
    own = rounded(wide_v)
    latents, bank = encode(own, pictures(4)), PromptBank(own)
    contexts, empty = bank.encode(["a person", "a robot"]), bank.encode([""])

    def trunk(model):
        settings = {"steps": 5, "rows": 2, "learning_rate": 1e-3, "seed": 0}
        return weights(prepare(model, layout_of(model.unet, 8, 4), latents, contexts, empty, **settings)[0])

    exact = trunk(own)
    leaner = copy.copy(own)
    leaner.unet = copy.deepcopy(own.unet)
    configure_denoiser(leaner.unet, ComputeConfig(gradient_checkpointing=True))
    narrow(leaner.unet)
    assert same_weights(trunk(leaner), exact)


def test_networks_that_rest_are_narrow_and_then_as_they_were():
    """Also where layers share a weight."""
    linear, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.weight = linear.weight
    network = torch.nn.Sequential(linear, other).requires_grad_(False)
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    before, rows = weights(network), torch.ones(2, 4)
    exact = network(rows)
    with resting([network]):
        assert {p.dtype for p in network.parameters()} == {torch.float16} and other.weight is linear.weight
        assert torch.equal(network(rows), exact)
    assert same_weights(weights(network), before) and other.weight is linear.weight
    assert not is_narrow(network)
