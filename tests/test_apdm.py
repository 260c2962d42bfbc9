"""APDM against a second implementation: slow, one row at a time, with the formulas written out; only the draws are shared."""

import copy
import functools
import itertools
import math
import threading
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tiny import alphas_bar, assert_one_sentence, harden_with, largest_difference, pictures, same_weights, weights

from guardsmith.core.errors import RunFailed
from guardsmith.diffusion.latents import LatentStore
from guardsmith.diffusion.losses import noise_samples, row_losses
from guardsmith.methods import METHODS, Preparation
from guardsmith.methods.apdm import ApdmConfig
from guardsmith.methods.apdm import losses as apdm_losses
from guardsmith.methods.apdm import method as apdm_method
from guardsmith.methods.data import BenignData, SubjectData
from guardsmith.training.loop import UNetCost, generator, load_checkpoint

harden = functools.partial(harden_with, "apdm")
SEED = 7  # whose first two draws pick neither subject's first identifier
TOLERANCE = 1e-5
SMALL = {
    "learning_rate": 1e-3,
    "personalization_learning_rate": 2e-3,
    "outer_steps": 2,
    "inner_steps": 3,
    "batch_size": 2,
    "identifiers": ("sks", "ohwx"),
}


def make_subject(name="mira", noun="person", seed=0, identifiers=()):
    return SubjectData(name, noun, identifiers, pictures(3, seed), pictures(3, seed + 1), pictures(5, seed + 2))


def make_benign():
    return BenignData(pictures(6, 50), [f"a photo of a thing {i}" for i in range(6)])


