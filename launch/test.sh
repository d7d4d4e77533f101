#!/usr/bin/env bash
# All default tests, lint and format checks; --long and --notebooks run more. Further arguments go to pytest.
# --faults runs instead every trial of tests/faults that did not pass before, and prints a table of the faults.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/venv.sh test
patience=()
what=(-n 2 --dist loadfile)
for argument in "$@"; do
  if [ "$argument" = --notebooks ]; then
    . launch/venv.sh notebooks
    # A notebook is one test and takes minutes: longer than a test may stand still otherwise.
    patience=(-o faulthandler_timeout=900)
  fi
  if [ "$argument" = --faults ]; then
    # One process, as faults need a quiet machine. A test is a thousand trials, whose waits have limits of their own.
    what=(tests/faults -n 0)
    patience=(-o faulthandler_timeout=86400)
  fi
done
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
python -m ruff check .
python -m ruff format --check .
# By default two processes: compiling, which takes most of the time, is done by one thread of each.
python -m pytest "${what[@]}" ${patience[@]+"${patience[@]}"} "$@"
