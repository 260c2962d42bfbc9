"""Probes: what they measure, when they look, when they end a hardening."""

import copy
import json

import pytest
import torch
from test_apdm import make_subject
from test_persguard import SMALL, subject_data
from tiny import harden_with, same_weights, weights

from guardsmith.config.recipe import ProbeSpec, Sampling
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.hardening.probes import ROWS, Probes
from guardsmith.models.checkpoint import with_own_unet
from guardsmith.training.loop import UNetCost, generator, load_checkpoint

QUICK = Sampling(steps=2, guidance=2.0)


def make_probes(model, folder, subjects=None, steps=10, **spec):
    return Probes(model, subjects or [make_subject()], ProbeSpec(**spec), QUICK, steps, folder, 0)


@pytest.fixture
def louder(tiny_v):
    """The base with predictions half as large again."""
    own = with_own_unet(tiny_v)
    with torch.no_grad():
        own.unet.conv_out.weight.mul_(1.5)
        own.unet.conv_out.bias.mul_(1.5)
    return own


def test_the_base_is_one(tiny_v, tmp_path):
    found = make_probes(tiny_v, tmp_path).measure(tiny_v)
    assert found == {"subject_loss": 1.0, "subject_gradient": 1.0, "class_loss": 1.0}


def test_the_numbers_are_ratios_to_the_base(tiny_v, louder, tmp_path):
    """By hand: median ratio of row losses, ratio of gradient norms, ratio of mean class losses, the worst of two subjects."""
    subjects = [make_subject(), make_subject("tom", "robot", 10)]
    found = make_probes(tiny_v, tmp_path, subjects).measure(louder)
    times = (torch.arange(ROWS) * 2 + 1) * 1000 // (2 * ROWS)
    ratios = {"loss": [], "gradient": [], "class": []}
    for i, subject in enumerate(subjects):
        per_model = []
        for model in (tiny_v, louder):
            unet = copy.deepcopy(model.unet).requires_grad_(True)
            rng, context = generator(0, -10, i), PromptBank(model).encode([f"a photo of sks {subject.class_noun}"])
            losses = row_losses(
                unet,
                model.scheduler,
                noise_samples(encode(model, subject.images).draw(ROWS, rng), context, rng, timesteps=times),
            )
            losses.mean().backward()
            norm = sum(float(p.grad.double().square().sum()) for p in unet.parameters()) ** 0.5
            rng, context = generator(0, -10, -1 - i), PromptBank(model).encode([f"a photo of {subject.class_noun}"])
            rows = noise_samples(encode(model, subject.class_images).draw(ROWS, rng), context, rng, timesteps=times)
            with torch.no_grad():
                kept = float(row_losses(unet, model.scheduler, rows).mean())
            per_model.append((losses.detach(), norm, kept))
        (base, base_norm, base_kept), (now, norm, kept) = per_model
        ratios["loss"].append(float((now / base).median()))
        ratios["gradient"].append(norm / base_norm)
        ratios["class"].append(kept / base_kept)
    assert found["subject_loss"] == pytest.approx(min(ratios["loss"]), rel=1e-4)
    assert found["subject_gradient"] == pytest.approx(min(ratios["gradient"]), rel=1e-3)
    assert found["class_loss"] == pytest.approx(max(ratios["class"]), rel=1e-4)
    assert abs(found["subject_loss"] - 1) > 0.01
    # Where a method means to lower the loss, the worst subject is the one whose loss is highest.
    lowering = make_probes(tiny_v, tmp_path, subjects, stop_at=0.5).measure(louder)
    assert lowering["subject_loss"] == pytest.approx(max(ratios["loss"]), rel=1e-4)


