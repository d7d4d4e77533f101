#!/usr/bin/env bash
# launch/local_pod.sh N ARGUMENT…: runs `lmm train ARGUMENT…` on this machine as a pod of N hosts would: N processes with
# 8/N virtual CPU devices each (JAX_NUM_CPU_DEVICES), which find each other and read their own rows.
# Lines of output begin with [host I]. SIGTERM and Ctrl-C go on to all hosts, which save and end with 75; a second Ctrl-C
# kills them.
# Ends when all have ended, with the exit code of the first that failed.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
case ${1:-} in
  -h | --help) help && exit ;;
  [1-9] | [1-9][0-9]) hosts=$1 && shift ;;
  *) die 2 "how many hosts? see --help" ;;
esac
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi

port=$(python -c '
import socket
for port in range(20_000, 26_000, 2):  # two free ports; none that the system gives out itself
    with socket.socket() as one, socket.socket() as next:
        try:
            one.bind(("", port)), next.bind(("", port + 1))
        except OSError:
            continue
        print(port)
        break')
devices=$((hosts < 8 ? 8 / hosts : 1))
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-$devices}"
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$hosts
export LMM_HOSTS_SECRET="${LMM_HOSTS_SECRET:-$(make_secret)}" # by which they know one another

set -m # a process group for each host, which can be killed with all its children
declare -A running=()
for ((i = 0; i < hosts; i++)); do
  # gloo, by which CPUs exchange numbers, names every connection
  JAX_PROCESS_ID=$i python -m lmm_jax train "$@" > >(sed -u "/^\[Gloo\]/d; s/^/[host $i] /") 2>&1 < /dev/null &
  running[$!]=$i
done
trap 'kill -TERM "${!running[@]}"' TERM
trap 'trap "exit 130" INT; kill -TERM "${!running[@]}"' INT
# shellcheck disable=SC2329 # the trap calls it
end() { for pid in "${!running[@]}"; do kill -KILL -- "-$pid" || true; done; }
trap end EXIT
first=0
while [ ${#running[@]} -gt 0 ]; do
  code=0
  wait -n -p ended "${!running[@]}" || code=$?
  if [ "${ended:-}" ]; then # and not a signal, when it is unset
    unset "running[$ended]"
    if [ "$first" = 0 ]; then first=$code; fi
  fi
done
exit "$first"
