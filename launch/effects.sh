#!/usr/bin/env bash
# The board of effects, five seeds of every row: trains and evaluates what is not there yet, then prints the rows that
# stand in configs/README.md and draws them. Run again, it continues where it was. Alone on 2 cores a seed takes about
# an hour and a half.
#   launch/effects.sh [OUT [--config.FIELD=VALUE…]]        SEEDS="0 1 2 3 4"   RUNS="m3 only_36", names below; all if unset
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/venv.sh plots
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-2}"
out=${1:-runs/effects}
overrides=("${@:2}") # of every run that is trained

for data in digits pages; do
  lmm prepare --dataset "$data" --out "$out/data_$data"
done

for seed in ${SEEDS:-0 1 2 3 4}; do
  # name, data, what config file, scales to evaluate, further flags of `lmm evaluate`. Where the third is of=RUN,
  # nothing is trained: RUN is evaluated in another way. What the pages are read by goes on from the first of theirs.
  runs="
  low          digits recipe=low           all
  deepstack    digits recipe=deepstack     all
  deepstack_v  digits recipe=deepstack_v   all
  high         digits recipe=high          all
  m3           digits recipe=m3            1,4,9,36
  m3_zip       digits of=m3                1,4,9,18,36  --reduction zip
  m3_random    digits of=m3                1,4,9,18,36  --reduction random
  m3_strided   digits of=m3                1,4,9,18,36  --reduction strided
  m3_fit       digits of=m3                all        --fit-auto
  cascade      digits of=m3                auto
  router       digits recipe=router,start=$out/m3-$seed  all  --fit-auto
  routed       digits of=router            auto
  only_36      digits recipe=full          1,4,9,36
  only_9       digits recipe=full,scale=9  9
  only_4       digits recipe=full,scale=4  4
  only_1       digits recipe=full,scale=1  1
  pages        pages  stages=3             all
  stage3_32    pages  pixels=32,start=$out/pages-$seed  all
  stage4_64    pages  stages=4,start=$out/pages-$seed   all
  stage3_64    pages  stages=3,start=$out/pages-$seed   all
  pages_vit    pages  encoder=vit          1,4,16,64
  pages_zip    pages  of=pages_vit         1,4,16,64  --reduction zip
  pages_random pages  of=pages_vit         1,4,16,64  --reduction random
  pages_strided pages of=pages_vit         1,4,16,64  --reduction strided
  "
  while read -r name data recipe scales flags; do
    run="$out/$name-$seed"
    if [ -z "$name" ] || [ -f "$run/evaluation.json" ]; then continue; fi
    case " ${RUNS:-$name} " in *" $name "*) ;; *) continue ;; esac
    echo "== $run"
    model=$run
    if [ "${recipe#of=}" != "$recipe" ]; then
      model="$out/${recipe#of=}-$seed"
    else
      lmm train --config "configs/$data.py:$recipe,data=$out/data_$data" --workdir "$run" \
        --config.seed="$seed" --config.train.eval_every=0 ${overrides[@]+"${overrides[@]}"} < /dev/null
    fi
    # shellcheck disable=SC2086 # flags are words
    lmm evaluate --workdir "$model" --tasks "$data" --scales "$scales" --limit 1000 --out "$run" $flags < /dev/null
    git describe --always --dirty --exclude='*' > "$run/commit" 2> /dev/null || true
  done <<< "$runs"
done
python -m lmm_jax.tools.effects "$out"
