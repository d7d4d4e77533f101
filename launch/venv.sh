# shellcheck shell=bash disable=SC1091
# Sourced: makes and activates .venv unless an environment is active, and installs this clone with extras "$1".
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lmm_jax needs Python 3.11 or newer"; exit 2; }
  [ -d .venv ] || python3 -m venv .venv
  . .venv/bin/activate
fi
stamp=$(python -c 'import sys; print(sys.prefix)')/.lmm_jax_$1
if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  echo "== installing lmm_jax[$1] into $(python -c 'import sys; print(sys.prefix)')"
  python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
  touch "$stamp"
fi
