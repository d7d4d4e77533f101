"""Which of several hosts holds the others up: steps are taken together, so that all look equally slow."""

import numpy as np

FACTOR, SHARE = 1.5, 0.05  # times the median, and the share of a step, from which on a host counts as slow
KINDS = ("waits for its data", "works between two steps")


def slow_hosts(found, per_step) -> list[str]:
    """Names hosts that take much longer than the median host for what each does alone.

    Args:
      found: `[hosts, 2]` seconds of a step that each host waits for its batch, and does other things than waiting for
        its devices.
      per_step: seconds that a step takes.

    Returns:
      a sentence for each slow host and kind.
    """
    out = []
    for kind, seconds in zip(KINDS, np.asarray(found).T, strict=True):
        median = float(np.median(seconds))
        slow = (seconds > FACTOR * median) & (seconds - median > SHARE * per_step)
        out += [
            f"host {host} {kind} {seconds[host]:.3g} s a step, the median host {median:.3g} s; a step takes "
            f"{per_step:.3g} s"
            for host in np.flatnonzero(slow)
        ]
    return out
