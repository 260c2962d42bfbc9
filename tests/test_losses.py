import math

import pytest
import torch
from tiny import TOKENS, WIDTH, alphas_bar, largest_difference, weights

from guardsmith.diffusion.losses import (
    NoisedSamples,
    add_noise,
    dpo_loss,
    dpo_saturation,
    join,
    noise_samples,
    own_target,
    predict,
    row_losses,
    squared_errors,
)
from guardsmith.models.checkpoint import with_own_unet
from guardsmith.training.loop import generator


def random_rows(count, seed=0, timesteps=None):
    rng = generator(seed)
    latents = torch.randn((count, 4, 8, 8), generator=rng)
    context = torch.randn((count, TOKENS, WIDTH), generator=rng)
    return noise_samples(latents, context, rng, timesteps=timesteps)


def random_errors(count=3, seed=0):
    """Four maps of squared errors: positive, negative, and the reference's two."""
    return torch.rand((4, count, 4, 8, 8), generator=generator(seed), dtype=torch.float64)


class PerfectUNet:
    """Knows the clean latents and returns the true noise or velocity, worked out from the noisy latents."""

    def __init__(self, kind, clean):
        self.kind, self.clean, self.bar = kind, clean, alphas_bar(kind)

    def __call__(self, noisy, timesteps, context, return_dict=True):
        a = self.bar[timesteps].sqrt()[:, None, None, None]
        s = (1 - self.bar[timesteps]).sqrt()[:, None, None, None]
        noise = (noisy.double() - a * self.clean) / s
        return ((noise if self.kind == "epsilon" else a * noise - s * self.clean).float(),)


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_noisy_latents_and_targets_are_those_of_the_formulas(tiny, t):
    bar = float(alphas_bar(tiny.prediction_type)[t])
    z, eps = torch.full((1, 4, 8, 8), 0.6), torch.full((1, 4, 8, 8), -1.5)
    noisy = add_noise(tiny.scheduler, z, eps, torch.tensor([t]))
    expected = math.sqrt(bar) * 0.6 + math.sqrt(1 - bar) * -1.5
    assert torch.allclose(noisy, torch.full_like(noisy, expected), atol=1e-5)
    target = own_target(tiny.scheduler, z, eps, torch.tensor([t]))
    expected = -1.5 if tiny.prediction_type == "epsilon" else math.sqrt(bar) * -1.5 - math.sqrt(1 - bar) * 0.6
    assert torch.allclose(target, torch.full_like(target, expected), atol=1e-5)


def test_targets_at_the_ends_of_the_schedules(tiny_epsilon, tiny_v):
    # Computed by hand: SD1's first beta is 0.00085; the cosine schedule ends with the beta that is capped at 0.999.
    assert float(tiny_epsilon.scheduler.alphas_cumprod[0]) == pytest.approx(0.99915, abs=1e-6)
    z, eps, last = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([999])
    assert float(tiny_v.scheduler.alphas_cumprod[999]) < 1e-8
    assert torch.allclose(own_target(tiny_v.scheduler, z, eps, last), -z, atol=1e-6)
    assert torch.allclose(own_target(tiny_epsilon.scheduler, z, eps, last), eps)


def test_an_unknown_prediction_type_has_no_target(tiny_epsilon):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="sample"):
        own_target(scheduler, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([0]))


def test_a_perfect_network_has_no_loss(tiny):
    rows = random_rows(6, timesteps=torch.tensor([20, 100, 300, 500, 700, 900]))
    losses = row_losses(PerfectUNet(tiny.prediction_type, rows.latents.double()), tiny.scheduler, rows)
    assert losses.max() < 1e-6


def test_a_network_of_the_other_parametrization_has_a_loss(tiny):
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[tiny.prediction_type]
    rows = random_rows(2, timesteps=torch.tensor([300, 700]))
    stub = PerfectUNet(tiny.prediction_type, rows.latents.double())
    stub.kind = other
    assert row_losses(stub, tiny.scheduler, rows).min() > 0.1


