"""Single-file checkpoints: the hardened U-Net in the place of the base's, and everything else byte for byte."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from leaks import TOKEN, base_tensors_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import assert_one_sentence, same_weights, weights

from guardsmith.cli import app as cli
from guardsmith.core.errors import GuardsmithError, UserError
from guardsmith.models.checkpoint import builtin_path, load_model, save_model, stored_dtype, weights_digest
from guardsmith.models.single_file import read_single_file, unet_names, write_single_file
from guardsmith.models.tensor_files import read_header

LAYERS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def in_a1111(name):
    """The name that a tensor of the small U-Net (one layer a block, two blocks) has there, worked out by hand."""
    for ours, theirs in ENDS.items():
        if name.startswith(ours + "."):
            return "model.diffusion_model." + name.replace(ours, theirs)
    where, number, kind, index, rest = re.fullmatch(
        r"(down_blocks|mid_block|up_blocks)\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name
    ).groups()
    if kind == "resnets":
        layer, _, end = rest.partition(".")
        rest = f"{LAYERS[layer]}.{end}"
    if where == "mid_block":
        place = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    elif where == "down_blocks":
        at = 1 + 2 * int(number) + int(index)
        place = {"resnets": f"input_blocks.{at}.0", "attentions": f"input_blocks.{at}.1",
                 "downsamplers": f"input_blocks.{2 + 2 * int(number)}.0.op"}[kind]  # fmt: skip
    else:
        at = 2 * int(number) + int(index)
        beside = 1 if number == "0" else 2  # the first up-block has no attention
        place = {"resnets": f"output_blocks.{at}.0", "attentions": f"output_blocks.{at}.1",
                 "upsamplers": f"output_blocks.{2 * int(number) + 1}.{beside}.conv"}[kind]  # fmt: skip
    if kind.endswith("samplers"):
        rest = rest.removeprefix("conv.")
    return f"model.diffusion_model.{place}.{rest}"


def vae_in_a1111(name):
    """The same for the small VAE of four levels."""
    new = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
    new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
    new = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", new)
    new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", new)
    if "mid_block.attentions.0" in new:
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("to_out.0", "proj_out")
        new = new.replace("group_norm", "norm").replace(".to_", ".")
    return "first_stage_model." + new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def other_tensors():
    random = torch.Generator().manual_seed(5)
    return {
        "first_stage_model.encoder.conv_in.weight": torch.randn(3, 5, generator=random),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(7),
        "betas": torch.linspace(0, 1, 20),
    }


@pytest.fixture
def single(tiny_v, tmp_path):
    """The base of the tests as one file, in half precision, with metadata."""
    tensors = {in_a1111(name): value.half() for name, value in weights(tiny_v.unet).items()}
    file = tmp_path / "base.safetensors"
    save_file(tensors | other_tensors(), file, metadata={"format": "pt", "modelspec.title": "mine"})
    return file


@pytest.fixture(scope="module")
def hardened(tiny_v, tmp_path_factory):
    """Folder of a hardened model, and the model; copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("hardened") / "out" / "model"
    own = copy.copy(tiny_v)
    own.unet = copy.deepcopy(tiny_v.unet)
    with torch.no_grad():
        for parameter in own.unet.parameters():
            parameter.add_(0.25)
        own.unet.conv_in.weight[0, 0, 0, 0] = 1e6  # what no half holds
    save_model(own, folder)
    return folder, own


def test_the_names_are_those_of_the_layout(tiny_v, single):
    found = unet_names(read_header(single), dict(tiny_v.unet.config), single)
    assert found == {in_a1111(name): name for name in weights(tiny_v.unet)}


