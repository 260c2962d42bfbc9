#!/usr/bin/env bash
# The methods side by side: five protected subjects together, five controls (one of a class that nobody protected), identifiers that
# no hardening used. Subjects are of the set `testing`; nothing was chosen on them. Every method gets as many U-Net forward
# equivalents as Tripwire. Tripwire meets the attacks of several-avatars, up to four times the usual steps; the others meet DreamBooth
# and LoRA of rank 4, for the usual steps.
#
#   recipes/avatar-base/matrix.sh DATA FOLDER            FOLDER keeps the runs; run it again after an interruption
#   recipes/avatar-base/matrix.sh DATA FOLDER peers      without Tripwire, whose report is docs/results/matrix-tripwire-report.json
#
# Writes docs/results/matrix.json, matrix.md and matrix.svg: what the reports have in common.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
data=$(cd "$1" && pwd)
work=$(mkdir -p "$2" && cd "$2" && pwd)
export PATH="$root/.venv/bin:$PATH"

cd "$here"
[ -f "$work/registry.yaml" ] || python make_registries.py "$data" --set testing --protected 5 --controls 5 --folder "$work" \
  --styles avataaars micah personas bottts
harden() { # name, recipe, changes
  local out="$work/$1" recipe=$2
  shift 2
  guardsmith harden --subjects "$work/registry.yaml" --recipe "$recipe" --output "$out" "$@" \
    $([ -f "$out/settings.json" ] && echo --resume)
}
[ "${3:-}" = peers ] || harden tripwire several-avatars
harden persguard persguard-avatar --set method.params.steps=3535 --set method.params.target_noun=character # nobody's class
harden imma imma-avatar --set method.params.steps=7576
harden apdm apdm-avatar --set method.params.outer_steps=596

verify() { # name, changes; the verdict is in the report; a failed gate (1, 3) is a result
  local code=0 out="$work/$1"
  shift
  guardsmith verify "$out" --subjects "$work/registry.yaml" --recipe several-avatars --base-runs "$work/base" "$@" || code=$?
  [ $code -eq 0 ] || [ $code -eq 1 ] || [ $code -eq 3 ] || exit $code
}
dreambooth='dreambooth: {name: dreambooth, params: {learning_rate: 3.0e-4, steps: 300, batch_size: 2}}'
lora_4='lora-4: {name: lora, params: {learning_rate: 2.0e-3, steps: 300, batch_size: 2, rank: 4}}'
for run in persguard imma apdm; do
  verify $run --set 'verify.evaluation_points=[1]' --set "verify.attacks={$dreambooth, $lora_4}"
done
tripwire="$root/docs/results/matrix-tripwire-report.json"
[ "${3:-}" = peers ] || { verify tripwire && cp "$work/tripwire/verify/report.json" "$tripwire"; }
for run in persguard imma apdm; do
  cp "$work/$run/verify/report.json" "$root/docs/results/matrix-$run-report.json"
done
cp "$tripwire" "$work/tripwire.json" # a column is called as its file
runs=("$work/tripwire.json" "$work/persguard" "$work/imma" "$work/apdm")
guardsmith compare "${runs[@]}" --json >"$root/docs/results/matrix.json"
guardsmith compare "${runs[@]}" --markdown --svg "$root/docs/results/matrix.svg" >"$root/docs/results/matrix.md"
