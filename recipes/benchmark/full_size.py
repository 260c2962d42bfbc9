"""A base of Stable Diffusion 1.5's full size and layout, with random weights, through guardsmith on the CPU.

python recipes/benchmark/full_size.py       writes docs/results/full-size.json, and prints it; about 20 minutes, 12 GiB

The base is stored in float16, as the published ones are. Every stage is the command that a user runs, in a process of its own,
whose peak memory and seconds are written down:

    base      make the base and the same model as a single file in the layout of A1111
    plan      guardsmith harden --dry-run: what the hardening is expected to need
    harden    guardsmith harden: two steps of APDM along adapters on the attention, with gradient checkpointing, and saving
    load      diffusers opens the hardened model
    export    guardsmith export: the hardened model as a single file

With random weights nothing can be protected; this measures room and time only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark import save_base, stable_diffusion
from peak import peak_rss
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from guardsmith.core.atomic_io import write_json
from guardsmith.hardening.memory import GIB
from guardsmith.models.checkpoint import load_model, stored_dtype

ROOT = Path(__file__).parents[2]
PEAK = Path(__file__).parent / "peak.py"
RESULTS = ROOT / "docs" / "results" / "full-size.json"
LIMIT = 24  # GiB that a full-size base of Stable Diffusion 1.5 may take
VOCABULARY = 49408  # CLIP's
METHOD = {"name": "apdm", "params": {"outer_steps": 2, "inner_steps": 1, "class_images": 2, "path": "lora",
                                     "parameters": "attention", "personalization_learning_rate": 1e-4}}  # fmt: skip
LAYERS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def in_single_file(name: str) -> str:
    """The name that a tensor of this U-Net (four blocks, two layers each, the last without attention) has in a single file."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return f"model.diffusion_model.{theirs}{name.removeprefix(ours)}"
    found = re.fullmatch(r"(\w+_blocks?)\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    if found is None:
        raise ValueError(f"{name} is no tensor of this layout")
    where, block, kind, index, rest = found.groups()
    if kind == "resnets":
        layer, _, end = rest.partition(".")
        rest = f"{LAYERS[layer]}.{end}"
    part = {"resnets": 0, "attentions": 1}.get(kind)
    if where == "mid_block":
        place = f"middle_block.{2 * int(index) if part == 0 else 1}"
    elif kind == "downsamplers":
        place, rest = f"input_blocks.{3 * int(block) + 3}.0", rest.replace("conv", "op", 1)
    elif kind == "upsamplers":
        place = f"output_blocks.{3 * int(block) + 2}.{1 if block == '0' else 2}"
    elif where == "down_blocks":
        place = f"input_blocks.{3 * int(block) + int(index) + 1}.{part}"
    else:
        place = f"output_blocks.{3 * int(block) + int(index)}.{part}"
    return f"model.diffusion_model.{place}.{rest}"


def make_base(place: Path, width: int, size: int) -> None:
    """Write the base to `place/base` and, with its U-Net and text encoder, to `place/base.safetensors`, in float16.

    Args:
        place: folder.
        width: channels of the U-Net's first block; 320 for the real one.
        size: side of the latents; 64 for the real one.
    """
    model = stable_diffusion(width, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        words = model.tokenizer
        text = CLIPTextModel(
            CLIPTextConfig(vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                           num_attention_heads=12, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                           pad_token_id=words.pad_token_id)
        )  # fmt: skip
    model.text_encoder = text
    for network in model.networks.values():
        network.half()
    save_base(model, place / "base")
    tensors = {in_single_file(name): value for name, value in model.unet.state_dict().items()}
    encoder = ((name.removeprefix("text_model."), value) for name, value in text.state_dict().items())
    tensors |= {f"cond_stage_model.transformer.text_model.{name}": value for name, value in encoder}
    save_file(tensors, place / "base.safetensors", metadata={"format": "pt"})


def measured(command: list[str]) -> tuple[dict[str, float], str]:
    """Run a command that prints its peak memory in bytes at the end; returns its seconds and GiB, and what it printed."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - began
    printed = done.stdout.rstrip().splitlines()
    return {"seconds": round(seconds, 1), "peak_gib": round(int(printed[-1]) / GIB, 2)}, "\n".join(printed[:-1])


def run(width: int, size: int, output: Path | None = None) -> dict[str, Any]:
    """All stages; see the module.

    Args:
        width: see `make_base`.
        size: likewise.
        output: folder to work in; a temporary one when not given.
    """
    stages: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = output or Path(temporary)
        again = [__file__, "--width", str(width), "--size", str(size), "--folder", str(place)]
        stages["base"], _ = measured([*again, "--stage", "base"])
        recipe = {"base": str(place / "base"), "method": METHOD, "compute": {"gradient_checkpointing": True},
                  "sampling": {"steps": 2, "batch": 1}, "probe": {"times": 0}}  # fmt: skip
        (place / "recipe.yaml").write_text(json.dumps(recipe))
        command = [str(PEAK), "harden", "--recipe", str(place / "recipe.yaml"), "--subjects",
                   str(ROOT / "registries" / "demo.yaml"), "--output", str(place / "out")]  # fmt: skip
        stages["plan"], told = measured([*command, "--dry-run", "--json"])
        planned = json.loads(told)
        stages["harden"], _ = measured(command)
        stages["load"], told = measured([*again, "--stage", "load"])
        loaded = json.loads(told)
        stages["export"], _ = measured(
            [str(PEAK), "export", str(place / "out"), "--like", str(place / "base.safetensors"), "--output",
             str(place / "hardened.safetensors"), "--force-unverified"]
        )  # fmt: skip
        record = json.loads((place / "out" / "harden.json").read_text())
        sizes = {"base": "base", "model": "out/model", "single file": "hardened.safetensors"}
        sizes_gib = {
            name: round(sum(file.stat().st_size for file in _files(place / where)) / GIB, 2)
            for name, where in sizes.items()
        }
    return {
        "command": "python recipes/benchmark/full_size.py", "width": width, "latent_size": size, "method": METHOD,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.machine(),
                    "torch": torch.__version__},
        "estimated_gib": planned["memory_gib"]["together"], "stages": stages, "precision": record["precision"],
        "changed_weights": record["changed_weights"], "stored_gib": sizes_gib, **loaded,
        "peak_gib": max(stage["peak_gib"] for stage in stages.values()), "limit_gib": LIMIT,
    }  # fmt: skip


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def main() -> None:
    """Run all stages and write down what was measured, or run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320, help="channels of the U-Net's first block")
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--folder", type=Path, help="to work in, and to keep")
    parser.add_argument("--stage", choices=["base", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage == "base":
        make_base(args.folder, args.width, args.size)
        print(peak_rss())
    elif args.stage == "load":
        model = load_model(str(args.folder / "out" / "model"))
        dtype = str(stored_dtype(args.folder / "out" / "model")).removeprefix("torch.")
        print(json.dumps({"weights": sum(p.numel() for p in model.unet.parameters()), "stored_in": dtype}))
        print(peak_rss())
    else:
        found = run(args.width, args.size, args.folder)
        print(json.dumps(found, indent=1))
        if (args.width, args.size) == (320, 64):
            write_json(RESULTS, found)


if __name__ == "__main__":
    main()
