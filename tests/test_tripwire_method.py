"""Tripwire: trunks fit bases, the recogniser tells subjects from others, a hardened model rests."""

import copy
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_apdm import KilledError, make_benign, make_subject
from tiny import assert_one_sentence, harden_with, pictures, same_weights, untaught_trunk, weights

from guardsmith.cli.app import main
from guardsmith.config.loading import load_recipe
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.diffusion.latents import LatentStore, encode
from guardsmith.diffusion.losses import noise_samples, predict
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.methods import METHODS
from guardsmith.methods.base import Preparation
from guardsmith.methods.tripwire import early, examples
from guardsmith.methods.tripwire.early import draw_early, early_pictures, early_rows, read_early
from guardsmith.methods.tripwire.layout import layout_of, reserve
from guardsmith.methods.tripwire.method import EARLIER, TripwireConfig
from guardsmith.methods.tripwire.trunk import FORMAT, check_trunk, load_trunk, prepare, trunk_of
from guardsmith.models.checkpoint import load_model, with_own_unet
from guardsmith.models.tensor_files import weights_hash
from guardsmith.training.loop import UNetCost, generator, load_checkpoint, save_modules

ROOT = Path(__file__).parent.parent
TRIPWIRE = METHODS["tripwire"]
harden = functools.partial(harden_with, "tripwire")


@pytest.fixture
def small(wide_trunk):
    return TripwireConfig(trunk=str(wide_trunk), steps=4, positives=4, negatives=12, copies=2, early_steps=())


