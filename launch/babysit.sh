#!/usr/bin/env bash
# launch/babysit.sh [--dry-run] COMMAND…: rents slices, installs, runs the command on every worker, and does so again
# after a preemption or a failure, until the command ends with 0 everywhere. COMMAND has --workdir gs://…, where the
# same command continues. Environment of `launch/tpu_vm.sh create`, setup and run, and
#   FAILURES (5)   gives up after so many attempts in a row without a new checkpoint, whatever ended them
#   STALL (7200)   an attempt without a new checkpoint for so many seconds is stopped, and is a failure
#   BACKOFF (60)   seconds before the next attempt after a failure; doubled each time, an hour at most
#   POLL (60)      seconds between two looks
#   KEEP=1         leaves the slices when all is over; otherwise the logs go to runs/NAME.log and the slices back
# Ends with 0: done; 2: the command was refused as it stands; 1: gave up. Killed and started again, it watches on.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
dry=""
case ${1:-} in -h | --help) help && exit ;; --dry-run) dry=1 && shift ;; esac
launch/tpu_vm.sh --dry-run create > /dev/null || exit 2
FAILURES=${FAILURES:-5} STALL=${STALL:-7200} BACKOFF=${BACKOFF:-60} POLL=${POLL:-60}
for variable in FAILURES STALL BACKOFF POLL; do check $variable '[0-9]+' "not a number"; done
export POLL COMMIT="${COMMIT:-$(git rev-parse HEAD)}" # this commit in every attempt
workdir=$(printf '%s\n' "$@" | sed -n '/^--workdir$/{n;p;}; s/^--workdir=//p')
case $workdir in gs://?*) ;; *) die 2 "the command has no --workdir gs://…, where other slices could continue" ;; esac

say() { echo "== $(date -u +%FT%TZ) $*"; }
tpu() { launch/tpu_vm.sh ${dry:+--dry-run} "$@"; }

checkpoint() { # the newest step; 0 if there is none yet, or no answer
  { echo /0/ && { gcloud storage ls "$workdir/checkpoints/" 2> /dev/null || true; }; } |
    sed -n 's|.*/\([0-9]\{1,\}\)/$|\1|p' | sort -n | tail -n 1
}

# Sets `seen` to running, done, refused, ended (with another code, or lost, on some worker), idle (nothing started),
# silent (not all workers answer, three times), unknown (Google Cloud does not), or the queued resource's state.
look() {
  local answer failed words
  for _ in 1 2 3; do
    failed=""
    answer=$(tpu status) || failed=failed
    seen=$(sed -n 's/^state //p' <<< "$answer")
    if [ "${seen:=unknown}" != ACTIVE ]; then return; fi
    words=$(sed -n 's/^worker [^ ]*: //p' <<< "$answer" | sort -u)
    case $'\n'$words$'\n'$failed in
      *$'\nexited 2\n'*) seen=refused && return ;;
      *"exited "[1-9]* | *lost*) seen=ended && return ;;
      *failed) ;;
      *running*) seen=running && return ;;
      *idle*) seen=idle && return ;;
      *"exited 0"*) seen="done" && return ;;
    esac
    seen=silent
    sleep "$POLL"
  done
}

# Goes on with what runs, or rents, installs and starts; ends when `seen` is something else than running.
attempt() {
  local since=$SECONDS step now
  step=$(checkpoint)
  look
  if [ "$seen" != running ]; then
    case $seen in FAILED | SUSPEND* | silent) tpu delete || return 0 ;; esac
    say "renting $NAME: ${SLICES:-1} times $TOPOLOGY"
    tpu create || return 0
    seen=broken
    tpu setup && tpu stop && tpu run "$@" && seen=running since=$SECONDS
    [ "$seen" = running ] || tpu delete || return 0
  fi
  while [ "$seen" = running ]; do
    sleep "$POLL"
    look
    if [ "$seen" = unknown ]; then seen=running; fi
    now=$(checkpoint)
    if [ "$now" -gt "$step" ]; then step=$now since=$SECONDS; fi
    if [ "$seen" = running ] && [ $((SECONDS - since)) -ge "$STALL" ]; then seen=stalled && { tpu stop || true; }; fi
  done
}

finish() { # CODE WORDS
  say "$2" && mkdir -p runs
  NODE=all tpu logs all 1000 >> "runs/$NAME.log" || say "no logs"
  [ -n "${KEEP:-}" ] || tpu delete || say "$NAME could not be deleted; do it by hand, it costs money"
  exit "$1"
}

if [ "$dry" ]; then
  tpu create && tpu setup && tpu stop && tpu run "$@" && tpu status && NODE=all tpu logs all 1000 && tpu delete
  call gcloud storage ls "$workdir/checkpoints/" && exit
fi
failures=0 pause=$BACKOFF best=$(checkpoint)
while :; do
  attempt "$@"
  case $seen in
    done) finish 0 "done" ;;
    refused) finish 2 "the command ended with code 2: as it stands it cannot run" ;;
  esac
  step=$(checkpoint)
  if [ "$step" -gt "$best" ]; then failures=0 pause=$BACKOFF best=$step; else failures=$((failures + 1)); fi
  say "$NAME: $seen; newest checkpoint $step; failures in a row without a new one: $failures of $FAILURES"
  [ "$failures" -lt "$FAILURES" ] || finish 1 "gave up"
  if [ "$failures" -gt 0 ]; then sleep "$pause" && pause=$((pause < 1800 ? pause * 2 : 3600)); fi
done
