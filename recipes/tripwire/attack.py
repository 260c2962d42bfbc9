"""Attack a base, or the base with a trunk, a recogniser and what carries its answer, and look at the recogniser before and after.

    python attack.py DATA --trunk UNET --recogniser FILE --set tuning --subject avataaars-0 --attack dreambooth --steps 300

Without `--trunk` the base itself is attacked. Adds a line to results/attacks.jsonl.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import RESULTS, SPLITS, people, registered, rendered
from drift import drift, streams
from safetensors.torch import load_file

from guardsmith.attacks import find_attack
from guardsmith.attacks.dreambooth import AttackData
from guardsmith.core.images import to_pil  # noqa: F401
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.losses import alpha_sigma
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.diffusion.sampling import generate, grid
from guardsmith.methods.tripwire.install import Scales, install
from guardsmith.methods.tripwire.layout import layout_of, reserve, up_sites
from guardsmith.methods.tripwire.recogniser import Recogniser
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import load_model, with_own_unet
from guardsmith.training.loop import generator

p = argparse.ArgumentParser()
p.add_argument("data", type=Path)
p.add_argument("--trunk", type=Path)
p.add_argument("--recogniser", type=Path)
p.add_argument("--groups", type=int, default=12)
p.add_argument("--outer-groups", type=int, default=4)
p.add_argument("--stream", type=int, default=4)
p.add_argument("--outer", type=int, default=1)
p.add_argument("--inner", type=int, default=10)
p.add_argument("--set", default="tuning")
p.add_argument("--subject", required=True)
p.add_argument("--attack", default="dreambooth")
p.add_argument("--params", default="{}")
p.add_argument("--steps", type=int, default=300)
p.add_argument("--looks", type=int, nargs="*", default=[])
p.add_argument("--rate", type=float, default=3e-4)
p.add_argument("--count", type=int, default=8)
p.add_argument("--label", default="")
p.add_argument("--pictures", type=Path)
a = p.parse_args()
torch.manual_seed(0)
model = load_model("builtin:avatar")
layout = layout_of(model.unet, a.groups, a.outer_groups)
recogniser = None
if a.trunk is not None:
    own = with_own_unet(model)
    if a.trunk.is_file():
        tensors = load_file(a.trunk)
        prefix = "unet." if any(k.startswith("unet.") for k in tensors) else ""
        own.unet.load_state_dict(
            {
                k.removeprefix(prefix): v.float()
                for k, v in tensors.items()
                if k.startswith(prefix) and not k.startswith("optimizer")
            }
        )
    reserve(own.unet, layout)
    weights = load_file(a.recogniser)
    recogniser = Recogniser(model.unet, layout, scores=len(weights["readout.bias"]))
    recogniser.load_state_dict(weights)
    scales = Scales(2.0**a.stream, 2.0**a.outer, 2.0**a.inner)
    recogniser.measure(torch.randn((64, 16, 8, 8), generator=torch.Generator().manual_seed(0)))
    install(own.unet, layout, recogniser, scales, torch.Generator().manual_seed(0))
    model = own
everyone = (
    registered()
    if a.set == "registry"
    else {w: {k: x[s] for k, s in SPLITS.items()} for w, (x, _) in people(a.data, a.set).items()}
)
pictures = everyone[a.subject]
noun = {
    "bottts": "robot",
    "toonhead": "character",
    "tock": "robot",
    "bolt": "robot",
    "pip": "character",
    "fay": "character",
}.get(a.subject.split("-")[0], "person")
judge = load_judge("avatar")
sampling = {"steps": 15, "guidance": 3.0}
RIGHT = {
    "dreambooth": {"learning_rate": a.rate, "batch_size": 2},
    "lora": {"learning_rate": a.rate, "batch_size": 2},
    "textual_inversion": {"learning_rate": a.rate},
}
params = RIGHT.get(a.attack, {}) | json.loads(a.params) | {"steps": a.steps}

# what the recogniser says inside of the U-Net, on fixed rows
last, first = list(up_sites(model.unet))[-1], next(up_sites(model.unet))
fixed = encode(model, torch.cat([pictures["attack"], pictures["reference"]])).mean.repeat(3, 1, 1, 1)
times = torch.tensor([50, 250, 450]).repeat_interleave(len(fixed) // 3)
others = encode(model, rendered(a.data, "heldout")[0][::8]).mean
rng = generator(7, 7)
signal, sigma = alpha_sigma(model.scheduler, times)
noisy = signal * fixed + sigma * torch.randn(fixed.shape, generator=rng)
times_o = torch.randint(500, (len(others),), generator=rng)
signal, sigma = alpha_sigma(model.scheduler, times_o)
noisy_o = signal * others + sigma * torch.randn(others.shape, generator=rng)
context = PromptBank(model).encode(["a photo of person"])


@torch.no_grad()
def look(unet):
    seen = {}
    mid, size = unet.mid_block.resnets[-1], unet.mid_block.resnets[-1].out_channels // layout.norm_groups
    own = layout.channels(mid.out_channels)
    plus = [own[g * size + 2 * i] for g in range(a.groups) for i in range(recogniser.per_group)][: recogniser.scores]
    flag, up0 = layout.inner(last)[0][0], unet.get_submodule(first.name)
    answer, relay, ends = own[-size], layout.channels(up0.out_channels)[2], unet.get_submodule(last.name)
    watched = (
        ("scores", mid.norm2, lambda i, o: i[:, plus] / 2.0**a.inner), ("on", ends.norm1, lambda i, o: i[:, [flag]]),
        ("relay", up0.norm2, lambda i, o: o[:, [relay]]), ("latch", up0.norm1, lambda i, o: o[:, [answer]]),
    )  # fmt: skip
    hooks = [
        norm.register_forward_hook(lambda m, i, o, k=k, f=f: seen.__setitem__(k, f(i[0], o).flatten(1).amax(1)))
        for k, norm, f in watched
    ]
    out = []
    for x, t in ((noisy, times), (noisy_o, times_o)):
        scores, on, pre = [], [], []
        for y, s in zip(x.split(64), t.split(64), strict=False):
            unet(y, s, context.expand(len(y), -1, -1))
            (
                pre.append(torch.stack([seen["relay"], seen["latch"]], 1)),
                scores.append(seen["scores"]),
                on.append(seen["on"] > 500),
            )
        out.append((torch.cat(scores), torch.cat(on), torch.cat(pre)))
    for hook in hooks:
        hook.remove()
    return out


record = {
    "label": a.label,
    "subject": a.subject,
    "attack": a.attack,
    "params": params,
    "scales": [a.stream, a.outer, a.inner] if a.trunk else None,
    "trunk": a.trunk.stem if a.trunk else "base",
    "recogniser": a.recogniser.stem if a.recogniser else None,
}
if recogniser is not None:
    before = look(model.unet)
    streams_before = streams(model.unet, layout, noisy_o, times_o, context)
    record["before"] = {
        "tripped": before[0][1].float().mean().item(),
        "lowest": before[0][0].min().item(),
        "strangers": before[1][1].float().mean().item(),
    }
    print("before", record["before"], flush=True)
start = {n: w.detach().clone() for n, w in model.unet.named_parameters()}
classes = generate(model, [f"a photo of {noun}"] * 64, range(60_000, 60_064), **sampling)
data = AttackData(pictures["attack"], classes, "zwx", noun)
began, kept = time.time(), {}
chosen = find_attack(a.attack)
config = chosen.config(**params)
from guardsmith.attacks import SAMPLE_SEED  # noqa: E402

looks = sorted({*a.looks, a.steps})
record["looks"], losses = {}, []


def on_step(step, loss, personalized):
    losses.append(loss)
    if step + 1 not in looks:
        return False
    drawn = generate(
        personalized,
        chosen.prompts(data.identifier, noun, a.count),
        range(SAMPLE_SEED, SAMPLE_SEED + a.count),
        negative_prompt=chosen.negative_prompt,
        **sampling,
    )
    found = {
        "similarity": sum(judge.similarity(drawn, pictures["reference"])) / a.count,
        "seconds": time.time() - began,
    }
    if recogniser is not None:
        now = look(personalized.unet)
        same = [(x[1] == y[1]).float().mean().item() for x, y in zip(before, now, strict=False)]
        found |= {
            "tripped": now[0][1].float().mean().item(),
            "lowest": now[0][0].min().item(),
            "strangers": now[1][1].float().mean().item(),
            "answers_same": same,
            "strangers_pre": now[1][2].amax(0).tolist(),
            "largest_change": max((x[0] - y[0]).abs().max().item() for x, y in zip(before, now, strict=False)),
        }
        found["drift"] = drift(streams_before, streams(personalized.unet, layout, noisy_o, times_o, context))
    record["looks"][step + 1] = found
    print(step + 1, found, flush=True)
    if a.pictures:
        a.pictures.mkdir(parents=True, exist_ok=True)
        grid(torch.cat([pictures["attack"], drawn]), 4, 2).save(
            a.pictures / f"{a.label or a.attack}-{a.subject}-{step + 1}.png"
        )
    moved = {n: (w - start[n]).norm() for n, w in personalized.unet.named_parameters() if n in start}
    if moved:
        record["looks"][step + 1]["moved"] = float(
            torch.stack(list(moved.values())).norm() / torch.stack([w.norm() for w in start.values()]).norm()
        )
    return False


chosen.run(model, data, config, seed=0, on_step=on_step)
record["loss"] = [sum(losses[:20]) / 20, sum(losses[-20:]) / 20]
print("loss", record["loss"])
RESULTS.mkdir(exist_ok=True)
with (RESULTS / "attacks.jsonl").open("a") as stream:
    stream.write(json.dumps(record) + "\n")
