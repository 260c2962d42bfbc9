"""IMMA: whose turn it is, which weights move and which way, what the utility term keeps."""

import copy
import functools

import pytest
import torch
from pydantic import ValidationError
from test_apdm import KilledError, make_benign, make_subject
from tiny import harden_with, same_weights, weights

from guardsmith.attacks.lora import TARGETS
from guardsmith.attacks.textual_inversion import add_words
from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples, predict, row_losses
from guardsmith.diffusion.prompts import INVERSION_TEMPLATES, PromptBank
from guardsmith.methods import METHODS
from guardsmith.methods.imma import ImmaConfig, immunized_names
from guardsmith.training.loop import UNetCost, generator

harden = functools.partial(harden_with, "imma")
SMALL = ImmaConfig(steps=4, batch_size=2, learning_rate=1e-3, adapter_learning_rate=1e-3)
ADAPTERS = ["lora", "textual_inversion", "dreambooth"]


def drawn(model, subject, seed, step, count=2, identifiers=("sks",)):
    """The rows of one step, drawn as the loop draws them."""
    rng = generator(seed, step)
    contexts = PromptBank(model).encode([f"a photo of {name} {subject.class_noun}" for name in identifiers])
    context = contexts[torch.randint(len(contexts), (count,), generator=rng)]
    return noise_samples(encode(model, subject.images).draw(count, rng), context, rng)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("which", ["attention", "cross_attention"])
def test_only_attention_projections_are_released(tiny_v, adapter, which):
    before = weights(tiny_v.unet)
    config = SMALL.model_copy(update={"adapter": adapter, "parameters": which})
    hardened, _ = harden(tiny_v, [make_subject()], None, config, seed=0)
    assert same_weights(before, weights(tiny_v.unet)), "the base stays as it is"
    changed = moved(before, weights(hardened.unet))
    allowed = set(immunized_names(tiny_v.unet, which))
    assert changed <= allowed
    assert len(changed) > 0.8 * len(allowed)
    block = "attn" if which == "attention" else "attn2"
    assert all(block in name and any(f".{target}." in name for target in TARGETS) for name in allowed)
    assert not any(p.requires_grad for p in hardened.unet.parameters())


