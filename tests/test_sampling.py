import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny import alphas_bar

from guardsmith.diffusion.prompts import PromptBank
from guardsmith.diffusion.sampling import generate, grid
from guardsmith.diffusion.states import StateRecorder
from guardsmith.training.loop import UNetCost, generator

PROMPTS = ["a photo of sks person", "a photo of person", "", "zwx"]
SEEDS = [3, 1, 4, 1]


class Oracle:
    """A U-Net that knows where to go: its prediction always points to one clean latent, chosen by the context."""

    def __init__(self, model, choose):
        self.kind, self.bar, self.choose = model.prediction_type, alphas_bar(model.prediction_type), choose
        self.config = SimpleNamespace(sample_size=8, in_channels=4)
        self.batches = []

    def __call__(self, noisy, t, context, return_dict=True):
        self.batches.append(len(noisy))
        a, s = self.bar[int(t)].sqrt(), (1 - self.bar[int(t)]).sqrt()
        clean = self.choose(context).double()
        if self.kind == "epsilon":
            return (((noisy.double() - a * clean) / s).float(),)
        return (((a * noisy.double() - clean) / s).float(),)


def decode(model, latents):
    with torch.no_grad():
        return model.vae.decode(latents / model.vae.config.scaling_factor).sample.clamp(-1, 1)


@pytest.mark.parametrize("guidance", [1, 5.0])
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_the_sampler_arrives_where_the_unet_points(tiny, steps, guidance):
    wanted = torch.randn((1, 4, 8, 8), generator=generator(0))
    oracle = Oracle(tiny, lambda context: wanted.expand(len(context), -1, -1, -1))
    model = dataclasses.replace(tiny, unet=oracle)
    images = generate(model, ["a", "b"], [0, 1], steps=steps, guidance=guidance)
    assert torch.allclose(images, decode(tiny, wanted).expand(2, -1, -1, -1), atol=2e-3)
    assert oracle.batches == [2 if guidance == 1 else 4] * steps


def test_guidance_goes_beyond_the_prompt_away_from_the_negative_one(tiny):
    """Both parametrizations are affine in the clean latent, so guidance acts on it: without + g (with - without)."""
    rng = generator(0)
    plain, negative, asked = torch.randn((3, 1, 4, 8, 8), generator=rng) / 4
    bank = PromptBank(tiny)
    known = {"": plain, "ugly": negative, "sks": asked}

    def choose(context):
        return torch.cat([next(known[p] for p in known if torch.equal(bank.encode([p])[0], row)) for row in context])

    model = dataclasses.replace(tiny, unet=Oracle(tiny, choose))
    for other, options in ((plain, {}), (negative, {"negative_prompt": "ugly"})):
        images = generate(model, ["sks"], [0], steps=5, guidance=3.0, **options)
        assert torch.allclose(images, decode(tiny, other + 3 * (asked - other)), atol=2e-3)
    images = generate(model, ["sks"], [0], steps=5, guidance=1, negative_prompt="ugly")
    assert torch.allclose(images, decode(tiny, asked), atol=2e-3)


def test_without_guidance_only_the_conditional_prediction_is_made(tiny):
    """The same pictures from a loop of its own, one picture at a time."""
    with UNetCost() as cost:
        found = generate(tiny, PROMPTS[:2], SEEDS[:2], steps=3, guidance=1)
    assert (cost.forwards, cost.backwards) == (6, 0)
    for prompt, seed, image in zip(PROMPTS, SEEDS, found, strict=False):
        context = PromptBank(tiny).encode([prompt])
        solver = DPMSolverMultistepScheduler.from_config(tiny.scheduler.config, timestep_spacing="trailing")
        solver.set_timesteps(3)
        latents = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))[None]
        with torch.no_grad():
            for t in solver.timesteps:
                latents = solver.step(tiny.unet(latents, t, context).sample, t, latents).prev_sample
        assert torch.allclose(image, decode(tiny, latents)[0], atol=1e-4)


def test_guided_by_its_own_prompt_nothing_changes(tiny):
    first = generate(tiny, ["sks"], [0], steps=3, guidance=1)
    second = generate(tiny, ["sks"], [0], steps=3, guidance=6.0, negative_prompt="sks")
    assert torch.allclose(first, second, atol=1e-3)


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(tiny):
    together = generate(tiny, PROMPTS, SEEDS, steps=4, batch=4)
    for batch in (1, 3):
        assert torch.allclose(together, generate(tiny, PROMPTS, SEEDS, steps=4, batch=batch), atol=1e-4)
    alone = generate(tiny, PROMPTS[2:3], SEEDS[2:3], steps=4)
    assert torch.allclose(together[2:3], alone, atol=1e-4)
    assert together.shape == (4, 3, 64, 64)
    assert together.dtype == torch.float32
    assert together.abs().max() <= 1


def test_seeds_and_prompts_matter(tiny_v):
    first, second, third = generate(tiny_v, ["sks", "sks", "person"], [0, 1, 0], steps=3)
    assert (first - second).abs().max() > 0.01
    assert (first - third).abs().max() > 1e-4
    again = generate(tiny_v, ["sks"], range(1), steps=3)
    assert torch.allclose(again[0], first, atol=1e-4)


def test_the_global_generator_is_not_used(tiny_v):
    torch.manual_seed(0)
    first = generate(tiny_v, ["sks"], [0], steps=2)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(first, generate(tiny_v, ["sks"], [0], steps=2))
    assert torch.equal(torch.rand(1), expected)


def test_every_step_is_told_and_may_interrupt(tiny_v):
    told = []
    generate(tiny_v, PROMPTS, SEEDS, steps=3, batch=3, on_step=lambda: told.append(1))
    assert len(told) == 2 * 3

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny_v, ["a"], [0], steps=2, on_step=interrupt)


def test_the_recorder_keeps_every_step_of_every_picture_in_order(tiny_v):
    recorder = StateRecorder()
    assert recorder.states() is None
    plain = generate(tiny_v, PROMPTS, SEEDS, steps=4, batch=3)
    assert torch.equal(generate(tiny_v, PROMPTS, SEEDS, steps=4, batch=3, on_state=recorder), plain)
    states = recorder.states()
    assert states.latents.shape == (4, 4, 4, 8, 8)
    assert states.timesteps.tolist() == [999, 749, 499, 249]  # trailing spacing
    for picture, seed in enumerate(SEEDS):
        assert torch.equal(states.latents[picture, 0], torch.randn((4, 8, 8), generator=generator_of(seed)))
    assert not torch.equal(states.latents[:, 1], states.latents[:, 0])


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def test_a_grid_has_rows_of_pictures_on_white():
    images = torch.full((3, 3, 4, 4), -1.0)
    images[1] = 1
    images[2, 0] = 1  # red
    sheet = grid(images, 2, scale=3)
    assert sheet.size == (24, 24)
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    assert sheet.getpixel((13, 0)) == (255, 255, 255)
    assert sheet.getpixel((11, 23)) == (255, 0, 0)
    assert sheet.getpixel((12, 12)) == (255, 255, 255)  # nothing there
    assert grid(images, 3).size == (12, 4)