def test_only_the_unet_is_replaced(tiny_v, single, hardened, tmp_path):
    folder, own = hardened
    done = write_single_file(single, tiny_v.folder, folder, tmp_path / "new.safetensors")
    before, after = load_file(single), load_file(tmp_path / "new.safetensors")
    assert done == (len(weights(own.unet)), [], True), "1e6 is no half"
    assert list(read_header(tmp_path / "new.safetensors").tensors) == list(read_header(single).tensors)
    for name in other_tensors():
        assert torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
    for name, value in weights(own.unet).items():
        found = after[in_a1111(name)]  # of one precision, for readers take one for all
        assert found.dtype == torch.float32 and torch.equal(found, value), name
    with safe_open(tmp_path / "new.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "modelspec.title": "mine"}


def ema_name(name):
    """As the published training code names them: a module's names lose their dots."""
    return "model_ema." + in_a1111(name).removeprefix("model.").replace(".", "")


COPIES = (
    ema_name, lambda name: f"model_ema.{in_a1111(name)}", lambda name: f"ema_model.{name}", lambda name: f"unet_ema.{name}",
    lambda name: in_a1111(name).replace("model.", "model2.", 1), lambda name: f"non_ema.{name}",
    lambda name: f"control_model.{in_a1111(name).removeprefix('model.diffusion_model.')}",
    lambda name: f"model.diffusion_model.old.{name}", lambda name: f"first_stage_model.{name}",
    lambda name: f"first_stage_model.encoder.{in_a1111(name)}", lambda name: f"unet.{name}",
    lambda name: f"lora_unet_{name.replace('.', '_')}.lora_up.weight",
)  # fmt: skip


@pytest.mark.parametrize("copy_name", COPIES)
@pytest.mark.parametrize("scale", [1.0, 1.01], ids=["the same", "averaged"])
def test_copies_of_the_unet_are_left_out_and_named(tiny_v, single, hardened, tmp_path, copy_name, scale):
    """An EMA copy has other values than the weights, so that only its names tell."""
    before = weights(tiny_v.unet)
    copies = {copy_name(name): (value * scale).half() for name, value in before.items()}
    save_file(load_file(single) | copies, single)
    try:
        done = write_single_file(single, tiny_v.folder, hardened[0], tmp_path / "new.safetensors")
    except UserError as error:  # a name that says nothing, of values that say nothing
        assert "no known part" in str(error) and not (tmp_path / "new.safetensors").exists()
        assert "first_stage_model" in next(iter(copies))
        return
    assert set(done.left_out) == set(copies)
    assert load_file(tmp_path / "new.safetensors").keys() == load_file(single).keys() - copies.keys()
    assert not base_tensors_in([tmp_path / "new.safetensors"], tiny_v.folder, hardened[0])


def test_diffusers_has_no_base_to_get_back_from_an_export(tiny_v, single, hardened, tmp_path):
    ema = {ema_name(name): value.half() for name, value in weights(tiny_v.unet).items()}
    save_file(load_file(single) | ema, single)
    write_single_file(single, tiny_v.folder, hardened[0], tmp_path / "new.safetensors")
    unet = UNet2DConditionModel.from_single_file(
        str(tmp_path / "new.safetensors"),
        config=str(hardened[0]),
        subfolder="unet",
        local_files_only=True,
        extract_ema=True,
    )
    assert same_weights(weights(unet), weights(hardened[1].unet))


def test_unknown_tensors_are_refused_unless_they_are_wanted(tiny_v, single, hardened, tmp_path):
    new = tmp_path / "new.safetensors"
    hidden = weights(tiny_v.unet)["conv_out.weight"].half()
    save_file(load_file(single) | {"mystery.a": torch.ones(3), "mystery.b": hidden.reshape(-1, 4)}, single)
    with pytest.raises(UserError, match=r"1 tensors of no known part \(mystery\.a\)") as caught:
        write_single_file(single, tiny_v.folder, hardened[0], new)
    assert_one_sentence(caught.value)
    assert not new.exists()
    done = write_single_file(single, tiny_v.folder, hardened[0], new, keep_unknown=True)
    assert done.left_out == ["mystery.b"], "by its values"
    assert "mystery.a" in load_file(new) and "mystery.b" not in load_file(new)


def test_a_hardened_text_encoder_is_exported_too(tiny_v, whole, tmp_path):
    own = copy.copy(tiny_v)
    own.unet, own.text_encoder = copy.deepcopy(tiny_v.unet), copy.deepcopy(tiny_v.text_encoder)
    with torch.no_grad():
        for parameter in (*own.unet.parameters(), *own.text_encoder.parameters()):
            parameter.add_(0.25)
    save_model(own, tmp_path / "hard", ("unet", "text_encoder"))
    write_single_file(whole, tiny_v.folder, tmp_path / "hard", tmp_path / "new.safetensors")
    after = load_file(tmp_path / "new.safetensors")
    for name, value in weights(own.text_encoder).items():
        assert torch.equal(after[f"cond_stage_model.transformer.text_model.{name}"], value.half()), name
    tensors = {name: value for name, value in load_file(whole).items() if not name.startswith("cond_stage_model")}
    save_file(tensors, whole)
    with pytest.raises(UserError, match="text_encoder was hardened too"):
        write_single_file(whole, tiny_v.folder, tmp_path / "hard", tmp_path / "newer.safetensors")


def test_metadata_that_says_more_than_what_the_model_is_is_left_out(tiny_v, single, hardened, tmp_path):
    """Prompts, tags of training pictures, thumbnails, hashes of the weights before, and credentials wherever they stand."""
    kept = {"format": "pt", "modelspec.title": "mine"}
    further = {
        "ss_tag_frequency": '{"10_jane doe": {}}', "prompt": "jane doe", "modelspec.thumbnail": "data:image/png;base64,AAAA",
        "modelspec.hash_sha256": "0x12", "modelspec.author": TOKEN,
    }  # fmt: skip
    save_file(load_file(single), single, metadata=kept | further)
    done = write_single_file(single, tiny_v.folder, hardened[0], tmp_path / "new.safetensors")
    assert done.left_out == sorted(f"metadata {key}" for key in further)
    with safe_open(tmp_path / "new.safetensors", "pt") as opened:
        assert opened.metadata() == kept
    assert TOKEN.encode() not in (tmp_path / "new.safetensors").read_bytes()


def test_the_same_unet_gives_the_same_bytes(tiny_v, single, tmp_path):
    """With the half-precision weights that the file has, nothing changes but what may."""
    own = copy.copy(tiny_v)
    own.unet = copy.deepcopy(tiny_v.unet).half().float()
    save_model(own, tmp_path / "same")
    write_single_file(single, tiny_v.folder, tmp_path / "same", tmp_path / "new.safetensors")
    start = read_header(single).start
    assert (tmp_path / "new.safetensors").read_bytes()[-1000:] == single.read_bytes()[-1000:]
    assert (
        single.read_bytes()[start:]
        == (tmp_path / "new.safetensors").read_bytes()[read_header(tmp_path / "new.safetensors").start :]
    )


def test_diffusers_reads_it(tiny_v, single, hardened, tmp_path):
    folder, own = hardened
    write_single_file(single, tiny_v.folder, folder, tmp_path / "new.safetensors")
    unet = UNet2DConditionModel.from_single_file(
        str(tmp_path / "new.safetensors"), config=str(folder), subfolder="unet", local_files_only=True
    )
    assert same_weights(weights(unet), weights(own.unet))


@pytest.fixture
def whole(tiny_v, tmp_path):
    """All parts of the base of the tests in one file, in half precision."""
    tensors = {in_a1111(name): value for name, value in weights(tiny_v.unet).items()}
    for name, value in weights(tiny_v.vae).items():
        there = vae_in_a1111(name)
        attention = ".attn_1." in there and value.ndim == 2  # a convolution there
        tensors[there] = value[:, :, None, None] if attention else value
    for name, value in weights(tiny_v.text_encoder).items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = value
    file = tmp_path / "whole.safetensors"
    save_file({name: value.half().contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})
    return file


def test_a_single_file_becomes_a_base_and_a_single_file_again(tiny_v, whole, tmp_path, capsys):
    folder = tmp_path / "base"
    assert cli.main(["import", str(whole), str(folder), "--config", str(tiny_v.folder)]) == 0
    assert "(v_prediction)" in capsys.readouterr().err
    read = load_model(str(folder))
    for part in ("unet", "vae", "text_encoder"):
        wanted = {name: value.half().float() for name, value in weights(getattr(tiny_v, part)).items()}
        assert same_weights(weights(getattr(read, part)), wanted), part
        assert stored_dtype(folder, part) == torch.float16
    assert read.tokenizer("sks of a person").input_ids == tiny_v.tokenizer("sks of a person").input_ids
    assert read.prediction_type == "v_prediction" and read.scheduler.alphas_cumprod.equal(
        tiny_v.scheduler.alphas_cumprod
    )

    write_single_file(whole, folder, folder, tmp_path / "again.safetensors")
    before, after = load_file(whole), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def spoil_pickle(file):
    file.rename(file.with_suffix(".ckpt"))
    return file.with_suffix(".ckpt")


def spoil_layout(file):
    save_file({"conv_in.weight": torch.zeros(2)}, file)


def spoil_half_of_it(file):
    save_file({name: value for name, value in load_file(file).items() if "first_stage" not in name}, file)


def spoil_unet(file):
    spoil_missing(file, None)


def spoil_vae(file):
    tensors = load_file(file)
    del tensors["first_stage_model.decoder.conv_out.bias"]
    save_file(tensors, file)


def spoil_position(file):
    tensors = load_file(file)
    del tensors["cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"]
    save_file(tensors, file)


def spoil_nan(file):
    tensors = load_file(file)
    tensors[in_a1111("conv_out.bias")][0] = torch.nan
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_pickle, "pickled weights"), (lambda file: spoil_truncated(file, None), "is not whole"),
        (spoil_layout, "no Stable Diffusion U-Net"),
        (spoil_half_of_it, "lacks a part"), (spoil_nan, "not finite"),
        (spoil_unet, "not laid out"),
        (spoil_vae, "not laid out"),
        (spoil_position, "lacks"),
        (lambda file: "builtin", "not laid out as its configurations say"),
        (lambda file: "no/such-model", "the Hub did not give its configurations"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_base_is_one_sentence_and_leaves_nothing(tiny_v, whole, tmp_path, spoil, said):
    config, new = str(tiny_v.folder), spoil(whole)
    file = new if isinstance(new, Path) else whole
    if isinstance(new, str):
        config = str(builtin_path("avatar")) if new == "builtin" else new
    with pytest.raises(GuardsmithError, match=said) as caught:
        read_single_file(file, tmp_path / "base", config)
    assert_one_sentence(caught.value)
    assert str(tmp_path / "base") not in str(caught.value), "the folder that was written is gone"
    assert not list(tmp_path.glob("*base*"))


def test_a_pointer_of_git_lfs_is_called_one(tiny_v, tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_single_file(tmp_path / "model.safetensors", tmp_path / "base", str(tiny_v.folder))


def spoil_another(file, unet):
    tensors = load_file(file)
    tensors[in_a1111("conv_out.weight")] += 0.5
    save_file(tensors, file)


def spoil_missing(file, unet):
    tensors = load_file(file)
    del tensors[in_a1111("conv_out.weight")]
    save_file(tensors, file)


def spoil_shape(file, unet):
    tensors = load_file(file)
    tensors[in_a1111("conv_out.bias")] = torch.zeros(9)
    save_file(tensors, file)


def spoil_finite(file, unet):
    tensors = load_file(file)
    tensors[in_a1111("conv_out.weight")][0] = torch.nan
    save_file(tensors, file)


def spoil_finite_elsewhere(file, unet):
    tensors = load_file(file)
    tensors["first_stage_model.encoder.conv_in.weight"][0] = torch.inf
    save_file(tensors, file)


def spoil_no_unet(file, unet):
    save_file({"cond_stage_model.x": torch.zeros(2)}, file)


def spoil_truncated(file, unet):
    file.write_bytes(file.read_bytes()[:-10])


def spoil_no_file_of_that_kind(file, unet):
    file.write_bytes(b"PK\x03\x04 a pickle in a zip, perhaps")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_another, "another model than the base"), (spoil_missing, "not laid out as this model"),
        (spoil_shape, "not laid out as this model"), (spoil_no_unet, "not laid out as this model"),
        (spoil_truncated, "is not whole"), (spoil_no_file_of_that_kind, "no safetensors file"),
        (spoil_finite, "another model than the base"), (spoil_finite_elsewhere, "not finite"),
    ],
)  # fmt: skip
def test_what_is_not_the_base_is_refused_and_nothing_is_written(tiny_v, single, hardened, tmp_path, spoil, said):
    spoil(single, tiny_v.unet)
    with pytest.raises(UserError, match=said) as caught:
        write_single_file(single, tiny_v.folder, hardened[0], tmp_path / "new.safetensors")
    assert_one_sentence(caught.value)
    assert not list(tmp_path.glob("*new*"))


