"""Transformed training pictures and ways of drawing: what is done, what undoes it, and that units do both."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from test_attacks import make_data
from tiny import assert_one_sentence, pictures, same_weights, weights

from guardsmith.attacks import draw_during_attack, dreambooth, lora, sampling_tricks
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.attacks.evasion import EVASIONS, EvasionContext, inverted, transformed
from guardsmith.attacks.evasion.adversarial import BUDGET, middle_features
from guardsmith.attacks.evasion.colours import LARGEST_CONDITION, random_matrix
from guardsmith.attacks.evasion.layout import block_order
from guardsmith.attacks.evasion.perspective import SEEN_AT
from guardsmith.attacks.lora import LoraConfig, merge_adapters
from guardsmith.config.loading import load_recipe
from guardsmith.config.recipe import AttackSpec
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures, to_pil
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.diffusion.sampling import SAMPLERS, generate, solver_for
from guardsmith.evaluation import runs
from guardsmith.evaluation.planning import TargetModel, plan_units
from guardsmith.evaluation.runs import run_unit
from guardsmith.evaluation.units import scores_of
from guardsmith.models.checkpoint import load_model, with_own_unet
from guardsmith.registry.loader import load_registry

ROOT = Path(__file__).parent.parent
PARAMS = {"steps": 3, "batch_size": 1, "learning_rate": 1e-3}
SAMPLING = {"steps": 3, "guidance": 3.0}
EXACT = [name for name, entry in EVASIONS.items() if entry.exact]
INEXACT = [name for name, entry in EVASIONS.items() if entry.invert is not None and not entry.exact]
AS_DRAWN = [name for name, entry in EVASIONS.items() if entry.invert is None]


def portraits(count=4):
    """Avatars, which a resampling of half the size does not destroy."""
    registry = load_registry(ROOT / "registries" / "demo.yaml")
    return open_pictures([image.path for image in registry.subjects[0].images_of("reference")[:count]], 64)


def context(model=None, seed=3):
    return EvasionContext(seed, model, pictures(2, 50))


def bytes_of(images):
    return [to_pil(image).tobytes() for image in images]


def test_every_family_is_there():
    wanted = {
        "negative", "vertical_flip", "turn_90", "channels_bgr", "colour_matrix", "hue_rotation", "frame", "tiles",
        "block_shuffle", "perspective", "swirl", "checkerboard",
        "blur", "pixelate", "posterize", "sketch", "paint", "adversarial_noise", "crop",
        "side_by_side",
    }  # fmt: skip
    assert wanted <= EVASIONS.keys()
    assert {"negative", "block_shuffle", "turn_90", "colour_matrix"} <= set(EXACT)
    assert {"blur", "sketch", "crop", "adversarial_noise"} <= set(AS_DRAWN)


@pytest.mark.parametrize("name", EVASIONS)
def test_every_transformation_changes_pictures_within_their_range(name, tiny_v):
    images = pictures(4, 3)
    after = transformed(images, [name], context(tiny_v))
    assert after.shape == images.shape and after.dtype == images.dtype
    assert after.abs().max() <= 1
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(after, images, strict=True))
    again = transformed(images, [name], context(tiny_v))
    assert torch.equal(after, again), "the same seed transforms alike"


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_inverse_gives_every_pixel_value_back(name):
    images = torch.stack([*pictures(4, 3), *portraits()])
    back = inverted(transformed(images, [name], context()), [name], context())
    assert bytes_of(back) == bytes_of(images)


@pytest.mark.parametrize("name", INEXACT)
def test_other_inverses_give_the_picture_back_but_for_details(name):
    images = portraits()
    back = inverted(transformed(images, [name], context()), [name], context())
    inside = slice(8, -8)  # a perspective loses corners
    wrong = (back - images)[:, :, inside, inside].abs().mean()
    untouched = (transformed(images, [name], context()) - images)[:, :, inside, inside].abs().mean()
    assert wrong < 0.12 and wrong < 0.5 * untouched


@pytest.mark.parametrize("name", AS_DRAWN)
def test_without_an_inverse_pictures_are_judged_as_drawn(name):
    images = pictures(2, 3)
    assert torch.equal(inverted(images, [name], context()), images)


def test_a_chain_is_undone_in_reverse():
    images = pictures(2, 3)
    names = ["turn_90", "block_shuffle", "negative", "vertical_flip"]
    after = transformed(images, names, context())
    assert torch.equal(inverted(after, names, context()), images)
    assert not torch.equal(inverted(after, names[::-1], context()), images), "the order counts"
    assert torch.equal(transformed(images, names[:1], context()), images.rot90(1, (-2, -1)))


def test_what_the_transformations_do():
    images = pictures(2, 3)
    turned = transformed(images, ["turn_90"], context())
    assert torch.equal(turned[:, :, 0], images[:, :, :, -1]), "the right edge is on top"
    assert torch.equal(transformed(images, ["channels_gbr"], context()), images[:, [1, 2, 0]])
    hue = transformed(images[:, :1].repeat(1, 3, 1, 1), ["hue_rotation"], context())
    assert (hue.amax(1) - hue.amin(1)).max() < 1e-5, "grey stays grey"
    large = transformed(images, ["pixelate"], context())
    assert torch.equal(large[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), large)
    assert len(transformed(images, ["posterize"], context()).unique()) == 4
    board = transformed(images, ["checkerboard"], context())
    assert torch.equal(board[:, :, :16, :16], images[:, :, :16, :16])
    assert torch.equal(board[:, :, :16, 16:32], -images[:, :, :16, 16:32])
    swirl = transformed(images, ["swirl"], context())
    assert torch.allclose(swirl[:, :, :4, :4], images[:, :, :4, :4], atol=1e-5), "corners stay"
    sketch = transformed(portraits(), ["sketch"], context())
    assert torch.equal(sketch[:, 0], sketch[:, 1]), "a pencil has no colour"
    four = transformed(images, ["tiles"], context())
    assert torch.equal(four[:, :, :32, :32], four[:, :, 32:, 32:])
    beside = transformed(images, ["side_by_side"], context())
    other = transformed(context().strangers, ["side_by_side"], EvasionContext(0, None, images))
    assert torch.allclose(beside[:, :, :, 32:], other[:, :, :, :32], atol=1e-5), "the stranger is on the right"
    with pytest.raises(ValueError, match="another subject"):
        transformed(images, ["side_by_side"], EvasionContext())


@pytest.mark.parametrize("seed", range(5))
def test_random_transformations_depend_on_the_seed(seed):
    matrix = random_matrix(seed)
    values = torch.linalg.svdvals(matrix)
    assert values[0] <= LARGEST_CONDITION * values[-1] * 1.001
    assert matrix.abs().sum(1).max() <= 1.0001
    assert not torch.equal(matrix, random_matrix(seed + 1))
    order = block_order(seed)
    assert sorted(order.tolist()) == list(range(16)) and not (order == torch.arange(16)).any()


def test_a_perspective_puts_the_corners_where_it_says():
    white = torch.ones(1, 3, 64, 64)
    view = transformed(white, ["perspective"], context())[0, 0]
    for x, y in SEEN_AT.tolist():
        row, column = round((y * 0.85 + 1) * 32), round((x * 0.85 + 1) * 32)
        assert view[row, column] > 0.9, "inside the corner"
        row, column = round((y * 1.2 + 1) * 32), round((x * 1.2 + 1) * 32)
        if 0 <= row < 64 and 0 <= column < 64:
            assert view[row, column] < 0.1, "outside"


def test_adversarial_noise_is_small_and_moves_features_more_than_noise_does(tiny_v):
    images = pictures(2, 3) * 0.8
    after = transformed(images, ["adversarial_noise"], context(tiny_v))
    assert (after - images).abs().max() <= BUDGET + 1e-6
    random = images + BUDGET * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    rng, prompt = torch.Generator().manual_seed(1), PromptBank(tiny_v).encode([""])
    times, noise = torch.tensor([100, 100]), torch.randn(2, 4, 8, 8, generator=rng)
    with torch.no_grad():
        clean, moved, other = (
            middle_features(tiny_v, encode(tiny_v, each).mean, times, noise, prompt) for each in (images, after, random)
        )
    assert (moved - clean).norm() > 1.5 * (other - clean).norm()


def draw_with(model, **options):
    drawn, _ = draw_during_attack(
        model, "dreambooth", PARAMS, make_data(), evaluate_at=[3], seed=4, count=2, sampling=SAMPLING, **options
    )
    return drawn[3]


def test_the_hand_over_uses_each_denoiser_on_its_side(tiny_v):
    own, _ = dreambooth.attack(tiny_v, make_data(), DreamBoothConfig(**PARAMS | {"learning_rate": 1e-2}), seed=0)
    called = {"early": [], "late": []}
    both = sampling_tricks.handed_over(own, with_own_unet(tiny_v), 0.4, own)
    for which in called:
        network = getattr(both.unet, which)
        network.register_forward_pre_hook(lambda _, inputs, which=which: called[which].append(int(inputs[1])))
    images = generate(both, ["a photo of sks person"], [0], steps=8, guidance=2.0)
    assert min(called["early"]) > 400 >= max(called["late"])
    assert len(called["early"]) + len(called["late"]) == 8
    assert not torch.equal(images, generate(own, ["a photo of sks person"], [0], steps=8, guidance=2.0))


@pytest.mark.parametrize("trick", sampling_tricks.TRICKS)
def test_every_trick_draws_other_pictures_than_usual(tiny_v, trick):
    usual = draw_with(tiny_v)
    tricked = draw_with(tiny_v, trick=trick, base=tiny_v)
    assert tricked.shape == usual.shape and tricked.abs().max() <= 1
    assert not torch.equal(usual, tricked)
    if trick in sampling_tricks.NEEDS_BASE:
        with pytest.raises(ValueError, match="needs the public base"):
            draw_with(tiny_v, trick=trick)


def test_samplers_and_scales_are_what_they_say(tiny_v, monkeypatch):
    """A picture depends on its seed and not on its batch, whatever noise the sampler adds; the names have their settings."""
    asked = []

    def note(model, prompts, seeds, **arguments):
        asked.append(arguments)
        return generate(model, prompts, seeds, **arguments)

    monkeypatch.setattr(sampling_tricks, "generate", note)
    plain = {"steps": 6, "guidance": 2.0, "batch": 4}
    for name, change in sampling_tricks.SETTINGS.items():
        together = sampling_tricks.draw(tiny_v, name, ["a photo"] * 3, [7, 8, 9], base=None, sampling=plain)
        alone = sampling_tricks.draw(tiny_v, name, ["a photo"], [8], base=None, sampling=plain)
        assert torch.allclose(together[1:2], alone, atol=1e-4), name
        assert not torch.allclose(together[:1], together[1:2], atol=1e-2), name
        assert asked[-1].items() >= (plain | change).items(), name
    assert {type(solver_for(tiny_v, 4, name)).__name__ for name in SAMPLERS} == {
        "DPMSolverMultistepScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler",
    }  # fmt: skip
    assert set(get_args(AttackSpec.model_fields["drawing"].annotation)) == {"usual", *sampling_tricks.TRICKS}


def test_one_step_is_the_prediction_of_the_clean_picture(tiny):
    """For a network that always says what the target of a known picture is, that picture comes out."""
    seeds = [5, 6]
    clean = encode(tiny, pictures(2, 3)).mean
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    last = torch.tensor([int(tiny.scheduler.config.num_train_timesteps) - 1])
    kept, added = (float(share) for share in sampling_tricks.clean_coefficients(tiny.scheduler, last))
    target = (kept * noise - clean) / added

    class Fixed(torch.nn.Module):
        config = tiny.unet.config

        def forward(self, latents, timestep, context, return_dict=False):
            assert int(timestep) == int(last)
            return (target.repeat(len(latents) // 2, 1, 1, 1),)

    drawn = sampling_tricks.one_step(replace(tiny, unet=Fixed()), ["a", "b"], seeds, guidance=3.0)
    assert torch.allclose(drawn, tiny.decode(clean).clamp(-1, 1), atol=2e-3)


@pytest.mark.parametrize("attack", ["dreambooth", "lora"])
def test_the_average_of_two_models_is_that_of_their_weights(tiny_v, attack, monkeypatch):
    module, config = (
        (dreambooth, DreamBoothConfig(**PARAMS)) if attack == "dreambooth" else (lora, LoraConfig(**PARAMS, rank=2))
    )
    seen = []
    monkeypatch.setattr(
        sampling_tricks, "draw", lambda model, *_, **__: seen.append(model) or torch.zeros(2, 3, 64, 64)
    )
    draw_during_attack(
        tiny_v, attack, PARAMS | ({"rank": 2} if attack == "lora" else {}), make_data(), evaluate_at=[3], seed=4, count=2,
        sampling=SAMPLING, trick="average_two",
    )  # fmt: skip
    parts = []
    for seed in (4, 4 + sampling_tricks.SECOND_SEED):
        own, _ = module.attack(tiny_v, make_data(), config, seed=seed)
        merge_adapters(own.unet)
        parts.append(weights(own.unet))
    found = weights(seen[0].unet)
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        assert torch.allclose(value, (parts[0][name] + parts[1][name]) / 2, atol=1e-6), name
    assert not same_weights(parts[0], parts[1])


@pytest.fixture(scope="module")
def registry():
    return load_registry(ROOT / "registries" / "demo.yaml")


@pytest.fixture
def both(tmp_path):
    base = load_model("builtin:avatar")
    return {side: TargetModel(base, f"sha256:{side}", tmp_path / side) for side in ("base", "hardened")}


def units_of(registry, target, **changes):
    attacks = {"plain": {"name": "lora", "params": PARAMS}, "other": {"name": "lora", "params": PARAMS} | changes}
    recipe = load_recipe(
        "demo", ["verify.attacks=" + json.dumps(attacks), "verify.identifiers=[zwx]", "verify.class_images=0"]
    )
    return {(unit.side, unit.label, unit.subject): unit for unit in plan_units(registry, recipe, target)}


@pytest.mark.parametrize("change", [{"evasion": "negative"}, {"evasion": ["side_by_side"]}, {"drawing": "one_step"}])
def test_each_is_another_unit_for_subjects_and_controls_alike(registry, both, change):
    found = units_of(registry, both, **change)
    for side in ("base", "hardened"):
        for subject in ("mira", "nora"):
            plain, unit = found[side, "plain", subject], found[side, "other", subject]
            assert unit.digest != plain.digest
            assert not {"evasion", "drawing", "removal", "public"} & plain.settings.keys()
            assert str(ROOT) not in json.dumps(unit.settings)


def test_a_stranger_is_somebody_else(registry, both):
    found = units_of(registry, both, evasion="side_by_side")
    for subject, other in (("mira", "nora"), ("nora", "mira")):
        plan = found["base", "other", subject].evasion
        assert plan["images"] == [str(i.path) for i in registry.find(other).images_of("attack")]


def test_the_base_finishes_the_pictures_of_both_models(registry, both):
    found = units_of(registry, both, drawing="finish_with_base", hand_over=0.3)
    for side in ("base", "hardened"):
        unit = found[side, "other", "mira"]
        assert unit.settings["public"] == "sha256:base" and unit.model_digest == f"sha256:{side}"
        assert unit.settings["drawing"] == {"name": "finish_with_base", "hand_over": 0.3}
    assert "hand_over" not in units_of(registry, both, drawing="one_step")["base", "other", "mira"].settings["drawing"]


def test_a_unit_trains_on_transformed_pictures_and_judges_those_transformed_back(registry, both, monkeypatch):
    unit = units_of(registry, both, evasion=["negative", "turn_90"])["hardened", "other", "mira"]
    known = open_pictures([i.path for i in registry.subjects[0].images_of("attack")], 64)
    reference = open_pictures([i.path for i in registry.subjects[0].images_of("reference")], 64)[0]
    trained = []

    def spy(model, attack, params, data, *, stop, **_):
        trained.append(data.images)
        drawn = (-reference).rot90(1, (-2, -1)).expand(unit.images, -1, -1, -1)
        stop(3, drawn)
        return {3: drawn}, [1.0]

    monkeypatch.setattr(runs, "draw_during_attack", spy)
    run_unit(unit)
    assert torch.equal(trained[0], (-known).rot90(1, (-2, -1)))
    assert min(scores_of(unit)[1]) > 0.5, "transformed back they are the subject"
    assert bytes_of(open_pictures(unit.pictures(1), 64)[:1]) == bytes_of(reference[None]), "and kept so"


@pytest.mark.parametrize("name", ["crop", "paint"])
def test_what_cannot_be_undone_is_compared_with_real_pictures_after_the_same(registry, both, monkeypatch, name):
    unit = units_of(registry, both, evasion=["negative", name])["hardened", "other", "mira"]
    assert unit.settings["evasion"] == {"names": ["negative", name], "of_references": [name]}
    means = []
    for person in ("mira", "nora"):
        photos = open_pictures([i.path for i in registry.find(person).images_of("attack")], 64)
        drawn = -transformed(photos, [name], EvasionContext())

        def draws(model, attack, params, data, *, stop, drawn=drawn, **_):
            pictures = drawn.repeat(unit.images, 1, 1, 1)[: unit.images]
            stop(3, pictures)
            return {3: pictures}, [1.0]

        monkeypatch.setattr(runs, "draw_during_attack", draws)
        shutil.rmtree(unit.folder, ignore_errors=True)
        run_unit(unit)
        means.append(sum(scores_of(unit)[1]) / unit.images)
    assert means[0] > 0.3 and means[1] < 0.15, "the subject is known in part, and nobody else is taken for it"


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"name": "lora", "evasion": "negativ"}, "did you mean 'negative'"),
        ({"name": "lora", "evasion": ["negative", "nothing"]}, "no evasion 'nothing'"),
        ({"name": "lora", "drawing": "sideways"}, "drawing"),
        ({"name": "lora", "trained_on": "base", "drawing": "one_step"}, "cannot be combined"),
    ],
)
def test_what_is_not_possible_is_refused(attack, said):
    with pytest.raises(UserError, match=said) as caught:
        load_recipe("demo", ["verify.attacks=" + json.dumps({"some": attack})])
    assert_one_sentence(caught.value)
