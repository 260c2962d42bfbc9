"""Train a recogniser of subjects of a rendered set, or of the registry, and count whom it takes for one of them.

    python recognise.py DATA OUTPUT --set tuning --subjects avataaars-0 [--groups 6] [--steps 3000] [--more]

`--set registry` takes them from registries/avatars.yaml. Strangers to train against are registries/bystanders.parquet, with
`--more` also the rendered set `corpus`; those counted are the rendered sets `heldout` and `many`.
Writes OUTPUT (safetensors) and results/recogniser-<name>.json.
"""

import argparse
import time
from pathlib import Path

import torch
from common import SPLITS, bystanders, people, registered, rendered, write
from safetensors.torch import save_file

from guardsmith.diffusion.latents import encode
from guardsmith.methods.tripwire.layout import layout_of
from guardsmith.methods.tripwire.recogniser import Recogniser
from guardsmith.methods.tripwire.training import Examples, RecogniserTraining, noised, train, tripped
from guardsmith.methods.variations import variations
from guardsmith.metrics.identity import embed
from guardsmith.models.checkpoint import load_model
from guardsmith.training.loop import generator, torch_seed

p = argparse.ArgumentParser()
p.add_argument("data", type=Path)
p.add_argument("output", type=Path)
p.add_argument("--set", default="tuning")
p.add_argument("--subjects", nargs="+", required=True)
p.add_argument("--groups", type=int, default=6)
p.add_argument("--steps", type=int, default=3000)
p.add_argument("--drift", type=float, default=RecogniserTraining.drift)
p.add_argument("--mixtures", type=float, default=RecogniserTraining.mixtures)
p.add_argument("--constancy-weight", type=float, default=RecogniserTraining.constancy_weight)
p.add_argument("--more", action="store_true")
p.add_argument("--seed", type=int, default=0)
p.add_argument("--name", default=None)
a = p.parse_args()
model = load_model("builtin:avatar")
if a.set == "registry":
    everyone = registered()
else:
    everyone = {who: {k: x[s] for k, s in SPLITS.items()} for who, (x, _) in people(a.data, a.set).items()}
positives = [
    encode(model, variations(everyone[who]["harden"], 48, generator(a.seed, -1, i))).mean
    for i, who in enumerate(a.subjects)
]
strangers = bystanders()
if a.more:
    strangers = torch.cat([strangers, rendered(a.data, "corpus")[0]])
negatives = encode(model, strangers).mean
layout = layout_of(model.unet, a.groups)
with torch_seed(a.seed):
    recogniser = Recogniser(model.unet, layout)
began = time.time()
train(
    recogniser,
    Examples(positives, negatives),
    model.scheduler,
    RecogniserTraining(steps=a.steps, drift=a.drift, mixtures=a.mixtures, constancy_weight=a.constancy_weight),
    seed=a.seed,
    on_step=lambda s, x: (
        print(s + 1, {part: round(value, 3) for part, value in x.items()}, f"{time.time() - began:.0f} s", flush=True)
        if (s + 1) % 250 == 0
        else None
    ),
)
seconds = time.time() - began
a.output.parent.mkdir(parents=True, exist_ok=True)
save_file(recogniser.state_dict(), a.output)
TIMES = (0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 600, 700, 800, 900)
record = {
    "command": f"recognise.py --set {a.set} --subjects {' '.join(a.subjects)} --groups {a.groups} --steps {a.steps}"
    f" --drift {a.drift} --mixtures {a.mixtures} --constancy-weight {a.constancy_weight}"
    + (" --more" if a.more else ""),
    "seconds": seconds,
    "weights": sum(w.numel() for w in recogniser.parameters()),
    "negatives": len(negatives),
    "timesteps": TIMES,
}
record["recall"] = {}
for who in a.subjects:
    unseen = encode(model, torch.cat([everyone[who]["attack"], everyone[who]["reference"]])).mean
    hits = tripped(recogniser, unseen.repeat(4, 1, 1, 1), model.scheduler, TIMES, 11)
    record["recall"][who] = hits.float().mean(1).tolist()
    print(who, [round(x, 2) for x in record["recall"][who]])
NEAREST = 20
faces = {}
for name in ("heldout", "many"):
    hits = tripped(recogniser, encode(model, rendered(a.data, name)[0]).mean, model.scheduler, TIMES, 12)
    below = hits[:11].any(0)
    record[name] = {
        "by_timestep": hits.float().mean(1).tolist(),
        "any_of_11_below_half": below.float().mean().item(),
        "any": hits.any(0).float().mean().item(),
        "n": len(below),
    }
    print(
        name,
        [round(x, 4) for x in record[name]["by_timestep"]],
        "any",
        record[name]["any_of_11_below_half"],
        record[name]["any"],
    )
    faces[name] = embed(rendered(a.data, name)[0]), hits.any(0)
embedded, taken = (torch.cat(parts) for parts in zip(*faces.values(), strict=True))
record["lookalikes"] = {}
for who in a.subjects:
    nearest = (embedded @ embed(everyone[who]["harden"]).mean(0)).topk(NEAREST).indices
    record["lookalikes"][who] = int(taken[nearest].sum())
print(f"of the {NEAREST} who look most like the subject there, taken:", record["lookalikes"])
with torch.no_grad():
    rows = noised(model.scheduler, negatives[:256], torch.randint(1000, (256,), generator=generator(14)), generator(15))
    record["same_in_every_picture"] = {}
    for part, module in zip(recogniser.names, recogniser.body, strict=True):
        rows = module(rows)
        record["same_in_every_picture"][part] = float((rows.mean(0).square().mean() / rows.square().mean()).sqrt())
print("share of the stream that is the same in every picture:", record["same_in_every_picture"])
others = {w: x for w, x in everyone.items() if w not in a.subjects}
record["others"] = {}
for who, x in others.items():
    hits = tripped(
        recogniser, encode(model, torch.cat([x["attack"], x["reference"]])).mean, model.scheduler, TIMES[:11], 13
    )
    record["others"][who] = hits.float().mean().item()
print("others taken:", {w: round(v, 3) for w, v in record["others"].items() if v > 0})
write(f"recogniser-{a.name or a.output.stem}", record)