def test_looking_changes_nothing(tiny_v, louder, tmp_path):
    before = weights(louder.unet)
    louder.unet.requires_grad_(True)
    louder.unet.conv_in.requires_grad_(False)
    moving = [p.requires_grad for p in louder.unet.parameters()]
    state = torch.random.get_rng_state()
    make_probes(tiny_v, tmp_path, times=1, steps=1)(0, lambda: louder)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same_weights(before, weights(louder.unet))
    assert [p.requires_grad for p in louder.unet.parameters()] == moving
    assert all(p.grad is None for p in louder.unet.parameters())


@pytest.mark.parametrize(("steps", "times", "due"), [(10, 2, [5, 10]), (7, 3, [2, 5, 7]), (2, 5, [1, 2]), (9, 0, [])])
def test_it_looks_evenly_and_at_the_end(tiny_v, tmp_path, steps, times, due):
    probes = make_probes(tiny_v, tmp_path, steps=steps, times=times, pictures=0)
    looked = []
    for step in range(steps):
        probes(step, lambda step=step: looked.append(step + 1) or tiny_v)
    assert looked == due
    assert [told["step"] for told in probes.results()] == due


def test_pictures_and_numbers_are_kept(tiny_v, tmp_path, capsys):
    probes = make_probes(tiny_v, tmp_path / "probes", steps=4, times=2, pictures=3)
    for step in range(4):
        assert not probes(step, lambda: tiny_v)
    pictures = sorted(file.name for file in (tmp_path / "probes").glob("*.png"))
    assert pictures == ["step-000002.png", "step-000004.png"]
    probes(3, lambda: tiny_v)  # a step that a killed run takes again
    assert [told["step"] for told in probes.results()] == [2, 4]
    assert (
        "probe at step 4, against the base: subject loss x1, subject gradient x1, class loss x1"
        in capsys.readouterr().err
    )


def test_a_broken_model_is_told_and_not_raised(tiny_v, louder, tmp_path, capsys):
    with torch.no_grad():
        louder.unet.conv_out.weight.fill_(float("nan"))
    probes = make_probes(tiny_v, tmp_path, steps=1, times=1, stop_at=2.0)
    assert not probes(0, lambda: louder)
    (told,) = probes.results()
    assert told == {"step": 1, "subject_loss": None, "subject_gradient": None, "class_loss": None}
    json.loads((tmp_path / "probes.jsonl").read_text(), parse_constant=pytest.fail)
    assert "holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop_at", "subject", "kept", "enough"),
    [
        (None, 100.0, 1.0, False),
        (2.0, 2.0, 1.0, True),
        (2.0, 1.9, 1.0, False),
        (2.0, 5.0, 1.2, False),
        (0.5, 0.5, 1.0, True),
        (0.5, 0.6, 1.0, False),
        (2.0, float("nan"), 1.0, False),
        (2.0, 3.0, float("nan"), False),
    ],
)
def test_when_it_is_enough(tiny_v, tmp_path, stop_at, subject, kept, enough):
    probes = make_probes(tiny_v, tmp_path, stop_at=stop_at)
    assert probes.target_met({"subject_loss": subject, "subject_gradient": 1.0, "class_loss": kept}) is enough


def test_a_met_target_ends_the_hardening_for_good(tiny_v, tmp_path):
    """A run that ended early is complete: it is not trained on when it is called again."""
    config = SMALL.model_copy(update={"steps": 6, "distillation_weight": 0.0})
    subject = subject_data()
    saving = {"checkpoint": tmp_path / "last.safetensors", "checkpoint_every": 50}
    asked = []

    def third(step, present):
        asked.append(weights(present().unet))
        return step == 2

    ended, history = harden_with("persguard", tiny_v, [subject], None, config, seed=0, probe=third, **saving)
    assert len(history) == len(asked) == 3
    assert same_weights(asked[-1], weights(ended.unet))
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["ended"] is True
    with UNetCost() as cost:
        again, told = harden_with("persguard", tiny_v, [subject], None, config, seed=0, probe=third, **saving)
    assert cost.forwards == 0
    assert told == history
    assert same_weights(weights(ended.unet), weights(again.unet))
