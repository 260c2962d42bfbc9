"""DINO and CLIP as judges, on encoders of a few thousand random weights: what is embedded, scored, refused and measured."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from test_harden import write_registry
from test_policy import written
from tiny import assert_one_sentence, make_tokenizer, pictures
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from guardsmith.cli import app as cli
from guardsmith.config.deployability import ADAPTERS
from guardsmith.config.judge import JudgeSpec
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.evaluation.deployability import merges
from guardsmith.gate import policy
from guardsmith.gate.policy import load_policy, measure_policy
from guardsmith.metrics import Judge, load_judge
from guardsmith.metrics.vision import VisionEncoder, load_prompt_fit
from guardsmith.registry.loader import load_registry
from guardsmith.reports.report import Report

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders of a small DINO and a small CLIP, by kind."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "dino": Dinov2Model(Dinov2Config(**SMALL)),
            "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, intermediate_size=32, projection_dim=8)),
        }
    for kind, model in models.items():
        made[kind] = tmp_path_factory.mktemp("encoders") / kind
        model.save_pretrained(made[kind])
        (made[kind] / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return made


@pytest.fixture(scope="session")
def both_encoders(tmp_path_factory):
    """Folder of a small CLIP with both of its encoders and a tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("encoders") / "both", make_tokenizer()
    towers = SMALL | {"intermediate_size": 32, "projection_dim": 8}
    text = towers | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=towers, projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def test_pictures_and_prompts_are_compared_as_clip_does(both_encoders):
    images, prompts = pictures(3), ["a photo of sks", "to", "a photo of " + "a dog " * 20]
    images = torch.nn.functional.interpolate(images, (28, 28))
    found = load_prompt_fit(str(both_encoders))(images, prompts)
    scaled = (images / 2 + 0.5 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    clip = CLIPModel.from_pretrained(both_encoders).eval()
    for image, prompt, score in zip(scaled, prompts, found, strict=True):
        asked = make_tokenizer()(prompt, return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            out = clip(pixel_values=image[None], **asked)
        assert score == pytest.approx(float(out.logits_per_image / clip.logit_scale.detach().exp()), abs=1e-5)
    images[1] = float("nan")
    assert [score is None for score in load_prompt_fit(str(both_encoders))(images, prompts)] == [False, True, False]


def test_weights_that_are_missing_or_of_another_shape_are_not_made_up(encoders, both_encoders, tmp_path):
    """The first has no text encoder; the second says that it is wider than it is."""
    with pytest.raises(UserError, match="it has no ") as caught:
        load_prompt_fit(str(encoders["clip"]))
    assert_one_sentence(caught.value)
    shutil.copytree(both_encoders, tmp_path / "wider")
    config = json.loads((both_encoders / "config.json").read_text())
    config["vision_config"]["projection_dim"] = 16
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_judge("clip", str(tmp_path / "wider"))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_pictures_are_embedded_as_the_encoder_was_trained(encoders, kind):
    encoder = VisionEncoder(kind, str(encoders[kind]))
    images = torch.nn.functional.interpolate(pictures(3), (28, 28))
    scaled = (images / 2 + 0.5 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        if kind == "dino":
            own = Dinov2Model.from_pretrained(encoders[kind])(pixel_values=scaled).last_hidden_state[:, 0]
        else:
            own = CLIPVisionModelWithProjection.from_pretrained(encoders[kind])(pixel_values=scaled).image_embeds
    own = own / own.norm(dim=1, keepdim=True)
    assert torch.allclose(encoder.embed(images), own, atol=1e-5)
    assert torch.allclose(encoder.features(images), own * own.shape[1] ** 0.5, atol=1e-4)
    large = pictures(3)
    assert encoder.embed(large).shape == own.shape
    found = encoder.similarity(images, images[:2])
    assert found == pytest.approx((own @ own[:2].T).mean(1).tolist(), abs=1e-5)


def test_what_is_not_finite_is_not_scored(encoders):
    judge = load_judge("dino", str(encoders["dino"]))
    images = pictures(3)
    images[1, 0, 0, 0] = float("nan")
    found = judge.similarity(images, pictures(2, 5))
    assert [score is None for score in found] == [False, True, False]
    assert judge.fidelity is None


def test_an_encoder_that_is_not_there_is_a_sentence(encoders, tmp_path):
    with pytest.raises((UserError, RunFailed)) as caught:
        load_judge("dino", "nobody/no-such-encoder")
    assert_one_sentence(caught.value)
    assert "nobody/no-such-encoder" in str(caught.value)
    bare = tmp_path / "pickled"
    bare.mkdir()
    (bare / "config.json").write_text((encoders["dino"] / "config.json").read_text())
    (bare / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(UserError, match="safetensors") as caught:
        load_judge("dino", str(bare))
    assert_one_sentence(caught.value)


def test_levels_by_hand(monkeypatch):
    """Three persons whose pictures have a number each; similarity is 1 - distance."""
    registry = load_registry("registries/avatars.yaml")
    people = [subject for subject in (*registry.subjects, *registry.controls) if subject.class_noun == "person"][:3]
    value = {str(image.path): 0.3 * k for k, subject in enumerate(people) for image in subject.images}
    monkeypatch.setattr(policy, "open_pictures", lambda paths, size: torch.tensor([value[str(path)] for path in paths]))

    def similarity(images, references):
        return [float((1 - (image - references).abs()).mean()) for image in images]

    monkeypatch.setattr(policy, "load_judge", lambda *_: Judge(similarity, None))
    three = registry.__class__(**{**vars(registry), "subjects": people, "controls": []})
    found = measure_policy(three, JudgeSpec(name="dino"), 64)
    # pairs: .7 four times, .4 twice; the 95th percentile is .7
    assert asdict(found.classes["person"]) == pytest.approx({"chance": 0.6, "chance_high": 0.7, "genuine": 1.0})
    assert found.measured_on == "avatars.yaml: 3 of class person"
    assert found.judge.name == "dino"
    one = registry.__class__(**{**vars(registry), "subjects": people[:1], "controls": []})
    with pytest.raises(UserError, match="one subject only") as caught:
        measure_policy(one, JudgeSpec(name="dino"), 64)
    assert_one_sentence(caught.value)
    monkeypatch.setattr(policy, "load_judge", lambda *_: Judge(lambda images, _: [0.5] * len(images), None))
    with pytest.raises(UserError, match="cannot tell") as caught:
        measure_policy(three, JudgeSpec(name="clip"), 64)
    assert_one_sentence(caught.value)


def test_levels_on_the_command_line(encoders, capsys, tmp_path):
    """The embedded encoder tells the embedded subjects apart; its levels make a policy that can be read again."""
    code = cli.main(["policy", "--judge", "avatar", "--subjects", "registries/avatars.yaml", "--size", "64"])
    told = capsys.readouterr()
    assert code == 0, told.err
    (tmp_path / "policy.yaml").write_text(told.out)
    found = load_policy(tmp_path / "policy.yaml")
    assert set(found.classes) == {"person", "robot", "character"}
    assert all(levels.genuine > 0.4 > levels.chance for levels in found.classes.values())
    for wrong in (["--judge", "dino"], ["--subjects", "registries/avatars.yaml"], ["--judge-model", "x"]):
        assert cli.main(["policy", *wrong]) == 2
        assert "belong together" in capsys.readouterr().err
    assert cli.main(["policy", "--judge", "eyes", "--subjects", "registries/avatars.yaml"]) == 2
    assert "avatar, dino, clip" in capsys.readouterr().err


def test_the_judge_is_part_of_the_policys_digest(tmp_path):
    plain = load_policy(written(tmp_path))
    assert load_policy(written(tmp_path, judge={"name": "dino"})).digest != plain.digest
    with pytest.raises(UserError, match="judge"):
        load_policy(written(tmp_path, judge={"name": "eyes"}))


def test_a_base_of_another_kind_is_verified_by_such_a_judge(
    encoders, both_encoders, v_folder, tmp_path, capsys, monkeypatch, few_steps, nothing_compiled
):
    """End to end on a base that the embedded judges cannot read; attacks and pictures too few to mean anything."""
    registry = write_registry(tmp_path / "registry", seed=7)
    monkeypatch.setattr(merges, "SIBLING_STEPS", 2)
    attack = {"name": "lora", "params": {"steps": 2, "batch_size": 1}}
    few = {kind: {"steps": 20, "batch_size": 1, "learning_rate": 1e-2} for kind in ADAPTERS}
    everyday = {"images": 8, "adapter_images": 8, "adapters": few, "compile": "eager"}
    asked = {
        "base": str(v_folder), "subjects": str(registry), "sampling": {"steps": 2, "batch": 8, "guidance": 2.0},
        "verify": {"attacks": {"lora": attack}, "identifiers": ["zwx"], "images_per_unit": 8, "class_images": 2,
                   "benign_images": 12, "deployability": everyday},
    }  # fmt: skip
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(asked))
    command = ["verify", str(output), "--recipe", str(recipe), "--model", str(v_folder), "--workers", "1"]
    levels = {"person": {"chance": -1.0, "chance_high": -0.99, "genuine": 0.9}}
    judge = {"name": "dino", "model": str(encoders["dino"]), "clip_t": str(both_encoders)}
    file = written(tmp_path, name="of this test", judge=judge, classes=levels)
    assert cli.main([*command, "--policy", str(file)]) == 1, capsys.readouterr().err
    report = Report.load(output)
    assert report.policy.judge.model_dump() == judge
    protected = next(check for check in report.checks if check.name == "protected")
    assert protected.status == "fail" and -1 <= protected.value <= 1
    [unit] = (output / "verify/hardened/mira/lora").glob("*/*/*")
    told = json.loads((unit / "attack.json").read_text())
    assert told["judge"] == {"name": "dino", "model": judge["model"], "learnt": pytest.approx(-0.05)}
    assert report.utility.fidelity_base is None and report.utility.kid_base > 0
    benign = [check.name for check in report.checks if check.name.startswith("benign")]
    assert benign == [f"benign prompts ({what})" for what in ("KID", "collapsed", "CLIP-T")], "traits cannot be read"
    assert next(check for check in report.checks if "CLIP-T" in check.name).value == 0, "the model is its base"
    failed = [case for case in report.deployability if case.error and case.check != "controlnet"]
    # A control is named by nobody, and what this random base learns in a few steps may be nothing.
    assert all("learns nothing there" in case.error for case in failed), failed
    assert {case.check for case in report.deployability if not case.error} == {
        "precision", "adapters", "merges", "quantization", "samplers",
    }  # fmt: skip
    assert report.utility.clip_t_base == report.utility.clip_t_hardened and len(report.utility.clip_t_base) == 12
    assert "which knows neither" in (output / "verify/report.html").read_text()