def context_of(model, prompt, encoder=None):
    """With the model's own text encoder, or with another one that is being trained."""
    tokens = model.tokenizer(
        prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.set_grad_enabled(encoder is not None):
        return (encoder or model.text_encoder)(tokens).last_hidden_state


def posteriors(model, images):
    """One picture at a time through the VAE."""
    with torch.no_grad():
        found = [model.vae.encode(image[None]).latent_dist for image in images]
    scale = model.vae.config.scaling_factor
    return LatentStore(torch.cat([p.mean for p in found]) * scale, torch.cat([p.std for p in found]) * scale)


class SlowRows:
    """What the two implementations share: the order in which latents, timesteps and noise are drawn from a stream."""

    def __init__(self, model, subject, config):
        names = list(config.identifiers) + [n for n in subject.identifiers if n not in config.identifiers]
        images = torch.cat([subject.images, subject.images.flip(-1)]) if config.mirror else subject.images
        self.negatives = posteriors(model, images)
        self.positives = posteriors(
            model, subject.positives if subject.instead_images is None else subject.instead_images
        )
        self.prior = posteriors(model, subject.class_images)
        if config.pairing == "nearest":
            apart = [[float((a - b).square().sum()) for b in self.prior.mean] for a in self.negatives.mean]
            closest = torch.tensor([row.index(min(row)) for row in apart])
            self.positives = LatentStore(self.prior.mean[closest], self.prior.std[closest])
        self.prompts = [f"a photo of {name} {subject.class_noun}" for name in names]
        self.class_prompt = f"a photo of {subject.class_noun}"
        self.instance = [context_of(model, prompt) for prompt in self.prompts]
        self.class_context = context_of(model, self.class_prompt)
        self.config = config

    def personalization(self, context, class_context, rng):
        instance = noise_samples(self.negatives.draw(self.config.batch_size, rng), context, rng)
        latents = self.prior.draw(self.config.batch_size, rng)
        return instance, noise_samples(latents, class_context, rng, timesteps=instance.timesteps)

    def protection(self, context, class_context, rng):
        positive, negative = apdm_losses.draw_pair(self, context, self.config, rng, 1000)
        latents = self.prior.draw(self.config.batch_size, rng)
        return positive, negative, noise_samples(latents, class_context, rng, timesteps=positive.timesteps)


def slow_error(model, unet, rows, i):
    """Squared error of row i alone, from the formulas."""
    bar = float(alphas_bar(model.prediction_type)[int(rows.timesteps[i])])
    a, s = math.sqrt(bar), math.sqrt(1 - bar)
    z, eps = rows.latents[i : i + 1], rows.noise[i : i + 1]
    target = eps if model.prediction_type == "epsilon" else a * eps - s * z
    return (unet(a * z + s * eps, rows.timesteps[i : i + 1], rows.context[i : i + 1]).sample - target) ** 2


def slow_harden(model, subjects, benign, config):
    """Algorithm 1 with a fresh deep copy and a fresh plain AdamW for every path."""
    plain = {"weight_decay": 1e-2, "foreach": False, "fused": False}
    parts = {"unet": model.unet} | ({"text": model.text_encoder} if config.train_text_encoder else {})
    theta = torch.nn.ModuleDict({name: copy.deepcopy(part).requires_grad_(True) for name, part in parts.items()})
    phi = copy.deepcopy(model.unet)
    kept = [
        n
        for n, _ in theta.named_parameters()
        if n.startswith("text.") or config.parameters == "unet" or is_attention(n, config.parameters)
    ]
    outer = torch.optim.AdamW([dict(theta.named_parameters())[n] for n in kept], lr=config.learning_rate, **plain)

    def said(modules, prompt):
        return context_of(model, prompt, modules["text"] if config.train_text_encoder else None)

    prepared = [SlowRows(model, subject, config) for subject in subjects]
    count = config.batch_size
    for j in range(config.outer_steps):
        subject = prepared[j % len(prepared)]
        path = copy.deepcopy(theta)
        inner = torch.optim.AdamW(path.parameters(), lr=config.personalization_learning_rate, **plain)
        total = {name: torch.zeros_like(p) for name, p in theta.named_parameters()}
        prompt = subject.prompts[int(torch.randint(len(subject.prompts), (1,), generator=generator(SEED, j)))]
        for i in range(config.inner_steps):
            rng = generator(SEED, j, i)
            instance, prior = subject.personalization(said(path, prompt), said(path, subject.class_prompt), rng)
            path.zero_grad()
            for k in range(count):
                (slow_error(model, path["unet"], instance, k).mean() / count).backward(retain_graph=True)
                (config.prior_weight * slow_error(model, path["unet"], prior, k).mean() / count).backward(
                    retain_graph=True
                )
            if config.leak:
                for name, p in path.named_parameters():
                    total[name] += p.grad
            inner.step()

            positive, negative, prior = subject.protection(said(path, prompt), said(path, subject.class_prompt), rng)
            plainly = context_of(model, prompt).expand(count, -1, -1)
            path.zero_grad()
            for k in range(count):
                with torch.no_grad():
                    before_positive = slow_error(model, phi, replace(positive, context=plainly), k)
                    before_negative = slow_error(model, phi, replace(negative, context=plainly), k)
                margin = (slow_error(model, path["unet"], positive, k) - before_positive) - (
                    slow_error(model, path["unet"], negative, k) - before_negative
                )
                if config.reduction == "mean":
                    margin = margin.mean()
                # -log sigmoid(-x) = log(1 + e^x), which is x + log(1 + e^-x) where e^x would overflow
                x = config.beta * margin
                loss = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
                (loss.mean() / count).backward(retain_graph=True)
                (config.prior_weight * slow_error(model, path["unet"], prior, k).mean() / count).backward(
                    retain_graph=True
                )
            for name, p in path.named_parameters():
                total[name] += p.grad
        if config.distillation_weight:
            rng = generator(SEED, j, -1)
            store = posteriors(model, benign.images)
            rows = torch.randint(len(store), (4 * count,), generator=rng)
            latents = store.sample(rows, rng)
            context = torch.cat([context_of(model, benign.prompts[r]) for r in rows])
            draws = noise_samples(latents, context, rng)
            theta.zero_grad()
            for k in range(4 * count):
                bar = float(alphas_bar(model.prediction_type)[int(draws.timesteps[k])])
                noisy = math.sqrt(bar) * draws.latents[k : k + 1] + math.sqrt(1 - bar) * draws.noise[k : k + 1]
                given = (noisy, draws.timesteps[k : k + 1])
                with torch.no_grad():
                    wanted = phi(*given, draws.context[k : k + 1]).sample
                found = theta["unet"](*given, said(theta, benign.prompts[rows[k]])).sample
                same = ((found - wanted) ** 2).mean()
                (config.distillation_weight * config.inner_steps * same / (4 * count)).backward()
            for name, p in theta.named_parameters():
                total[name] += p.grad
        for name, p in theta.named_parameters():
            p.grad = total[name] if name in kept else None
        if config.max_grad_norm is not None:
            norm = math.sqrt(sum(float(total[name].double().square().sum()) for name in kept))
            for name in kept:
                total[name] *= min(1.0, config.max_grad_norm / norm)
        outer.step()
    found = weights(theta["unet"])
    return found | ({f"text.{n}": v for n, v in weights(theta["text"]).items()} if config.train_text_encoder else {})


def of(model, config):
    """What `slow_harden` returns, of a model."""
    text = {f"text.{n}": v for n, v in weights(model.text_encoder).items()} if config.train_text_encoder else {}
    return weights(model.unet) | text


def is_attention(name, which):
    return ".attn2." in name or (which == "attention" and ".attn1." in name)


VARIANTS = {
    "paper": {},
    "leak": {"leak": True},
    "element, sharp": {"reduction": "element", "beta": 20.0},
    "random pairs, beta 10, less prior": {"pairing": "random", "beta": 10.0, "prior_weight": 0.3},
    "clipped, distillation": {"max_grad_norm": 0.5, "distillation_weight": 2.0, "prior_weight": 0.0},
    "cross-attention, distillation, leak": {"parameters": "cross_attention", "distillation_weight": 1.0, "leak": True},
    "nearest, mirrored": {"pairing": "nearest", "mirror": True},
    "text encoder": {"train_text_encoder": True},
    "text encoder, distillation, leak": {
        "train_text_encoder": True,
        "distillation_weight": 1.0,
        "leak": True,
        "parameters": "attention",
    },
}
# What is no matter of the parametrization is compared on one of the two only, to save time.
COMPARED = [
    ("paper", "epsilon"),
    ("paper", "v"),
    ("leak", "epsilon"),
    ("leak", "v"),
    ("element, sharp", "epsilon"),
    ("random pairs, beta 10, less prior", "v"),
    ("clipped, distillation", "epsilon"),
    ("cross-attention, distillation, leak", "v"),
    ("nearest, mirrored", "v"),
    ("text encoder", "epsilon"),
    ("text encoder, distillation, leak", "v"),
]


@pytest.fixture
def smooth_adam(monkeypatch):
    """AdamW with an eps that matters. The usual one turns a gradient of 1e-10 into a full step of either sign, so that
    the last bit of a sum decides about a few weights; with this one equal gradients give equal steps.
    """
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))


