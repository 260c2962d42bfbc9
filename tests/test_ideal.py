"""States of an attack that went perfectly: the optimal denoiser, the base's own guidance, and who is shown so."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_apdm import make_benign, make_subject
from test_tripwire import make_states
from tiny import pictures

from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.sampling import generate
from guardsmith.diffusion.states import StateRecorder, States
from guardsmith.hardening.data import load_pictures
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.methods.tripwire import ideal
from guardsmith.methods.tripwire.ideal import ideal_states, imagined_by, likeness, posterior_mean, with_ideal_states
from guardsmith.methods.tripwire.method import TripwireConfig
from guardsmith.methods.tripwire.recognition import Lesson
from guardsmith.models.checkpoint import load_model
from guardsmith.registry.loader import load_registry
from guardsmith.training.loop import generator


def test_the_posterior_mean_weighs_pictures_by_how_likely_they_are():
    """Two pictures of one number each: ab = .64, z_t = 1; distances 1 - .8 * 1 and 1 + .8 * 1, variance .36."""
    found = posterior_mean(
        torch.ones(1, 1, 1, 1), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1), *torch.tensor([0.8, 0.6])
    )
    near, far = math.exp(-(0.2**2) / 0.72), math.exp(-(1.8**2) / 0.72)
    assert found.item() == pytest.approx((near - far) / (near + far))


def test_no_denoiser_does_better_on_these_pictures():
    rng = generator(0)
    known, alpha_bar = torch.randn((3, 2, 1, 1), generator=rng), torch.tensor(0.3)
    clean = known[torch.randint(3, (4000,), generator=rng)]
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * torch.randn(clean.shape, generator=rng)
    best = posterior_mean(noisy, known.expand(4000, -1, -1, -1, -1), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    error = (best - clean).square().mean()
    nearest = known[(noisy.unsqueeze(1) - alpha_bar.sqrt() * known).square().sum((2, 3, 4)).argmin(1)]
    for other in (0.9 * best, best + 0.1, noisy / alpha_bar.sqrt(), nearest):
        assert (other - clean).square().mean() > error


class IdealUNet:
    """The U-Net of a personalized model: the base without a prompt, the optimal denoiser with one."""

    def __init__(self, model, known):
        self.model, self.known, self.config = model, known, model.unet.config

    def __call__(self, noisy, t, context, return_dict):
        out = self.model.unet(noisy, t, context, return_dict=False)[0]
        alpha_bar = self.model.scheduler.alphas_cumprod[int(t)]
        half = len(noisy) // 2
        clean = posterior_mean(noisy[half:], self.known, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        noise = (noisy[half:] - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        if self.model.prediction_type == "v_prediction":
            noise = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        out[half:] = noise
        return (out,)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_states_are_those_of_a_model_with_the_optimal_denoiser(request, kind, monkeypatch):
    model = request.getfixturevalue(f"tiny_{kind}")
    monkeypatch.setattr(ideal, "BATCH", 2)
    known = encode(model, pictures(6)).mean.view(3, 2, 4, 8, 8)
    found = ideal_states(model, known, [7, 8, 9], steps=5, guidance=3.0)
    parts = []
    for row, seed in enumerate((7, 8, 9)):
        recorder = StateRecorder()
        personalized = replace(model, unet=IdealUNet(model, known[row : row + 1]))
        generate(personalized, ["a photo of sks person"], [seed], steps=5, guidance=3.0, on_state=recorder)
        parts.append(recorder.states())
    assert torch.equal(found.timesteps, parts[0].timesteps)
    wanted = torch.cat([part.latents for part in parts])
    assert (found.latents - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_without_guidance_it_ends_at_the_picture(request, kind):
    model = request.getfixturevalue(f"tiny_{kind}")
    known = encode(model, pictures(2)).mean.unsqueeze(1)
    states = ideal_states(model, known, [3, 4], steps=30, guidance=1.0)
    time = int(states.timesteps[-1])
    alpha_bar = model.scheduler.alphas_cumprod[time]
    left = states.latents[:, -1] - alpha_bar.sqrt() * known[:, 0]
    assert (left.std() / (1 - alpha_bar).sqrt()).item() == pytest.approx(1, abs=0.15), (
        "its own noise is all that is left"
    )


def test_other_photographs_of_the_subject_are_the_likest():
    """On the embedded base and its registry: nobody looks more like the subject than itself, whoever else is there."""
    model, registry = load_model("builtin:avatar"), load_registry(Path("registries/avatars.yaml"))
    people = [each for each in (*registry.subjects, *registry.controls) if each.class_noun == "person"]
    mira, others = people[0], people[1:]
    crowd = torch.cat([load_pictures(model, each, "attack") for each in (*others, mira)])
    around = torch.cat([load_pictures(model, each, "reference") for each in others])
    shown = load_pictures(model, mira, "harden")
    subject = SubjectData("mira", "person", (), shown, shown, around)
    benign = BenignData(around, ["a photo of a thing"] * len(around), negatives=crowd)
    score = likeness(model, [subject], benign, 0)[:, 0]
    twins = len(shown)
    assert len(score) == len(crowd) > 3 * twins
    assert score[-twins:].mean() > score[:-twins].mean() + 2 * score[:-twins].std()


def test_the_likest_come_first_with_their_states(tiny, tmp_path, monkeypatch):
    mira, tom = make_subject(), make_subject("tom", "robot", 10)
    score = torch.zeros(12, 2)
    score[[10, 4, 7], 0], score[[7, 1, 4], 1] = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, 1.0])
    monkeypatch.setattr(ideal, "likeness", lambda *_: score)
    before = replace(make_benign(), negatives=pictures(12, 90), states=make_states(6))
    asked = {"seed": 0, "steps": 4, "guidance": 3.0}
    after, rows = with_ideal_states(tiny, [mira, tom], before, 2, cache=tmp_path / "cache/some.safetensors", **asked)
    assert torch.equal(after.negatives, before.negatives[[1, 4, 7, 10, 0, 2, 3, 5, 6, 8, 9, 11]])
    known = encode(tiny, after.negatives[:4]).mean.unsqueeze(1)
    wanted = ideal_states(tiny, known, range(ideal.FIRST_SEED, ideal.FIRST_SEED + 4), steps=4, guidance=3.0)
    assert torch.allclose(after.negative_states.latents, wanted.latents, atol=1e-5)
    assert rows == 4 * 4
    monkeypatch.setattr(ideal, "likeness", None)
    again, same = with_ideal_states(tiny, [mira, tom], before, 2, cache=tmp_path / "cache/some.safetensors", **asked)
    assert same == rows
    assert torch.equal(again.negatives, after.negatives)
    assert torch.equal(again.negative_states.latents, after.negative_states.latents)


def test_more_are_asked_for_than_there_are(tiny, tmp_path):
    mira = make_subject()
    few = replace(make_benign(), negatives=pictures(2, 90), states=make_states(6))
    after, _ = with_ideal_states(
        tiny, [mira], few, 200, seed=0, steps=4, guidance=3.0, cache=tmp_path / "some.safetensors"
    )
    assert len(after.negatives) == len(after.negative_states.latents) == 2


def test_the_lesson_shows_bystanders_in_these_states(tiny):
    """The pool is class pictures, ordinary ones, bystanders: the states have to belong to the right ones."""
    mira = make_subject()
    mira = replace(mira, class_states=make_states(5, 1))
    marked = States(torch.full((2, 5, 4, 8, 8), 77.0), make_states(1).timesteps)
    benign = replace(make_benign(), states=make_states(6, 2), negatives=pictures(4, 90), negative_states=marked)
    others = Lesson(tiny, [mira], benign, 0).others
    assert len(others.latents) == 5 + 6 + 4
    seen = set()
    for seed in range(20):
        rows = others.show(torch.arange(15), tiny.scheduler, generator(seed))
        scaled = rows.latents * tiny.scheduler.alphas_cumprod[rows.timesteps].sqrt().view(-1, 1, 1, 1)
        seen |= {row for row in range(15) if torch.allclose(scaled[row], torch.tensor(77.0), atol=1e-3)}
    assert seen == {11}, "every other row is a state; 11 and 12 are the bystanders who have some"


def test_no_other_pictures_use_its_seeds():
    from guardsmith.attacks import SAMPLE_SEED
    from guardsmith.methods.tripwire.rehearsal import REHEARSAL_SEED

    assert max(SAMPLE_SEED, REHEARSAL_SEED) + 100_000 < ideal.FIRST_SEED
    assert ideal.FIRST_SEED + 50_000 < ideal.SUBJECT_SEED


def test_subjects_are_imagined_from_their_own_pictures_and_variations(tiny, tmp_path, monkeypatch):
    mira, tom = make_subject(), make_subject("tom", "robot", 10)
    config = TripwireConfig(rehearsal_steps=0, ideal_images=3)
    (first, second), rows = imagined_by(tiny, [mira, tom], config, 0, tmp_path / "cache")
    assert rows == 2 * 3 * ideal.IMAGINED_STEPS
    assert first.rehearsed is None
    assert first.rehearsed_states.latents.shape[:2] == (3, ideal.IMAGINED_STEPS)
    own = ideal_states(
        tiny, encode(tiny, tom.images).mean.unsqueeze(0), [ideal.SUBJECT_SEED], steps=ideal.IMAGINED_STEPS, guidance=3.0
    )
    assert torch.allclose(second.rehearsed_states.latents[:1], own.latents, atol=1e-5), (
        "the first knows the pictures as they are"
    )
    assert not torch.allclose(second.rehearsed_states.latents[1:2], own.latents, atol=1e-2)
    assert not torch.allclose(first.rehearsed_states.latents[:1], own.latents, atol=1e-2)
    monkeypatch.setattr(ideal, "ideal_states", None)
    (again, _), same = imagined_by(tiny, [mira, tom], config, 0, tmp_path / "cache")
    assert same == rows
    assert torch.equal(again.rehearsed_states.latents, first.rehearsed_states.latents)


def test_imagining_takes_the_place_of_rehearsals():
    with pytest.raises(ValueError, match="set rehearsal_steps to 0"):
        TripwireConfig(ideal_images=3)
    assert TripwireConfig(ideal_images=3, rehearsal_steps=0).ideal_images == 3
