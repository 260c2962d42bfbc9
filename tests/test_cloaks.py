"""Cloaks: the step they share, by hand; what each is meant to do to a small model; and the command on pictures of any shape."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from test_attacks import make_data, same_state, state
from tiny import assert_one_sentence, pictures

from guardsmith.cli import app as cli
from guardsmith.cloaks import CLOAKS, advdm, aspl, metacloak, photoguard
from guardsmith.cloaks.pixels import (
    PIXEL,
    PixelConfig,
    Surrogate,
    SurrogateConfig,
    ascend,
    denoising_loss,
    project,
)
from guardsmith.cloaks.rid import Defender
from guardsmith.config.recipe import Recipe
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.images import open_image, to_tensor
from guardsmith.core.picture_folders import select_pictures
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import add_noise, epsilon_of, noise_samples, own_target, row_losses
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.models.families import SD
from guardsmith.models.networks import save_network
from guardsmith.pictures.cloaking import cut_squares, join_squares, largest_change, metadata_of
from guardsmith.purifiers import gaussian
from guardsmith.training.loop import generator

SMALL = {
    "aspl": {"rounds": 2, "steps": 4, "surrogate_steps": 2, "learning_rate": 1e-3, "budget": 8, "step": 2},
    "fsmg": {"steps": 8, "surrogate_steps": 4, "learning_rate": 1e-3, "budget": 8, "step": 2},
    "metacloak": {"pool": 2, "pool_steps": 2, "sweeps": 1, "rounds": 2, "steps": 2, "surrogate_steps": 1, "budget": 8, "step": 2},
    "advdm": {"steps": 8, "step": 2},
    "photoguard": {"steps": 8, "budget": 8, "step": 2},
    "glaze": {"steps": 8, "budget": 8, "solver_steps": 2, "guidance": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def defender(tmp_path_factory):
    """A network that cloaks somehow; what training makes of one is in test_rid.py."""
    file = tmp_path_factory.mktemp("defender") / "some.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Defender(64, 16, 16, 1, 2)
        torch.nn.init.normal_(network.last.weight)
    save_network(network, network.shape, file, {})
    SMALL["rid"] = {"defender": str(file)}


def run(name, models, data, seed=0, **params):
    config = CLOAKS[name].config(**SMALL[name] | params)
    return CLOAKS[name].run(models, data, config, seed=seed)


def test_the_budget_and_the_range_by_hand():
    clean = torch.tensor([0.0, 0.99, -1.0, 0.5])
    moved = torch.tensor([0.5, 2.0, -3.0, 0.5 + PIXEL])
    wanted = torch.tensor([2 * PIXEL, 1.0, -1.0, 0.5 + PIXEL])
    assert torch.allclose(project(moved, clean, 2), wanted)


def test_a_step_goes_up_by_the_sign_and_in_batches_as_in_one():
    clean = torch.zeros(3, 1, 1, 2)
    slope = torch.tensor([[[[1.0, -2.0]]], [[[0.0, 3.0]]], [[[-5.0, 1e-9]]]])
    config = PixelConfig(budget=3, step=2, batch_size=2)

    def gain(part, rows):
        return (part * slope[rows]).sum() / len(part)

    once, shown = ascend(clean, clean, gain, config)
    assert shown == 0
    assert torch.allclose(once / PIXEL, 2 * slope.sign())
    twice, shown = ascend(once, clean, gain, config)
    assert torch.allclose(twice / PIXEL, 3 * slope.sign()), "the budget is 3"
    assert shown == pytest.approx(float((once * slope).sum() / 3), rel=1e-5)
    assert not twice.requires_grad
    with pytest.raises(RunFailed, match="not finite") as caught:
        ascend(once, clean, lambda part, rows: (part * torch.inf).sum(), config)
    assert_one_sentence(caught.value)


def test_the_loss_on_pixels_is_the_loss_of_the_rows(tiny):
    images, context = pictures(2), PromptBank(tiny).encode(["a photo of sks person"])
    store, rng = encode(tiny, images), generator(3)
    latents = store.mean + store.std * torch.randn(store.mean.shape, generator=rng)
    rows = noise_samples(latents, context, rng)
    wanted = row_losses(tiny.unet, tiny.scheduler, rows).mean()
    pixels = images.clone().requires_grad_()
    found = denoising_loss(tiny, pixels, context, generator(3))
    assert torch.allclose(found, wanted, rtol=1e-5)
    found.backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for part in (tiny.unet, tiny.vae, tiny.text_encoder) for p in part.parameters())


def test_the_noise_in_a_prediction(tiny):
    latents, noise, times = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 990])
    noisy = add_noise(tiny.scheduler, latents, noise, times)
    truth = own_target(tiny.scheduler, latents, noise, times)
    assert torch.allclose(epsilon_of(tiny.scheduler, truth, noisy, times), noise, atol=1e-4)


def test_the_score_gradient_skips_the_u_net(tiny, monkeypatch):
    """On the latents it is eps_theta(z_t) - eps, whatever the U-Net's Jacobian."""
    pixels, context = pictures(2), PromptBank(tiny).encode(["a photo"])
    kept = {}

    def latents(model, part, rng):
        kept["latents"] = encode(model, part).mean.requires_grad_()
        return kept["latents"]

    monkeypatch.setattr(advdm, "sampled_latents", latents)
    advdm.score_gain(tiny, pixels, context, generator(1)).backward()
    rows = noise_samples(kept["latents"].detach(), context, generator(1))
    noisy = add_noise(tiny.scheduler, rows.latents, rows.noise, rows.timesteps)
    with torch.no_grad():
        out = tiny.unet(noisy, rows.timesteps, rows.context, return_dict=False)[0]
    residual = epsilon_of(tiny.scheduler, out, noisy, rows.timesteps) - rows.noise
    assert torch.allclose(kept["latents"].grad, residual / 2, atol=1e-6)


