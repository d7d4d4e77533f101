"""The largest batch that a slice holds, and the remat policy to train it with, in few compilations."""

from lmm_jax.models.decoder import REMAT_POLICIES

MOST = 4096  # packs a device; nobody needs more


def fit(compile, progress=print) -> dict:
    """Finds the most packs a device that fit with the policy that keeps least, and then the one that keeps most.

    Memory is a line in the number of packs, nearly: two sizes that fit tell where it ends, and the ends are tried.

    Args:
      compile: `(packs a device, policy)` to a dict as `compile.compile` returns.
      progress: called with a line for each try.

    Returns:
      dict of `packs`, `policy` and `result`, that of their compilation; packs 0 if not even one fits, with the result
      of one.
    """
    tried = {}

    def attempt(packs, policy):
        found = tried[packs, policy] = compile(packs, policy)
        peak, usable = found["peak_hbm_bytes"], found["hbm_bytes"]
        words = "fits" if found["fits"] else "does not fit"
        share = "" if peak is None else f", {peak / usable:.0%} of the memory"
        progress(f"{packs} packs a device, remat {policy}: {words}{share}")
        return found["fits"]

    def guess(fits):
        """Packs where the line through the two largest that fit reaches the memory."""
        if len(fits) < 2:
            return 2 * fits[-1]
        (a, p), (b, q) = ((n, tried[n, "full"]["peak_hbm_bytes"]) for n in fits[-2:])
        slope = (q - p) / (b - a)
        return MOST if slope <= 0 else b + int((tried[b, "full"]["hbm_bytes"] - q) / slope)

    if not attempt(1, "full"):
        return {"packs": 0, "policy": "full", "result": tried[1, "full"]}
    fits, above = [1], MOST + 1
    while above - fits[-1] > 1:
        packs = min(max(guess(fits), fits[-1] + 1), above - 1)
        if attempt(packs, "full"):
            fits.append(packs)
        else:
            above = packs
    packs = fits[-1]
    kept_most = sorted((policy for policy in REMAT_POLICIES if policy != "full"), key=list(REMAT_POLICIES).index)
    policy = next((policy for policy in kept_most if attempt(packs, policy)), "full")
    return {"packs": packs, "policy": policy, "result": tried[packs, policy]}