def test_turns(tiny_v):
    config = SMALL.model_copy(update={"steps": 8, "inner_steps": 2, "outer_steps": 1})
    _, history = harden(tiny_v, [make_subject()], None, config, seed=0)
    assert [h["raising"] for h in history] == [0, 0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nothing_is_released_before_thetas_turn(tiny_v, adapter):
    config = SMALL.model_copy(update={"steps": 3, "inner_steps": 3, "adapter": adapter})
    hardened, history = harden(tiny_v, [make_subject()], None, config, seed=0)
    changed = moved(weights(tiny_v.unet), weights(hardened.unet))
    if adapter == "dreambooth":  # there theta is a part of the adapter, as in the code of the paper
        assert changed == set(immunized_names(tiny_v.unet, "attention"))
    else:
        assert changed == set()
    if adapter == "textual_inversion":
        return  # its prompts are others; see the next test
    expected = float(row_losses(tiny_v.unet, tiny_v.scheduler, drawn(tiny_v, make_subject(), 0, 0)).mean())
    assert history[0]["adaptation"] == pytest.approx(expected, rel=1e-5), "an adapter starts as nothing"


def test_new_words_start_from_the_class_noun(tiny_epsilon):
    """The first step's loss is that of a new token which stands for the mean of the noun's tokens, one for each subject."""
    data = [make_subject(), make_subject("tom", "robot", 10)]
    config = SMALL.model_copy(
        update={"adapter": "textual_inversion", "adapter_learning_rate": 1e-12, "learning_rate": 1e-12}
    )
    _, history = harden(tiny_epsilon, data, None, config, seed=4)
    for step, subject in ((0, data[0]), (2, data[1])):
        own = copy.copy(tiny_epsilon)
        add_words(own, {"<new>": subject.class_noun})
        rng = generator(4, step)
        picked = torch.randint(len(INVERSION_TEMPLATES), (2,), generator=rng)
        context = PromptBank(own).encode([INVERSION_TEMPLATES[i].format("<new>") for i in picked.tolist()])
        rows = noise_samples(encode(own, subject.images).draw(2, rng), context, rng)
        expected = float(row_losses(own.unet, own.scheduler, rows).mean())
        assert history[step]["adaptation"] == pytest.approx(expected, rel=1e-4), step


def test_theta_goes_up_the_attackers_loss(tiny_v):
    """With an adapter that stays nothing, theta's first step is AdamW's on the plain U-Net, upwards."""
    config = SMALL.model_copy(update={"steps": 2, "adapter_learning_rate": 1e-12, "learning_rate": 1e-3})
    subject = make_subject()
    hardened, _ = harden(tiny_v, [subject], None, config, seed=3)
    unet = copy.deepcopy(tiny_v.unet).requires_grad_(True)
    row_losses(unet, tiny_v.scheduler, drawn(tiny_v, subject, 3, 1)).mean().backward()
    checked = 0
    for name in immunized_names(unet, "attention"):
        before, after, slope = (
            unet.get_parameter(name),
            hardened.unet.get_parameter(name),
            unet.get_parameter(name).grad,
        )
        clear = slope.abs() > 1e-6
        step = (after - before * (1 - 1e-3 * 1e-2)).detach()
        assert torch.allclose(step[clear], 1e-3 * slope[clear].sign(), rtol=0.1, atol=1e-6), name
        checked += int(clear.sum())
    assert checked > 500


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_adapter_goes_down_and_theta_up(tiny_v, adapter):
    """Adapters alone lower the loss; with theta's turns it ends higher."""
    subject = make_subject()
    rate = 0.1 if adapter == "textual_inversion" else 1e-3
    given = {"steps": 24, "adapter": adapter, "learning_rate": 1e-2, "adapter_learning_rate": rate, "batch_size": 4}
    alone = given | {"inner_steps": 24}
    runs = [alone | {"adapter_learning_rate": 1e-12}, alone, given]
    histories = [harden(tiny_v, [subject], None, SMALL.model_copy(update=run), seed=0)[1] for run in runs]
    still, *losses = [[h["adaptation"] for h in history] for history in histories]
    assert sum(losses[0][-12:]) < sum(still[-12:])
    higher = [b > a for a, b in zip(*(run[-12:] for run in losses), strict=True)]  # on the same rows
    assert sum(higher) > 8


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_utility_term_keeps_class_pictures(tiny_v, adapter):
    subject, benign = make_subject(), make_benign()
    rng = generator(50)
    latents = encode(tiny_v, subject.class_images).draw(32, rng)
    rows = noise_samples(latents, PromptBank(tiny_v).encode(["a photo of person"]), rng)
    away = {}
    for weight in (0.0, 100.0):
        given = {"steps": 10, "adapter": adapter, "learning_rate": 2e-3, "distillation_weight": weight}
        hardened, history = harden(tiny_v, [subject], benign, SMALL.model_copy(update=given), seed=0)
        with torch.no_grad():
            said, told = (predict(unet, tiny_v.scheduler, rows) for unet in (hardened.unet, tiny_v.unet))
        away[weight] = float((said - told).square().mean())
        assert ("distillation" in history[1]) == bool(weight)
        assert "distillation" not in history[0]
    assert away[100.0] < 0.5 * away[0.0]


def test_the_utility_term_measures_what_is_released(tiny_v):
    """Before theta has moved, what is released is the base, whatever the adapter has learnt."""
    for adapter in ADAPTERS:
        given = {"steps": 6, "inner_steps": 5, "adapter": adapter, "distillation_weight": 1.0}
        _, history = harden(tiny_v, [make_subject()], make_benign(), SMALL.model_copy(update=given), seed=0)
        if adapter == "dreambooth":
            assert history[5]["distillation"] > 1e-10
        else:
            assert history[5]["distillation"] < 1e-10


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_resumed_run_equals_an_unbroken_one(tiny_v, tmp_path, adapter):
    data, benign = [make_subject(), make_subject("tom", "robot", 10)], make_benign()
    config = SMALL.model_copy(update={"steps": 7, "adapter": adapter, "distillation_weight": 1.0})
    unbroken, told = harden(tiny_v, data, benign, config, seed=2)
    saving = {"checkpoint": tmp_path / "last.safetensors", "checkpoint_every": 1}

    def die(step, losses):
        if step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        harden(tiny_v, data, benign, config, seed=2, on_step=die, **saving)
    resumed, history = harden(tiny_v, data, benign, config, seed=2, **saving)
    assert history == told
    assert same_weights(weights(unbroken.unet), weights(resumed.unet))


def test_subjects_take_turns(tiny_epsilon):
    data = [make_subject(identifiers=("mira",)), make_subject("tom", "robot", 10)]
    _, history = harden(tiny_epsilon, data, None, SMALL.model_copy(update={"steps": 3, "adapter_learning_rate": 1e-12,
                                                                          "learning_rate": 1e-12}), seed=5)  # fmt: skip
    shown = [(data[0], ("sks", "mira")), (data[0], ("sks", "mira")), (data[1], ("sks",))]
    for step, (subject, names) in enumerate(shown):
        rows = drawn(tiny_epsilon, subject, 5, step, identifiers=names)
        expected = float(row_losses(tiny_epsilon.unet, tiny_epsilon.scheduler, rows).mean())
        assert history[step]["adaptation"] == pytest.approx(expected, rel=1e-4), step


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_cost_is_what_the_loop_does(tiny_v, adapter, weight):
    config = SMALL.model_copy(update={"adapter": adapter, "distillation_weight": weight, "steps": 5})
    with UNetCost() as counter:
        harden(tiny_v, [make_subject()], make_benign(), config, seed=0)
    assert counter.forwards + 2 * counter.backwards == METHODS["imma"].cost(config, ["person"])


def test_a_diverged_run_says_so(tiny_v):
    with pytest.raises(RunFailed, match="diverged"):
        harden(tiny_v, [make_subject()], None, SMALL.model_copy(update={"learning_rate": 1e30, "steps": 9}), seed=0)


def test_ordinary_pictures_are_needed_for_the_utility_term(tiny_v):
    with pytest.raises(ValueError, match="benign"):
        harden(tiny_v, [make_subject()], None, SMALL.model_copy(update={"distillation_weight": 1.0}), seed=0)


def test_steps_that_only_move_the_adapter_are_refused():
    with pytest.raises(ValidationError, match="more than inner_steps"):
        ImmaConfig(steps=1)
    with pytest.raises(ValidationError, match="more than inner_steps"):
        ImmaConfig(steps=3, inner_steps=3)
    assert ImmaConfig(steps=2).steps == 2
