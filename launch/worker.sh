#!/usr/bin/env bash
# launch/worker.sh VERB …, on a host of a slice, called by tpu_vm.sh: one detached command, with log and exit code.
#   setup EXTRAS     makes .venv in this clone
#   start COMMAND…   in this clone and its .venv; output is appended to ~/lmm_run/log
#   status           "worker HOST: running", "exited CODE", "lost" (killed, or the host rebooted) or "idle"
#   log LINES        the last lines of the log, each with the host's name
#   stop SECONDS     SIGTERM to the command, so that it saves and exits with code 75; SIGKILL after SECONDS

# shellcheck disable=SC1090,SC1091 # sources what is only on the host
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
run=$HOME/lmm_run
verb=${1:-}

# The name is checked too: after a reboot the number may be another process's.
alive() { [ -s "$run/pid" ] && grep -qs worker.sh "/proc/$(cat "$run/pid")/cmdline"; }

report() {
  local word=idle
  if [ -s "$run/pid" ]; then word=lost; fi
  if alive; then word=running; fi
  if [ -s "$run/code" ]; then word="exited $(cat "$run/code")"; fi # looked for last: it is written before the end
  echo "worker $(hostname): $word"
}

finished() { # CODE; whole or not at all
  echo "$1" > "$run/code.new"
  mv "$run/code.new" "$run/code"
}

case $verb in
  setup)
    : "${2:?EXTRAS, the extras of lmm_jax to install}"
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then # images of TPU VMs had 3.10
      if [ ! -d .venv ]; then
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --seed --python 3.12 .venv
      fi
      . .venv/bin/activate
    fi
    . launch/venv.sh "$2"
    ;;
  start)
    shift
    if [ -f ~/.lmm_env ]; then # keys and the hosts' secret: for this command only, not for the disk
      . ~/.lmm_env
      rm -f ~/.lmm_env
    fi
    : "${1:?COMMAND to start}"
    [ -f .venv/bin/activate ] || die 1 "$(hostname): no .venv in $PWD; run setup first"
    ! alive || die 1 "$(hostname): already runs a command; stop it first"
    mkdir -p "$run"
    rm -f "$run/code" "$run/pid"
    . .venv/bin/activate
    echo "== $(date -u +%FT%TZ) $*" >> "$run/log"
    setsid "$PWD/launch/worker.sh" supervise "$@" >> "$run/log" 2>&1 < /dev/null &
    echo $! > "$run/pid"
    echo "worker $(hostname): running"
    ;;
  supervise) # in a session of its own, so that logging out does not end it
    shift
    trap : TERM # outlives the command, to write down its code
    code=0
    "$@" || code=$?
    finished "$code"
    ;;
  status) report ;;
  log) tail -n "${2:?LINES to show}" "$run/log" | sed "s/^/$(hostname): /" ;;
  stop)
    deadline=$((SECONDS + ${2:?SECONDS to wait for the save}))
    if alive; then pkill -TERM -P "$(cat "$run/pid")" || true; fi
    while alive; do
      if [ "$SECONDS" -ge "$deadline" ]; then
        kill -KILL -- "-$(cat "$run/pid")"
        finished 137
        break
      fi
      sleep 1
    done
    report
    ;;
  -h | --help) help ;;
  *) die 2 "no verb '$verb'; see --help" ;;
esac