def test_losses_of_a_batch_equal_those_of_its_rows_one_by_one(tiny):
    rows = random_rows(4)
    with torch.no_grad():
        errors, losses = squared_errors(tiny.unet, tiny.scheduler, rows), row_losses(tiny.unet, tiny.scheduler, rows)
    assert errors.shape == (4, 4, 8, 8)
    assert losses.shape == (4,)
    bar = alphas_bar(tiny.prediction_type).float()
    for i, t in enumerate(rows.timesteps.tolist()):
        a, s = bar[t].sqrt(), (1 - bar[t]).sqrt()
        z, eps = rows.latents[i], rows.noise[i]
        with torch.no_grad():
            out = tiny.unet((a * z + s * eps)[None], t, rows.context[i : i + 1]).sample[0]
        expected = (out - (eps if tiny.prediction_type == "epsilon" else a * eps - s * z)) ** 2
        assert torch.allclose(errors[i], expected, atol=1e-4)
        assert float(losses[i]) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_rows_with_a_target_of_their_own_are_compared_with_it(tiny):
    rows = random_rows(2)
    with torch.no_grad():
        own = predict(tiny.unet, tiny.scheduler, rows)
        same = NoisedSamples(rows.latents, rows.timesteps, rows.noise, rows.context, own)
        shifted = NoisedSamples(rows.latents, rows.timesteps, rows.noise, rows.context, own + 2)
        assert row_losses(tiny.unet, tiny.scheduler, same).max() == 0
        assert torch.allclose(row_losses(tiny.unet, tiny.scheduler, shifted), torch.tensor(4.0))


def test_join_keeps_the_order_and_refuses_mixed_targets():
    first, second = random_rows(2), random_rows(3, seed=1)
    both = join(first, second)
    assert len(both) == 5
    for name in ("latents", "timesteps", "noise", "context"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(first, name), getattr(second, name)]))
    assert both.target is None
    with_target = NoisedSamples(first.latents, first.timesteps, first.noise, first.context, first.noise)
    assert torch.equal(join(with_target, with_target).target, torch.cat([first.noise, first.noise]))
    with pytest.raises(ValueError, match="target"):
        join(with_target, second)
    with pytest.raises(ValueError, match="target"):
        join(second, with_target)


def test_drawn_rows_cover_all_timesteps_and_share_a_single_context():
    rows = noise_samples(torch.zeros(4000, 1, 2, 2), torch.zeros(1, 2, 3), generator(0))
    assert rows.context.shape == (4000, 2, 3)
    assert rows.timesteps.min() >= 0
    assert rows.timesteps.max() <= 999
    assert rows.timesteps.unique().numel() > 950  # of 1000: 1000 (1 - e^-4) = 982 are expected
    assert abs(float(rows.noise.mean())) < 0.03
    assert float(rows.noise.std()) == pytest.approx(1, abs=0.03)
    few = noise_samples(torch.zeros(200, 1, 2, 2), torch.zeros(1, 2, 3), generator(0), steps=10)
    assert set(few.timesteps.tolist()) == set(range(10))


@pytest.mark.parametrize("beta", [0.3, 1.0, 25.0])
def test_dpo_loss_is_that_of_the_formula(beta):
    positive, negative, before_positive, before_negative = errors = random_errors()
    by_row, by_element = [], []
    for i in range(3):
        d = ((positive - before_positive) - (negative - before_negative))[i].flatten().tolist()
        by_row.append(math.log(1 + math.exp(beta * sum(d) / len(d))))
        by_element += [math.log(1 + math.exp(beta * one)) for one in d]
    assert float(dpo_loss(*errors, beta=beta, reduction="mean")) == pytest.approx(sum(by_row) / 3, rel=1e-9)
    assert float(dpo_loss(*errors, beta=beta, reduction="element")) == pytest.approx(sum(by_element) / 768, rel=1e-9)


