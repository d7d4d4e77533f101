#!/usr/bin/env bash
# From a fresh clone to a trained nested-token model: install, prepare, train on the CPU, answer, evaluate, draw.
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

data=runs/digits_data run=runs/digits results=runs/digits/evaluation.txt
echo "== data: pictures of handwritten digits with questions, about half a minute"
lmm prepare --dataset digits --out "$data"

echo "== training configs/digits.py: one model for 1, 4, 9 and 36 visual tokens, about four minutes"
lmm train --config "configs/digits.py:data=$data" --workdir "$run"

if [ "$results" -nt "$run/checkpoints" ]; then
  echo "== all is done; remove runs/ to start again"
else
  echo "== questions about one unseen picture, $data/example.png"
  for scale in 1 36; do
    for prompt in "digit at b2?" "read all"; do
      echo "at $scale visual tokens, '$prompt': $(lmm generate --workdir "$run" --image "$data/example.png" \
        --prompt "$prompt" --scale "$scale")"
    done
  done
  echo "== evaluation: 500 questions of each kind about unseen handwriting, at each number of visual tokens"
  lmm evaluate --workdir "$run" --limit 500 > "$results.tmp"
  mv "$results.tmp" "$results"
fi
cat "$results"
echo "$run/loss.png"
