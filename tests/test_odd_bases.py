"""Bases as they come: what cannot be used is refused in a sentence by `harden --dry-run` and `plan`, as `harden` itself does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import assert_one_sentence, edit_json, make_sd3

from guardsmith.cli.app import main
from guardsmith.core.errors import UserError
from guardsmith.hardening.compatibility import check_class_pictures, check_computes
from guardsmith.models.checkpoint import load_model

ROOT = Path(__file__).parent.parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULE = "scheduler/scheduler_config.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3438167536\n"


@pytest.fixture
def base(epsilon_folder, tmp_path):
    return Path(shutil.copytree(epsilon_folder, tmp_path / "base"))


def planned(base, tmp_path, capsys):
    code = main(["harden", "--recipe", "apdm-sd15", "--base", str(base), "--subjects", str(ROOT / "registries/demo.yaml"),
                 "--output", str(tmp_path / "out"), "--dry-run"])  # fmt: skip
    return code, capsys.readouterr().err


def shard(base, *, index=True, lose=False):
    tensors = load_file(base / WEIGHTS)
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, base / "unet" / name)
    (base / WEIGHTS).unlink()
    if index:
        where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        text = json.dumps({"metadata": {}, "weight_map": where})
        (base / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(text)
    if lose:
        (base / "unet" / names[1]).unlink()


def as_variant(base, name):
    (base / WEIGHTS).rename(base / WEIGHTS.replace(".safetensors", f".{name}.safetensors"))


def quantize(base):
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(base / WEIGHTS).items()}
    save_file(tensors, base / WEIGHTS)


def with_schedule(**changes):
    return lambda base: edit_json(base / SCHEDULE, **changes)


def without(key):
    def edit(base):
        schedule = json.loads((base / SCHEDULE).read_text())
        del schedule[key]
        (base / SCHEDULE).write_text(json.dumps(schedule))

    return edit


ODD = {
    "pointer of Git LFS": (lambda base: (base / WEIGHTS).write_text(POINTER), [WEIGHTS, "git lfs pull"]),
    "pointer in place of a configuration": (lambda base: (base / "vae/config.json").write_text(POINTER), ["vae", "git lfs pull"]),
    "lost shard": (lambda base: shard(base, lose=True), ["unet", "00002-of-00002", "missing"]),
    "shards without an index": (lambda base: shard(base, index=False), ["unet", "00001-of-00002", "index"]),
    "fp16 only": (lambda base: as_variant(base, "fp16"), ["unet", "fp16", "variant"]),
    "non-EMA only": (lambda base: as_variant(base, "non_ema"), ["unet", "non_ema", "variant"]),
    "fp8": (quantize, [WEIGHTS, "quantized"]),
    "cut short": (lambda base: (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:9000]), [WEIGHTS, "truncated"]),
    "empty": (lambda base: (base / WEIGHTS).write_bytes(b""), [WEIGHTS, "truncated"]),
    "nine channels": (lambda base: edit_json(base / "unet/config.json", in_channels=9), ["9 channels", "inpainting"]),
    "sides of latents": (lambda base: edit_json(base / "unet/config.json", sample_size=[8, 8]), ["sample_size", "[8, 8]"]),
    "no side": (lambda base: edit_json(base / "unet/config.json", sample_size=None), ["sample_size"]),
    "configuration that is a list": (lambda base: (base / "unet/config.json").write_text("[]"), ["unet/config.json", "mapping"]),
    "scale null": (lambda base: edit_json(base / "vae/config.json", scaling_factor=None), ["scaling_factor"]),
    "flow over a U-Net": (with_schedule(_class_name="FlowMatchEulerDiscreteScheduler"), ["flow matching"]),
    "no betas": (without("beta_start"), ["beta_start"]),
    "no schedule": (without("beta_schedule"), ["beta_schedule"]),
    "betas as text": (with_schedule(beta_end="large"), ["beta_end"]),
    "steps null": (with_schedule(num_train_timesteps=None), ["num_train_timesteps"]),
    "betas too few": (with_schedule(trained_betas=[0.1, 0.2]), ["trained_betas"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_used_is_named_by_part_and_file(base, tmp_path, capsys, name):
    spoil, words = ODD[name]
    spoil(base)
    with pytest.raises(UserError) as caught:
        load_model(str(base))
    assert_one_sentence(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    code, said = planned(base, tmp_path, capsys)
    assert code == 2 and str(caught.value) in said and "run again without" not in said


def test_shards_with_their_index_are_read(base):
    before = load_model(str(base)).unet.state_dict()
    shard(base)
    after = load_model(str(base)).unet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_trained_betas_are_understood(base):
    betas = [0.001 + 0.00001 * step for step in range(1000)]
    edit_json(base / SCHEDULE, trained_betas=betas)
    assert torch.allclose(load_model(str(base)).scheduler.betas, torch.tensor(betas))


def test_a_diffusion_schedule_under_sd3_is_refused(tmp_path):
    folder = make_sd3(tmp_path / "sd3")
    edit_json(folder / SCHEDULE, _class_name="DDPMScheduler")
    with pytest.raises(UserError, match="is a schedule of diffusion"):
        load_model(str(folder))


@pytest.mark.parametrize(("file", "key", "part"), [
    (WEIGHTS, "conv_out.weight", "unet"), ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight", "vae"),
])  # fmt: skip
def test_finite_weights_that_give_no_finite_numbers_are_refused_before_anything_is_drawn(
    base, tmp_path, capsys, file, key, part
):
    tensors = load_file(base / file)
    tensors[key] = torch.full_like(tensors[key], 3e38)
    save_file(tensors, base / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"its {part} computes"):
        check_computes(load_model(str(base)))
    code, said = planned(base, tmp_path, capsys)
    assert code == 2 and f"its {part} computes" in said
    assert main(["harden", "--recipe", "apdm-sd15", "--base", str(base), "--subjects", str(ROOT / "registries/demo.yaml"),
                 "--output", str(tmp_path / "out")]) == 2  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_blank_class_pictures_are_refused():
    black, drawn = torch.full((4, 3, 8, 8), -1.0), torch.rand((4, 3, 8, 8))
    check_class_pictures("person", torch.cat([black[:2], drawn[:2]]), "base")
    with pytest.raises(UserError, match="3 of 4 of its pictures of the class person are blank"):
        check_class_pictures("person", torch.cat([black[:3], drawn[:1]]), "base")


CONFIGS = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", SCHEDULE,
           "tokenizer/tokenizer_config.json"]  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(allow_nan=False, width=16), st.text(max_size=4),
    st.lists(st.integers(0, 9), max_size=3), st.just({}),
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_configuration_says_is_understood_or_refused_in_a_sentence(epsilon_folder, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("odd") / "base"
    shutil.copytree(epsilon_folder, folder)
    file = folder / data.draw(st.sampled_from(CONFIGS))
    found = json.loads(file.read_text())
    key = data.draw(st.sampled_from(sorted(found)))
    if data.draw(st.booleans()):
        found[key] = data.draw(VALUES)
    else:
        del found[key]
    file.write_text(json.dumps(found))
    try:
        check_computes(load_model(str(folder)))
    except UserError as error:
        assert str(error) and "object at 0x" not in str(error)
    finally:
        shutil.rmtree(folder)
