# shellcheck shell=bash disable=SC2034
# Sourced by the pod scripts, in the clone's folder: help, dry runs, checks, and what Google Cloud calls a slice.

help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "launch/$(basename "$0")"; }

die() { # CODE MESSAGE
  echo "$(basename "$0"): $2" >&2
  exit "$1"
}

# parse "$@" reads [--dry-run] VERB [--dry-run] and sets dry, verb, and rest to what follows.
parse() {
  dry="" verb=""
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) help && exit ;;
      --dry-run) dry=1 ;;
      *) if [ "$verb" ]; then break; else verb=$1; fi ;;
    esac
    shift
  done
  rest=("$@")
}

# Runs a command; with --dry-run prints it instead, quoted so that a shell reads it back.
call() {
  local word
  if [ -z "$dry" ]; then "$@"; else
    for word; do
      case $word in
        '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s' " "$(printf %s "$word" | sed "s/'/'\\\\''/g")" ;;
        *) printf '%s ' "$word" ;;
      esac
    done
    echo
  fi
}

make_secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

check() { # VARIABLE PATTERN WORDS
  [[ ${!1} =~ ^$2$ ]] || die 2 "$1=${!1}: $3"
}

# Writes the variables that the command shall have to a file for its owner only, never to a command line: the secret by
# which the hosts know one another, a new one unless it is set, and what else is set.
store_environment() { # FILE FORMAT
  local variable LMM_HOSTS_SECRET=${LMM_HOSTS_SECRET:-$(make_secret)}
  for variable in LMM_HOSTS_SECRET ${PASS:-WANDB_API_KEY WANDB_PROJECT WANDB_ENTITY WANDB_MODE XLA_FLAGS LIBTPU_INIT_ARGS}; do
    # shellcheck disable=SC2059
    [ -z "${!variable:-}" ] || (umask 077 && printf "$2" "$variable" "${!variable}" >> "$1")
  done
}

# find_slice TOPOLOGY, by chips as in `lmm compile --topology`, sets accelerator and runtime of TPU VMs (no runtime:
# only GKE rents it), and label, grid and hosts of GKE's pools of 4-chip machines. As in lmm_jax/tools/topology.py.
find_slice() {
  local flat="4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16"
  local cube="4:2x2x1 8:2x2x2 16:2x2x4 32:2x4x4 64:4x4x4 128:4x4x8 256:4x8x8 512:8x8x8"
  local chips=${1##*-} grids=$flat cores=1 cloud entry
  runtime="" label=""
  case $1 in
    v5e-*) cloud=v5litepod runtime=v2-alpha-tpuv5-lite label=tpu-v5-lite-podslice ;;
    v6e-*) cloud=v6e runtime=v2-alpha-tpuv6e label=tpu-v6e-slice ;;
    v5p-*) cloud=v5p runtime=v2-alpha-tpuv5 label=tpu-v5p-slice grids=$cube cores=2 ;; # the cloud counts cores
    tpu7x-*) cloud=tpu7x label=tpu7x grids=$cube cores=2 ;;
    *) die 2 "TOPOLOGY=$1: no such kind; choose v5e, v6e, v5p or tpu7x, then - and the number of chips" ;;
  esac
  for entry in $grids; do
    if [ "${entry%:*}" = "$chips" ]; then
      accelerator=$cloud-$((chips * cores)) grid=${entry#*:} hosts=$((chips / 4))
      return
    fi
  done
  die 2 "TOPOLOGY=$1: no such slice; chips can be $(for entry in $grids; do printf '%s ' "${entry%:*}"; done)"
}