def test_dpo_of_hand_made_numbers():
    one = torch.ones(1, 1, 1, 2)
    # r+ = 3 - 1 = 2 and r- = 1 - 1.5 = -0.5, so the margin is 2.5 everywhere.
    for reduction in ("mean", "element"):
        loss = dpo_loss(3 * one, one, one, 1.5 * one, beta=2, reduction=reduction)
        assert float(loss) == pytest.approx(-math.log(1 / (1 + math.exp(5))), rel=1e-6)
        weight = dpo_saturation(3 * one, one, one, 1.5 * one, beta=2, reduction=reduction)
        assert weight == pytest.approx(1 / (1 + math.exp(-5)), rel=1e-6)
    # Where the elements differ the two reductions differ: margins 4 and 0, mean 2.
    positive = torch.tensor([[[[4.0, 0.0]]]])
    zero = torch.zeros_like(positive)
    mean = dpo_loss(positive, zero, zero, zero, beta=1, reduction="mean")
    element = dpo_loss(positive, zero, zero, zero, beta=1, reduction="element")
    assert float(mean) == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)
    assert float(element) == pytest.approx((math.log(1 + math.exp(4)) + math.log(2)) / 2, rel=1e-6)


def test_dpo_starts_at_log_two_and_half_weight():
    errors = random_errors()[:2]
    for reduction in ("mean", "element"):
        assert float(dpo_loss(*errors, *errors, beta=7, reduction=reduction)) == pytest.approx(math.log(2))
        assert dpo_saturation(*errors, *errors, beta=7, reduction=reduction) == pytest.approx(0.5)


def test_dpo_stays_finite_where_exp_would_overflow():
    one = torch.ones(1, 1, 2, 2, requires_grad=True)
    loss = dpo_loss(one * 1e4, one.detach(), one.detach(), one.detach(), beta=100, reduction="mean")
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert torch.isfinite(one.grad).all()


@pytest.mark.parametrize("reduction", ["mean", "element"])
@pytest.mark.parametrize("beta", [1.0, 30.0])
def test_dpo_gradient_is_beta_times_the_weighted_gradient_of_the_margin(reduction, beta):
    # grad L = beta * mean_k sigma(beta d_k) grad d_k, through a stand-in for a network with 5 weights.
    weight = torch.randn(5, generator=generator(1), dtype=torch.float64, requires_grad=True)
    basis = torch.randn((5, 2, 3, 1, 4, 4), generator=generator(2), dtype=torch.float64) / 4
    before = torch.rand((2, 3, 1, 4, 4), generator=generator(3), dtype=torch.float64)

    def margin():
        now = torch.einsum("p,p...->...", weight, basis).square()
        return now, (now[0] - before[0]) - (now[1] - before[1])

    now, d = margin()
    (found,) = torch.autograd.grad(dpo_loss(*now, *before, beta=beta, reduction=reduction), weight)
    _, d = margin()
    d = d.mean(dim=(1, 2, 3)) if reduction == "mean" else d.flatten()
    expected = torch.zeros_like(weight)
    for k in range(len(d)):
        (slope,) = torch.autograd.grad(d[k], weight, retain_graph=True)
        expected += beta / (1 + math.exp(-beta * float(d[k].detach()))) * slope / len(d)
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "element"])
def test_descending_dpo_helps_the_positive_and_hurts_the_negative(tiny, reduction):
    own = with_own_unet(tiny)
    unet = own.unet.requires_grad_(True)
    positive, negative = random_rows(2), random_rows(2, seed=1)
    negative = NoisedSamples(negative.latents, positive.timesteps, positive.noise, positive.context)
    with torch.no_grad():
        before = [squared_errors(tiny.unet, tiny.scheduler, rows) for rows in (positive, negative)]
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.02)
    for _ in range(10):
        now = [squared_errors(unet, tiny.scheduler, rows) for rows in (positive, negative)]
        loss = dpo_loss(*now, *before, beta=1, reduction=reduction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = [row_losses(unet, tiny.scheduler, rows).mean() for rows in (positive, negative)]
    assert after[0] < before[0].mean() - 1e-3
    assert after[1] > before[1].mean() + 1e-3
    assert largest_difference(weights(unet), weights(tiny.unet)) > 0
