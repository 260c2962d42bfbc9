"""How a trunk answers what people add to the base, beside the base's own answer.

    python effects.py DATA FOLDER TRUNK... [--recogniser FILE] [--groups 12] [--outer-groups 4]

Trains adapters and words on the base for two tuning subjects (kept in FOLDER), and puts them, and the shipped ControlNet and
T2I-Adapter, onto the base and onto each trunk. What counts is what they change in the prediction: its error is the squared
difference of the two changes over the square of the base's, its gain how large the trunk's is in the base's direction.
Rows that trip are counted apart. Prints besides how far a trunk has gone from the base, and the error of the half-way merge with
the base in its prediction. With `--recogniser` all of that is of the hardened U-Net, whose reserved channels the additions and
the base's weights read. Writes results/effects-<trunk>[-<recogniser>].json.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import SPLITS, people, rendered, write
from diffusers import ControlNetModel, T2IAdapter
from hardened import put_together
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from guardsmith.attacks import AttackData, find_attack
from guardsmith.attacks.lora import EVERYWHERE, TARGETS, add_adapters
from guardsmith.attacks.sampling_tricks import averaged
from guardsmith.config.deployability import ADAPTERS
from guardsmith.diffusion.latents import decode, encode
from guardsmith.diffusion.prompts import PromptBank
from guardsmith.evaluation.deployability.edges import edge_maps
from guardsmith.methods.tripwire.layout import Masks, layout_of, reserve
from guardsmith.methods.tripwire.training import noised
from guardsmith.methods.tripwire.trunk import load_trunk
from guardsmith.models.checkpoint import BUILTIN, DiffusionModel, load_model, with_own_unet
from guardsmith.training.loop import generator

SUBJECTS = ("avataaars-10", "micah-10")
SETTINGS = {
    "lora": {"learning_rate": 2e-3}, "lora_conv": {"learning_rate": 1e-3}, "textual_inversion": {"learning_rate": 1e-2},
    "custom_diffusion": {"learning_rate": 1e-3},
}  # fmt: skip
COUNT = 96


def trained(model: DiffusionModel, pictures: Tensor, kind: str, file: Path) -> dict[str, Any]:
    """What an adapter's file would hold, made on the base once."""
    if file.exists():
        kept: dict[str, Any] = torch.load(file)
        return kept
    name, own = ADAPTERS[kind]
    attack = find_attack(name)
    config = attack.config(**own, **SETTINGS[kind], steps=200, batch_size=4)
    made = attack.run(model, AttackData(pictures, torch.empty(0), "zwx", "person"), config, seed=0)[0]
    kept = {}
    if kind.startswith("lora"):
        kept["adapter"] = {key: value.clone() for key, value in get_peft_model_state_dict(made.unet).items()}
    else:
        kept["context"] = PromptBank(made).encode(["a photo of <zwx> person"])
    if kind == "custom_diffusion":
        kept["weights"] = {
            key: value.clone()
            for key, value in made.unet.state_dict().items()
            if "attn2.to_k" in key or "attn2.to_v" in key
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(kept, file)
    return kept


@torch.no_grad()
def answers(
    model: DiffusionModel, added: dict[str, dict[str, Any]], call: tuple[Tensor, Tensor, Tensor], maps: Tensor
) -> dict[str, Tensor]:
    """Predictions of a model with each addition, and without any."""
    base = load_model("builtin:avatar").unet.state_dict()
    noisy, times, contexts = call

    def run(unet: Any, contexts: Tensor = contexts, **extra: Any) -> Tensor:
        out: Tensor = unet(noisy, times, contexts.expand(len(noisy), -1, -1), **extra, return_dict=False)[0]
        return out

    control = ControlNetModel.from_pretrained(BUILTIN / "controlnets" / "avatar", dtype=torch.float32)
    down, middle = control(noisy, times, contexts, maps, return_dict=False)
    inside = T2IAdapter.from_pretrained(BUILTIN / "t2i_adapters" / "avatar", dtype=torch.float32)(maps)
    given = {
        "plain": run(model.unet),
        "ControlNet": run(model.unet, down_block_additional_residuals=down, mid_block_additional_residual=middle),
        "T2I-Adapter": run(model.unet, down_intrablock_additional_residuals=list(inside)),
    }
    for name, kept in added.items():
        unet = with_own_unet(model).unet
        for key, value in kept.get("weights", {}).items():
            unet.get_parameter(key).add_(value - base[key])
        if "adapter" in kept:
            add_adapters(unet, 4, 0, targets=EVERYWHERE if "conv" in name else TARGETS)
            set_peft_model_state_dict(unet, kept["adapter"])
        given[name] = run(unet, kept.get("context", contexts))
    return given


def at_rest(prediction: Tensor, base: Tensor) -> Tensor:
    """Which rows of predictions (n, c, h, w) are not overridden, bool (n,)."""
    return (prediction - base).abs().flatten(1).mean(1) < 2


def weights_moved(base: Any, trunk: Any, masks: Masks) -> float:
    """Norm of the difference between a trunk's weights and the base's, over the norm of the base's, without what was cut."""
    difference = size = 0.0
    for (name, ours), theirs in zip(trunk.named_parameters(), base.parameters(), strict=True):
        free = masks.get(name, torch.ones_like(theirs, dtype=torch.bool))
        difference += float((ours - theirs)[free].square().sum())
        size += float(theirs[free].square().sum())
    return float((difference / size) ** 0.5)


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("trunks", type=Path, nargs="+")
    parser.add_argument("--recogniser", type=Path)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--outer-groups", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, everyone = load_model("builtin:avatar"), people(args.data, "tuning")
    added = {
        f"{kind} {who}": trained(model, everyone[who][0][SPLITS["attack"]], kind, args.folder / f"{kind}-{who}.pt")
        for kind in SETTINGS for who in SUBJECTS
    }  # fmt: skip
    latents = encode(model, rendered(args.data, "heldout")[0][5::9][:COUNT]).mean
    times = torch.randint(100, 900, (len(latents),), generator=generator(1, 1))
    contexts = PromptBank(model).encode(["a photo of zwx person"]).expand(len(latents), -1, -1)
    call = noised(model.scheduler, latents, times, generator(2, 2)), times, contexts
    maps = edge_maps(decode(model, latents).clamp(-1, 1)).roll(7, 0)  # of another picture
    own = answers(model, added, call, maps)
    for file in args.trunks:
        trunk = with_own_unet(model)
        load_trunk(file, trunk.unet)
        masks = reserve(trunk.unet, layout_of(model.unet, args.groups, args.outer_groups))
        moved = weights_moved(model.unet, trunk.unet, masks)
        label = file.stem
        if args.recogniser is not None:
            trunk, _ = put_together(model, file, args.recogniser, (args.groups, args.outer_groups))
            label += f"-{args.recogniser.stem}"
        given = answers(trunk, added, call, maps)
        merged = answers(averaged(model, trunk), {}, call, maps)["plain"]
        record: dict[str, Any] = {"weights_moved": moved, "rows": len(latents)}
        for name, found in (("plain", given["plain"]), ("merged", merged)):
            rest = at_rest(found, own["plain"])
            error = (found - own["plain"])[rest].square().sum() / own["plain"][rest].square().sum()
            record[name] = {"error": float(error), "tripped": int((~rest).sum())}
        for name in list(own)[1:]:
            rest = at_rest(given[name], own[name]) & at_rest(given["plain"], own["plain"])
            right, here = (own[name] - own["plain"])[rest], (given[name] - given["plain"])[rest]
            error, gain = (here - right).square().sum(), (here * right).sum()
            tripped = int((~at_rest(given[name], own[name])).sum())
            size = right.square().sum()
            record[name] = {"error": float(error / size), "gain": float(gain / size), "tripped": tripped}
        print(file, *(f"{key}: {value}" for key, value in record.items()), sep="\n    ")
        write(f"effects-{label}", record)


if __name__ == "__main__":
    main()
