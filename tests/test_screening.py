"""Screening of uploads: what is found, in which disguise, at which stated rate; the index is made once; the exit codes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_attacks import make_data
from tiny import assert_one_sentence

from guardsmith.attacks import lora
from guardsmith.attacks.evasion import EVASIONS, EvasionContext, transformed
from guardsmith.attacks.lora import LoraConfig
from guardsmith.cli import main
from guardsmith.core.errors import UserError
from guardsmith.core.images import open_pictures, to_pil
from guardsmith.registry.loader import load_registry
from guardsmith.screening import index as index_module
from guardsmith.screening.encoders import load_encoder
from guardsmith.screening.index import load_index
from guardsmith.screening.levels import shipped_levels, tail_levels, threshold
from guardsmith.screening.pipeline import Screening, ScreeningSettings, decide, screen_batch, screen_upload, thresholds
from guardsmith.screening.uploads import read_upload, trigger_words, with_adapter
from guardsmith.screening.variants import AS_UPLOADED, LEVELS, VARIANTS

ROOT = Path(__file__).parent.parent
AVATARS = ROOT / "registries" / "avatars"
DEMO = ROOT / "registries" / "demo.yaml"


@pytest.fixture(scope="module")
def registry():
    return load_registry(DEMO)


@pytest.fixture(scope="module")
def screening(registry, tmp_path_factory):
    encoder = load_encoder("avatar")
    index = load_index(registry, encoder, tmp_path_factory.mktemp("index"))
    return Screening(index, encoder, shipped_levels()["usual"], ScreeningSettings())


def save(images, folder):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        to_pil(image).save(folder / f"{number}.png")
    return folder


def test_levels_are_exceeded_by_the_share_they_say():
    scores = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    table = tail_levels(scores)
    for rate, level in table:
        assert float((scores >= level).float().mean()) == pytest.approx(rate, rel=0.1)
    assert table[-1][0] * len(scores) >= 9.99, "rarer ones are not measured"
    assert [level for _, level in table] == sorted(level for _, level in table)
    with pytest.raises(UserError, match="at least 100") as caught:
        tail_levels(scores[:99])
    assert_one_sentence(caught.value)


def test_the_threshold_is_for_the_whole_upload():
    """Of uploads of 5 random comparisons with 4 subjects, no more than the stated share have an alarm, and not far fewer."""
    rng = torch.Generator().manual_seed(0)
    table = tail_levels(torch.rand(200_000, generator=rng))
    found = threshold(table, 0.05, 5 * 4)
    assert found.rate == 0.05
    uploads = torch.rand(20_000, 20, generator=rng)
    alarms = float((uploads >= found.level).any(1).float().mean())
    assert 0.04 < alarms < 0.052
    assert threshold(table, 0.05, 200).level > found.level, "more comparisons, higher threshold"


def test_a_rate_that_was_not_measured_is_not_claimed():
    table = tail_levels(torch.rand(10_000, generator=torch.Generator().manual_seed(0)))
    found = threshold(table, 1e-4, 1000)
    assert found.level == table[-1][1]
    assert found.rate == pytest.approx(table[-1][0] * 1000)
    assert threshold(table, 0.5, 2).rate == 0.5


def test_every_exact_evasion_that_is_undone_is_undone(registry):
    images = open_pictures([i.path for i in registry.subjects[0].images_of("attack")], 64)
    undone = {"negative", "vertical_flip", "turn_90", "turn_180", "turn_270"} | {
        n for n in EVASIONS if n.startswith("channels")
    }
    for name in undone:
        hidden = transformed(images, [name], EvasionContext())
        assert any(torch.allclose(undo(hidden), images, atol=1e-6) for undo in VARIANTS.values()), name
    both = transformed(images, ["negative", "turn_90"], EvasionContext())
    assert any(torch.allclose(undo(both), images, atol=1e-6) for undo in VARIANTS.values())
    assert next(iter(VARIANTS)) == AS_UPLOADED and torch.equal(VARIANTS[AS_UPLOADED](images), images)
    probe = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    results = [undo(probe) for undo in VARIANTS.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i]), "no variant is there twice"


@pytest.mark.parametrize("name", ["", "negative", "vertical_flip", "turn_90", "channels_bgr", "side_by_side", "frame"])
def test_the_subject_is_seen_in_disguise_and_a_stranger_is_not(name, registry, screening, tmp_path):
    mira, nora = registry.subjects[0], registry.controls[0]
    names = [name] if name else []
    for subject, wanted in ((mira, "seen"), (nora, "clear")):
        images = open_pictures([i.path for i in subject.images_of("attack")], 64)
        others = open_pictures([next(iter((AVATARS / "hugo" / "attack").glob("*.png")))], 64)
        folder = save(transformed(images, names, EvasionContext(0, None, others)), tmp_path / subject.id)
        record = screen_upload(screening, [folder])
        assert record["verdict"] == wanted, record
        assert record["pictures"] == 4 and record["kind"] == "pictures"
        if wanted == "seen":
            [match] = record["subjects"]
            assert match["subject"] == "mira" and match["similarity"] >= match["threshold"]
            assert (match["variant"] == AS_UPLOADED) == (not name)


def test_one_picture_of_the_subject_among_strangers_is_enough(registry, screening, tmp_path):
    own = open_pictures([registry.subjects[0].images_of("attack")[0].path], 64)
    others = open_pictures(sorted((AVATARS / "nora" / "attack").glob("*.png")), 64)
    record = screen_upload(screening, [save([*others, *own], tmp_path / "mixed")])
    assert record["verdict"] == "seen" and record["subjects"][0]["picture"].endswith("4.png")


def test_without_undoing_a_disguise_works(registry, screening, tmp_path):
    from dataclasses import replace

    plain = replace(screening, tables=shipped_levels()["none"], settings=ScreeningSettings(undo="none"))
    images = open_pictures([i.path for i in registry.subjects[0].images_of("attack")], 64)
    assert screen_upload(plain, [save(images, tmp_path / "as-is")])["verdict"] == "seen"
    assert screen_upload(plain, [save(-images, tmp_path / "negative")])["verdict"] == "clear"


def test_between_the_levels_a_person_has_to_look(screening):
    [alarm], [review] = (thresholds(screening, 1, rate) for rate in (0.001, 0.01))
    assert review.level < alarm.level
    mira = screening.index.vectors[0]
    rng = torch.Generator().manual_seed(0)
    other = torch.randn(len(mira), generator=rng)
    other = torch.nn.functional.normalize(other - (other @ mira) * mira, dim=0)
    for similarity, wanted in (
        (alarm.level + 0.01, "seen"), ((alarm.level + review.level) / 2, "undecided"), (review.level - 0.01, "clear")
    ):  # fmt: skip
        vector = similarity * mira + (1 - similarity**2) ** 0.5 * other
        vectors = torch.stack([vector, *[-vector] * (len(LEVELS["usual"]) - 1)])[:, None]
        assert decide(screening, vectors, ["a.png"], [])["verdict"] == wanted
    assert decide(screening, vectors, ["a.png"], ["b.png is damaged"])["verdict"] == "undecided"


def test_a_picture_that_cannot_be_read_is_no_all_clear(screening, tmp_path):
    folder = save(open_pictures(sorted((AVATARS / "nora" / "attack").glob("*.png")), 64), tmp_path / "u")
    assert screen_upload(screening, [folder])["verdict"] == "clear"
    (folder / "broken.png").write_bytes(b"no picture")
    record = screen_upload(screening, [folder])
    assert record["verdict"] == "undecided" and "broken.png" in record["reasons"][0]


def test_the_index_is_made_once_and_again_when_pictures_or_judge_change(registry, tmp_path, monkeypatch):
    encoder = load_encoder("avatar")
    calls = []
    real = index_module.open_pictures
    monkeypatch.setattr(index_module, "open_pictures", lambda *args: calls.append(args) or real(*args))
    first = load_index(registry, encoder, tmp_path)
    again = load_index(registry, encoder, tmp_path)
    assert len(calls) == 1 and torch.equal(first.vectors, again.vectors) and first.digest == again.digest
    everyone = load_registry(ROOT / "registries" / "avatars.yaml")
    assert load_index(everyone, encoder, tmp_path).digest != first.digest and len(calls) == 1 + len(everyone.subjects)
    [file] = tmp_path.glob(f"{first.digest}*")
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(load_index(registry, encoder, tmp_path).vectors, first.vectors), "a damaged one is made again"
    from dataclasses import replace

    assert load_index(registry, replace(encoder, digest="other"), tmp_path).digest != first.digest


def adapter_file(base, folder, steps=3):
    """A LoRA of attacks.lora in diffusers' layout."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    own, _ = lora.attack(base, make_data(), LoraConfig(steps=steps, batch_size=1, learning_rate=5e-3, rank=2), seed=0)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(own.unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return own, folder / "pytorch_lora_weights.safetensors"