@pytest.mark.parametrize("name", CLOAKS)
def test_every_cloak_keeps_its_budget_its_model_and_its_seed(name, tiny_v):
    data, before = make_data(), state(tiny_v)
    once, again, other = run(name, [tiny_v], data), run(name, [tiny_v], data), run(name, [tiny_v], data, seed=1)
    assert once.shape == data.images.shape and once.dtype == torch.float32 and not once.requires_grad
    assert float(once.abs().max()) <= 1
    assert float((once - data.images).abs().max()) <= 8 * PIXEL + 1e-6
    assert float((once - data.images).abs().max()) > 4 * PIXEL
    assert torch.equal(once, again) and torch.equal(once, other) == (name == "rid"), "one pass needs no chance"
    assert same_state(before, state(tiny_v))
    for part in (tiny_v.unet, tiny_v.vae, tiny_v.text_encoder):
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("name", CLOAKS)
def test_the_steps_told_are_the_steps_taken(name, tiny_epsilon, tiny_v):
    for models in ([tiny_v], [tiny_v, tiny_epsilon]):
        config, told = CLOAKS[name].config(**SMALL[name]), []
        CLOAKS[name].run(models, make_data(), config, seed=0, on_step=told.append)
        assert len(told) == config.total(len(models), 2)
        assert all(isinstance(value, float) for value in told)


def rise(model, data, cloaked, prompt):
    """How much the denoising loss grew with the same timesteps and noise, in standard errors of its mean."""
    context = PromptBank(model).encode([prompt])

    def losses(pixels):
        with torch.no_grad():
            return torch.stack([denoising_loss(model, pixels, context, generator(7, i)) for i in range(40)])

    apart = losses(cloaked) - losses(data.images)
    return float(apart.mean() / (apart.std() / 40**0.5))


def norms(model, pixels, target=0.0):
    with torch.no_grad():
        return float((model.posterior(pixels)[0] - target).flatten(1).norm(dim=1).mean())


