"""A base as people's folders look, and a search for its weights and secrets that knows nothing of guardsmith's own."""

import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import edit_json

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
UNET = "unet/diffusion_pytorch_model.safetensors"
CLUTTER = (
    "v1-5-pruned.safetensors", "unet/diffusion_flax_model.msgpack", "unet/model.onnx", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/DIFFUSION.SAFETENSORS", "unet/nested/deeper/old.safetensors", "unet_ema/diffusion_pytorch_model.safetensors",
    "tokenizer/diffusion_pytorch_model.safetensors", "vae/unet.safetensors", ".git/config", ".env", "unet/.netrc",
    "state.safetensors", "cache/ordinary.safetensors", "pipeline.py", "tokenizer/notes.txt",
)  # fmt: skip


def clutter(folder):
    """Put the U-Net's weights and a token wherever they have been seen, and name a second U-Net as a part."""
    stored = load_file(folder / UNET)
    for name in CLUTTER:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() == ".safetensors":
            save_file({key: value.half() for key, value in stored.items()}, file)
        else:
            file.write_bytes(f"HF_TOKEN={TOKEN}\nurl = https://me:{TOKEN}@huggingface.co/a/b\n".encode())
    (folder / "unet_ema" / "config.json").write_bytes((folder / "unet" / "config.json").read_bytes())
    edit_json(folder / "model_index.json", unet_ema=["diffusers", "UNet2DConditionModel"])
    (folder / "README.md").write_text(f"# A base\n\n    export HF_TOKEN={TOKEN}\n")
    (folder / "LICENSE.md").write_text("only for good")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    hidden = {f"unet.{key}": value for key, value in stored.items()}
    save_file(
        vae | hidden, folder / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt", "by": TOKEN}
    )
    os.link(folder / UNET, folder / "hard link.safetensors")
    return folder


def tensors_in(file):
    with safe_open(file, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            yield key, opened.get_tensor(key)


def in_order(tensor):
    """Its values from the smallest to the largest, in every precision."""
    values = tensor.float().flatten().sort().values
    return [values, values.half(), values.bfloat16()]


def base_tensors_in(files, base, hardened):
    """Names of tensors in files that are, sorted and in any precision, a tensor of the base's U-Net that hardening changed."""
    before, after = load_file(base / UNET), load_file(hardened / UNET)
    looked, found = 0, []
    changed = {}
    for name, value in before.items():
        if value.numel() >= 16 and len(value.unique()) >= 8 and not torch.equal(value, after[name].to(value.dtype)):
            changed.setdefault(value.numel(), []).append(in_order(value))
    assert sum(map(len, changed.values())) > 20, "the test would find nothing"
    for file in files:
        for name, value in tensors_in(file):
            looked += 1
            if value.numel() not in changed:
                continue
            ours = in_order(value)
            for theirs in changed[value.numel()]:
                if any(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True)):
                    found.append(f"{file.name} {name}")
    assert looked
    return found
