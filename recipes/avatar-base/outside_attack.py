"""Personalizes the embedded base with diffusers' own training scripts, unchanged, and compares them with guardsmith's attacks.

python outside_attack.py DATA SCRIPTS PYTHON       resumes; writes docs/results/avatar-outside-ATTACKS.json

SCRIPTS holds `train_dreambooth.py` and `train_dreambooth_lora.py` from diffusers' examples/dreambooth; PYTHON is the
interpreter of an environment of its own that has torchvision (which the scripts import and guardsmith does not):

    python -m venv /tmp/outside
    /tmp/outside/bin/pip install -c constraints.txt torch diffusers transformers accelerate peft
    /tmp/outside/bin/pip install --no-deps torchvision

Where torchvision's compiled operators do not fit torch (as its CUDA build beside a CPU build), the launcher declares the
two that it looks for on import; the scripts only use its picture transforms, which need none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import world
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from evaluate import RESULTS, draw_class_pictures, first_rows
from safetensors.torch import load_file

from guardsmith.attacks import SAMPLE_SEED, AttackData, draw_after_attack
from guardsmith.config.loading import load_recipe
from guardsmith.core.atomic_io import folder_digest, write_json
from guardsmith.core.images import to_pil
from guardsmith.diffusion.prompts import class_prompt, instance_prompt, sample_prompts
from guardsmith.diffusion.sampling import generate
from guardsmith.metrics.identity import similarity
from guardsmith.models.checkpoint import load_model, weights_digest
from guardsmith.runtime.processes import processes

IDENTIFIER, COUNT = "zwx", 16
SCRIPT = {"dreambooth": "train_dreambooth.py", "lora": "train_dreambooth_lora.py"}
LAUNCHER = """
import runpy, sys
try:
    import torchvision
except RuntimeError:
    import torch
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(
    python: Path, script: Path, label: str, params: dict[str, Any], pictures: Path, noun: str, out: Path
) -> None:
    """One run of a script of diffusers; `pictures` holds instance/ and class/."""
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": load_model("builtin:avatar").folder,
        "instance_data_dir": pictures / "instance", "instance_prompt": instance_prompt(IDENTIFIER, noun),
        "class_data_dir": pictures / "class", "class_prompt": class_prompt(noun),
        "num_class_images": len(list((pictures / "class").iterdir())), "resolution": 64,
        "train_batch_size": params["batch_size"], "max_train_steps": params["steps"],
        "learning_rate": params["learning_rate"], "lr_scheduler": "constant", "lr_warmup_steps": 0, "seed": 0,
        "checkpointing_steps": 10**6, "output_dir": out,
    }  # fmt: skip
    if label == "lora":
        options["rank"] = params["rank"]
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [str(python), "-c", LAUNCHER, str(script), "--with_prior_preservation", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-3000:]}")


def compare(data: Path, scripts: Path, python: Path, row: int, label: str, cache: Path) -> dict[str, Any]:
    """Similarity to one subject after the script and after guardsmith's attack of the same settings."""
    file = cache / f"{label}-{row}.json"
    if file.exists():
        told: dict[str, Any] = json.loads(file.read_text())
        return told
    recipe, model = load_recipe("demo"), load_model("builtin:avatar")
    sampling, spec = recipe.sampling.model_dump(), recipe.verify.attacks[label]
    pixels, lines = world.load(data, "testing")
    noun, views = lines[row]["class_noun"], world.to_float(pixels[row : row + 16])
    class_images = load_file(cache / f"class-{noun}.safetensors")["images"]
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder)
        for name, images in (("instance", views[:4]), ("class", class_images)):
            (pictures / name).mkdir()
            for i, image in enumerate(images):
                to_pil(image).save(pictures / name / f"{i:03d}.png")
        run_script(python, scripts / SCRIPT[label], label, spec.params, pictures, noun, pictures / "out")
        outside = load_model("builtin:avatar")
        if label == "lora":
            pipeline = StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None)
            pipeline.load_lora_weights(pictures / "out")
            outside.unet = pipeline.unet.float().requires_grad_(False)
        else:
            outside.unet = UNet2DConditionModel.from_pretrained(pictures / "out" / "unet").requires_grad_(False)
    prompts = sample_prompts(IDENTIFIER, noun, COUNT)
    theirs = generate(outside, prompts, range(SAMPLE_SEED, SAMPLE_SEED + COUNT), **sampling)
    given = AttackData(views[:4], class_images, IDENTIFIER, noun)
    ours, _ = draw_after_attack(model, spec.name, spec.params, given, seed=0, count=COUNT, sampling=sampling)
    scores = {
        name: [s for s in similarity(images, views[8:]) if s is not None]
        for name, images in (("diffusers", theirs), ("guardsmith", ours), ("genuine", views[:4]))
    }
    told = {"identity": lines[row]["identity"], "attack": label} | {k: sum(v) / len(v) for k, v in scores.items()}
    write_json(file, told)
    return told


def main() -> None:
    """Some subjects of every style, both scripts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("scripts", type=Path)
    parser.add_argument("python", type=Path)
    parser.add_argument("--per-style", type=int, default=1)
    parser.add_argument("--attacks", nargs="+", choices=tuple(SCRIPT), default=list(SCRIPT))
    args = parser.parse_args()
    recipe, model = load_recipe("demo"), load_model("builtin:avatar")
    digest = weights_digest(model.folder)
    attacks = {k: v.model_dump() for k, v in recipe.verify.attacks.items() if k in SCRIPT}
    cache = args.data.parent / "outside" / folder_digest(digest, recipe.sampling.model_dump(), attacks)
    cache.mkdir(parents=True, exist_ok=True)

    draw_class_pictures(model, recipe, cache)
    rows = first_rows(args.data, "testing", args.per_style)
    asked = {label: attacks[label] for label in args.attacks}
    jobs = [(row, label) for label in asked for row in rows]
    with processes(2) as (pool, _):
        futures = [pool.submit(compare, args.data, args.scripts, args.python, *job, cache) for job in jobs]
        told = [future.result() for future in futures]
    result: dict[str, Any] = {
        "command": f"python outside_attack.py DATA SCRIPTS PYTHON --attacks {' '.join(asked)}", "model_digest": digest,
        "attacks": asked, "runs": told,
        "mean": {
            label: {
                key: sum(t[key] for t in told if t["attack"] == label) / len(rows)
                for key in ("diffusers", "guardsmith", "genuine")
            }
            for label in asked
        },
    }  # fmt: skip
    write_json(RESULTS / f"avatar-outside-{'-'.join(asked)}.json", result)
    print(json.dumps(result["mean"], indent=1))


if __name__ == "__main__":
    main()