def test_the_command(tiny_v, single, hardened, tmp_path, capsys):
    output = shutil.copytree(hardened[0].parent, tmp_path / "out")
    record = json.loads((Path(__file__).parent.parent / "docs/results/demo-harden.json").read_text()) | {"params": {}}
    digest = weights_digest(output / "model")
    (output / "harden.json").write_text(json.dumps(record | {"base": str(tiny_v.folder), "model_digest": digest}))
    command = ["export", str(output), "--like", str(single), "--output", str(tmp_path / "new.safetensors")]
    assert cli.main(command) == 2
    assert "was never verified" in capsys.readouterr().err and not (tmp_path / "new.safetensors").exists()
    command.insert(2, "--force-unverified")
    assert cli.main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "new.safetensors").is_file()
    (output / "verify").mkdir()
    for verdict, code in (("fail", 1), ("inconclusive", 3), ("pass", 0)):
        report = json.loads((Path(__file__).parent.parent / "docs/results/demo-report.json").read_text())
        report |= {"verdict": verdict, "exit_code": code, "hardening": report["hardening"] | {"model_digest": digest}}
        (output / "verify" / "report.json").write_text(json.dumps(report))
        asked = ["export", str(output), "--like", str(single), "--output", str(tmp_path / f"{verdict}.safetensors")]
        assert cli.main(asked) == (0 if verdict == "pass" else 2)
        assert verdict == "pass" or f"is {verdict}, not pass" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(single)]) == 2
    assert cli.main([*command[:-1], str(tmp_path / "no" / "folder.safetensors")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    config = output / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " ")
    assert cli.main([*command[:-1], str(tmp_path / "newer.safetensors")]) == 2
    assert "was changed after hardening" in capsys.readouterr().err
    shutil.rmtree(output / "model")
    assert cli.main([*command[:-1], str(tmp_path / "newer.safetensors")]) == 2
    assert "guardsmith harden" in capsys.readouterr().err
    assert load_model(str(tiny_v.folder)).image_size == 64
