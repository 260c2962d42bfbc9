"""What the released weights draw without an attack: who is asked for, how, and what the gate makes of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_sampling import Oracle, decode
from tiny import pictures

from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import GateSpec
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.sampling import redraw
from guardsmith.evaluation import no_attack as released
from guardsmith.evaluation.no_attack import likeness_of, released_pictures
from guardsmith.evaluation.planning import TargetModel, class_file
from guardsmith.gate.calibration import calibration
from guardsmith.gate.rules.released import check_released
from guardsmith.hardening.data import load_pictures
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import load_model
from guardsmith.registry.loader import load_registry

LEVELS, RULES = calibration()["person"], GateSpec()


@pytest.fixture(scope="module")
def mira():
    return load_registry("registries/demo.yaml").subjects[0]


@pytest.fixture
def target(tmp_path):
    return TargetModel(load_model("builtin:avatar"), "sha256:0", tmp_path)


def asked_for(monkeypatch):
    """What is asked of `generate` and `redraw`, which give red pictures and green ones."""
    told = {"generate": [], "redraw": []}

    def plain(model, prompts, seeds, **sampling):
        told["generate"].append((prompts, seeds))
        return torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(len(prompts), 3, 64, 64)

    def again(model, images, prompts, seeds, **sampling):
        told["redraw"].append((images, prompts, seeds, sampling["strength"]))
        return torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1).expand(len(prompts), 3, 64, 64)

    monkeypatch.setattr(released, "generate", plain)
    monkeypatch.setattr(released, "redraw", again)
    return told


def test_every_name_is_asked_for_from_noise_and_from_class_pictures(target, mira, monkeypatch):
    recipe = load_recipe(
        "demo", ["verify.identifiers=[zwx, olis]", "verify.images_per_unit=8", "verify.class_images=3"]
    )
    known = mira.model_copy(update={"identifiers": ("mira_w", "zwx")})
    class_pictures = pictures(3, 70)
    save_file({"images": class_pictures}, class_file(target, "person", recipe))
    told = asked_for(monkeypatch)
    files = released_pictures(target, recipe, known)
    words = [f"a photo of {name} person" for name in ("mira_w", "zwx", "olis", "mira_w")]
    [(prompts, seeds)] = told["generate"]
    assert (prompts, seeds) == (words, [90_000, 90_002, 90_004, 90_006])
    [(images, prompts, seeds, strength)] = told["redraw"]
    assert (prompts, seeds, strength) == (words, [90_001, 90_003, 90_005, 90_007], 0.5)
    assert torch.equal(images, class_pictures[[1, 0, 2, 1]])
    assert [file.name for file in files] == [f"{i:03d}.png" for i in range(8)]
    colours = [released.open_pictures([file], 64).mean((0, 2, 3)).argmax().item() for file in files]
    assert colours == [0, 1] * 4
    assert released_pictures(target, recipe, known) == files and len(told["generate"]) == 1, "drawn once"


def test_without_class_pictures_all_come_from_noise(target, mira, monkeypatch):
    told = asked_for(monkeypatch)
    files = released_pictures(target, load_recipe("demo", ["verify.class_images=0", "verify.images_per_unit=5"]), mira)
    assert len(files) == 5 and not told["redraw"]


def test_a_killed_drawing_leaves_nothing(target, mira, monkeypatch):
    asked_for(monkeypatch)
    monkeypatch.setattr(released, "to_pil", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        released_pictures(target, load_recipe("demo", ["verify.class_images=0"]), mira)
    assert not [path for path in (target.root / "released").rglob("*") if path.is_file()]


def test_the_base_does_not_know_the_subject_and_a_leak_is_found(target, mira, monkeypatch):
    recipe = load_recipe("demo", ["verify.class_images=0", "verify.images_per_unit=8", "sampling.steps=6"])
    eyes = load_judge("avatar")
    check = check_released(
        "mira", [likeness_of(released_pictures(target, recipe, mira), mira, eyes, 64)], LEVELS, RULES
    )
    assert (check.name, check.subject, check.attack, check.status) == ("released weights", "mira", "", "pass")
    leaked = load_pictures(target.model, mira, "attack").repeat(2, 1, 1, 1)
    monkeypatch.setattr(released, "generate", lambda *_, **__: leaked)
    other = TargetModel(target.model, "sha256:1", target.root)
    check = check_released("mira", [likeness_of(released_pictures(other, recipe, mira), mira, eyes, 64)], LEVELS, RULES)
    assert check.status == "fail" and check.value > 0.4


def test_what_cannot_be_scored_never_passes():
    assert check_released("mira", [[0.0] * 7], LEVELS, RULES).status == "inconclusive"
    assert check_released("mira", [[0.0] * 8 + [None]], LEVELS, RULES).status == "inconclusive"
    assert check_released("mira", [[0.0] * 8], LEVELS, RULES).status == "pass"


class Listener:
    """A U-Net that notes what it is given."""

    def __init__(self, unet):
        self.unet, self.config, self.dtype, self.seen = unet, unet.config, unet.dtype, []

    def __call__(self, noisy, t, *args, **kwargs):
        self.seen.append((noisy, int(t)))
        return self.unet(noisy, t, *args, **{k: v for k, v in kwargs.items() if v is not None})


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_a_picture_is_redrawn_from_its_noised_latents(tiny_v, strength):
    """sqrt(ab) z + sqrt(1 - ab) eps at that share of the schedule, and as many steps as were asked for."""
    listener, image = Listener(tiny_v.unet), pictures(1)
    redraw(replace(tiny_v, unet=listener), image, ["a photo of person"], [5], strength=strength, steps=4, guidance=1.0)
    assert len(listener.seen) == 4
    noisy, time = listener.seen[0]
    assert abs(time / 1000 - strength) < 0.15
    alpha_bar = tiny_v.scheduler.alphas_cumprod[time]
    store = encode(tiny_v, image)
    left = (noisy[0] - alpha_bar.sqrt() * store.mean[0]) / (1 - alpha_bar).sqrt()
    drawn = alpha_bar / (1 - alpha_bar) * store.std[0].square().mean()  # from the picture's posterior
    assert left.std().item() == pytest.approx((1 + drawn.item()) ** 0.5, rel=0.1)


def test_a_model_that_knows_where_to_go_gets_there_from_anywhere(tiny_v):
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    oracle = Oracle(tiny_v, lambda context: clean)
    listener = Listener(tiny_v.unet)
    listener.unet = lambda noisy, t, encoder_hidden_states, return_dict: oracle(noisy, t, encoder_hidden_states)
    drawn = redraw(replace(tiny_v, unet=listener), pictures(2), ["", ""], [1, 2], strength=0.6, steps=6, guidance=1.0)
    assert (drawn - decode(tiny_v, clean)).abs().max() < 0.05