MORE = {
    "advdm": {"steps": 16}, "aspl": {"rounds": 4}, "fsmg": {"steps": 16}, "metacloak": {"rounds": 8, "blur_kernel": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_what_climbs_the_loss_has_climbed_it(name, tiny_v):
    data = make_data()
    prompt = "a photo" if name == "advdm" else "a photo of sks person"
    cloaked = run(name, [tiny_v], data, budget=24, step=3, **MORE[name])
    assert rise(tiny_v, data, cloaked, prompt) > 4


def test_a_cloak_made_against_a_purifier_survives_it_better(tiny_v):
    """Latents of purified pixels come closer to the target than those of a cloak that did not know of the purifier."""
    data, how = make_data(), {"mode": "mist", "loss_weight": 0, "steps": 20, "budget": 16}
    with torch.no_grad():
        target = tiny_v.posterior(advdm.target_pattern(64))[0]
    blur = {"kernel": 9, "deviation": 2.0}
    config = gaussian.GaussianConfig(**blur)

    def after(cloaked):
        return norms(tiny_v, gaussian.purify(tiny_v, cloaked, config, class_noun="person", seed=0), target)

    known = run("advdm", [tiny_v], data, against="gaussian", against_params=blur, **how)
    assert after(known) < after(run("advdm", [tiny_v], data, **how)) < after(data.images)
    with pytest.raises(ValidationError, match="there is no purifier"):
        advdm.AdvdmConfig(against="soap")
    with pytest.raises(ValidationError, match="quality"):
        advdm.AdvdmConfig(against="jpeg", against_params={"quality": 900})


def test_what_approaches_latents_has_approached_them(tiny_v):
    data = make_data()
    assert norms(tiny_v, run("photoguard", [tiny_v], data, steps=20)) < 0.97 * norms(tiny_v, data.images)
    with torch.no_grad():
        target = tiny_v.posterior(advdm.target_pattern(64))[0]
    misty = run("advdm", [tiny_v], data, mode="mist", loss_weight=0, steps=20)
    assert norms(tiny_v, misty, target) < 0.99 * norms(tiny_v, data.images, target)


def test_of_several_models_each_counts(tiny_v, tiny_epsilon):
    data = make_data()
    both = run("photoguard", [tiny_v, tiny_epsilon], data, steps=20)
    for model in (tiny_v, tiny_epsilon):
        assert norms(model, both) < 0.99 * norms(model, data.images)


def test_the_diffusion_attack_goes_through_the_pipeline(tiny_v):
    """With the same noise, what the model makes of a cloaked picture is nearer to black than what it makes of the clean one."""
    config = photoguard.PhotoguardConfig(attack="diffusion", budget=32, step=6, steps=6, solver_steps=2, guidance=1.5)
    data = make_data()
    cloaked = photoguard.cloak([tiny_v], data, config, seed=0)
    context, empty = PromptBank(tiny_v).encode(["", ""]).split(1)

    def distances(pixels):
        with torch.no_grad():
            drawn = [photoguard.edited(tiny_v, pixels, context, empty, config, generator(9, i)) for i in range(8)]
        return torch.stack([(picture + 1).flatten(1).norm(dim=1).mean() for picture in drawn])

    assert bool((distances(cloaked) < distances(data.images)).all())


def test_a_surrogate_learns_and_goes_back(tiny_v):
    data, before = make_data(), state(tiny_v)
    surrogate = Surrogate(tiny_v, SurrogateConfig(learning_rate=1e-3))
    kept = surrogate.snapshot()
    first = state(surrogate.model)
    surrogate.learn(data, data.images, 2, seed=0)
    assert not same_state(first, state(surrogate.model))
    assert not any(parameter.requires_grad for parameter in surrogate.parameters)
    kept.restore()
    assert same_state(first, state(surrogate.model)) and same_state(before, state(tiny_v))


def test_aspl_keeps_what_was_learnt_from_cloaked_pictures_only(tiny_v, monkeypatch):
    """In every round: clean pictures (then forgotten), pixels, cloaked pictures (kept)."""
    data, learnt = make_data(), []
    real = Surrogate.learn

    def learn(self, given, images, steps, seed):
        learnt.append((torch.equal(images, data.images), state(self.model)["unet"]["conv_in.weight"]))
        real(self, given, images, steps, seed)

    monkeypatch.setattr(Surrogate, "learn", learn)
    run("aspl", [tiny_v], data)
    assert [clean for clean, _ in learnt] == [True, False, True, False]
    weights = [weight for _, weight in learnt]
    assert torch.equal(weights[0], weights[1]), "the steps on clean pictures are taken back"
    assert not torch.equal(weights[1], weights[2]) and torch.equal(weights[2], weights[3])
    assert aspl.AsplConfig().total(2, 9) == 600


def test_transformations_keep_shape_range_and_gradient():
    config, seen = metacloak.MetaCloakConfig(), set()
    for seed in range(8):
        pixels = pictures(2).requires_grad_()
        changed = metacloak.transformed(pixels, config, generator(seed))
        assert changed.shape == pixels.shape and float(changed.detach().abs().max()) <= 1
        changed.sum().backward()
        assert float(pixels.grad.abs().sum()) > 0
        seen.add(round(float(changed.detach().sum()), 4))
    assert len(seen) == 8


# Pictures of any shape.


def photo(width, height, seed=0):
    values = np.random.default_rng(seed).integers(20, 235, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("width", "height", "count"), [(64, 64, 1), (200, 90, 3), (48, 48, 1), (130, 64, 3), (64, 128, 2)]
)
def test_a_picture_is_covered_whole_and_comes_back_at_its_size(width, height, count):
    picture = photo(width, height)
    known = cut_squares(picture, 64)
    assert known.squares.shape == (count, 3, 64, 64)
    assert min(known.scaled) == 64
    ends = [(top + 64, left + 64) for top, left in known.places]
    assert (max(e[0] for e in ends), max(e[1] for e in ends)) == known.scaled
    assert largest_change(picture, join_squares(known, known.squares, 8)) == 0
    changed = join_squares(known, (known.squares + 20 * PIXEL), 6.375)
    assert changed.size == picture.size
    assert largest_change(picture, changed) == 6, "6 whole values are within 6.375"
    alternating = torch.tensor([1.0, -1.0]).repeat(32) * 8 * PIXEL
    assert largest_change(picture, join_squares(known, known.squares + alternating, 8)) <= 8


def test_where_squares_overlap_changes_are_averaged():
    known = cut_squares(Image.new("RGB", (96, 64), (128, 128, 128)), 64)
    assert known.places == [(0, 0), (0, 32)]
    change = torch.tensor([0.0, 4.0]).reshape(2, 1, 1, 1) * PIXEL
    values = np.asarray(join_squares(known, known.squares + change, 8))[0, :, 0]
    assert values.tolist() == [128] * 32 + [130] * 32 + [132] * 32


def command(*more):
    return ["cloak", *map(str, more), "--class-noun", "person", "--method", "photoguard"]


@pytest.fixture
def images(tmp_path, v_folder):
    folder = tmp_path / "photos"
    folder.mkdir()
    photo(200, 120).save(folder / "wide.jpg", quality=95)
    turned, exif = photo(64, 96, 1), Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Ann"
    turned.save(folder / "turned.jpg", exif=exif, icc_profile=b"a profile", dpi=(72, 72))
    photo(80, 64, 2).convert("L").save(folder / "grey.png")
    (folder / "notes.txt").write_text("not a picture")
    recipe = tmp_path / "images.yaml"
    recipe.write_text(
        json.dumps({"base": str(v_folder), "cloaks": {"photoguard": {"name": "photoguard", "params": {"steps": 3}}}})
    )
    return folder, recipe


def test_the_command_writes_copies_within_the_budget(images, tmp_path, capsys):
    folder, recipe = images
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    output = tmp_path / "cloaked"
    assert (
        cli.main([*command(folder), "--output", str(output), "--recipe", str(recipe), "--budget", "5.5", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(file.name for file in output.iterdir()) == ["grey.png", "report", "turned.png", "wide.png"]
    assert json.loads((output / "report" / "cloak.json").read_text()) == told
    with Image.open(output / "report" / "before-after.png") as page:
        assert page.size == (3 * 192, 3 * 192)
    for each in told["pictures"]:
        original, copy = open_image(folder / each["from"]), open_image(output / each["file"])
        assert copy.size == original.size
        assert 0 < largest_change(original, copy) == each["largest_change"] <= 5
        assert 30 < each["psnr_db"] < 60 and 0 < each["perceptual_distance"] < 1
    with Image.open(output / "turned.png") as turned:
        assert turned.size == (96, 64), "upright"
        assert turned.getexif().get(0x013B) == "Ann" and 0x0112 not in turned.getexif()
        assert turned.info["icc_profile"] == b"a profile"
    assert metadata_of(folder / "grey.png") == {}
    assert told["params"]["budget"] == 5.5 and told["params"]["steps"] == 3
    assert cli.main([*command(folder), "--output", str(output), "--recipe", str(recipe)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_bad_input_is_one_sentence_and_leaves_nothing(images, tmp_path, capsys):
    folder, recipe = images
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    photo(64, 64).save(tmp_path / "other" / "wide.png")
    photo(16, 16).save(tmp_path / "tiny.png")
    (tmp_path / "broken.jpg").write_bytes((folder / "wide.jpg").read_bytes()[:300])
    for given, said in (
        ([tmp_path / "empty"], "there is no picture in"),
        ([folder, tmp_path / "other"], "would have one name"),
        ([tmp_path / "nowhere.png"], "does not exist"),
        ([tmp_path / "tiny.png"], "larger picture"),
        ([tmp_path / "broken.jpg"], "broken.jpg"),
        ([folder, "--budget", "0"], "more than 0 and at most 255"),
        ([folder, "--budget", "300"], "more than 0 and at most 255"),
        ([folder, "--method", "photogard"], "photoguard"),
        ([folder, "--set", "cloaks.photoguard.params.speed=1"], "speed"),
        ([folder, "--base", str(tmp_path / "no-model")], "no base model"),
    ):
        asked = [*command(), "--output", str(tmp_path / "out"), "--recipe", str(recipe), *map(str, given)]
        assert cli.main(asked) == 2, given
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told
        assert not list(tmp_path.glob("*out*"))


def test_files_keep_the_order_of_the_folder(images):
    folder, _ = images
    assert [file.name for file in select_pictures([folder]).files] == ["grey.png", "turned.jpg", "wide.jpg"]


def test_bases_of_two_sizes_are_refused(images, tmp_path, v_folder, monkeypatch):
    from types import SimpleNamespace

    from guardsmith.cloaks import pixels
    from guardsmith.pictures import cloaking as cloak

    sizes = iter([64, 128])
    monkeypatch.setattr(pixels, "load_model", lambda base: SimpleNamespace(image_size=next(sizes), family=SD))
    with pytest.raises(UserError, match="different sizes") as caught:
        cloak.cloak_pictures(
            [images[0] / "wide.jpg"], tmp_path / "out", bases=["a", "b"], method="advdm", params={}, class_noun="person",
            identifier="sks", class_images=0, recipe=Recipe(),
        )  # fmt: skip
    assert_one_sentence(caught.value)


def test_png_keeps_eight_bits():
    picture = photo(64, 64)
    assert torch.equal(to_tensor(picture), cut_squares(picture, 64).squares[0])
