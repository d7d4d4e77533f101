#!/usr/bin/env bash
# launch/gke.sh [--dry-run] VERB …: the same command on every host of TPU slices, as a JobSet of a GKE cluster that
# `kubectl` speaks to, with node pools of 4-chip machines. Environment: NAME.
#   apply COMMAND…   fills in launch/gke_jobset.yaml for IMAGE (see launch/Dockerfile), TOPOLOGY by chips (v5e-64,
#                    v5p-64, tpu7x-64), SLICES (1), SPOT=1 on spot, and hands it over. Code 75 and lost hosts restart
#                    all slices, RESTARTS (50) times at most, GRACE (300) seconds after SIGTERM; 2 ends the JobSet.
#                    W&B's and XLA's variables (PASS) that are set, and a text by which the hosts know one another,
#                    become the secret NAME-env. With --dry-run the JobSet is printed
#   status           the JobSet and its pods
#   logs [INDEX]     the log of host INDEX (0) of slice SLICE (0)
#   delete           removes all
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

parse "$@"
set -- ${rest[@]+"${rest[@]}"}
case $verb in apply | status | logs | delete) ;; *) die 2 "no verb '$verb'; see --help" ;; esac
(: "${NAME:?name of the JobSet}") || exit 2
check NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "small letters, digits and -, a letter first, at most 40"

case $verb in
  apply)
    (: "${TOPOLOGY:?slice by its number of chips, such as v5e-64}" "${IMAGE:?container image}") || exit 2
    [ $# -gt 0 ] || die 2 "apply which command?"
    SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-50} GRACE=${GRACE:-300}
    check SLICES '[1-9][0-9]*' "not a number of slices"
    for variable in RESTARTS GRACE; do check $variable '[0-9]+' "not a number"; done
    check IMAGE '[a-zA-Z0-9][-a-zA-Z0-9._/:@]*' "not the name of an image"
    find_slice "$TOPOLOGY"
    spot=${SPOT:+'cloud.google.com/gke-spot: "true"'}
    # shellcheck disable=SC2016 # JSON is YAML, too; Kubernetes would replace $(…).
    command=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]).replace("$(", "$$("))' "$@")
    export NAME IMAGE SLICES RESTARTS GRACE hosts label grid spot command
    jobset=$(python3 -c 'import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ))' \
      < <(sed '/^#/d; s/ #.*//' launch/gke_jobset.yaml))
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    store_environment "$tmp/env" '%s=%s\n'
    call kubectl get crd jobsets.jobset.x-k8s.io --output=name ||
      die 1 "the cluster cannot be reached or has no JobSet controller; see jobset.sigs.k8s.io for its installation"
    call kubectl delete secret "$NAME-env" --ignore-not-found
    call kubectl create secret generic "$NAME-env" --from-env-file="$tmp/env"
    call kubectl apply --filename=- <<< "$jobset"
    [ -z "$dry" ] || echo "$jobset"
    ;;
  status)
    call kubectl get jobset "$NAME" --output=wide
    call kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
    ;;
  logs)
    selector=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=${SLICE:-0}
    call kubectl logs --selector="$selector,batch.kubernetes.io/job-completion-index=${1:-0}" --tail=1000
    ;;
  delete)
    call kubectl delete jobset "$NAME" --ignore-not-found
    call kubectl delete secret "$NAME-env" --ignore-not-found
    ;;
esac