@pytest.mark.parametrize(("variant", "kind"), COMPARED)
def test_weights_equal_those_of_a_slow_implementation(request, variant, kind, smooth_adam):
    tiny = request.getfixturevalue(f"tiny_{kind}")
    config = ApdmConfig(**SMALL | VARIANTS[variant])
    subjects = [make_subject(), make_subject("tom", "robot", 10, ("hta", "sks"))]
    hardened, _ = harden(tiny, subjects, make_benign(), config, seed=SEED)
    expected = slow_harden(tiny, subjects, make_benign(), config)
    assert largest_difference(of(hardened, config), expected) < TOLERANCE
    assert largest_difference(expected, of(tiny, config)) > 100 * TOLERANCE
    if config.train_text_encoder:
        told = weights(tiny.text_encoder)
        assert largest_difference(weights(hardened.text_encoder), told) > 100 * TOLERANCE


def test_the_way_is_the_same_with_the_real_optimizer_too(tiny_v):
    config = ApdmConfig(**SMALL | {"outer_steps": 1, "inner_steps": 2})
    hardened, _ = harden(tiny_v, [make_subject()], None, config, seed=SEED)
    expected, found = slow_harden(tiny_v, [make_subject()], None, config), weights(hardened.unet)
    before = weights(tiny_v.unet)
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in found)
    moved = sum(float((before[name] - expected[name]).square().sum()) for name in found)
    assert apart < 1e-3 * moved


