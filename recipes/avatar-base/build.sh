#!/usr/bin/env bash
# Builds the embedded world from nothing: pictures, tokenizer, VAE, judges, U-Net + text encoder, registries, measurements.
#
#   recipes/avatar-base/build.sh [FOLDER]       FOLDER (default build/avatar-base) keeps data and checkpoints, about 1.5 GB
#
# About three and a half hours on two CPU cores (README.md here has the parts). Run it again after an interruption: finished parts are
# skipped, training goes on from its last checkpoint. Needs node 20+, npm, and an environment with guardsmith installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mkdir -p "${1:-$root/build/avatar-base}" && cd "${1:-$root/build/avatar-base}" && pwd)
export OMP_NUM_THREADS=1 PATH="$root/.venv/bin:$PATH"
cd "$here"

[ -d node_modules ] || npm ci --no-audit --no-fund
node render.mjs "$work/data"
python make_registries.py "$work/data"
[ -d "$work/tokenizer" ] || python make_tokenizer.py "$work/data" "$work"
torchrun --nproc-per-node 2 train_vae.py "$work/data" "$work" --stage joint
python train_judges.py "$work/data" "$work"
torchrun --nproc-per-node 2 train_unet.py "$work/data" "$work" --steps 2800  # a first cosine, then a second one
torchrun --nproc-per-node 2 train_unet.py "$work/data" "$work" --steps 6400
python assemble.py "$work" "$root/guardsmith/builtin"
python train_purifiers.py "$work/purifiers" --what restorer
python train_control.py "$work/control" --what controlnet
python train_control.py "$work/control" --what t2i_adapter --steps 600
python -m guardsmith train-rid "parquet:$root/registries/bystanders.parquet" --output "$work/rid" $([ -d "$work/rid" ] && echo --resume)
mkdir -p "$root/guardsmith/builtin/defenders" && cp "$work/rid/defender.safetensors" "$root/guardsmith/builtin/defenders/avatar.safetensors"
python evaluate.py "$work/data" judges
python evaluate.py "$work/data" base
python evaluate.py "$work/data" personalize
