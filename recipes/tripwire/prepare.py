"""Distil the trunk of the embedded base for K groups reserved at the deepest level and O at the others.

    python prepare.py OUTPUT --groups 12 --outer-groups 4 --steps 1500 [--rows 12] [--rate 3e-4] [--start TRUNK]
        [--start-groups 6 6]

`--start-groups`: those of START, if it has others; channels that it has reserved and the new layout has not begin as the base's.
Writes OUTPUT/trunk.safetensors (and a checkpoint, from which it resumes) and results/trunk-<K>-<O>-<steps>.json.
"""

import argparse
import time
from pathlib import Path

import torch
from common import bystanders, write

from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import (
    HARDENING_IDENTIFIERS,
    HARDENING_TEMPLATES,
    PromptBank,
    benign_prompts,
    instance_prompt,
)
from guardsmith.methods.tripwire import layout as lay
from guardsmith.methods.tripwire.additions import odd_contexts
from guardsmith.methods.tripwire.trunk import load_trunk, prepare, relative_error, save_trunk
from guardsmith.models.checkpoint import load_model, with_own_unet

p = argparse.ArgumentParser()
p.add_argument("output", type=Path)
p.add_argument("--groups", type=int, default=12)
p.add_argument("--outer-groups", type=int, default=4)
p.add_argument("--steps", type=int, default=1500)
p.add_argument("--rows", type=int, default=12)
p.add_argument("--rate", type=float, default=3e-4)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--start", type=Path)
p.add_argument("--start-groups", type=int, nargs=2)
a = p.parse_args()
a.output.mkdir(parents=True, exist_ok=True)
model = load_model("builtin:avatar")
store = encode(model, bystanders())
nouns = ("person", "robot", "character")
texts = [prompt.text for prompt in benign_prompts(model, HARDENING_TEMPLATES, 300, 0)]
texts += [instance_prompt(name, noun) for name in HARDENING_IDENTIFIERS for noun in nouns] * 4
texts += [f"a photo of {noun}" for noun in nouns] * 10 + [f"a photo of a {noun}" for noun in nouns] * 10
bank = PromptBank(model)
contexts, empty = bank.encode(texts), bank.encode([""])
templates = ("a photo of {}", "a portrait of {}", "a picture of {}")
words = [*templates, *(f"{template} {noun}" for template in templates for noun in nouns)]
odd = odd_contexts(model, words * 8, 0)
shown = type(store)(store.mean[::8].clone(), store.std[::8].clone())
keep = torch.ones(len(store), dtype=torch.bool)
keep[::8] = False
kept = type(store)(store.mean[keep], store.std[keep])
layout = lay.layout_of(model.unet, a.groups, a.outer_groups)
began, curve = time.time(), {}
start = a.start
if a.start_groups is not None:
    own = with_own_unet(model)
    load_trunk(a.start, own.unet)
    had = lay.reserve(with_own_unet(model).unet, lay.layout_of(model.unet, *a.start_groups))
    given, now = model.unet.state_dict(), own.unet.state_dict()
    with torch.no_grad():
        for name, free in had.items():
            now[name][~free] = given[name][~free]
    start = a.output / "start.safetensors"
    save_trunk(own.unet, layout, model.unet, start)


def look(step, loss, unet):
    if step + 1 in (1, 30, 60, 100, 200, 400, 800, 1600, 3200) or (step + 1) == a.steps:
        curve[step + 1] = relative_error(model, unet, shown.mean, list(contexts), 5)
        print(step + 1, round(loss, 5), round(curve[step + 1], 5), f"{time.time() - began:.0f} s", flush=True)


unet, _ = prepare(
    model,
    layout,
    kept,
    torch.cat([contexts, odd]),
    empty,
    steps=a.steps,
    rows=a.rows,
    learning_rate=a.rate,
    seed=a.seed,
    start=start,
    checkpoint=a.output / "checkpoint.safetensors",
    on_step=look,
)
save_trunk(unet, layout, model.unet, a.output / "trunk.safetensors")
write(
    f"trunk-{a.groups}-{a.outer_groups}-{a.steps}",
    {
        "command": f"python prepare.py OUTPUT --groups {a.groups} --outer-groups {a.outer_groups} --steps {a.steps}"
        f" --rows {a.rows} --rate {a.rate} --seed {a.seed}"
        + (" --start TRUNK" if a.start else "")
        + (f" --start-groups {' '.join(map(str, a.start_groups))}" if a.start_groups else ""),
        "relative_error": curve,
        "rounded": relative_error(model, unet, shown.mean, list(contexts), 5),
        "seconds": time.time() - began,
    },
)
