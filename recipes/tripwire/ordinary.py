"""Benign prompts, as `guardsmith verify` measures them: KID ratio, fidelity, collapsed pictures.

python ordinary.py --trunk UNET --recogniser FILE [--count 200]      writes results/ordinary-<trunk folder>.json
"""

import argparse
from pathlib import Path

from common import write
from hardened import put_together

from guardsmith.diffusion.prompts import VERIFICATION_TEMPLATES, benign_prompts
from guardsmith.diffusion.sampling import generate
from guardsmith.evaluation.benign import measure_benign
from guardsmith.metrics import load_judge
from guardsmith.models.checkpoint import load_model

p = argparse.ArgumentParser()
p.add_argument("--trunk", type=Path, required=True)
p.add_argument("--recogniser", type=Path, required=True)
p.add_argument("--count", type=int, default=200)
a = p.parse_args()
base = load_model("builtin:avatar")
hard, _ = put_together(base, a.trunk, a.recogniser)
asked = benign_prompts(base, VERIFICATION_TEMPLATES, a.count, 1)
texts = [prompt.text for prompt in asked]
drawn = {
    name: generate(model, texts, range(seed, seed + a.count), steps=15, guidance=3.0, batch=16)
    for name, model, seed in (("base", base, 40_000), ("base again", base, 50_000), ("hardened", hard, 50_000))
}
record = measure_benign(asked, drawn, load_judge("avatar"))
print(record)
write(f"ordinary-{a.trunk.parent.name}", {"command": f"ordinary.py --count {a.count}"} | record.model_dump(mode="json"))
