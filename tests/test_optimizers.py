"""The kinds of AdamW: the same steps, whose moments lie elsewhere."""

import sys
from dataclasses import replace

import pytest
import torch
from test_apdm import make_benign, make_subject
from test_parallel import METHODS, recipe_for
from tiny import harden_with, pictures, same_weights, weights

from guardsmith.cli.app import main
from guardsmith.methods import METHODS as TABLE
from guardsmith.training.compute import ComputeConfig
from guardsmith.training.loop import load_optimizer_tensors, optimizer_step, optimizer_tensors, reset_optimizer
from guardsmith.training.optimizers import Offloaded, adamw

KINDS = ["adamw", "offloaded", "adamw8bit"]


def made(kind, seed=0):
    """A layer whose weights are enough for blocks of 8 bits, and its optimizer in two groups."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 3))
    groups = [{"params": list(network[0].parameters())}, {"params": list(network[1].parameters()), "lr": 3e-3}]
    return network, adamw(groups, lr=1e-2, weight_decay=0.1, kind=kind)


def walk(network, optimizer, steps, first=0):
    for step in range(first, first + steps):
        rng = torch.Generator().manual_seed(step)
        loss = (network(torch.randn(8, 96, generator=rng)) - torch.randn(8, 3, generator=rng)).square().mean()
        loss.backward()
        optimizer_step(optimizer, list(network.parameters()), max_grad_norm=None)
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_each_takes_adamws_steps(kind):
    begun = torch.cat([p.detach().flatten() for p in made("adamw")[0].parameters()])
    exact = walk(*made("adamw"), 6)
    found = walk(*made(kind), 6)
    if kind == "offloaded":
        assert torch.equal(found, exact)
    assert (found - exact).norm() < 0.1 * (exact - begun).norm(), "8 bits are close, and the rates of groups count"


@pytest.mark.parametrize("kind", KINDS)
def test_each_goes_on_from_a_checkpoint_to_the_same_bits(kind):
    network, optimizer = made(kind)
    walk(network, optimizer, 3)
    kept = {key: value.clone() for key, value in optimizer_tensors(optimizer).items()}
    again, fresh = made(kind)
    again.load_state_dict(network.state_dict())
    load_optimizer_tensors(fresh, kept)
    assert torch.equal(walk(network, optimizer, 3, first=3), walk(again, fresh, 3, first=3))


@pytest.mark.parametrize("kind", KINDS)
def test_each_forgets(kind):
    network, optimizer = made(kind)
    walk(network, optimizer, 3)
    twin, fresh = made(kind)
    twin.load_state_dict(network.state_dict())
    reset_optimizer(optimizer)
    assert torch.equal(walk(network, optimizer, 2, first=9), walk(twin, fresh, 2, first=9))


def test_an_offloaded_one_sees_weights_that_were_put_back():
    """APDM restores its weights behind the optimizer's back."""
    network, optimizer = made("offloaded")
    assert isinstance(optimizer, Offloaded)
    twin, plain = made("adamw")
    for other in (network, twin):
        with torch.no_grad():
            other[0].weight.mul_(0.5)
    assert torch.equal(walk(network, optimizer, 2), walk(twin, plain, 2))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_moments_of_8_bits_take_a_quarter():
    network, optimizer = made("adamw8bit")
    walk(network, optimizer, 1)
    large = optimizer.state[network[0].weight]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    assert large["state1"].numel() == network[0].weight.numel()


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_gives_the_same_weights_with_moments_elsewhere(tiny_v, method):
    params = {k: v for k, v in METHODS[method].items() if k != "train_text_encoder"}
    found = TABLE[method]
    released = []
    for kind in ("adamw", "offloaded"):
        subject = replace(make_subject(), instead_images=pictures(5, 70))
        own, _ = harden_with(
            method, tiny_v, [subject], make_benign(), found.config(**params), compute=ComputeConfig(optimizer=kind)
        )
        released.append(weights(own.unet))
    assert same_weights(*released)
    assert not same_weights(released[0], weights(tiny_v.unet))


def test_a_missing_library_is_told(v_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    recipe = recipe_for("persguard", v_folder, tmp_path)
    asked = [
        "harden",
        "--recipe",
        str(recipe),
        "--output",
        str(tmp_path / "out"),
        "--set",
        "compute.optimizer=adamw8bit",
    ]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "needs bitsandbytes: pip install guardsmith[8bit]" in said and "Traceback" not in said
    assert "pictures" not in said, "told before anything is drawn"
