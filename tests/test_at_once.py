"""Gradients that are applied as soon as they are there, and what the tripwire does with little memory."""

import pytest
import torch
from test_apdm import make_subject
from tiny import pictures, same_weights, weights

from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods.tripwire import trunk
from guardsmith.methods.tripwire.early import EarlyDrawing, early_pictures
from guardsmith.methods.tripwire.layout import layout_of
from guardsmith.methods.tripwire.trunk_training import LeanTraining
from guardsmith.training.at_once import AtOnce, Blocks
from guardsmith.training.compute import ComputeConfig

LEAN = ComputeConfig(optimizer="adamw8bit")


def made():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def test_gradients_are_applied_within_the_backward_pass_and_clipped_by_the_norm_of_the_step_before():
    network, seen = made(), []
    parameters = list(network.parameters())
    taken = AtOnce(parameters, lambda number: seen.append((number, parameters[number].grad.clone())), max_norm=0.5)
    rows = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) * 5

    def exact():
        return torch.autograd.grad(network(rows).square().sum(), parameters)

    network(rows).square().sum().backward()
    assert all(parameter.grad is None for parameter in parameters)
    assert sorted(number for number, _ in seen) == [0, 1, 2, 3]
    for number, gradient in seen:  # the first time each by itself
        own = exact()[number]
        assert torch.allclose(gradient, own * min(1.0, 0.5 / float(own.norm())), rtol=1e-4)
    norm = taken.end()
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in exact()]).norm()), rel=1e-5)
    seen.clear()
    network(rows * 2).square().sum().backward()
    twice = torch.autograd.grad(network(rows * 2).square().sum(), parameters)
    for number, gradient in seen:
        assert torch.allclose(gradient, twice[number] * 0.5 / norm, rtol=1e-4)


def test_a_gradient_that_overflows_moves_nothing_and_leaves_the_factor():
    network, seen = made(), []
    parameters = list(network.parameters())
    taken = AtOnce(parameters, seen.append)
    network(torch.ones(2, 6)).sum().backward()
    taken.end()
    factor, before = float(taken.factor), len(seen)
    (network(torch.ones(2, 6)).sum() * float("inf")).backward()
    assert len(seen) == before
    assert not torch.isfinite(taken.end()) and float(taken.factor) == factor


@pytest.mark.parametrize("shape", [(3,), (40, 70), (256,), (2, 3, 5)])
def test_blocks_hold_numbers_to_half_a_code(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    blocks = Blocks(values)
    assert blocks.codes.dtype == torch.int8 and blocks.values().shape == values.shape
    assert float((blocks.values() - values).abs().max()) <= float(values.abs().max()) / 127 * 0.501
    assert torch.equal(Blocks.of(blocks.codes, blocks.scales, blocks.shape).values(), blocks.values())
    assert not Blocks(torch.zeros(shape)).values().any()


def prepared(model, file=None, steps=8, **more):
    latents, bank = encode(model, pictures(4)), PromptBank(model)
    contexts, empty = bank.encode(["a person", "a robot"]), bank.encode([""])
    found, _ = trunk.prepare(
        model, layout_of(model.unet, 8, 4), latents, contexts, empty, steps=steps, rows=2, learning_rate=1e-3, seed=0,
        checkpoint=file, every=1, **more,
    )  # fmt: skip
    return found


def distance(first, second):
    return sum(float((p - q).square().sum()) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_lean_preparation_goes_where_the_usual_one_goes_without_holding_gradients(wide_v, monkeypatch):
    most = []

    class Watched(LeanTraining):
        def _apply(self, number):
            most.append(sum(p.grad is not None for p in self.matrices))
            super()._apply(number)

    start, usual = prepared(wide_v, steps=1), prepared(wide_v)
    monkeypatch.setattr(trunk, "LeanTraining", Watched)
    lean = prepared(wide_v, compute=LEAN)
    assert max(most) == 1, "one gradient at a time"
    assert distance(lean, usual) < 0.05 * distance(usual, start)
    masks = trunk.reserve(prepared(wide_v, steps=1), layout_of(wide_v.unet, 8, 4))
    fresh = dict(prepared(wide_v, steps=1).named_parameters())
    for name, parameter in lean.named_parameters():
        if name in masks:
            assert torch.equal(parameter[~masks[name]], fresh[name][~masks[name]]), f"{name}: what is cut stays"


@pytest.mark.parametrize("compute", [None, LEAN])
def test_a_preparation_that_was_killed_between_adapters_gives_the_same_bits(wide_v, tmp_path, compute):
    """What an adapter has learned when it is used must not depend on what the trunk did meanwhile."""

    class KilledError(Exception):
        pass

    def die(step, *_):
        if step == 4:
            raise KilledError

    unbroken, file = prepared(wide_v, compute=compute), tmp_path / "checkpoint.safetensors"
    with pytest.raises(KilledError):
        prepared(wide_v, file, compute=compute, on_step=die)
    assert same_weights(weights(unbroken), weights(prepared(wide_v, file, compute=compute)))


def test_early_pictures_with_little_memory_are_close_to_the_usual_ones(wide_v):
    pytest.importorskip("bitsandbytes")
    drawing, subject = EarlyDrawing((3, 6), 2, 1e-3, 2, 2.0), make_subject()
    still = early_pictures(wide_v, subject, EarlyDrawing((3, 6), 2, 1e-12, 2, 2.0), 4)
    usual = early_pictures(wide_v, subject, drawing, 4)
    lean = early_pictures(wide_v, subject, drawing, 4, compute=LEAN)
    assert (lean - usual).square().mean() < 0.3 * (usual - still).square().mean()
