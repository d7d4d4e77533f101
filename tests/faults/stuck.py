"""`python -m tests.faults.stuck N ARGUMENT…` is `lmm ARGUMENT…`, whose record N and all after it never come.

As on a network disk that is gone: whoever reads waits in a system call.
"""

import itertools
import sys
import time

from lmm_jax import cli
from lmm_jax.data.prepared import Prepared


def main():
    first, numbers, read = int(sys.argv.pop(1)), itertools.count(), Prepared.__getitem__

    def stuck(prepared, row):
        if next(numbers) >= first:
            time.sleep(3600)
        return read(prepared, row)

    Prepared.__getitem__ = stuck
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