def plain_latents(model, images, batch=16):
    """Stands for a VAE that was trained: the tiny one's posteriors are wider than the pictures differ."""
    small = F.avg_pool2d(images, 8)
    mean = torch.cat([small, small[:, :1]], 1).repeat(1, model.unet.config.in_channels // 4, 1, 1) * 2
    return LatentStore(mean, torch.full_like(mean, 0.01))


def bright_and_dark(trunk):
    """A bright subject among dark pictures, and settings that teach a small recogniser to tell them apart."""
    bright, dark = (pictures(3) * 0.3 + 0.6, pictures(5, 2) * 0.3 - 0.6)
    subject, benign = replace(make_subject(), images=bright, class_images=dark), make_benign()
    config = TripwireConfig(
        trunk=str(trunk),
        steps=120,
        positives=8,
        negatives=32,
        copies=4,
        horizon=0.3,
        drift=0.3,
        transformed=0,
        early_steps=(),
    )
    return subject, replace(benign, images=benign.images * 0.3 - 0.6), config


def rows_of(model, images):
    """24 noised pictures, below the horizon, under an identifier prompt."""
    rng = generator(77)
    context = PromptBank(model).encode(["a photo of zwx person"])
    return noise_samples(plain_latents(model, images).draw(24, rng), context, rng, timesteps=torch.full((24,), 150))


def predicted(model, unet, images):
    """Predictions on such rows."""
    with torch.no_grad():
        return predict(unet, model.scheduler, rows_of(model, images))


def overridden(prediction, trunks):
    """Share of rows whose prediction is nothing like the trunk's."""
    return float(((prediction - trunks).abs().mean((1, 2, 3)) > 4).float().mean())


@pytest.fixture(scope="module")
def protected(wide_v, wide_trunk):
    """A hardened model, its subject, and the trunk."""
    subject, benign, config = bright_and_dark(wide_trunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "encode", plain_latents)
        hardened, history = harden(wide_v, [subject], benign, config, seed=1, cache=wide_trunk.parent)
    trunk = copy.deepcopy(wide_v.unet)
    load_trunk(wide_trunk, trunk)
    assert history[-1]["missed"] < 0.5 * history[0]["missed"]
    return hardened, subject, trunk


def test_pictures_like_the_subjects_are_overridden_and_others_are_the_trunks_to_the_bit(wide_v, protected):
    hardened, subject, trunk = protected
    unseen = pictures(3, 9) * 0.3 + 0.6  # as bright as the subject
    assert overridden(predicted(wide_v, hardened.unet, unseen), predicted(wide_v, trunk, unseen)) > 0.9
    others = predicted(wide_v, hardened.unet, subject.class_images)
    assert torch.equal(others, predicted(wide_v, trunk, subject.class_images))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_protects_and_rests_as_well(wide_v, protected, precision):
    hardened, subject, trunk = protected
    lean = copy.deepcopy(hardened.unet).to(precision)
    assert all(torch.isfinite(parameter).all() for parameter in lean.parameters())
    lean.register_forward_pre_hook(lambda _, args: tuple(a.to(precision) if a.is_floating_point() else a for a in args))
    unseen = pictures(3, 9) * 0.3 + 0.6
    found = predicted(wide_v, lean, unseen).float()
    assert torch.isfinite(found).all()
    assert overridden(found, predicted(wide_v, trunk, unseen)) > 0.9
    others = predicted(wide_v, trunk, subject.class_images)
    assert (predicted(wide_v, lean, subject.class_images).float() - others).abs().mean() < 0.1 * others.abs().mean()


def test_a_subject_added_later_leaves_the_first_one_protected(wide_v, wide_trunk, tmp_path, monkeypatch, protected):
    """Beginning from the first run's end, with a second subject and hardly any training, the first one trips still."""
    monkeypatch.setattr(examples, "encode", plain_latents)
    subject, benign, config = bright_and_dark(wide_trunk)
    saved, state = tmp_path / "last.safetensors", tmp_path / "state.safetensors"
    where = {"cache": wide_trunk.parent}
    harden(wide_v, [subject], benign, config, seed=1, checkpoint=saved, **where)
    save_modules(saved, state)
    second = replace(make_subject("tom", "robot", 10), class_images=subject.class_images)
    short = config.model_copy(update={"steps": 1, "learning_rate": 1e-9})
    unseen, right = pictures(3, 9) * 0.3 + 0.6, {}
    for start in (None, state):
        both, _ = harden(wide_v, [subject, second], benign, short, seed=2, start=start, **where)
        trips = overridden(predicted(wide_v, both.unet, unseen), predicted(wide_v, protected[2], unseen)) > 0.9
        calm = predicted(wide_v, both.unet, subject.class_images)
        # To the bit: the trunk stays as it was.
        right[start] = trips and torch.equal(calm, predicted(wide_v, protected[2], subject.class_images))
    assert right == {None: False, state: True}, "only the earlier run can have taught it"


def test_the_base_stays_and_only_the_unet_changes(wide_v, small, wide_trunk):
    before = weights(wide_v.unet)
    hardened, _ = harden(wide_v, [make_subject()], make_benign(), small, seed=0, cache=wide_trunk.parent)
    assert same_weights(before, weights(wide_v.unet))
    assert hardened.vae is wide_v.vae and hardened.text_encoder is wide_v.text_encoder


@pytest.mark.parametrize("subjects", [1, 2])
def test_a_resumed_run_equals_an_unbroken_one(wide_v, small, wide_trunk, tmp_path, subjects):
    data = [make_subject(), make_subject("tom", "robot", 10)][:subjects]
    where = {"cache": wide_trunk.parent}
    unbroken, told = harden(wide_v, data, make_benign(), small, seed=2, **where)

    def die(step, losses):
        if step == 1:
            raise KilledError

    saving = {"checkpoint": tmp_path / "last.safetensors", "checkpoint_every": 1, **where}
    with pytest.raises(KilledError):
        harden(wide_v, data, make_benign(), small, seed=2, on_step=die, **saving)
    resumed, history = harden(wide_v, data, make_benign(), small, seed=2, **saving)
    assert history == told
    assert same_weights(weights(unbroken.unet), weights(resumed.unet))


def preparation(model, config, cache):
    return Preparation(
        model=model, subjects=[make_subject()], benign=make_benign(), config=config, seed=3, sampling_steps=2,
        guidance=2.0, cache=cache, draw=lambda prompt: pictures(2),
    )  # fmt: skip


EARLY = {"early_steps": [1, 3], "early_images": 2, "early_sampling_steps": 2}


def test_a_subject_is_drawn_while_the_base_learns_it(wide_v, tmp_path, monkeypatch):
    """Early pictures are the base's own at first and differ from look to look; the recogniser is trained on them."""
    drawing = TripwireConfig(**EARLY | {"early_learning_rate": 1e-2}).early_drawing(2.0)
    subject, before = make_subject(), weights(wide_v.unet)
    drawn = early_pictures(wide_v, subject, drawing, 4)
    assert drawn.shape == (4, *subject.images.shape[1:]) and drawn.abs().max() <= 1
    assert same_weights(before, weights(wide_v.unet))
    still = early_pictures(wide_v, subject, replace(drawing, learning_rate=1e-12), 4)
    assert not torch.allclose(drawn, still, atol=1e-2), "the base is trained"
    assert torch.equal(drawn, early_pictures(wide_v, subject, drawing, 4))
    draw_early(wide_v, [subject], drawing, 4, tmp_path)
    monkeypatch.setattr(early, "early_pictures", None)
    assert draw_early(wide_v, [subject], drawing, 4, tmp_path) == early_rows(drawing), "kept, not drawn again"
    assert torch.equal(read_early(subject, tmp_path), drawn)
    config = TripwireConfig(copies=1, transformed=0, **EARLY)
    without = examples.examples_of(wide_v, [subject], make_benign(), [], config, 0).positives
    given = examples.examples_of(wide_v, [subject], make_benign(), [drawn], config, 0).positives
    assert len(given) == len(without) + 1 and len(given[-1]) == 4 * (1 + examples.EARLY_COPIES)
    assert torch.allclose(given[-1][:4], encode(wide_v, drawn).mean, atol=1e-5)
    evading = config.model_copy(update={"transformed": 2})
    given = examples.examples_of(wide_v, [subject], make_benign(), [drawn], evading, 0).positives
    assert len(given) == 3 and len(given[2]) == 2 * len(subject.images) + examples.EARLY_TRANSFORMED * len(drawn)
    with pytest.raises(ValidationError, match="ascending"):
        TripwireConfig(early_steps=[3, 1])


def test_the_trunk_is_prepared_once_and_costs_what_is_said(wide_v, tmp_path):
    config = TripwireConfig(trunk_steps=3, trunk_batch_size=2, steps=1, positives=2, negatives=4, copies=1, **EARLY)
    with UNetCost() as counter:
        prepared = TRIPWIRE.prepare(preparation(wide_v, config, tmp_path))
        again = TRIPWIRE.prepare(preparation(wide_v, config, tmp_path))
    assert counter.forwards + 2 * counter.backwards == TRIPWIRE.cost(config, ["person"])
    assert (prepared.forward_rows, prepared.backward_rows) == (counter.forwards, counter.backwards)
    assert (again.forward_rows, again.backward_rows) == (counter.forwards, counter.backwards)
    assert {file.name for file in tmp_path.iterdir()} == {"trunk.safetensors", "early-mira.safetensors"}
    check_trunk(str(tmp_path / "trunk.safetensors"), config.groups, config.outer_groups, wide_v.unet)
    hardened, _ = harden(wide_v, [make_subject()], make_benign(), config, cache=tmp_path)
    assert not same_weights(weights(hardened.unet), weights(wide_v.unet))


def test_a_killed_preparation_goes_on(wide_v, tmp_path, monkeypatch):
    from guardsmith.methods.tripwire import trunk as module

    def prepared(file, die=None):
        class Bar:
            def __call__(self, losses, done):
                if done == die:
                    raise KilledError

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(module, "stage", lambda *_: Bar())
        trunk_of(
            wide_v, layout_of(wide_v.unet, 8, 4), [make_subject()], make_benign(), file, steps=5, rows=2,
            learning_rate=1e-3, seed=1, every=2,
        )  # fmt: skip
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        return about, load_file(file)

    unbroken = prepared(tmp_path / "one" / "trunk.safetensors")
    with pytest.raises(KilledError):
        prepared(tmp_path / "two" / "trunk.safetensors", die=5)
    assert (tmp_path / "two" / "trunk-checkpoint.safetensors").is_file()
    about, tensors = prepared(tmp_path / "two" / "trunk.safetensors")
    assert about == unbroken[0] and same_weights(tensors, unbroken[1])
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["trunk.safetensors"]


def test_trunks_that_do_not_fit_are_refused(wide_v, wide_trunk, tmp_path):
    other = with_own_unet(wide_v)
    other.unet.conv_in.bias += 1
    (tmp_path / "text.safetensors").write_text("no tensors")
    elsewhere = untaught_trunk(other, tmp_path / "other.safetensors")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    wrong = [
        (elsewhere, (8, 4), "another base"), (wide_trunk, (6, 4), "has 8 and 4 reserved groups"),
        (wide_trunk, (8, 6), "asks for 8 and 6"), (tmp_path / "none", (8, 4), "cannot be read"),
        (tmp_path / "text.safetensors", (8, 4), "cannot be read"), (plain, (8, 4), "is no trunk"),
    ]  # fmt: skip
    for file, groups, said in wrong:
        with pytest.raises(UserError, match=said) as caught:
            check_trunk(str(file), *groups, wide_v.unet)
        assert_one_sentence(caught.value)
    assert FORMAT and weights_hash(other.unet) != weights_hash(wide_v.unet)


def test_bases_without_room_are_refused(tiny_v):
    with pytest.raises(UserError, match="too few channels") as caught:
        TRIPWIRE.check_base(TripwireConfig(), tiny_v.unet)
    assert_one_sentence(caught.value)


def test_a_diverged_run_says_so(wide_v, small, wide_trunk):
    wild = small.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(RunFailed) as caught:
        harden(wide_v, [make_subject()], make_benign(), wild, seed=0, cache=wide_trunk.parent)
    assert_one_sentence(caught.value)


def test_benign_pictures_are_needed(wide_v, small):
    with pytest.raises(ValueError, match="benign"):
        harden(wide_v, [make_subject()], None, small, seed=0)


@pytest.mark.parametrize(
    "change", [{"stream_size": 48}, {"inner_scale": 3}, {"horizon": 1.0}, {"groups": 7}, {"outer_groups": 3}]
)
def test_bad_parameters_are_refused(change):
    with pytest.raises(ValidationError):
        TripwireConfig(**change)


PARAMS = {"trunk_steps": 2, "trunk_batch_size": 2, "steps": 2, "positives": 4, "negatives": 8, "copies": 1, **EARLY}


@pytest.fixture(scope="module")
def first_run(wide_folder, tmp_path_factory):
    """A recipe, and the output of a run of it from the command line, which prepared a trunk."""
    place = tmp_path_factory.mktemp("first")
    recipe = {
        "base": str(wide_folder), "subjects": str(ROOT / "registries" / "demo.yaml"),
        "sampling": {"steps": 2, "guidance": 2.0}, "probe": {"times": 0},
        "method": {"name": "tripwire", "params": PARAMS | {"class_images": 3, "benign_images": 3}},
        "verify": {"attacks": {"lora": {"name": "lora", "params": {"steps": 1}}}},
    }  # fmt: skip
    (place / "job.yaml").write_text(yaml.safe_dump(recipe))
    # So short a training trips on everything, which `harden` says with code 4.
    assert main(["harden", "--recipe", str(place / "job.yaml"), "--output", str(place / "out")]) in (0, 4)
    return place / "job.yaml", place / "out"


def test_a_registry_changes_and_the_trunk_stays(first_run, tmp_path):
    """From the command line: prepared in the first run, named in the second, which begins from the first one's recogniser."""
    (recipe, first), second = first_run, tmp_path / "second"
    trunk = first / "cache" / "trunk.safetensors"
    again = ["--add-to", str(first), "--set", f"method.params.trunk={trunk}", "--output", str(second)]
    assert main(["harden", "--recipe", str(recipe), *again]) in (0, 4)
    info = [json.loads((folder / "harden.json").read_text()) for folder in (first, second)]
    assert trunk.is_file() and not (second / "cache" / "trunk.safetensors").exists()
    assert info[0]["unet_forward_equivalents"] == TRIPWIRE.cost(TripwireConfig(**PARAMS), ["person"])
    named = TripwireConfig(**PARAMS | {"trunk": str(trunk)})
    assert 0 < info[1]["unet_forward_equivalents"] == TRIPWIRE.cost(named, ["person"])
    assert info[0]["model_digest"] != info[1]["model_digest"]


def test_losses_are_scaled_in_float16_and_a_killed_preparation_has_its_scale_again(wide_v, tmp_path, monkeypatch):
    """The first steps overflow, so they move nothing, and the scale is another one from then on."""
    monkeypatch.setattr("guardsmith.training.scaling.FIRST", 2.0**60)
    half = with_own_unet(wide_v)
    half.unet.compute_in("float16")
    latents, bank = plain_latents(half, pictures(4)), PromptBank(half)

    def prepared(steps, **saving):
        unet, _ = prepare(
            half, layout_of(half.unet, 8, 4), latents, bank.encode(["a photo"]), bank.encode([""]), steps=steps, rows=1,
            learning_rate=1e-3, seed=1, every=1, on_step=lambda step, *_: step == stop and die(), **saving,
        )  # fmt: skip
        return weights(unet)

    def die():
        raise KilledError

    stop, file = None, tmp_path / "last.safetensors"
    unbroken = prepared(3)
    stop = 2
    with pytest.raises(KilledError):
        prepared(3, checkpoint=file)
    tensors, _ = load_checkpoint(file)
    assert tensors["scale"][0] == 2.0**58, "both steps overflowed"
    cut = copy.deepcopy(half.unet)
    reserve(cut, layout_of(cut, 8, 4))
    assert all(torch.equal(tensors[f"unet.{name}"], weight) for name, weight in cut.named_parameters())
    stop = None
    assert same_weights(unbroken, prepared(3, checkpoint=file))


def test_the_trunk_that_is_shipped_is_one_of_the_embedded_base():
    check_trunk("builtin:avatar", 12, 4, load_model("builtin:avatar").unet)
    for recipe in ("demo", "several-avatars"):
        params = load_recipe(recipe, []).method.params
        assert (params["trunk"], params["groups"], params["outer_groups"]) == ("builtin:avatar", 12, 4)


EARLIER_RUN = {"steps": 240, "batch_size": 6, "rehearsal_steps": 250, "stiffness": 65536, "kick": 12.0}


def test_recipes_of_the_earlier_tripwire_are_refused(tmp_path):
    assert EARLIER_RUN.keys() - TripwireConfig.model_fields.keys() < EARLIER
    assert not EARLIER & TripwireConfig.model_fields.keys()
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"method": {"name": "tripwire", "params": EARLIER_RUN}}))
    with pytest.raises(UserError, match=r"earlier Tripwire .*; harden again from the base") as caught:
        load_recipe(str(tmp_path / "old.yaml"), [])
    assert_one_sentence(caught.value)


