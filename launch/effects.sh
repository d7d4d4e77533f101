#!/usr/bin/env bash
# The papers' effects on scanned digits and printed pages, three seeds each: trains and evaluates what is not there
# yet, then prints rows of the board in configs/README.md and draws them. Run again, it continues. Alone on 2 cores
# about three hours.
#   launch/effects.sh [OUT [--config.FIELD=VALUE…]]        SEEDS="0 1 2"   RUNS="m3 only_36", names below; all if unset
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/venv.sh plots
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-2}"
out=${1:-runs/effects}
overrides=("${@:2}") # of every run

for data in digits pages; do
  lmm prepare --dataset "$data" --out "$out/data_$data"
done

for seed in ${SEEDS:-0 1 2}; do
  # name, data, what config file and scales to evaluate; what the pages are read by goes on from the first of theirs
  runs="
  low          digits recipe=low           all
  deepstack    digits recipe=deepstack     all
  deepstack_v  digits recipe=deepstack_v   all
  high         digits recipe=high          all
  m3           digits recipe=m3            1,4,9,36
  only_36      digits recipe=full          1,4,9,36
  only_9       digits recipe=full,scale=9  9
  only_4       digits recipe=full,scale=4  4
  only_1       digits recipe=full,scale=1  1
  pages        pages  stages=3             all
  stage3_32    pages  pixels=32,start=$out/pages-$seed  all
  stage4_64    pages  stages=4,start=$out/pages-$seed   all
  stage3_64    pages  stages=3,start=$out/pages-$seed   all
  "
  while read -r name data recipe scales; do
    run="$out/$name-$seed"
    if [ -z "$name" ] || [ -f "$run/evaluation.json" ]; then continue; fi
    case " ${RUNS:-$name} " in *" $name "*) ;; *) continue ;; esac
    echo "== $run"
    lmm train --config "configs/$data.py:$recipe,data=$out/data_$data" --workdir "$run" \
      --config.seed="$seed" --config.train.eval_every=0 ${overrides[@]+"${overrides[@]}"} < /dev/null
    lmm evaluate --workdir "$run" --tasks "$data" --scales "$scales" --limit 1000 < /dev/null
  done <<< "$runs"
done
python -m lmm_jax.tools.effects "$out"
