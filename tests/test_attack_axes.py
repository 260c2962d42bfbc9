"""What attackers vary besides the attack: their pictures, somebody else first, adapters made for another model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from test_attacks import make_data
from tiny import assert_one_sentence, pictures, same_weights, some_rows, trained, weights

from guardsmith.attacks import ATTACKS, FIRST_STAGE_SEED, draw_during_attack, dreambooth, lora
from guardsmith.attacks.augmentations import CHANGES
from guardsmith.attacks.dreambooth import DreamBoothConfig
from guardsmith.attacks.lora import LoraConfig, carry_adapters, merge_adapters
from guardsmith.config.loading import load_recipe
from guardsmith.core.errors import UserError
from guardsmith.core.images import to_pil, to_tensor
from guardsmith.diffusion.losses import predict
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.evaluation.planning import TargetModel, attack_images, plan_units, stranger_to
from guardsmith.evaluation.runs import run_unit
from guardsmith.evaluation.units import scores_of
from guardsmith.models.checkpoint import load_model
from guardsmith.registry.loader import load_registry

ROOT = Path(__file__).parent.parent
PARAMS = {"steps": 3, "batch_size": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def registry():
    return load_registry(ROOT / "registries" / "avatars.yaml")


def striped(size=128):
    """Black and white columns of two pixels, the left half dark."""
    picture = Image.new("RGB", (size, size), "black")
    for x in range(0, size, 4):
        picture.paste((255, 255, 255) if x >= size // 2 else (60, 60, 60), (x, 0, x + 2, size))
    return picture


def test_what_is_done_to_pictures():
    before = to_tensor(striped())
    after = {name: to_tensor(change(striped())) for name, change in CHANGES.items()}
    assert all(picture.shape == before.shape for picture in after.values())
    assert torch.equal(after["flipped"], before.flip(2))
    assert after["blurred"].mean() == pytest.approx(before.mean().item(), abs=0.01)
    assert after["blurred"][:, :, 70:120].std() < 0.75 * before[:, :, 70:120].std()
    photo = pictures(1, 3)[0]
    saved = to_tensor(CHANGES["jpeg"](to_pil(photo)))
    assert 0 < (saved - photo).abs().mean() < 0.2


def test_the_attackers_pictures(registry):
    everyone = [*registry.subjects, *registry.controls]
    mira = registry.subjects[0]
    assert attack_images(mira, "unseen", everyone) == mira.images_of("attack")
    assert attack_images(mira, "flipped", everyone) == mira.images_of("attack")
    assert attack_images(mira, "hardened_on", everyone) == mira.images_of("harden")
    control = registry.controls[0]
    assert attack_images(control, "hardened_on", everyone) == control.images_of("attack")
    own, *others = attack_images(mira, "mixed", everyone)
    assert own == mira.images_of("attack")[0]
    foreign = {image: s for s in everyone for image in s.images if s.id != mira.id}
    assert len({image.sha256 for image in others}) == 3
    assert all(foreign[image].class_noun == mira.class_noun and image.split == "attack" for image in others)
    [robot] = [s for s in everyone if s.class_noun == "robot"][:1]
    with pytest.raises(UserError, match="needs 3 pictures of others of class robot") as caught:
        attack_images(robot, "mixed", [mira, robot])
    assert_one_sentence(caught.value)
    nora = everyone[1] if everyone[1].class_noun == mira.class_noun else registry.controls[0]
    one, two, three = attack_images(mira, "mixed", [mira, nora])[1:]
    assert (one, two, three) == nora.images_of("attack")[:3], "one other has to do"


def test_the_attackers_class_noun_is_in_prompts_and_class_pictures_and_no_level(registry, both, monkeypatch):
    from guardsmith.evaluation import runs as matrix

    found = units_of(registry, both, class_noun="character")
    unit = found["hardened", "other", "mira"]
    assert (unit.class_noun, unit.noun, unit.settings["called"]) == ("person", "character", "character")
    assert "class-character-" in unit.class_pictures and "class-person-" not in unit.class_pictures
    plain = found["hardened", "plain", "mira"]
    assert unit.digest != plain.digest and "called" not in plain.settings
    by_registry = units_of(registry, both, class_noun="person")["hardened", "other", "mira"]
    assert by_registry.digest == plain.digest, "the registry's own word is no other one"
    asked = []

    def spy(model, attack, params, data, **_):
        asked.append(data.class_noun)
        return {3: torch.zeros(unit.images, 3, 64, 64)}, [1.0]

    monkeypatch.setattr(matrix, "draw_during_attack", spy)
    run_unit(unit)
    assert asked == ["character"]
    told = json.loads((unit.folder / "scores.json").read_text())
    assert told["prompts"][0] == "a photo of zwx character"


@pytest.mark.parametrize("name", ["dreambooth", "cdl", "custom_diffusion", "unlearn_first"])
def test_the_instance_prompt_is_the_attackers(tiny_v, name, monkeypatch):
    """What is encoded: the template's words, and the class prompt as ever."""
    attack, said = ATTACKS[name], set()
    real = PromptBank.tokens

    def spy(self, prompts):
        said.update(prompts)
        return real(self, prompts)

    monkeypatch.setattr(PromptBank, "tokens", spy)
    config = attack.config(steps=1, batch_size=1, template="the {class_noun} {identifier} at sea")
    attack.run(tiny_v, make_data(), config, seed=0)
    word = "<sks>" if name == "custom_diffusion" else "sks"
    assert any(f"the person {word} at sea" in prompt for prompt in said), said
    assert not any(f"a photo of {word}" in prompt for prompt in said)
    assert any("a photo of person" in prompt for prompt in said)


