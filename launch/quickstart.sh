#!/usr/bin/env bash
# From a fresh clone to a trained nested-token model: install, prepare, train on the CPU, evaluate, answer, draw.
# Run again, it continues where it stopped. Workdir and data: runs/digits, runs/digits_data.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/venv.sh plots
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# One virtual CPU device per core (a power of two, at most 8): data parallelism beats threads inside a small step.
cores=$(getconf _NPROCESSORS_ONLN)
devices=1
while [ $((devices * 2)) -le "$cores" ] && [ "$devices" -lt 8 ]; do devices=$((devices * 2)); done
export JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-$devices}"

data=runs/digits_data run=runs/digits
echo "== data: pictures of handwritten digits with questions"
lmm prepare --dataset digits --out "$data"
echo "== training: configs/digits.py, one model for 1, 4, 9 and 36 visual tokens"
lmm train --config "configs/digits.py:data=$data" --workdir "$run"
echo "== evaluation: 500 questions of each kind about unseen handwriting, at each number of visual tokens"
lmm evaluate --workdir "$run" --limit 500
echo "== one picture, read at each number of visual tokens"
lmm show example --workdir "$run"
