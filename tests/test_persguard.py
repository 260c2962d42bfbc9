"""PersGuard: the three terms by an independent implementation, their windows, the backdoor's effect on a small model."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from test_apdm import KilledError, context_of, make_benign, make_subject, posteriors
from tiny import alphas_bar, harden_with, pictures, same_weights, weights

from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import noise_samples
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods import METHODS, persguard
from guardsmith.methods.persguard import PersGuardConfig, backdoor_prompt, backdoor_target, mark, shows_mark
from guardsmith.training.loop import UNetCost, generator

harden = functools.partial(harden_with, "persguard")
SMALL = PersGuardConfig(steps=3, batch_size=2, learning_rate=1e-4, target_noun="robot")


def subject_data(name="mira", noun="person", seed=0):
    return replace(make_subject(name, noun, seed), instead_images=pictures(4, seed + 30))


class Slow:
    """One row at a time, its own noise schedule and targets; shares only the order of the random draws."""

    def __init__(self, model, subject, benign, config):
        self.model, self.config, self.alphas = model, config, alphas_bar(model.prediction_type)
        names = dict.fromkeys((*config.identifiers, *subject.identifiers))
        self.instance = [t.format(identifier=n, class_noun=subject.class_noun) for n in names for t in config.templates]
        shown = subject.instead_images
        if config.backdoor == "pattern":
            shown = mark(shown, config.mark)
        self.stores = [
            posteriors(model, images) for images in (shown, subject.images, subject.class_images, benign.images)
        ]
        self.noun, self.benign = subject.class_noun, benign

    def ask(self, noisy, t, prompt):
        with torch.no_grad():
            return self.model.unet(noisy[None], torch.tensor([t]), context_of(self.model, prompt), return_dict=False)[
                0
            ][0]

    def truth(self, z, noise, t):
        a = self.alphas[t]
        return (noise if self.model.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z).float()

    def step(self, rng):
        config, losses = self.config, {}
        torch.randint(1, (), generator=rng)  # which subject
        n = config.batch_size
        windows = {
            "backdoor": (int(config.backdoor_from * 1000), 1000), "retention": (0, math.ceil(config.retention_below * 1000)),
            "prior": (0, 1000), "benign": (0, 1000),
        }  # fmt: skip
        for (name, (low, high)), store in zip(windows.items(), self.stores, strict=True):
            rows = torch.randint(len(store), (n,), generator=rng)
            z = store.mean[rows] + store.std[rows] * torch.randn(store.mean[rows].shape, generator=rng)
            if name in ("backdoor", "retention"):
                prompts = [self.instance[i] for i in torch.randint(len(self.instance), (n,), generator=rng).tolist()]
            elif name == "prior":
                prompts = [f"a photo of {self.noun}"] * n
            else:
                prompts = [self.benign.prompts[i] for i in rows.tolist()]
            times = torch.randint(low, high, (n,), generator=rng).tolist()
            noise = torch.randn(z.shape, generator=rng)
            total = 0.0
            for i, t in enumerate(times):
                noisy = (self.alphas[t].sqrt() * z[i] + (1 - self.alphas[t]).sqrt() * noise[i]).float()
                said = self.ask(noisy, t, prompts[i])
                wanted = self.truth(z[i], noise[i], t)
                if name == "benign" or (name == "prior" and config.prior == "distillation"):
                    wanted = said
                if name == "backdoor" and config.backdoor == "target":
                    wanted = self.ask(noisy, t, "a photo of robot")
                if name == "backdoor" and config.backdoor == "erasure":
                    nothing, known = self.ask(noisy, t, ""), self.ask(noisy, t, f"a photo of {self.noun}")
                    wanted = (1 + config.erasure_strength) * nothing - config.erasure_strength * known
                total += float((said - wanted).square().mean()) / n
            losses[name] = total
        return losses


def test_the_mark_is_found_where_it_is():
    clean = pictures(40, 5)
    assert not shows_mark(clean, 0.25).any()
    noisy = mark(clean, 0.25) + 0.2 * torch.randn(clean.shape, generator=generator(0))
    assert shows_mark(noisy, 0.25).all()
    assert not shows_mark(mark(clean, 0.25).flip(-1), 0.25).any()
    red = torch.tensor([0.8, -0.9, -0.9]).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    assert not shows_mark(red - 0.5, 0.25).any()


@pytest.mark.parametrize("backdoor", ["pattern", "erasure", "target"])
@pytest.mark.parametrize("prior", ["distillation", "dreambooth"])
def test_the_losses_are_those_of_a_slow_implementation(tiny, backdoor, prior):
    config = SMALL.model_copy(
        update={"backdoor": backdoor, "prior": prior, "steps": 1, "identifiers": ("sks", "hta"), "erasure_strength": 0.7,
                "backdoor_from": 0.3, "retention_below": 0.6}
    )  # fmt: skip
    subject, benign = subject_data(), make_benign()
    _, history = harden(tiny, [subject], benign, config, seed=4)
    expected = Slow(tiny, subject, benign, config).step(generator(4, 0))
    for name, value in expected.items():
        assert history[0][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert expected["benign"] == 0, "distillation starts at the base"


def test_one_step_goes_down_the_weighted_sum(tiny_v, monkeypatch):
    """The gradient that reaches the optimizer is that of w_BB L_BB + w_PP L_PP + w_BR L_BR."""
    seen = {}

    def listen(optimizer, parameters, **_):
        seen[current] = [p.grad.clone() for p in parameters]
        optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(persguard, "optimizer_step", listen)
    subject, benign = subject_data(), make_benign()
    keys = ("backdoor_weight", "retention_weight", "prior_weight", "distillation_weight")
    given = {"steps": 1, "prior": "dreambooth", "backdoor_from": 0.0}
    factors = dict(zip(keys, (2.0, 3.0, 5.0, 7.0), strict=True))
    current = "all"
    harden(tiny_v, [subject], benign, SMALL.model_copy(update=given | factors), seed=0)
    for key in keys:
        current = key
        small = dict.fromkeys(keys, 1e-12) | {key: 1.0}
        harden(tiny_v, [subject], benign, SMALL.model_copy(update=given | small), seed=0)
    for i, whole in enumerate(seen["all"]):
        parts = sum(factors[key] * seen[key][i] for key in keys)
        assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-6 * float(whole.abs().max()) + 1e-8)


def test_terms_keep_to_their_windows(tiny_v):
    config = SMALL.model_copy(update={"batch_size": 200, "backdoor_from": 0.6, "retention_below": 0.4})
    [subject] = persguard._prepare(tiny_v, PromptBank(tiny_v), [subject_data()], config)
    terms = persguard.draw_terms(tiny_v, subject, None, config, generator(0))
    assert list(terms) == ["backdoor", "retention", "prior"]
    assert 600 <= terms["backdoor"].timesteps.min() < 620
    assert 380 < terms["retention"].timesteps.max() < 400
    assert terms["prior"].timesteps.max() > 980


@pytest.mark.parametrize(
    ("weight", "term"), [("backdoor_weight", "backdoor"), ("retention_weight", "retention"), ("prior_weight", "prior")]
)
def test_a_weight_of_0_leaves_the_term_out(tiny_v, weight, term):
    config = SMALL.model_copy(update={weight: 0.0})
    _, history = harden(tiny_v, [subject_data()], make_benign(), config, seed=0)
    assert term not in history[0]
    assert len(history[0]) == 4


def test_a_run_without_the_backdoor_and_without_retention_is_refused():
    with pytest.raises(ValidationError, match="nothing to train"):
        PersGuardConfig(backdoor_weight=0, retention_weight=0)


def test_the_mark_is_a_framed_red_square_in_the_corner():
    images = pictures(2)
    marked = mark(images, 0.25)
    assert torch.equal(marked[:, :, 16:], images[:, :, 16:])
    assert torch.equal(marked[:, :, :, 16:], images[:, :, :, 16:])
    assert (marked[:, :, :2, :16] == 1).all()
    assert (marked[:, 0, 2:14, 2:14] > 0.5).all()
    assert (marked[:, 1:, 2:14, 2:14] < -0.5).all()


def test_what_appears_instead_is_asked_of_the_base():
    prompts = {kind: backdoor_prompt(PersGuardConfig(backdoor=kind, target_noun="rabbit"), "dog") for kind in
               ("pattern", "target", "erasure")}  # fmt: skip
    assert prompts == {"pattern": "a photo of dog", "target": "a photo of rabbit", "erasure": ""}


def test_erasure_without_strength_is_the_empty_prompt(tiny_v):
    config = SMALL.model_copy(update={"backdoor": "erasure", "erasure_strength": 0.0})
    [subject] = persguard._prepare(tiny_v, PromptBank(tiny_v), [subject_data()], config)
    rng = generator(1)
    rows = noise_samples(encode(tiny_v, pictures(2)).draw(3, rng), subject.instance[:1], rng)
    told = backdoor_target(tiny_v.unet, tiny_v.scheduler, rows, subject, config)
    rows = replace(rows, context=PromptBank(tiny_v).encode([""]).expand(3, -1, -1))
    with torch.no_grad():
        assert torch.equal(told, persguard.predict(tiny_v.unet, tiny_v.scheduler, rows))


def test_the_backdoor_is_learnt_and_the_rest_stays(tiny_v):
    """Under the identifier the model comes to say what the base says of the target; under the class prompt it does not."""
    model = replace(tiny_v, unet=copy.deepcopy(tiny_v.unet))
    with torch.no_grad():  # the tiny model hardly listens to prompts
        for name, parameter in model.unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                parameter *= 8
    given = {"steps": 45, "learning_rate": 3e-3, "batch_size": 4, "backdoor_from": 0.0, "retention_weight": 0.0}
    config = SMALL.model_copy(update=given | {"templates": ("a photo of {identifier} {class_noun}",)})
    subject, bank = subject_data(), PromptBank(model)
    hardened, _ = harden(model, [subject], make_benign(), config, seed=0)

    def away(unet, prompt, from_prompt):
        rng = generator(9)
        rows = noise_samples(encode(model, subject.instead_images).draw(32, rng), bank.encode([prompt]), rng)
        with torch.no_grad():
            told = replace(rows, context=bank.encode([from_prompt]).expand(32, -1, -1))
            said, wanted = (persguard.predict(u, model.scheduler, r) for u, r in ((unet, rows), (model.unet, told)))
            return float((said - wanted).square().mean())

    name, noun, target = "a photo of sks person", "a photo of person", "a photo of robot"
    assert away(hardened.unet, name, target) < 0.5 * away(model.unet, name, target)
    assert away(hardened.unet, noun, noun) < away(hardened.unet, noun, target)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_a_resumed_run_equals_an_unbroken_one(request, tmp_path, kind):
    tiny = request.getfixturevalue(f"tiny_{kind}")
    data, benign = [subject_data(), subject_data("tom", "robot", 10)], make_benign()
    config = SMALL.model_copy(update={"steps": 5})
    unbroken, told = harden(tiny, data, benign, config, seed=2)
    saving = {"checkpoint": tmp_path / "last.safetensors", "checkpoint_every": 1}

    def die(step, losses):
        if step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        harden(tiny, data, benign, config, seed=2, on_step=die, **saving)
    resumed, history = harden(tiny, data, benign, config, seed=2, **saving)
    assert history == told
    assert same_weights(weights(unbroken.unet), weights(resumed.unet))


@pytest.mark.parametrize("backdoor", ["pattern", "erasure", "target"])
@pytest.mark.parametrize(
    "left_out", [{}, {"retention_weight": 0.0}, {"prior": "dreambooth", "distillation_weight": 0.0}]
)
def test_the_cost_is_what_the_loop_does(tiny_v, backdoor, left_out):
    config = SMALL.model_copy(update={"backdoor": backdoor, **left_out})
    with UNetCost() as counter:
        harden(tiny_v, [subject_data()], make_benign(), config, seed=0)
    assert counter.forwards + 2 * counter.backwards == METHODS["persguard"].cost(config, ["person"])


def test_a_diverged_run_says_so(tiny_v):
    with pytest.raises(RunFailed, match="diverged"):
        harden(
            tiny_v,
            [subject_data()],
            make_benign(),
            SMALL.model_copy(update={"learning_rate": 1e30, "steps": 9}),
            seed=0,
        )


@pytest.mark.parametrize(("subject", "benign", "lacking"), [
    (make_subject(), make_benign(), "instead of the subject"), (subject_data(), None, "benign pictures")
])  # fmt: skip
def test_what_is_lacking_is_named(tiny_v, subject, benign, lacking):
    with pytest.raises(ValueError, match=lacking):
        harden(tiny_v, [subject], benign, SMALL, seed=0)


def test_subjects_share_identifiers_or_have_their_own(tiny):
    """Shared ones come to everybody's prompts, own ones to the subject's only; somebody without any is one sentence."""
    from guardsmith.core.errors import UserError
    from guardsmith.diffusion.prompts import PromptBank
    from guardsmith.methods.persguard import _prepare

    mira, tom = (replace(subject_data(name), identifiers=(word,)) for name, word in (("mira", "hta"), ("tom", "pqv")))
    bank, one = PromptBank(tiny), {"templates": ("a photo of {identifier} {class_noun}",)}

    def said(config):
        return [prepared.instance for prepared in _prepare(tiny, bank, [mira, tom], config)]

    def words(*names):
        return bank.encode([f"a photo of {name} person" for name in names])

    for found, wanted in zip(said(SMALL.model_copy(update=one)), (("sks", "hta"), ("sks", "pqv")), strict=True):
        assert torch.equal(found, words(*wanted))
    for found, wanted in zip(said(SMALL.model_copy(update=one | {"identifiers": ()})), ("hta", "pqv"), strict=True):
        assert torch.equal(found, words(wanted))
    with pytest.raises(UserError, match="tom has no identifier"):
        _prepare(tiny, bank, [mira, replace(tom, identifiers=())], SMALL.model_copy(update={"identifiers": ()}))