@pytest.mark.parametrize(
    "template", ["a photo", "{identifier}", "{identifier} {class_noun} {x}", "{identifier} {class_noun} }"]
)
def test_an_instance_prompt_without_its_words_is_refused(template):
    attack = {"name": "lora", "params": {"template": template}}
    with pytest.raises(UserError, match="template") as caught:
        load_recipe("demo", ["verify.attacks=" + json.dumps({"some": attack})])
    assert_one_sentence(caught.value)


def test_two_stages_need_somebody_else(registry):
    mira, other = registry.subjects[:2]
    assert stranger_to(mira, [mira, other, mira]) is other
    with pytest.raises(UserError, match="another subject beside mira") as caught:
        stranger_to(mira, [mira])
    assert_one_sentence(caught.value)


def units_of(registry, target, **changes):
    """Units of LoRA as it is and with these changes, by side."""
    attacks = {"plain": {"name": "lora", "params": PARAMS}, "other": {"name": "lora", "params": PARAMS} | changes}
    few = ["verify.identifiers=[zwx]", "verify.class_images=0", "verify.images_per_unit=4", "sampling.steps=2"]
    recipe = load_recipe("demo", ["verify.attacks=" + json.dumps(attacks), *few])
    return {(unit.side, unit.label, unit.subject): unit for unit in plan_units(registry, recipe, target)}


@pytest.fixture
def both(tmp_path):
    base = load_model("builtin:avatar")
    return {side: TargetModel(base, f"sha256:{side}", tmp_path / side) for side in ("base", "hardened")}


def test_an_attack_that_was_changed_is_run_again(registry, both, monkeypatch):
    before = units_of(registry, both)["base", "plain", "mira"]
    digest = before.digest
    monkeypatch.setitem(ATTACKS, "lora", ATTACKS["lora"]._replace(revision=2))
    assert before.digest != digest
    assert before.settings["revision"] == 2


def test_what_is_not_asked_for_leaves_no_trace_in_the_settings(registry, both):
    """Units that ran before there were axes are still those of the same settings."""
    found = units_of(registry, both)
    unit = found["base", "plain", "mira"]
    assert not {"change", "first", "trained_on", "precision"} & unit.settings.keys()
    assert unit.digest == found["base", "other", "mira"].digest