def test_the_options_matter(tiny_epsilon, smooth_adam):
    """Otherwise the comparison above could pass with options that nobody reads."""
    one_by_one = {
        "paper": {},
        "leak": {"leak": True},
        "element": {"reduction": "element"},
        "beta": {"beta": 10.0},
        "prior": {"prior_weight": 0.3},
        "pairs": {"pairing": "random"},
        "clipped": {"max_grad_norm": 0.5},
        "distillation": {"distillation_weight": 2.0},
        "identifiers": {"identifiers": ("hta",)},
        "path": {"personalization_learning_rate": 4e-3},
        "nearest": {"pairing": "nearest"},
        "mirror": {"mirror": True},
        "text encoder": {"train_text_encoder": True},
    }
    found = {}
    for name, options in one_by_one.items():
        config = ApdmConfig(**SMALL | {"inner_steps": 1} | options)
        found[name] = weights(harden(tiny_epsilon, [make_subject()], make_benign(), config, seed=SEED)[0].unet)
    for first, second in itertools.combinations(found, 2):
        assert largest_difference(found[first], found[second]) > 2 * TOLERANCE, f"{first} = {second}"


@pytest.mark.parametrize("which", ["cross_attention", "attention"])
def test_only_the_chosen_weights_change(tiny_v, which):
    config = ApdmConfig(**SMALL | {"parameters": which})
    hardened, _ = harden(tiny_v, [make_subject()], None, config, seed=SEED)
    before, after = weights(tiny_v.unet), weights(hardened.unet)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_attention(name, which)}


def test_the_base_stays_as_it_was_and_the_result_is_frozen(tiny):
    before = {name: weights(getattr(tiny, name)) for name in ("unet", "vae", "text_encoder")}
    hardened, _ = harden(tiny, [make_subject()], make_benign(), ApdmConfig(**SMALL, distillation_weight=1), seed=SEED)
    for name, part in before.items():
        assert same_weights(part, weights(getattr(tiny, name)))
    assert hardened.unet is not tiny.unet
    assert hardened.vae is tiny.vae
    assert hardened.text_encoder is tiny.text_encoder
    for unet in (tiny.unet, hardened.unet):
        assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
        assert not unet.training


def test_the_seed_decides(tiny_v):
    config = ApdmConfig(**SMALL)
    first, second, other = (
        weights(harden(tiny_v, [make_subject()], None, config, seed=seed)[0].unet) for seed in (1, 1, 2)
    )
    assert same_weights(first, second)
    assert not same_weights(first, other)


def test_two_subjects_take_turns(tiny_v, monkeypatch):
    seen = []
    draw_pair = apdm_losses.draw_pair

    def spy(prepared, *rest):
        seen.append(len(prepared.negatives))
        return draw_pair(prepared, *rest)

    monkeypatch.setattr(apdm_losses, "draw_pair", spy)
    two = SubjectData("two", "person", (), pictures(2), pictures(2, 1), pictures(4, 2))
    config = ApdmConfig(**SMALL | {"outer_steps": 5, "inner_steps": 2})
    harden(tiny_v, [make_subject(), two], None, config, seed=SEED)
    assert seen == [3, 3, 2, 2, 3, 3, 2, 2, 3, 3]


def test_pairs_share_everything_but_the_picture(tiny_v):
    rows = SlowRows(tiny_v, make_subject(), ApdmConfig(**SMALL))
    # Posteriors without spread, so that a latent tells which picture it is.
    rows.negatives = LatentStore(torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 8, 8), torch.zeros(3, 4, 8, 8))
    rows.positives = LatentStore(rows.negatives.mean + 10, rows.negatives.std)
    differ = 0
    for step in range(20):
        for pairing in ("paired", "random"):
            config = ApdmConfig(**SMALL | {"pairing": pairing})
            positive, negative = apdm_losses.draw_pair(rows, rows.instance[0], config, generator(step), 1000)
            for name in ("timesteps", "noise", "context"):
                assert torch.equal(getattr(positive, name), getattr(negative, name))
            matched = torch.equal(positive.latents, negative.latents + 10)
            assert matched or pairing == "random"
            differ += not matched
    assert differ > 10  # of 20 random ones: all but 1 in 9 are expected to