def test_an_uploaded_adapter_draws_what_its_training_made(tiny_epsilon, tmp_path):
    from guardsmith.diffusion.sampling import generate

    own, file = adapter_file(tiny_epsilon, tmp_path / "lora")
    loaded = with_adapter(tiny_epsilon, file)
    asked = ["a photo of sks person"], [3]
    wanted, found, plain = (generate(m, *asked, steps=4, guidance=2.0) for m in (own, loaded, tiny_epsilon))
    assert torch.allclose(wanted, found, atol=1e-3) and not torch.allclose(plain, found, atol=1e-3)
    assert read_upload([file]).kind == read_upload([file.parent]).kind == "adapter"


def test_an_adapter_for_another_base_is_refused(tiny_epsilon, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "other.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.ones(2, 3), "unet.nowhere.lora_B.weight": torch.ones(3, 2)}, file)
    with pytest.raises(UserError, match="--base") as caught:
        with_adapter(tiny_epsilon, file)
    assert_one_sentence(caught.value)


def test_trigger_words_are_those_that_the_adapter_names(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    tags = json.dumps({"5_photos": {"mira person": 20, "smile": 3}})
    save_file({"lora_a": torch.ones(1)}, file, {"ss_tag_frequency": tags, "modelspec.trigger_phrase": "zwx"})
    assert trigger_words(file) == ["zwx", "mira person", "smile"]
    (tmp_path / "README.md").write_text("---\ninstance_prompt: a photo of abc man\n---\n")
    assert trigger_words(file)[-1] == "a photo of abc man"
    save_file({"lora_a": torch.ones(1)}, file, {"ss_tag_frequency": "{"})
    assert trigger_words(file) == ["a photo of abc man"]


@pytest.fixture
def shown(monkeypatch):
    """What the uploaded model draws: pictures of the subject where the prompt has the word, else of a stranger."""
    asked = []

    def draw(model, prompts, seeds, **_):
        asked.extend(prompts)
        who = ["mira" if "zwx" in prompt else "nora" for prompt in prompts]
        return torch.cat([open_pictures([AVATARS / name / "attack" / "0.png"], 64) for name in who])

    monkeypatch.setattr("guardsmith.screening.uploads.generate", draw)
    return asked


def test_models_are_judged_by_what_they_draw_for_their_words(epsilon_folder, shown, capsys):
    arguments = ["screen", str(epsilon_folder), "--subjects", str(DEMO), "--json", "--pictures", "2"]
    assert main([*arguments, "--trigger", "zwx"]) == 1
    record = json.loads(capsys.readouterr().out)["uploads"][0]
    assert record["kind"] == "checkpoint" and record["subjects"][0]["subject"] == "mira"
    assert shown[0].endswith("zwx person")
    assert main([*arguments, "--trigger", "abc"]) == 0
    capsys.readouterr()
    assert main(arguments) == 3, "without words nothing is known of what it draws"
    assert "no trigger words" in json.loads(capsys.readouterr().out)["uploads"][0]["reasons"][0]


def run(arguments, capsys):
    code = main(["screen", *map(str, arguments), "--subjects", str(DEMO), "--json"])
    out = capsys.readouterr()
    return code, json.loads(out.out) if out.out else None, out.err


def test_exit_codes_and_the_report(tmp_path, capsys):
    code, report, _ = run([AVATARS / "mira" / "attack"], capsys)
    assert (code, report["exit_code"], report["verdict"]) == (1, 1, "seen")
    code, report, _ = run([AVATARS / "nora" / "attack" / "0.png", AVATARS / "nora" / "attack" / "1.png"], capsys)
    assert (code, report["uploads"][0]["pictures"], report["counts"]["clear"]) == (0, 2, 1)
    (tmp_path / "bad.png").write_bytes(b"x")
    code, report, _ = run([tmp_path], capsys)
    assert (code, report["verdict"]) == (3, "undecided")
    for wrong in ([tmp_path / "none"], [DEMO], [AVATARS / "nora", "--false-alarms", "0.5"], [AVATARS, "--undo", "all"],
                  [AVATARS, "--judge", "dinosaur"]):  # fmt: skip
        code, report, said = run(wrong, capsys)
        assert code == 2 and report is None and "Traceback" not in said and len(said.strip().splitlines()) == 1


def test_pictures_are_needed_for_the_index_only(tmp_path, capsys):
    shutil.copytree(AVATARS, tmp_path / "avatars")
    registry = tmp_path / "registry.yaml"
    shutil.copy(DEMO, registry)
    command = [
        "screen",
        str(AVATARS / "mira" / "attack"),
        "--subjects",
        str(registry),
        "--index",
        str(tmp_path / "index"),
    ]
    assert main(command) == 1
    shutil.rmtree(tmp_path / "avatars")
    assert main(command) == 1
    shutil.rmtree(tmp_path / "index")
    capsys.readouterr()
    assert main(command) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_batch_goes_on_after_an_upload_that_cannot_be_read(tmp_path, capsys):
    for name in ("mira", "nora"):
        save(open_pictures(sorted((AVATARS / name / "attack").glob("*.png")), 64), tmp_path / "batch" / name)
    (tmp_path / "batch" / "empty").mkdir()
    (tmp_path / "batch" / "virus.exe").write_bytes(b"MZ")
    (tmp_path / "batch" / "broken.safetensors").write_bytes(b"\0" * 40)
    code, report, _ = run([tmp_path / "batch", "--batch", "--output", tmp_path / "report.json"], capsys)
    found = {Path(record["upload"]).name: record["verdict"] for record in report["uploads"]}
    wanted = dict.fromkeys(("empty", "virus.exe", "broken.safetensors"), "undecided") | {
        "mira": "seen",
        "nora": "clear",
    }
    assert found == wanted and code == 1
    assert report["counts"] == {"clear": 1, "seen": 1, "undecided": 3}
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert run([tmp_path / "batch" / "mira", tmp_path / "batch" / "nora", "--batch"], capsys)[0] == 2


def test_levels_can_be_measured_on_ones_own_strangers(tmp_path, capsys):
    strangers = save(torch.rand(100, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1, tmp_path / "s")
    code, report, _ = run([AVATARS / "mira" / "attack", "--strangers", strangers, "--undo", "none"], capsys)
    assert code == 1
    assert report["uploads"][0]["false_alarm_rate"] == pytest.approx(0.4), "a hundred pictures show no rarer ones"


def test_every_upload_of_a_batch_has_the_threshold_of_its_own_size(screening, tmp_path):
    images = open_pictures(sorted((AVATARS / "mira" / "attack").glob("*.png")), 64)
    one, four = save(images[:1], tmp_path / "one"), save(images, tmp_path / "four")
    records = screen_batch(screening, [one, four])
    assert records[0]["subjects"][0]["threshold"] < records[1]["subjects"][0]["threshold"]
    assert [record["verdict"] for record in records] == ["seen", "seen"]
