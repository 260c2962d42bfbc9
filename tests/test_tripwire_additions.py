"""What people add to a base, as the trunk meets it in its distillation."""

from __future__ import annotations

import copy

import pytest
import torch

from guardsmith.diffusion.latents import LatentStore
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods.tripwire.additions import Adapter, Adapters, odd_contexts, residuals
from guardsmith.models.checkpoint import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("builtin:avatar")


@pytest.fixture(scope="module")
def store():
    rng = torch.Generator().manual_seed(0)
    return LatentStore(torch.randn((5, 16, 8, 8), generator=rng), torch.full((5, 16, 8, 8), 0.01))


@pytest.fixture(scope="module")
def contexts(model):
    return PromptBank(model).encode(["a photo of person", "a photo of robot"])


@pytest.fixture(scope="module")
def call(store, contexts):
    return store.mean[:4], torch.tensor([100, 400, 600, 900]), contexts[[0, 1, 0, 1]]


def predicted(unet, call, **extra):
    with torch.no_grad():
        return unet(*call, **extra, return_dict=False)[0]


def test_an_adapter_is_on_inside_and_gone_outside(model, store, contexts, call):
    plain = predicted(model.unet, call)
    adapter = Adapter(model, store, contexts, seed=0, number=0)
    with adapter.on(model.unet):
        assert torch.equal(predicted(model.unet, call), plain)  # untrained, it changes nothing
    for _ in range(3):
        adapter.train()
    other = copy.deepcopy(model.unet)
    with adapter.on(model.unet), adapter.on(other):
        assert not torch.equal(predicted(model.unet, call), plain)
        assert torch.equal(predicted(other, call), predicted(model.unet, call))
    assert torch.equal(predicted(model.unet, call), plain)


def test_adapters_follow_each_other_and_are_the_same_after_a_resume(model, store, contexts, monkeypatch):
    monkeypatch.setattr("guardsmith.methods.tripwire.additions.ROUND", 3)
    first, resumed = (Adapters(model, store, contexts, seed=1) for _ in range(2))
    seen = [first.at(step) for step in range(5)]
    assert seen[0] is seen[2] and seen[2] is not seen[3]
    again = resumed.at(4)
    assert again.factors.keys() == seen[4].factors.keys()
    for name, pair in again.factors.items():
        assert all(torch.equal(*two) for two in zip(pair, seen[4].factors[name], strict=True))
    assert any(up.any() for _, up in again.factors.values())


@pytest.mark.parametrize("inside", [False, True])
def test_residuals_move_pictures_towards_others_by_their_factor(model, call, inside):
    plain = predicted(model.unet, call)
    factors = torch.tensor([0.0, 1.0, 0.0, 0.5]).view(4, 1, 1, 1)
    extra = residuals(model.unet, call, factors, inside=inside)
    moved = predicted(model.unet, call, **extra)
    changed = (moved - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert changed[0] < 1e-5 and changed[2] < 1e-5
    assert changed[1] > 0.02 and changed[3] > 0.01


def test_odd_contexts_have_a_word_of_their_own_each_and_leave_the_model_alone(model):
    words, table = len(model.tokenizer), model.text_encoder.get_input_embeddings().weight.clone()
    contexts = odd_contexts(model, ["a photo of {}"] * 3, seed=0)
    usual = PromptBank(model).encode(["a photo of person"])
    assert contexts.shape == (3, *usual.shape[1:])
    assert not torch.allclose(contexts[0], contexts[1]) and not torch.allclose(contexts[1], contexts[2])
    assert len(model.tokenizer) == words and torch.equal(model.text_encoder.get_input_embeddings().weight, table)