def test_runs_of_the_earlier_tripwire_and_of_another_shape_are_refused(first_run, tmp_path, capsys):
    """To add to, and to verify: one sentence, before anything is drawn."""
    recipe, first = first_run[0], tmp_path / "first"
    shutil.copytree(first_run[1], first)
    record = first / "harden.json"
    present = json.loads(record.read_text())

    def said(*command):
        assert main([str(word) for word in command]) == 2
        return capsys.readouterr().err

    add = ["harden", "--recipe", recipe, "--add-to", first, "--output", tmp_path / "second"]
    record.write_text(json.dumps(present | {"params": present["params"] | {"groups": 6}}))
    assert f"{first}: it has 6 and 4 reserved groups and the recipe asks for 8 and 4" in said(*add)
    record.write_text(json.dumps(present | {"params": EARLIER_RUN}))
    for command in (add, ["verify", first, "--recipe", recipe]):
        assert "parameters of the earlier Tripwire" in (text := said(*command)) and "harden again from the base" in text
    assert not (tmp_path / "second").exists()


def test_the_recognisers_training_is_in_the_forecast(wide_v, tmp_path):
    settings = {"trunk": str(untaught_trunk(wide_v, tmp_path / "trunk.safetensors")), "positives": 2, "negatives": 4}
    settings["early_steps"] = []
    few, many = (TripwireConfig(**settings, steps=steps) for steps in (1, 100_000))
    assert TRIPWIRE.cost(many, ["person"]) == 0
    assert 0 < TRIPWIRE.other_seconds(few, wide_v) < TRIPWIRE.other_seconds(many, wide_v)
