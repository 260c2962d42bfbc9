"""Bases as they come: what cannot be used is refused in a sentence by `harden --dry-run` and `plan`, as `harden` itself does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import assert_one_sentence, edit_json, make_sd3

from guardsmith.cli.app import main
from guardsmith.core.errors import UserError
from guardsmith.hardening.compatibility import check_class_pictures, check_computes
from guardsmith.models.checkpoint import load_model, save_model, stored_dtype
from guardsmith.models.saved import base_weights_in

ROOT = Path(__file__).parent.parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
SCHEDULE = "scheduler/scheduler_config.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3438167536\n"


@pytest.fixture
def base(epsilon_folder, tmp_path):
    return Path(shutil.copytree(epsilon_folder, tmp_path / "base"))


DEMO = str(ROOT / "registries/demo.yaml")


def planned(base, tmp_path, capsys):
    code = main(["harden", "--recipe", "apdm-sd15", "--base", str(base), "--subjects", DEMO, "--output", str(tmp_path / "out"),
                 "--dry-run"])  # fmt: skip
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


def variant_of(file, name):
    return file.with_name(file.name.replace(".safetensors", f".{name}.safetensors"))


def as_variant(base, name, weights=WEIGHTS):
    (base / weights).rename(variant_of(base / weights, name))


def copy_as(base, name, weights=WEIGHTS):
    shutil.copyfile(base / weights, variant_of(base / weights, name))


def quantize(base):
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(base / WEIGHTS).items()}
    save_file(tensors, base / WEIGHTS)


def with_schedule(**changes):
    return lambda base: edit_json(base / SCHEDULE, **changes)


def with_index(**changes):
    return lambda base: edit_json(base / "model_index.json", **changes)


def with_config(file, **changes):
    return lambda base: edit_json(base / file, **changes)


def changed(file, key, change):
    """One tensor of a file changed, or all that are numbers with a fraction."""

    def edit(base):
        tensors = load_file(base / file)
        for name in [key] if key else [name for name, value in tensors.items() if value.is_floating_point()]:
            tensors[name] = change(tensors[name])
        save_file(tensors, base / file, {"format": "pt"})

    return edit


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
    "lost shard and index": (lambda base: shard(base, index=False, lose=True), ["unet", "00001-of-00002", "index"]),
    "two variants": (lambda base: (copy_as(base, "fp16"), as_variant(base, "non_ema")), ["unet", "fp16 and non_ema"]),
    "other names": (lambda base: (base / WEIGHTS).rename(base / "unet/weights.safetensors"), ["unet", "weights.safetensors"]),
    "index of nothing": (lambda base: (shard(base), (base / INDEX).write_text("{}")), [INDEX, "weight_map"]),
    "another kind of VAE": (with_index(vae=["diffusers", "AutoencoderTiny"]), ["vae", "AutoencoderTiny"]),
    "a part that is null": (with_index(unet=[None, None]), ["model_index.json", "unet"]),
    "fp8": (quantize, [WEIGHTS, "quantized"]),
    "tokenizer not fetched": (lambda base: (base / "tokenizer/tokenizer.json").write_text(POINTER), ["tokenizer", "git lfs"]),
    "no weights but whole numbers": (changed(WEIGHTS, "conv_in.weight", torch.Tensor.int), [WEIGHTS, "I32"]),
    "text encoder in 8 bits": (changed(TEXT, None, lambda value: value.to(torch.int8)), [TEXT, "quantized"]),
    "NaN": (changed(WEIGHTS, "conv_in.weight", lambda value: value * float("nan")), ["unet", "not finite", "conv_in.weight"]),
    "infinite VAE": (changed(VAE, "decoder.conv_in.weight", lambda value: value + float("inf")), ["vae", "not finite"]),
    "another shape": (changed(WEIGHTS, "conv_in.weight", lambda value: value[:8].clone()), ["unet", "conv_in.weight", "shape"]),
    "text encoder of another width": (with_config("text_encoder/config.json", hidden_size=32), ["text_encoder", "shape"]),
    "a folder for weights": (lambda base: ((base / WEIGHTS).unlink(), (base / WEIGHTS).mkdir()), [WEIGHTS, "no file"]),
    "a link to nothing": (lambda base: ((base / WEIGHTS).unlink(), (base / WEIGHTS).symlink_to("gone")), [WEIGHTS, "link"]),
    "a page in place of weights": (lambda base: (base / WEIGHTS).write_text("<html>404</html>"), [WEIGHTS, "corrupt"]),
    "UTF-16": (lambda base: (base / "vae/config.json").write_bytes("{}".encode("utf-16")), ["vae/config.json", "not valid JSON"]),
    "instruction model": (with_config("unet/config.json", in_channels=8), ["8 channels", "instruction"]),
    "channels null": (with_config("unet/config.json", in_channels=None), ["unet/config.json", "in_channels is None"]),
    "channels in a list": (with_config("vae/config.json", latent_channels=[4]), ["vae/config.json", "latent_channels is [4]"]),
    "a side beyond reason": (with_config("unet/config.json", sample_size=10**12), ["sample_size"]),
    "text beside the prompt": (with_config("unet/config.json", addition_embed_type="text"), ["addition_embed_type", "'text'"]),
    "normalised latents": (with_config("vae/config.json", latents_mean=[0, 0, 0, 0]), ["vae/config.json", "latents_mean"]),
    "flow by another scheduler": (with_schedule(use_flow_sigmas=True), ["flow matching"]),
    "schedule of no name": (with_schedule(_class_name=None), ["_class_name"]),
    "betas that fall": (with_schedule(beta_start=0.9, beta_end=0.1), ["beta_start", "rise"]),
    "no noise": (with_schedule(beta_start=0, beta_end=0), ["beta_start"]),
    "sample prediction": (with_schedule(prediction_type="sample"), ["sample"]),
    "prompts of any length": (with_config("tokenizer/tokenizer_config.json", model_max_length=None), ["model_max_length", "16"]),
    "prompts too long": (with_config("tokenizer/tokenizer_config.json", model_max_length=99), ["model_max_length", "16"]),
    "no padding": (with_config("tokenizer/tokenizer_config.json", pad_token=None), ["tokenizer", "padding token"]),
    "tokenizer of another kind": (with_index(tokenizer=["transformers", "T5Tokenizer"]), ["tokenizer", "T5Tokenizer"]),
    "no such scheduler": (with_index(scheduler=["diffusers", "NoSuchScheduler"]), ["scheduler", "NoSuchScheduler"]),
    "a network of one's own": (with_index(unet=["mine", "UNet2DConditionModel"]), ["unet", "mine"]),
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
    common = ["--base", str(base), "--subjects", DEMO, "--output", str(tmp_path / "out")]
    commands = [["harden", "--recipe", "apdm-sd15", *common, "--dry-run"], ["harden", "--recipe", "apdm-sd15", *common],
                ["plan", "apdm-sd15", *common], ["check", DEMO, "--base", str(base)]]  # fmt: skip
    for command in commands:
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert str(caught.value) in said and "run again without" not in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


NETWORKS = {
    "unet": WEIGHTS,
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def in_half(base, weights=WEIGHTS):
    save_file({key: value.half() for key, value in load_file(base / weights).items()}, base / weights, {"format": "pt"})


def every(change):
    """The same change of every network's weights."""

    def change_all(base):
        for weights in NETWORKS.values():
            change(base, weights)

    return change_all