@pytest.mark.parametrize(
    "change",
    [{"data": "hardened_on"}, {"data": "mixed"}, {"data": "blurred"}, {"two_stage": True}, {"precision": "bfloat16"}],
)
def test_each_axis_is_another_unit_without_paths_in_its_settings(registry, both, change):
    found = units_of(registry, both, **change)
    for side in ("base", "hardened"):
        unit = found[side, "other", "mira"]
        assert unit.digest != found[side, "plain", "mira"].digest
        assert str(ROOT) not in json.dumps(unit.settings)


def test_the_first_stage_is_somebody_else(registry, both):
    found = units_of(registry, both, two_stage=True)
    everyone = {subject.id: subject for subject in (*registry.subjects, *registry.controls)}
    for (_, label, subject), unit in found.items():
        if label == "other":
            used = [s.id for s in everyone.values() if str(s.images_of("attack")[0].path) in unit.first["images"]]
            assert len(used) == 1 and used != [subject]
            assert used[0] in {control.id for control in registry.controls}
            assert unit.first["class_noun"] == everyone[used[0]].class_noun


def test_adapters_made_for_the_base_are_those_of_the_plain_attack_there(registry, both):
    found = units_of(registry, both, trained_on="base")
    assert found["base", "other", "mira"].digest == found["base", "plain", "mira"].digest
    unit = found["hardened", "other", "mira"]
    assert unit.trained_on == {"model": both["base"].model.place, "digest": "sha256:base"}
    assert unit.model_digest == "sha256:hardened"
    assert unit.settings["trained_on"] == "sha256:base"
    found = units_of(registry, both, trained_on="hardened")
    assert found["hardened", "other", "mira"].digest == found["hardened", "plain", "mira"].digest
    assert found["base", "other", "mira"].settings["trained_on"] == "sha256:hardened"


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"name": "textual_inversion", "two_stage": True}, "dreambooth and lora only"),
        ({"name": "dreambooth", "trained_on": "base"}, "lora only"),
        ({"name": "lora", "trained_on": "base", "two_stage": True}, "in one stage"),
        ({"name": "lora", "data": "stolen"}, "unseen"),
    ],
)
def test_what_is_not_possible_is_refused(attack, said):
    with pytest.raises(UserError, match=said) as caught:
        load_recipe("demo", ["verify.attacks=" + json.dumps({"some": attack})])
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_merged_adapters_predict_the_same_and_are_gone(tiny_v, kind):
    config = LoraConfig(**PARAMS | {"learning_rate": 1e-2}, rank=2, kind=kind)
    own, _ = lora.attack(tiny_v, make_data(), config, seed=0)
    rows = some_rows(tiny_v, pictures(3))
    with torch.no_grad():
        before = predict(own.unet, tiny_v.scheduler, rows)
        untouched = predict(tiny_v.unet, tiny_v.scheduler, rows)
        merge_adapters(own.unet)
        after = predict(own.unet, tiny_v.scheduler, rows)
    assert (before - untouched).abs().max() > 1e-3
    assert (after - before).abs().max() < 1e-4
    assert not [m for m in own.unet.modules() if isinstance(m, BaseTunerLayer)]
    assert weights(own.unet).keys() == weights(tiny_v.unet).keys()


