"""The embedded world: what every claim stands on."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from guardsmith.core.images import open_image, to_tensor
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import UNSEEN_IDENTIFIERS, benign_prompts, lost_words
from guardsmith.diffusion.sampling import generate
from guardsmith.gate.calibration import calibration
from guardsmith.metrics import fidelity, identity
from guardsmith.metrics.kid import kid
from guardsmith.models.checkpoint import BUILTIN, builtin_path, load_model
from guardsmith.registry.loader import load_registry

ROOT = Path(__file__).parent.parent
SAMPLING = {"steps": 20, "guidance": 3.0, "batch": 32}


@pytest.fixture(scope="module")
def model():
    return load_model("builtin:avatar")


@pytest.fixture(scope="module")
def registry():
    return load_registry(ROOT / "registries" / "avatars.yaml")


def pictures(subject, split):
    return to_tensor([open_image(image.path) for image in subject.images_of(split)])


def test_it_is_a_stable_diffusion_folder_in_half_precision_safetensors():
    folder = builtin_path("avatar")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    parts = [
        type(getattr(pipeline, name)).__name__ for name in ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    ]
    assert parts == ["CLIPTokenizer", "CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL", "DDPMScheduler"]
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            assert {str(weights.get_tensor(k).dtype) for k in weights.keys()} <= {"torch.float16", "torch.int64"}  # noqa: SIM118
    assert not [f for f in BUILTIN.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_it_is_small_enough_to_ship():
    assert sum(f.stat().st_size for f in BUILTIN.rglob("*") if f.is_file()) <= 64 * 2**20


def test_credits_lie_beside_the_weights():
    text = (builtin_path("avatar") / "LICENSE.md").read_text()
    for designer in ("Pablo Stanley", "Micah Lanier", "Draftbit", "Johan Melin"):
        assert designer in text
    assert text == (ROOT / "docs" / "credits.md").read_text()


def test_the_schedule_ends_in_pure_noise(model):
    assert model.prediction_type == "v_prediction"
    assert float(model.scheduler.alphas_cumprod[-1]) < 1e-6


def test_latents_have_unit_variance(model, registry):
    stores = [encode(model, pictures(subject, "reference")) for subject in registry.subjects]
    assert 0.7 < float(torch.cat([s.mean for s in stores]).std()) < 1.3


def test_the_vae_keeps_pictures_it_never_saw(model, registry):
    real = torch.cat([pictures(subject, "reference") for subject in (*registry.subjects, *registry.controls)])
    with torch.no_grad():
        out = model.vae.decode(model.vae.encode(real).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (out - real).square().mean(dim=(1, 2, 3)))
    assert float(psnr.mean()) > 28


def test_pictures_show_what_prompts_ask_for(model):
    asked = benign_prompts(model, ("a photo of a {}",), 32, seed=3)
    images = generate(model, [p.text for p in asked], range(900, 932), **SAMPLING)
    scores = fidelity.fidelity(images, [p.traits for p in asked])
    assert sum(s for s in scores if s is not None) / 32 > 0.75
    swapped = fidelity.fidelity(
        images, [p.traits for p in asked[1:] + asked[:1]]
    )  # the right answer of another picture
    assert sum(scores) > 1.5 * sum(swapped)


def test_unseen_identifiers_reach_the_model(model):
    assert lost_words(model, UNSEEN_IDENTIFIERS) == []


def test_identity_tells_subjects_apart_also_through_the_vae(model, registry):
    everyone = (*registry.subjects, *registry.controls)
    for subject in everyone:
        references = pictures(subject, "reference")
        attack = pictures(subject, "attack")
        with torch.no_grad():
            softened = model.vae.decode(model.vae.encode(attack).latent_dist.mode()).sample.clamp(-1, 1)
        others = torch.cat(
            [pictures(o, "attack") for o in everyone if o.class_noun == subject.class_noun and o != subject]
        )
        for own in (attack, softened):
            assert min(identity.similarity(own, references)) > max(identity.similarity(others, references)) - 0.1
            mean_own = sum(identity.similarity(own, references)) / len(own)
            assert mean_own > calibration()[subject.class_noun].chance_high


def test_a_picture_that_is_not_finite_is_not_scored(registry):
    references = pictures(registry.subjects[0], "reference")
    broken = references[:2].clone()
    broken[0, 0, 0, 0] = float("nan")
    scores = identity.similarity(broken, references)
    assert scores[0] is None
    assert scores[1] > 0.5
    assert fidelity.fidelity(broken, [{"class": "person"}] * 2)[0] is None


def test_noise_and_flat_pictures_are_nobody(registry):
    flat = torch.full((1, 3, 64, 64), 0.3)
    noise = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    for subject in registry.subjects:
        limit = calibration()[subject.class_noun].genuine / 2
        assert all(s < limit for s in identity.similarity(torch.cat([flat, noise]), pictures(subject, "reference")))


def test_traits_are_read_off_real_pictures(registry):
    for subject in registry.subjects:
        seen = fidelity.read_traits(pictures(subject, "reference"))
        assert [s["class"] for s in seen] == [subject.class_noun] * len(seen)


def test_kid_tells_avatars_from_noise(registry):
    people = torch.cat([pictures(s, "reference") for s in (*registry.subjects, *registry.controls)])
    half, rest = fidelity.features(people[::2]), fidelity.features(people[1::2])
    noise = fidelity.features(torch.rand(people[::2].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert kid(half, rest) * 10 < kid(half, noise)


def test_calibration_is_dated_and_ordered():
    told = json.loads((BUILTIN / "judges" / "calibration.json").read_text())
    assert told["date"]
    for levels in calibration().values():
        assert levels.chance < levels.chance_high < levels.genuine
