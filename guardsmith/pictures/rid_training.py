"""Training a RID defender on a folder of pictures: pairs first, then the network; a killed run goes on with --resume.

<output>/settings.json          settings of the run; a resumed run must have the same
<output>/pairs.safetensors      pictures cloaked by optimization
<output>/state.safetensors      training state
<output>/defender.safetensors   appears whole, at the end
<output>/training.json          written last
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guardsmith.attacks.base import AttackData
from guardsmith.cloaks import find_cloak
from guardsmith.cloaks.pixels import load_bases
from guardsmith.cloaks.rid import RidTraining, train
from guardsmith.core.atomic_io import folder_digest, read_kept, read_record, whole_file, write_json
from guardsmith.core.images import open_pictures, sha256_file
from guardsmith.core.progress import stage
from guardsmith.hardening.data import negative_files
from guardsmith.models.checkpoint import DiffusionModel, weights_digest
from guardsmith.models.networks import save_network
from guardsmith.runtime.output import lock_output, prepare_output

DEFENDER = "defender.safetensors"
WRITTEN = ("training.json", DEFENDER, "pairs.safetensors", "state.safetensors")


def make_pairs(
    models: Sequence[DiffusionModel], pictures: Tensor, config: RidTraining, seed: int, file: Path
) -> Tensor:
    """Cloaked copies of the first pictures, group by group; kept in a file after every group, from which it goes on."""
    count = round(len(pictures) * config.pair_share) if config.regression_weight else 0
    stored = read_kept(file, lambda path: load_file(path)["pairs"], "its pictures are cloaked again")
    pairs = torch.empty(0, *pictures.shape[1:]) if stored is None else stored
    entry = find_cloak(config.pair_cloak)
    settings = entry.config(**{"budget": config.budget} | config.pair_params)
    no_images = torch.empty(0, *pictures.shape[1:])
    with stage(f"pairs ({config.pair_cloak})", count) as bar:
        bar(done=min(len(pairs), count))
        while len(pairs) < count:
            group = pictures[len(pairs) : min(len(pairs) + config.pair_group, count)]
            data = AttackData(group, no_images, "sks", "person")
            pairs = torch.cat([pairs, entry.run(models, data, settings, seed=seed + len(pairs))])
            with whole_file(file) as temporary:
                save_file({"pairs": pairs}, temporary)
            bar(done=len(pairs))
    return pairs[:count]


def train_defender(
    place: str,
    output: Path,
    *,
    bases: Sequence[str],
    params: dict[str, Any],
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a defender and write it down.

    Args:
        place: pictures to train on (see `Recipe.negatives`).
        output: folder.
        bases: one, or several of one size (RID-Ensemble).
        params: values of `RidTraining`.
        seed: of everything random.
        resume: go on with an interrupted run of the same settings.
        overwrite: delete an earlier run first.

    Returns:
        The content of `training.json`.

    Raises:
        UserError: pictures, bases or output cannot be used.
        RunFailed: it diverged.
    """
    config = RidTraining(**params)
    files = negative_files(place)
    models = load_bases(bases)
    digests = [weights_digest(model.folder) for model in models]
    settings = {
        "bases": digests, "picture_digest": folder_digest(*(sha256_file(file) for file in files)), "seed": seed,
        "params": config.model_dump(mode="json"),
    }  # fmt: skip
    prepare_output(output, settings, resume=resume, overwrite=overwrite, mark="picture_digest", written_here=WRITTEN)
    with ExitStack() as stack:
        lock_output(output, stack)
        record = read_kept(output / "training.json", _finished, "the defender is trained again")
        if record is not None:
            return record
        return _train(output, files, models, bases, digests, config, seed)


def _finished(record: Path) -> dict[str, Any]:
    return read_record(record, ("params", "seconds"), "train again")


def _train(
    output: Path, files: Sequence[Path], models: Sequence[DiffusionModel], bases: Sequence[str], digests: Sequence[str],
    config: RidTraining, seed: int,
) -> dict[str, Any]:  # fmt: skip
    pictures = open_pictures(files, models[0].image_size)
    began = time.monotonic()
    pairs = make_pairs(models, pictures, config, seed, output / "pairs.safetensors")
    with stage("training (RID)", config.steps) as bar:

        def show(step: int, numbers: dict[str, float]) -> None:
            bar(numbers, done=step + 1)

        defender, history = train(
            models, pictures, pairs, config, seed=seed, checkpoint=output / "state.safetensors", on_step=show
        )
    record = {
        "bases": [{"base": base, "digest": digest} for base, digest in zip(bases, digests, strict=True)],
        "params": config.model_dump(mode="json"), "pictures": len(files), "pairs": len(pairs), "seed": seed,
        "seconds": time.monotonic() - began, "parameters": sum(p.numel() for p in defender.parameters()),
        "history": history[:: max(1, len(history) // 100)],
    }  # fmt: skip
    settings = {key: record[key] for key in ("bases", "params", "pictures", "pairs", "seed")}
    save_network(defender, defender.shape, output / DEFENDER, settings)
    write_json(output / "training.json", record)
    return record