def test_positives_can_be_pictures_of_another_prompt(tiny_v, smooth_adam, tmp_path):
    """Then they take the place of the class pictures, pair by pair, and the method asks for them."""
    config = ApdmConfig(**SMALL | {"positive_prompt": "a photo of {class_noun} in the snow"})
    prompts = []

    def prepared(config):
        preparation = Preparation(
            model=tiny_v, subjects=[make_subject()], benign=None, config=config, seed=0, sampling_steps=2, guidance=1.0,
            cache=tmp_path, draw=lambda prompt: prompts.append(prompt) or pictures(3, 70),
        )  # fmt: skip
        return METHODS["apdm"].prepare(preparation).subjects[0]

    assert prepared(ApdmConfig()).instead_images is None and not prompts
    subject = prepared(config)
    assert prompts == ["a photo of person in the snow"]
    assert torch.equal(subject.instead_images, pictures(3, 70))
    hardened, _ = harden(tiny_v, [subject], None, config, seed=SEED)
    assert largest_difference(weights(hardened.unet), slow_harden(tiny_v, [subject], None, config)) < TOLERANCE
    other, _ = harden(tiny_v, [make_subject()], None, config, seed=SEED)
    assert largest_difference(weights(hardened.unet), weights(other.unet)) > 2 * TOLERANCE


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"positive_prompt": "a photo of {noun}"}, "the only word in braces may be {class_noun}"),
        ({"positive_prompt": "a photo of {class_noun"}, "the only word in braces may be {class_noun}"),
        ({"positive_prompt": "a thing", "pairing": "nearest"}, "leave positive_prompt out"),
    ],
)
def test_wrong_pairs_are_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        ApdmConfig(**wrong)


def test_hardening_moves_the_errors_apart(tiny):
    """What it is for: under the identifier prompt, x+ is denoised better and x- worse than by the base."""
    config = ApdmConfig(**SMALL | {"outer_steps": 24, "inner_steps": 2, "identifiers": ("sks",)})
    hardened, history = harden(tiny, [make_subject()], None, config, seed=SEED)
    rows = SlowRows(tiny, make_subject(), config)
    pairs = apdm_losses.draw_pair(
        rows, rows.instance[0], config.model_copy(update={"batch_size": 200}), generator(1), 1000
    )
    with torch.no_grad():
        gain = [
            (row_losses(tiny.unet, tiny.scheduler, some) - row_losses(hardened.unet, tiny.scheduler, some)).mean()
            for some in pairs
        ]
    assert gain[0] > gain[1] + 0.002
    assert [set(step) for step in history] == [
        {"personalization", "dpo", "prior", "positive_shift", "negative_shift", "saturation", "gradient_norm"}
    ] * 24
    assert all(math.isfinite(value) for step in history for value in step.values())


def test_one_path_costs_two_trained_calls_and_one_of_the_reference(tiny_v):
    config = ApdmConfig(**SMALL)
    with UNetCost() as cost:
        harden(tiny_v, [make_subject()], None, config, seed=SEED)
    rows = config.outer_steps * config.inner_steps * config.batch_size
    assert cost.backwards == 5 * rows  # instance, class; x+, x-, class
    assert cost.forwards == 7 * rows  # and the reference's x+, x-


