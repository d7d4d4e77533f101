#!/usr/bin/env bash
# launch/tpu_vm.sh [--dry-run] VERB …: TPU VMs of Google Cloud, one queued resource of one or more slices.
# Environment: NAME, ZONE, and PROJECT unless gcloud knows it.
#   create [FLAG…]          asks for TOPOLOGY, by chips (v5e-64, v6e-256, v5p-64), SLICES (1) times, spot if SPOT=1,
#                           and looks every POLL (30) seconds, for WAIT (86400), if it is there; FLAG… go to gcloud
#   setup                   installs this clone at COMMIT (HEAD) with EXTRAS (tpu,gcs) on every worker
#   run COMMAND…            starts the command on every worker, detached, in the clone's folder; passes on W&B's and
#                           XLA's variables (PASS) that are set, and a secret by which the workers know one another.
#                           75: preempted after a save, run it again
#   status                  "state …", then a line for each worker: running, exited CODE, lost, idle
#   logs [WORKER [LINES]]   the end of the log of a worker (0; or all) of slice NODE (0; or all)
#   stop                    SIGTERM to the command, which saves and exits with 75; SIGKILL after GRACE (900) seconds
#   delete                  gives everything back
# Several workers need `ssh-add ~/.ssh/google_compute_engine`; without public addresses, TPU_SSH=--tunnel-through-iap.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

parse "$@"
set -- ${rest[@]+"${rest[@]}"}
case $verb in create | setup | run | status | logs | stop | delete) ;; *) die 2 "no verb '$verb'; see --help" ;; esac
(: "${NAME:?name of the queued resource}" "${ZONE:?zone of Google Cloud, such as us-west4-a}") || exit 2
check NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "small letters, digits and -, a letter first, at most 40"
check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' "not a zone, such as us-west4-a"
poll=${POLL:-30}
where=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")
# shellcheck disable=SC2206 # several flags
connect=("${where[@]}" ${TPU_SSH:-})
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

tpus() { call gcloud compute tpus queued-resources "$@"; }

on() { # WORKER NODE COMMAND; a host that has gone is noticed within two minutes
  tpus ssh "$NAME" "${connect[@]}" --worker="$1" --node="$2" \
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 --command="$3"
}

copy() { tpus scp "$1" "$NAME:$(basename "$1")" "${connect[@]}" --worker=all --node=all; }

state() { # of the queued resource; ABSENT if there is none, a failure if nobody answers
  tpus describe "$NAME" "${where[@]}" --format='value(state.state)' 2> "$tmp/error" && return
  if grep -q NOT_FOUND "$tmp/error"; then echo ABSENT; else cat "$tmp/error" >&2 && return 1; fi
}

case $verb in
  create)
    (: "${TOPOLOGY:?slice by its number of chips, such as v5e-64}") || exit 2
    find_slice "$TOPOLOGY"
    [ "$runtime" ] || die 2 "TOPOLOGY=$TOPOLOGY: Google Cloud rents tpu7x through GKE only; see launch/gke.sh"
    SLICES=${SLICES:-1}
    check SLICES '[1-9][0-9]*' "not a number of slices"
    flags=(--accelerator-type="$accelerator" --runtime-version="${RUNTIME:-$runtime}" ${SPOT:+--spot} "$@")
    if [ "$SLICES" = 1 ]; then
      flags+=(--node-id="$NAME")
    else
      flags+=(--node-count="$SLICES" --node-prefix="$NAME")
    fi
    now=ABSENT
    [ "$dry" ] || now=$(state)
    [ "$now" != ABSENT ] || tpus create "$NAME" "${where[@]}" "${flags[@]}"
    until [ "$dry" ]; do
      now=$(state) || now=unknown
      case $now in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) die 1 "$NAME is $now; delete it, then create it again" ;;
      esac
      [ "$SECONDS" -lt "${WAIT:-86400}" ] || die 1 "$NAME is $now after $SECONDS s; it stays in the queue"
      sleep "$poll"
    done
    [ -z "$dry" ] || state ;;
  setup)
    EXTRAS=${EXTRAS:-tpu,gcs}
    check EXTRAS '[-a-z,]+' "not extras of lmm_jax, such as tpu,wandb"
    file=$tmp/lmm_jax.tar.gz
    call git archive --output="$file" "${COMMIT:-HEAD}"
    for left in 4 3 2 1 0; do # new hosts need a while before they let anyone in
      if copy "$file"; then break; fi
      [ "$left" -gt 0 ] || die 1 "$NAME: not all workers could be reached"
      sleep "$poll"
    done
    on all all "mkdir -p lmm_jax && find lmm_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + && \
tar -xzf lmm_jax.tar.gz -C lmm_jax && lmm_jax/launch/worker.sh setup $EXTRAS" ;;
  run)
    [ $# -gt 0 ] || die 2 "run which command?"
    store_environment "$tmp/.lmm_env" 'export %s=%q\n'
    copy "$tmp/.lmm_env"
    on all all "lmm_jax/launch/worker.sh start$(printf ' %q' "$@")" ;;
  status)
    if [ "$dry" ]; then state; else now=$(state) && echo "state $now"; fi
    if [ "${now:-ACTIVE}" = ACTIVE ]; then on all all "lmm_jax/launch/worker.sh status"; fi ;;
  logs) on "${1:-0}" "${NODE:-0}" "lmm_jax/launch/worker.sh log ${2:-100}" ;;
  stop) on all all "lmm_jax/launch/worker.sh stop ${GRACE:-900}" ;;
  delete)
    if [ "$dry" ] || [ "$(state)" != ABSENT ]; then tpus delete "$NAME" "${where[@]}" --force --quiet; fi ;;
esac
