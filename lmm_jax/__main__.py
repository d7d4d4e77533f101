"""`python -m lmm_jax` is `lmm`."""

import sys

from lmm_jax.cli import main

sys.exit(main())
