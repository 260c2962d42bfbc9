"""Single-file checkpoints: the hardened U-Net in the place of the base's, and everything else byte for byte."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import assert_one_sentence, same_weights, weights

from guardsmith import cli
from guardsmith.errors import UserError
from guardsmith.models import load_model, save_model
from guardsmith.single_file import read_header, unet_names, write_single_file

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


def other_tensors():
    random = torch.Generator().manual_seed(5)
    return {
        "first_stage_model.encoder.conv_in.weight": torch.randn(3, 5, generator=random),
        "cond_stage_model.positions": torch.arange(7),
        "model_ema.decay": torch.tensor(0.9),
    }


@pytest.fixture
def single(tiny_v, tmp_path):
    """The base of the tests as one file, in half precision, with metadata."""
    tensors = {in_a1111(name): value.half() for name, value in weights(tiny_v.unet).items()}
    file = tmp_path / "base.safetensors"
    save_file(tensors | other_tensors(), file, metadata={"format": "pt", "modelspec.title": "mine"})
    return file


@pytest.fixture
def hardened(tiny_v, tmp_path):
    own = copy.copy(tiny_v)
    own.unet = copy.deepcopy(tiny_v.unet)
    with torch.no_grad():
        for parameter in own.unet.parameters():
            parameter.add_(0.25)
        own.unet.conv_in.weight[0, 0, 0, 0] = 1e6  # what no half holds
    save_model(own, tmp_path / "out" / "model")
    return tmp_path / "out" / "model", own


def test_the_names_are_those_of_the_layout(tiny_v, single):
    found = unet_names(read_header(single), dict(tiny_v.unet.config), single)
    assert found == {in_a1111(name): name for name in weights(tiny_v.unet)}


def test_only_the_unet_is_replaced(tiny_v, single, hardened, tmp_path):
    folder, own = hardened
    count = write_single_file(single, tiny_v.folder, folder, tmp_path / "new.safetensors")
    before, after = load_file(single), load_file(tmp_path / "new.safetensors")
    assert count == len(weights(own.unet))
    assert list(read_header(tmp_path / "new.safetensors").tensors) == list(read_header(single).tensors)
    for name in other_tensors():
        assert torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
    for name, value in weights(own.unet).items():
        found = after[in_a1111(name)]
        if name == "conv_in.weight":
            assert found.dtype == torch.float32 and torch.equal(found, value), "1e6 is no half"
        else:
            assert found.dtype == torch.float16 and torch.equal(found, value.half())
    with safe_open(tmp_path / "new.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "modelspec.title": "mine"}


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
    wanted = {name: value.half().float() for name, value in weights(own.unet).items()}
    wanted["conv_in.weight"] = own.unet.conv_in.weight
    assert same_weights({name: value.float() for name, value in weights(unet).items()}, wanted)


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
    ],
)  # fmt: skip
def test_what_is_not_the_base_is_refused_and_nothing_is_written(tiny_v, single, hardened, tmp_path, spoil, said):
    spoil(single, tiny_v.unet)
    with pytest.raises(UserError, match=said) as caught:
        write_single_file(single, tiny_v.folder, hardened[0], tmp_path / "new.safetensors")
    assert_one_sentence(caught.value)
    assert not list(tmp_path.glob("*new*"))


def test_the_command(tiny_v, single, hardened, tmp_path, capsys):
    output = hardened[0].parent
    record = json.loads((Path(__file__).parent.parent / "docs/results/demo-harden.json").read_text())
    (output / "harden.json").write_text(json.dumps(record | {"base": str(tiny_v.folder)}))
    command = ["export", str(output), "--like", str(single), "--output", str(tmp_path / "new.safetensors")]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "new.safetensors").is_file()
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(single)]) == 2
    shutil.rmtree(output / "model")
    assert cli.main([*command[:-1], str(tmp_path / "newer.safetensors")]) == 2
    assert "guardsmith harden" in capsys.readouterr().err
    assert load_model(str(tiny_v.folder)).image_size == 64
