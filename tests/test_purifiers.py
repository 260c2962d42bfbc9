"""Purifiers by hand, the ranges and timesteps they mean, and the red team that uses them."""

import io
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from pydantic import ValidationError
from test_attacks import make_data, same_state, state
from tiny import assert_one_sentence, pictures, same_weights, weights

from guardsmith.attacks import ATTACKS, cdl, purified_cdl
from guardsmith.attacks.cdl import CdlConfig
from guardsmith.attacks.purified_cdl import PurifiedCdlConfig
from guardsmith.cli import app as cli
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures, to_pil
from guardsmith.diffusion.latents import encode
from guardsmith.metrics.perceptual import perceptual_distance, psnr
from guardsmith.models.networks import save_network
from guardsmith.purifiers import PURIFIERS, ddspure, diffpure, gaussian, gridpure, impress, jpeg, tvm
from guardsmith.purifiers.pixel_model import load_pixel_model, taken_back, tiled
from guardsmith.purifiers.restore import Restorer
from guardsmith.registry.loader import load_registry

QUICK = {
    "diffpure": {"timestep": 2, "guidance": 2.0}, "impress": {"steps": 2}, "tvm": {"shrink": 1, "iterations": 25},
    "gridpure": {"rounds": 2, "timestep": 1}, "ddspure": {}, "restore": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def pixel_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels") / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    unet.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    return folder


def some_restorer(file):
    network = Restorer(2, 8, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(network.last.weight, std=0.01)
    save_network(network, network.shape, file, {"steps": 0})
    return file


def purify(name, model, images, seed=0, **params):
    config = PURIFIERS[name].config(**QUICK.get(name, {}) | params)
    return PURIFIERS[name].run(model, images, config, class_noun="person", seed=seed)


@pytest.mark.parametrize("name", PURIFIERS)
def test_every_purifier_keeps_shape_range_model_and_seed(name, tiny_v, pixel_folder):
    images, before = pictures(3), state(tiny_v)
    params = {"pixel_model": str(pixel_folder)} if name in ("gridpure", "ddspure") else {}
    if name == "restore":
        params["restorer"] = str(some_restorer(pixel_folder.parent / "restorer.safetensors"))
    once, again = (purify(name, tiny_v, images, **params) for _ in range(2))
    assert once.shape == images.shape and once.dtype == torch.float32 and not once.requires_grad
    assert float(once.abs().max()) <= 1 and not torch.equal(once, images)
    assert torch.equal(once, again)
    if name not in ("gaussian", "jpeg", "restore"):
        assert not torch.equal(once, purify(name, tiny_v, images, seed=1, **params))
    assert same_state(before, state(tiny_v))


def test_a_blur_by_hand():
    spot = torch.zeros(1, 3, 9, 9)
    spot[:, :, 4, 4] = 1
    seen = gaussian.blurred(spot, 3, 0.8)
    side = 2.718281828 ** (-0.5 / 0.64)
    middle = 1 / (1 + 2 * side)
    assert float(seen[0, 0, 4, 4]) == pytest.approx(middle**2, rel=1e-5)
    assert float(seen[0, 1, 4, 5]) == pytest.approx(middle**2 * side, rel=1e-5)
    assert float(seen.sum()) == pytest.approx(3, rel=1e-5)
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.allclose(gaussian.blurred(flat, 5, 1.1), flat, atol=1e-6), "borders are no darker"
    with pytest.raises(ValueError, match="odd"):
        purify("gaussian", None, flat, kernel=4)
    assert torch.allclose(purify("gaussian", None, spot, kernel=5), gaussian.blurred(spot, 5, 1.1), atol=1e-6)


def test_jpeg_is_pillows():
    images = pictures(2)
    kept = io.BytesIO()
    to_pil(images[1]).save(kept, "JPEG", quality=40)
    with Image.open(kept) as again:
        assert to_pil(purify("jpeg", None, images, quality=40)[1]).tobytes() == again.convert("RGB").tobytes()


def test_total_variation_by_hand_and_its_minimum():
    picture = torch.tensor([[[[0.0, 3.0], [4.0, 3.0]]]])
    # rows: (4, 0) -> 4; columns: (3, -1) -> sqrt(10)
    assert float(tvm.total_variation(picture)) == pytest.approx(4 + 10**0.5, rel=1e-5)
    rng = torch.Generator().manual_seed(0)
    noisy = (pictures(2) + 0.1 * torch.randn(2, 3, 64, 64, generator=rng)).clamp(-1, 1)
    smooth = purify("tvm", None, noisy, iterations=100, weight=0.2, dropped=0)

    def objective(found):
        misfit = ((found - noisy) / 2).square().sum((1, 2, 3)).sqrt()
        return float((misfit + 0.2 * tvm.total_variation(found / 2)).sum())

    assert objective(smooth) < 0.9 * objective(noisy)
    for other in (0.9 * smooth + 0.1 * noisy, smooth + 0.01 * torch.randn(smooth.shape, generator=rng)):
        assert objective(smooth) < objective(other), "it is the minimum"
    small = purify("tvm", None, noisy, shrink=8)
    assert small.shape == noisy.shape, "enlarged again"
    flat = torch.full((1, 3, 16, 16), -0.4)
    assert torch.allclose(purify("tvm", None, flat), flat, atol=1e-3)


def test_dropped_pixels_are_drawn_anew():
    """With the paper's weight the others stay as they are; a dropped one takes the value of its neighbours."""
    flat = torch.full((1, 3, 16, 16), -0.4)
    flat[0, :, 5, 7] = 0.9
    config = tvm.TvmConfig(shrink=1, dropped=0.02)
    dropping = next(
        seed for seed in range(1000)
        if float(torch.rand((1, 1, 16, 16), generator=diffpure.generator(seed))[0, 0, 5, 7]) < 0.02
    )  # fmt: skip
    pure = tvm.purify(None, flat, config, class_noun="", seed=dropping)
    assert torch.allclose(pure, torch.full_like(pure, -0.4), atol=0.02)
    kept = tvm.purify(None, flat, config, class_noun="", seed=dropping + 1)
    assert float(kept[0, 0, 5, 7]) > 0.5


def test_impress_agrees_more_with_its_own_reconstruction(tiny_v):
    images = pictures(2)

    def misfit(pixels):
        with torch.no_grad():
            again = tiny_v.vae.decode(tiny_v.vae.encode(pixels).latent_dist.mean, return_dict=False)[0]
        return float((again - pixels).square().mean())

    config = impress.ImpressConfig(steps=40, learning_rate=0.02, noise=0, weight=0)
    pure = impress.purify(tiny_v, images, config, class_noun="", seed=0)
    assert misfit(pure) < 0.9 * misfit(images)
    tied = impress.ImpressConfig(steps=40, learning_rate=0.02, noise=0, weight=100, allowed=0)
    held = impress.purify(tiny_v, images, tied, class_noun="", seed=0)
    assert float((held - images).abs().mean()) < 0.5 * float((pure - images).abs().mean()), "looks are kept"


def test_diffpure_in_latents_by_hand(tiny_v):
    """One step back from timestep 0 is the prediction of the clean latents, without noise."""
    images = pictures(2)
    store, schedule = encode(tiny_v, images), dict(vars(tiny_v.scheduler))
    pure = purify("diffpure", tiny_v, images, timestep=0, prompt="", guidance=1.0)
    noise = torch.randn(store.mean.shape, generator=diffpure.generator(0))
    zero = torch.zeros(2, dtype=torch.long)
    noisy = tiny_v.scheduler.add_noise(store.mean, noise, zero)
    alpha = tiny_v.scheduler.alphas_cumprod[0]
    with torch.no_grad():
        context = diffpure.PromptBank(tiny_v).encode([""]).expand(2, -1, -1)
        out = tiny_v.unet(noisy, 0, context, return_dict=False)[0]
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * out
        wanted = tiny_v.vae.decode(clean / tiny_v.vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)
    assert torch.allclose(pure, wanted, atol=1e-5)
    assert dict(vars(tiny_v.scheduler)).keys() == schedule.keys()
    assert tiny_v.scheduler.num_inference_steps is None, "the training schedule stays as it was"
    told = purify("diffpure", tiny_v, images, timestep=5, prompt="a photo of {class_noun}")
    assert not torch.equal(told, purify("diffpure", tiny_v, images, timestep=5, prompt="a photo of robot"))


def test_a_pixel_model_takes_back_what_it_was_given(pixel_folder):
    model = load_pixel_model(str(pixel_folder))
    images = pictures(2)[:, :, :32, :32]
    pure = taken_back(model, images, 0, seed=3)
    noise = torch.randn(images.shape, generator=diffpure.generator(3))
    noisy = model.scheduler.add_noise(images, noise, torch.zeros(2, dtype=torch.long))
    alpha = model.scheduler.alphas_cumprod[0]
    with torch.no_grad():
        out = model.unet(noisy, 0, return_dict=False)[0]
    assert torch.allclose(pure, ((noisy - (1 - alpha).sqrt() * out) / alpha.sqrt()).clamp(-1, 1), atol=1e-5)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        taken_back(model, images * 127, 0, seed=3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (70, 45), (64, 100), (20, 50)])
def test_tiles_cover_everything_and_are_averaged(pixel_folder, height, width):
    model, seen = load_pixel_model(str(pixel_folder)), []
    images = pictures(1)[:, :, :1, :1].expand(1, 3, height, width) * 0 + torch.linspace(-1, 1, width)

    def work(tiles):
        seen.append(tiles.shape)
        return tiles

    found = tiled(model, images, work, stride=0.5)
    assert torch.allclose(found, images, atol=0.02 if min(height, width) < 32 else 1e-6)
    assert set(seen) == {torch.Size([1, 3, 32, 32])}
    numbered = iter(range(1000))
    values = tiled(model, torch.zeros(1, 3, 32, 48), lambda tiles: tiles + next(numbered), stride=0.5)[0, 0, 0]
    assert values.tolist() == [0.0] * 16 + [0.5] * 16 + [1.0] * 16


def test_gridpure_mixes_in_a_share_of_what_was_before(pixel_folder, monkeypatch):
    monkeypatch.setattr(gridpure, "taken_back", lambda model, tiles, timestep, seed: torch.zeros_like(tiles))
    images = pictures(1)
    pure = purify("gridpure", None, images, rounds=3, share=0.1, pixel_model=str(pixel_folder))
    assert torch.allclose(pure, images * 0.001, atol=1e-6)


def test_the_timestep_of_a_budget_by_hand():
    bar = DDPMScheduler().alphas_cumprod
    sigma = 2 * 11 / 255
    chosen = ddspure.timestep_of(bar, sigma)
    ratio = ((1 - bar) / bar).sqrt()
    assert ratio[chosen - 1] < sigma < ratio[chosen + 1]
    assert 20 <= chosen <= 24, "the specification's estimate for [-1, 1]"


def test_a_pixel_model_that_cannot_be_had_is_one_sentence(tmp_path, pixel_folder):
    for wrong in (str(tmp_path), "no/such-model"):
        with pytest.raises(UserError, match="cannot be read") as caught:
            load_pixel_model(wrong)
        assert_one_sentence(caught.value)
    for kind, config in (("gridpure", gridpure.GridPureConfig), ("ddspure", ddspure.DdsPureConfig)):
        with pytest.raises(UserError):
            purify(kind, None, pictures(1), pixel_model="no/such-model")
        assert config().pixel_model.count("/") == 1


def test_a_restorer_begins_as_an_enlargement_and_learns_to_do_better(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, network = pictures(4), Restorer(2, 8, 1)
    small = network.shrunk(images)
    assert small.shape == (4, 3, 32, 32)
    plain = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
    assert torch.equal(network(small), plain)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (network(small) - images).abs().mean().backward()
        optimizer.step()
    found = network(small).detach()
    assert float((found - images).abs().mean()) < 0.98 * float((plain - images).abs().mean())
    save_network(network, network.shape, tmp_path / "r.safetensors", {})
    found = purify("restore", None, images, restorer=str(tmp_path / "r.safetensors"))
    assert torch.allclose(found, network(small).detach().clamp(-1, 1), atol=5e-3), "half precision"


def test_a_restoration_that_cannot_be_had_is_one_sentence(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    for params, said in (
        ({"restorer": "nowhere"}, "there is no restorer"), ({"restorer": str(tmp_path / "x.safetensors")}, "is no restorer"),
        ({"restorer": None}, "name one"), ({"upscaler": "no/such-model"}, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            purify("restore", None, pictures(1), **params)
        assert_one_sentence(caught.value)


def test_looks_by_hand(tiny_v):
    images = pictures(2)
    assert torch.equal(perceptual_distance(tiny_v, images, images), torch.zeros(2))
    near, far = images + 0.02 * pictures(2, 5), images + 0.3 * pictures(2, 5)
    assert bool((perceptual_distance(tiny_v, images, near) < perceptual_distance(tiny_v, images, far)).all())
    assert torch.allclose(perceptual_distance(tiny_v, images, far), perceptual_distance(tiny_v, far, images))
    assert psnr(images, images + 0.02).tolist() == pytest.approx([40.0, 40.0], rel=1e-4)


# The red team.


def test_the_attack_is_cdl_on_purified_pictures(tiny_v):
    data = make_data()
    params = {"steps": 3, "learning_rate": 1e-3}
    pure = jpeg.purify(tiny_v, data.images, jpeg.JpegConfig(quality=20), class_noun="person", seed=0)
    wanted, _ = cdl.attack(tiny_v, purified_cdl.replace(data, images=pure), CdlConfig(**params), seed=0)
    config = PurifiedCdlConfig(**params, purifier="jpeg", purifier_params={"quality": 20})
    found, _ = purified_cdl.attack(tiny_v, data, config, seed=0)
    assert same_weights(weights(wanted.unet), weights(found.unet))
    plain, _ = cdl.attack(tiny_v, data, CdlConfig(**params), seed=0)
    assert not same_weights(weights(plain.unet), weights(found.unet))
    assert ATTACKS["purified_cdl"].prompts("sks", "person", 1) == ["a photo of sks person, without bhj noisy pattern"]
    with pytest.raises(ValidationError, match="there is no purifier 'jpg'"):
        PurifiedCdlConfig(purifier="jpg")


@pytest.fixture
def photos(tmp_path, v_folder):
    for folder, seed in (("given", 0), ("others", 9)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(pictures(2, seed)):
            to_pil(image).save(tmp_path / folder / f"{i}.png")
    recipe = {
        "base": str(v_folder), "sampling": {"steps": 2, "guidance": 1.5},
        "verify": {"attacks": {"dreambooth": {"name": "dreambooth", "params": {"steps": 2, "learning_rate": 1e-3}},
                               "lora": {"name": "lora"}}},
        "purifiers": {"weak": {"name": "jpeg", "params": {"quality": 90}}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def asked(photos, *more, references="others"):
    return ["redteam", str(photos / "given"), "--references", str(photos / references), "--class-noun", "person", "--output",
            str(photos / "out"), "--recipe", str(photos / "recipe.yaml"), "--judge", "avatar", "--class-images", "2",
            "--count", "3", "--purifier", "weak", *map(str, more)]  # fmt: skip


def test_the_command_runs_three_attackers(photos, capsys):
    assert cli.main(asked(photos, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["attackers"]) == ["dreambooth", "purified-dreambooth", "purified-cdl"]
    for name, row in told["attackers"].items():
        assert len(row["scores"]) == 3 and row["low"] <= row["similarity"] <= row["high"]
        assert len(list((photos / "out" / name).glob("*.png"))) == 3
    assert (told["purifier"], told["purifier_params"]) == ("jpeg", {"quality": 90})
    assert len(list((photos / "out" / "purified").glob("*.png"))) == 2
    assert json.loads((photos / "out" / "redteam.json").read_text()) == told
    assert str(photos) not in json.dumps(told["pictures"])
    with Image.open(photos / "out" / "grid.png") as page:
        assert page.height == 6 * 128


def test_the_command_refuses_in_one_sentence(photos, capsys):
    for more, said in (
        (["--purifier", "strong"], "there is no purifier 'strong'"),
        (["--judge", "mother"], "there is no judge 'mother'"),
        (["--attack", "lora"], "name a DreamBooth attack"),
        (["--attack", "dreamboth"], "--attack dreamboth: the recipe has"),
        (["--set", "purifiers.weak.params.quality=900"], "quality"),
    ):
        assert cli.main(asked(photos, *more)) == 2, more
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told
        assert not (photos / "out").exists()
    for references, said in (("given", "is a reference and trained on"), ("nowhere", "does not exist")):
        assert cli.main(asked(photos, references=references)) == 2
        assert said in capsys.readouterr().err


def test_the_embedded_pixel_model_takes_noise_out_of_avatars_that_it_never_saw():
    """A tile of each of some subjects' pictures, with 16 of 255 added or taken at random."""
    subjects = load_registry(Path(__file__).parent.parent / "registries" / "avatars.yaml").subjects[:3]
    clean = open_pictures([who.images_of("reference")[0].path for who in subjects], 64)[:, :, 12:44, 16:48]
    signs = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = (clean + 16 * 2 / 255 * signs).clamp(-1, 1)
    pure = purify("ddspure", None, noisy, budget=16, pixel_model="builtin:avatar")
    assert psnr(clean, pure).mean() > psnr(clean, noisy).mean() + 3
    assert psnr(clean, purify("gridpure", None, clean, pixel_model="builtin:avatar")).mean() > 25, "clean ones stay"
