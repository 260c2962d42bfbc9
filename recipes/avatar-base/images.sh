#!/usr/bin/env bash
# The image side (docs/results/images.md): two subjects cloaked in every way, or protected by hardened models, and attackers with all
# of the pictures cloaked, some of them, or washed ones. Two controls are attacked on the hardened models, too.
#
#   recipes/avatar-base/images.sh FOLDER                 FOLDER keeps the runs; run it again after an interruption
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
export PATH="$root/.venv/bin:$PATH"

cd "$here"
python images_table.py "$work" --write-registry
harden() { # method, recipe
  local out="$work/$1"
  guardsmith harden --subjects "$work/registry.yaml" --recipe "$2" --output "$out" $([ -f "$out/settings.json" ] && echo --resume)
}
harden tripwire demo
harden persguard persguard-avatar
harden imma imma-avatar
harden apdm apdm-avatar
models=()
for method in tripwire persguard imma apdm; do models+=(--model "$method=$work/$method/model"); done
python images_table.py "$work" --budget 32 --sweep 8 16 48 "${models[@]}"