@pytest.mark.parametrize(
    "options", [{}, {"leak": True, "parameters": "attention"}, {"path": "lora", "personalization_learning_rate": 5e-2}]
)
def test_a_second_thread_changes_nothing_but_the_time(tiny_v, monkeypatch, smooth_adam, options):
    """The protection is taken at the path's point of that step, in another thread, by a model that goes the same way."""
    config = ApdmConfig(**SMALL | {"inner_steps": 4} | options)
    threads = set()
    protection_loss = apdm_method.protection_loss

    def spy(*args):
        threads.add(threading.current_thread())
        return protection_loss(*args)

    monkeypatch.setattr(apdm_method, "protection_loss", spy)
    cores = torch.get_num_threads()
    plain, told = harden(tiny_v, [make_subject()], None, config, seed=SEED)
    assert threads == {threading.main_thread()}
    with UNetCost() as cost:
        both, said = harden(tiny_v, [make_subject()], None, config.model_copy(update={"overlap": True}), seed=SEED)
    assert threading.main_thread() in threads and len(threads) == 1 + config.outer_steps
    rows = config.outer_steps * config.inner_steps * config.batch_size
    assert (cost.forwards, cost.backwards) == (7 * rows, 5 * rows)
    assert largest_difference(weights(plain.unet), weights(both.unet)) < TOLERANCE
    assert largest_difference(weights(tiny_v.unet), weights(both.unet)) > 100 * TOLERANCE
    for first, second in zip(told, said, strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    assert torch.get_num_threads() == cores


def test_a_text_encoder_that_is_trained_stays_in_one_thread():
    with pytest.raises(ValidationError, match="leave overlap or train_text_encoder out"):
        ApdmConfig(overlap=True, train_text_encoder=True)


def test_the_reference_comes_to_the_accelerator_once_a_path_only(tiny_v, monkeypatch):
    """A stand-in for a device: where the U-Net was sent last, and where it was when it was called."""
    config = ApdmConfig(**SMALL | {"distillation_weight": 1.0, "offload_reference": True})
    moved, called = ["cuda"], []
    monkeypatch.setattr(apdm_method, "chosen_device", lambda: "cuda")
    monkeypatch.setattr(tiny_v.unet, "to", lambda place: moved.append(str(place)))

    def note(network, _):
        if network is tiny_v.unet:  # not the copy, which has the hook too
            called.append(moved[-1])

    handle = tiny_v.unet.register_forward_pre_hook(note)
    away, _ = harden(tiny_v, [make_subject()], make_benign(), config, seed=SEED)
    handle.remove()
    assert moved == ["cuda", "cpu"] + ["cuda", "cpu"] * 2 * config.outer_steps + ["cuda"]
    assert set(called) == {"cuda"}
    usual, _ = harden(
        tiny_v, [make_subject()], make_benign(), config.model_copy(update={"offload_reference": False}), seed=SEED
    )
    assert same_weights(weights(away.unet), weights(usual.unet))


class KilledError(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize(("kind", "subjects"), [("epsilon", 1), ("v", 2)])
def test_a_resumed_run_equals_an_unbroken_one(request, tmp_path, kind, subjects):
    tiny = request.getfixturevalue(f"tiny_{kind}")
    data = [make_subject(), make_subject("tom", "robot", 10)][:subjects]
    options = {"outer_steps": 4, "inner_steps": 1, "distillation_weight": 1.0, "leak": True}
    config = ApdmConfig(**SMALL | options | {"train_text_encoder": subjects == 2})
    unbroken, told = harden(tiny, data, make_benign(), config, seed=SEED)
    path = tmp_path / "c" / "last.safetensors"
    shown = []

    def die(step, losses):
        shown.append(step)
        if step == 1:
            raise KilledError

    saving = {"checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(KilledError):
        harden(tiny, data, make_benign(), config, seed=SEED, on_step=die, **saving)
    resumed, history = harden(
        tiny, data, make_benign(), config, seed=SEED, on_step=lambda step, _: shown.append(step), **saving
    )
    assert shown == [0, 1, 1, 2, 3]
    assert same_weights(weights(unbroken.unet), weights(resumed.unet))
    assert same_weights(weights(unbroken.text_encoder), weights(resumed.text_encoder))
    assert history == told
    # A finished run is not trained again.
    again, _ = harden(tiny, data, make_benign(), config, seed=SEED, on_step=die, **saving)
    assert shown == [0, 1, 1, 2, 3]
    assert same_weights(weights(unbroken.unet), weights(again.unet))


def test_only_the_chosen_weights_change_after_a_resume_too(tiny_v, tmp_path):
    config = ApdmConfig(**SMALL | {"parameters": "cross_attention", "outer_steps": 3, "inner_steps": 1})
    unbroken, _ = harden(tiny_v, [make_subject()], None, config, seed=SEED)
    path = tmp_path / "last.safetensors"
    short = config.model_copy(update={"outer_steps": 1})
    harden(tiny_v, [make_subject()], None, short, seed=SEED, checkpoint=path)
    assert len(load_checkpoint(path)[1]["history"]) == 1  # the last step is saved whatever `checkpoint_every` says
    resumed, _ = harden(tiny_v, [make_subject()], None, config, seed=SEED, checkpoint=path)
    assert same_weights(weights(unbroken.unet), weights(resumed.unet))


@pytest.mark.parametrize("rate", ["learning_rate", "personalization_learning_rate"])
def test_a_diverged_run_says_so_and_keeps_the_last_good_checkpoint(tiny, tmp_path, rate):
    path = tmp_path / "last.safetensors"
    good = ApdmConfig(**SMALL | {"outer_steps": 1, "inner_steps": 2})
    harden(tiny, [make_subject()], None, good, seed=SEED, checkpoint=path)
    kept = path.read_bytes()
    bad = good.model_copy(update={"outer_steps": 4, rate: 1e30})
    with pytest.raises(RunFailed) as caught:
        harden(tiny, [make_subject()], None, bad, seed=SEED, checkpoint=path, checkpoint_every=1)
    assert_one_sentence(caught.value)
    assert "diverged" in str(caught.value)
    assert path.read_bytes() == kept


def test_a_single_diverged_step_is_not_handed_over_as_a_result(tiny):
    with pytest.raises(RunFailed):
        harden(tiny, [make_subject()], None, ApdmConfig(**SMALL | {"outer_steps": 1, "learning_rate": 1e30}), seed=SEED)


def test_distillation_without_pictures_is_refused(tiny_v):
    with pytest.raises(ValueError, match="benign"):
        harden(tiny_v, [make_subject()], None, ApdmConfig(**SMALL, distillation_weight=1), seed=SEED)


def test_the_defaults_are_the_papers():
    config = METHODS["apdm"].config()
    assert (config.learning_rate, config.personalization_learning_rate) == (5e-6, 5e-6)
    assert (config.inner_steps, config.outer_steps, config.batch_size, config.beta) == (20, 800, 1, 1.0)
    assert (config.reduction, config.pairing, config.prior_weight, config.leak) == ("mean", "paired", 1.0, False)
    assert (config.distillation_weight, config.max_grad_norm, config.identifiers) == (0, None, ("sks",))


@pytest.mark.parametrize(
    "wrong",
    [{"beta": 0}, {"outer_steps": 0}, {"reduction": "sum"}, {"betta": 1}, {"learning_rate": -1}, {"batch_size": 0}],
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        ApdmConfig(**wrong)


def test_a_path_of_adapters_that_goes_nowhere_is_a_full_path_that_goes_nowhere(tiny_v):
    """The gradients that are collected are those of the weights under the adapters."""
    still = SMALL | {"personalization_learning_rate": 1e-12}
    full, _ = harden(tiny_v, [make_subject()], None, ApdmConfig(**still), seed=SEED)
    lora, _ = harden(tiny_v, [make_subject()], None, ApdmConfig(**still, path="lora"), seed=SEED)
    assert set(weights(lora.unet)) == set(weights(tiny_v.unet)), "released without adapters"
    assert largest_difference(weights(full.unet), weights(lora.unet)) < 2e-5
    assert largest_difference(weights(full.unet), weights(tiny_v.unet)) > 1e-3


def test_a_path_of_adapters_moves_them_and_begins_anew(tiny_v, monkeypatch):
    """Along the path the weights stay as they are, the loss falls, and every path starts where the first did."""
    settings = SMALL | {"personalization_learning_rate": 5e-2, "inner_steps": 4, "path": "lora", "learning_rate": 1e-12}
    losses = []
    real = apdm_method.personalization_loss

    def watched(unet, *rest):
        plain = [p for name, p in unet.named_parameters() if "lora" not in name]
        losses.append(([p.detach().clone() for p in plain], adapters_of(unet)))
        return real(unet, *rest)

    def adapters_of(unet):
        return torch.cat([p.detach().flatten() for name, p in unet.named_parameters() if "lora" in name])

    monkeypatch.setattr(apdm_method, "personalization_loss", watched)
    harden(tiny_v, [make_subject()], None, ApdmConfig(**settings), seed=SEED)
    first, second, again = losses[0], losses[1], losses[4]
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert (second[1] - first[1]).abs().max() > 1e-2
    assert torch.equal(again[1], first[1])


def test_a_path_of_adapters_resumes_to_the_same_weights(tiny_v, tmp_path):
    config = ApdmConfig(**SMALL | {"outer_steps": 3}, path="lora")
    whole, _ = harden(tiny_v, [make_subject()], None, config, seed=SEED)

    def stop(step, _):
        if step == 1:
            raise KeyboardInterrupt

    saved = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        harden(tiny_v, [make_subject()], None, config, seed=SEED, on_step=stop, **saved)
    resumed, _ = harden(tiny_v, [make_subject()], None, config, seed=SEED, **saved)
    assert same_weights(weights(whole.unet), weights(resumed.unet))


def test_a_path_of_adapters_needs_nothing_that_moves_weights():
    for wrong in ({"leak": True}, {"train_text_encoder": True}):
        with pytest.raises(ValidationError, match="leave leak and train_text_encoder out"):
            ApdmConfig(path="lora", **wrong)
