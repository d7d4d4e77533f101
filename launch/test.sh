#!/usr/bin/env bash
# All default tests, lint and format checks; --long and --notebooks run more. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/venv.sh test
patience=()
for argument in "$@"; do
  if [ "$argument" = --notebooks ]; then
    . launch/venv.sh notebooks
    # A notebook is one test and takes minutes: longer than a test may stand still otherwise.
    patience=(-o faulthandler_timeout=900)
  fi
done
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
python -m ruff check .
python -m ruff format --check .
# Two processes: compiling, which takes most of the time, is done by one thread of each.
python -m pytest -n 2 --dist loadfile ${patience[@]+"${patience[@]}"} "$@"
