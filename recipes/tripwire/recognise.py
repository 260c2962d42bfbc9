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
from common import ROOT, SPLITS, bystanders, people, registered, rendered, write
from safetensors.torch import save_file

from guardsmith.attacks.evasion import EVASIONS, EvasionContext, transformed
from guardsmith.diffusion.latents import encode
from guardsmith.diffusion.prompts import class_prompt
from guardsmith.diffusion.sampling import generate
from guardsmith.methods.data import SubjectData
from guardsmith.methods.transformations import transformed_at_random
from guardsmith.methods.tripwire.early import EarlyDrawing, early_pictures
from guardsmith.methods.tripwire.examples import positives_of
from guardsmith.methods.tripwire.layout import layout_of
from guardsmith.methods.tripwire.method import TripwireConfig
from guardsmith.methods.tripwire.recogniser import Recogniser
from guardsmith.methods.tripwire.training import Examples, RecogniserTraining, noised, train, tripped
from guardsmith.metrics.identity import embed
from guardsmith.models.checkpoint import load_model
from guardsmith.registry.loader import load_registry
from guardsmith.training.loop import generator, torch_seed

p = argparse.ArgumentParser()
p.add_argument("data", type=Path)
p.add_argument("output", type=Path)
p.add_argument("--set", default="tuning")
p.add_argument("--subjects", nargs="+", required=True)
p.add_argument("--groups", type=int, default=12)
p.add_argument("--outer-groups", type=int, default=4)
p.add_argument("--steps", type=int, default=3000)
p.add_argument("--drift", type=float, default=RecogniserTraining.drift)
p.add_argument("--norm-drift", type=float, default=RecogniserTraining.norm_drift)
p.add_argument("--mixtures", type=float, default=RecogniserTraining.mixtures)
p.add_argument("--strangers-weight", type=float, default=RecogniserTraining.strangers_weight)
p.add_argument("--constancy-weight", type=float, default=RecogniserTraining.constancy_weight)
p.add_argument("--transformed", type=int, default=0, help="transformed copies of every picture of a subject")
p.add_argument(
    "--transformed-strangers", type=float, default=0.5, help="transformed strangers, as a share of strangers"
)
p.add_argument("--early", type=int, nargs="*", default=[], help="steps of DreamBooth, after which the base draws")
p.add_argument("--early-images", type=int, default=48)
p.add_argument("--rate", type=float, default=RecogniserTraining.learning_rate)
p.add_argument("--more", action="store_true")
p.add_argument("--seed", type=int, default=0)
p.add_argument("--name", default=None)
a = p.parse_args()
model = load_model("builtin:avatar")
if a.set == "registry":
    everyone = registered()
    nouns = {subject.id: subject.class_noun for subject in load_registry(ROOT / "registries" / "avatars.yaml").subjects}
else:
    found = people(a.data, a.set)
    everyone = {who: {k: x[s] for k, s in SPLITS.items()} for who, (x, _) in found.items()}
    nouns = {who: noun for who, (_, noun) in found.items()}
strangers = bystanders()
if a.more:
    strangers = torch.cat([strangers, rendered(a.data, "corpus")[0]])
positives = []
config = TripwireConfig(transformed=a.transformed)
for i, who in enumerate(a.subjects):
    pictures = None
    if a.early:
        classes = generate(model, [class_prompt(nouns[who])] * 64, range(60_000, 60_064), steps=15, guidance=3.0)
        data = SubjectData(who, nouns[who], (), everyone[who]["harden"], classes, classes)
        pictures = early_pictures(model, data, EarlyDrawing(a.early, a.early_images, 3e-4, 15, 3.0), a.seed + i)
    positives += positives_of(model, everyone[who]["harden"], pictures, strangers, config, a.seed, i)
if a.transformed:
    rng = generator(a.seed, -6)
    some = strangers[torch.randperm(len(strangers), generator=rng)[: int(a.transformed_strangers * len(strangers))]]
    strangers = torch.cat([strangers, *transformed_at_random(some, 1, strangers, rng)])
negatives = encode(model, strangers).mean
layout = layout_of(model.unet, a.groups, a.outer_groups)
with torch_seed(a.seed):
    recogniser = Recogniser(model.unet, layout)
began = time.time()
train(
    recogniser,
    Examples(positives, negatives),
    model.scheduler,
    RecogniserTraining(
        steps=a.steps,
        learning_rate=a.rate,
        drift=a.drift,
        norm_drift=a.norm_drift,
        mixtures=a.mixtures,
        constancy_weight=a.constancy_weight,
        strangers_weight=a.strangers_weight,
    ),
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
    "command": f"recognise.py --set {a.set} --subjects {' '.join(a.subjects)} --groups {a.groups}"
    f" --outer-groups {a.outer_groups} --steps {a.steps} --rate {a.rate} --strangers-weight {a.strangers_weight}"
    f" --drift {a.drift} --norm-drift {a.norm_drift} --mixtures {a.mixtures} --constancy-weight {a.constancy_weight}"
    + (f" --transformed {a.transformed} --transformed-strangers {a.transformed_strangers}" if a.transformed else "")
    + (f" --early {' '.join(map(str, a.early))} --early-images {a.early_images}" if a.early else "")
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
record["evasions"] = {}
for who in a.subjects:
    unseen, record["evasions"][who] = everyone[who]["attack"], {}
    for name, entry in EVASIONS.items():
        if entry.needs_model:
            continue
        pictures = transformed(unseen, [name], EvasionContext(0, strangers=strangers[:4]))
        hits = tripped(recogniser, encode(model, pictures).mean.repeat(4, 1, 1, 1), model.scheduler, TIMES[:13], 21)
        record["evasions"][who][name] = hits.float().mean(1).tolist()
    print(who, {n: [round(x[i], 2) for i in (0, 4, 8, 11)] for n, x in record["evasions"][who].items()})
NEAREST = 20
faces = {}
pictures = rendered(a.data, "heldout")[0]
pictures = torch.cat([*transformed_at_random(pictures, 1, pictures, generator(a.seed, -7))])
hits = tripped(recogniser, encode(model, pictures).mean, model.scheduler, TIMES, 12)
record["transformed_strangers"] = hits[:11].any(0).float().mean().item()
print("transformed strangers taken", record["transformed_strangers"])
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