@pytest.mark.parametrize("text", [False, True])
def test_adapters_do_on_another_model_what_they_would_have_done_there(tiny_v, text):
    config = LoraConfig(**PARAMS | {"learning_rate": 1e-2}, rank=2, train_text_encoder=text)
    own, _ = lora.attack(tiny_v, make_data(), config, seed=0)
    rows = some_rows(tiny_v, pictures(3))
    same = carry_adapters(own, tiny_v, config)
    with torch.no_grad():
        assert torch.equal(predict(same.unet, tiny_v.scheduler, rows), predict(own.unet, tiny_v.scheduler, rows))
    other = replace(tiny_v, unet=trained(tiny_v))
    kept = weights(other.unet)
    moved = carry_adapters(own, other, config)
    assert same_weights(kept, weights(other.unet))
    layers = [name for name, module in own.unet.named_modules() if isinstance(module, BaseTunerLayer)]
    merge_adapters(own.unet)
    merge_adapters(moved.unet)
    for name in layers:
        learnt = own.unet.get_submodule(name).weight - tiny_v.unet.get_submodule(name).weight
        added = moved.unet.get_submodule(name).weight - other.unet.get_submodule(name).weight
        assert torch.allclose(added, learnt, atol=1e-6)
    changed = not same_weights(weights(moved.text_encoder), weights(tiny_v.text_encoder))
    assert changed == text


@pytest.mark.parametrize(
    ("attack", "module", "config"), [("dreambooth", dreambooth, DreamBoothConfig), ("lora", lora, LoraConfig)]
)
def test_two_stages_are_one_attack_after_the_other(tiny_v, attack, module, config):
    other = replace(make_data(), images=pictures(3, 40), identifier="ktn")
    sampling = {"steps": 3, "guidance": 3.0}
    drawn, losses = draw_during_attack(
        tiny_v,
        attack,
        PARAMS,
        make_data(),
        evaluate_at=[1, 3],
        seed=4,
        count=2,
        sampling=sampling,
        first=other,
        first_steps=2,
    )
    between, _ = module.attack(tiny_v, other, config(**PARAMS | {"steps": 2}), seed=4 + FIRST_STAGE_SEED)
    if attack == "lora":
        merge_adapters(between.unet)
    wanted, again = draw_during_attack(
        between, attack, PARAMS, make_data(), evaluate_at=[1, 3], seed=4, count=2, sampling=sampling
    )
    assert losses == again and len(losses) == 3
    assert all(torch.equal(drawn[look], wanted[look]) for look in (1, 3))
    plain, _ = draw_during_attack(
        tiny_v, attack, PARAMS, make_data(), evaluate_at=[3], seed=4, count=2, sampling=sampling
    )
    assert not torch.equal(plain[3], drawn[3])


def test_a_unit_with_adapters_of_the_base_and_changed_pictures_runs(registry, both):
    unit = units_of(registry, both, trained_on="base", data="jpeg")["hardened", "other", "mira"]
    run_unit(unit)
    assert len(scores_of(unit)[1]) == unit.images
    told = json.loads((unit.folder / "attack.json").read_text())
    assert (told["change"], told["trained_on"]) == ("jpeg", "sha256:base")


def test_an_attacker_in_half_precision_trains_and_draws_so_and_nobody_after_it(registry, both, monkeypatch):
    unit = units_of(registry, both, precision="bfloat16")["hardened", "other", "mira"]
    plain = units_of(registry, both)["hardened", "other", "mira"]
    seen = []
    monkeypatch.setattr(
        "guardsmith.evaluation.runs.draw_during_attack",
        lambda model, *args, **more: seen.append(model) or draw_during_attack(model, *args, **more),
    )
    for each in (unit, plain):
        run_unit(each)
    assert [model.unet.precision for model in seen] == [torch.bfloat16, torch.float32]
    assert scores_of(unit)[1] != scores_of(plain)[1]
    assert json.loads((unit.folder / "attack.json").read_text())["precision"] == "bfloat16"


def test_adapters_of_the_base_draw_in_half_precision_on_the_other_model_too(registry, both, monkeypatch):
    unit = units_of(registry, both, trained_on="base", precision="bfloat16")["hardened", "other", "mira"]
    seen = []
    monkeypatch.setattr(
        "guardsmith.evaluation.runs.draw_during_attack",
        lambda model, *args, onto, **more: (
            seen.extend((model, onto)) or draw_during_attack(model, *args, onto=onto, **more)
        ),
    )
    run_unit(unit)
    assert [model.unet.precision for model in seen] == [torch.bfloat16, torch.bfloat16]
