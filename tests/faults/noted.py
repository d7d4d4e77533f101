"""`python -m tests.faults.noted FILE ARGUMENT…` is `lmm ARGUMENT…`, and notes what it hands over to be saved.

A line of FILE is the step and the hash of the state, written before the save begins.
"""

import sys


def main():
    from lmm_jax import cli
    from lmm_jax.training.checkpoint import Checkpoints
    from tests.faults.restarts import hash_of

    file, save = sys.argv.pop(1), Checkpoints.save

    def noting(checkpoints, state, *more, **options):
        with open(file, "a") as f:
            f.write(f"{int(state.step)} {hash_of(state)}\n")
        return save(checkpoints, state, *more, **options)

    Checkpoints.save = noting
    return cli.main()


if __name__ == "__main__":  # not in the readers of the run, which import what it was started with
    sys.exit(main())