def halves_only(base, weights=WEIGHTS):
    in_half(base, weights)
    as_variant(base, "fp16", weights)


def shard_as(base, names):
    tensors = load_file(base / WEIGHTS)
    for number, name in enumerate(names):
        save_file(dict(list(tensors.items())[number :: len(names)]), base / "unet" / name)
    (base / WEIGHTS).unlink()


STEM = "diffusion_pytorch_model"
GONE = json.dumps({"weight_map": {"conv_in.weight": f"{STEM}-00001-of-00002.safetensors"}})
READABLE = {
    "shards with their index": shard,
    "shards without an index": lambda base: shard(base, index=False),
    "fp16 only": halves_only,
    "fp16 only, everywhere": every(halves_only),
    "fp16 of the VAE only": lambda base: halves_only(base, NETWORKS["vae"]),
    "non-EMA only": lambda base: as_variant(base, "non_ema"),
    "shards of a variant": lambda base: shard_as(
        base, [f"{STEM}.fp16-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    ),
    "older names of these": lambda base: shard_as(base, [f"{STEM}-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)]),
    "an index whose shards are not there": lambda base: (base / INDEX).write_text(GONE),
    "a variant that Git LFS has not fetched": lambda base: variant_of(base / WEIGHTS, "fp16").write_text(POINTER),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_can_be_read_is_read_and_saved_so_that_diffusers_reads_it_by_itself(base, tmp_path, name):
    before = load_model(str(base))
    READABLE[name](base)
    model = load_model(str(base))
    for part, network in before.networks.items():
        after = model.networks[part].state_dict()
        assert all(torch.allclose(value, after[key], atol=2e-3) for key, value in network.state_dict().items()), part
    dtypes = {part: stored_dtype(base, part) for part in NETWORKS}
    with torch.no_grad():
        model.unet.conv_in.weight += 0.25
    save_model(model, tmp_path / "model")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert torch.allclose(saved.unet.conv_in.weight.float(), model.unet.conv_in.weight, atol=2e-3)
    assert {part: stored_dtype(tmp_path / "model", part) for part in NETWORKS} == dtypes
    assert not base_weights_in(base, tmp_path / "model", NETWORKS)
    written = {
        file.relative_to(tmp_path / "model").as_posix() for file in (tmp_path / "model").glob("*/*.safetensors*")
    }
    # The pointer says that there are files in half precision, so there are some of the hardened model.
    assert written - {variant_of(Path(WEIGHTS), "fp16").as_posix()} == set(NETWORKS.values())


def test_a_frozen_part_in_shards_without_an_index_gets_one(base, tmp_path):
    weights = NETWORKS["vae"]
    tensors = load_file(base / weights)
    for number in (1, 2):
        part = dict(list(tensors.items())[number - 1 :: 2])
        save_file(part, base / f"vae/diffusion_pytorch_model-0000{number}-of-00002.safetensors", {"format": "pt"})
    (base / weights).unlink()
    save_model(load_model(str(base)), tmp_path / "model")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert all(torch.equal(tensors[key], value) for key, value in saved.vae.state_dict().items())


def test_a_base_of_halves_is_hardened_to_one(base, tmp_path, capsys):
    """`harden.json` says the precision of every part, and the disk is needed for one model of that."""
    READABLE["fp16 only, everywhere"](base)
    out = tmp_path / "out"
    values = ["method.params.outer_steps=1", "method.params.inner_steps=1", "method.params.class_images=2", "sampling.steps=2",
              "method.params.learning_rate=0.001"]  # fmt: skip
    settings = [word for value in values for word in ("--set", value)]
    code = main(["harden", "--recipe", "apdm-sd15", "--base", str(base), "--subjects", str(ROOT / "registries/demo.yaml"),
                 "--output", str(out), *settings])  # fmt: skip
    assert code in (0, 4), capsys.readouterr().err
    told = json.loads((out / "harden.json").read_text())
    assert set(told["precision"].values()) == {"float16"}
    sizes = [sum(file.stat().st_size for file in folder.glob("*/*.safetensors")) for folder in (base, out / "model")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


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
    (WEIGHTS, "conv_out.weight", "unet"), (VAE, "decoder.conv_out.weight", "vae decoder"),
    (VAE, "encoder.conv_out.weight", "vae encoder"), (TEXT, "final_layer_norm.weight", "text_encoder"),
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


@pytest.mark.parametrize(("file", "part"), [(WEIGHTS, "unet"), (VAE, "vae decoder")])
def test_a_part_of_zeros_is_refused(base, file, part):
    changed(file, None, torch.zeros_like)(base)
    with pytest.raises(UserError, match=f"its {part} computes the same number everywhere"):
        check_computes(load_model(str(base)))


def test_a_base_that_draws_blanks_leaves_nothing_behind(base, tmp_path, capsys, monkeypatch):
    """Found after the output folder was claimed, when class pictures are drawn."""
    monkeypatch.setattr("guardsmith.hardening.compatibility.BLANK", 10.0)
    command = ["harden", "--recipe", "apdm-sd15", "--base", str(base), "--subjects", DEMO, "--output", str(tmp_path / "out"),
               "--set", "method.params.class_images=2", "--set", "sampling.steps=2"]  # fmt: skip
    assert main(command) == 2
    assert "are blank" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main(command) == 2 and not (tmp_path / "out").exists()


def test_blank_class_pictures_are_refused():
    black, drawn = torch.full((4, 3, 8, 8), -1.0), torch.rand((4, 3, 8, 8))
    check_class_pictures("person", torch.cat([black[:2], drawn[:2]]), "base")
    with pytest.raises(UserError, match="3 of 4 of its pictures of the class person are blank"):
        check_class_pictures("person", torch.cat([black[:3], drawn[:1]]), "base")
    with pytest.raises(UserError, match="blank"):
        check_class_pictures("person", black * float("nan"), "base")
