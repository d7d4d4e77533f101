"""Measurements as rows of name, value, unit and a ratio against a ceiling or peer measured in the same run."""

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

MATMUL_SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
COPIED_BYTES = {"cpu": 2**28, "gpu": 2**32, "tpu": 2**31}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of a table.

    Attributes:
      name, value, unit: what was measured; value is None where it could not be, as `against` then says.
      ratio: value against what `against` names, None if there is nothing to compare with.
      against: the ceiling or peer, or a remark.
    """

    name: str
    value: float | None
    unit: str
    ratio: float | None = None
    against: str = ""


def table(rows) -> str:
    """Measurements as text."""
    lines = []
    for r in rows:
        ratio = f"{r.ratio:5.2f} × {r.against}" if r.ratio is not None else r.against
        value = "–" if r.value is None else f"{r.value:,.5g}"
        lines.append(f"{r.name:<36} {value:>10} {r.unit:<16} {ratio}".rstrip())
    return "\n".join(lines)


def time_steps(step, steps, what, warmup=1, of=statistics.median) -> float:
    """Seconds of a call of `step`, whose result is waited for; each is told on stderr.

    `of` the times after the warm-up: for a ceiling the least, as what else a machine does only makes it lower.
    """
    times = []
    for _ in range(warmup + steps):
        begin = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - begin)
        print(f"{what}: {times[-1]:.3g} s", file=sys.stderr, flush=True)
    return of(times[warmup:])


def matmul_rate(dtype) -> float:
    """Operations per second of a large matrix product: the ceiling of everything that is matrix products."""
    n = MATMUL_SIDE[jax.default_backend()]
    x = jnp.ones((n, n), dtype)
    repeats = 16  # in one program, so that what starts it counts little

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, repeats, lambda _, y: (x @ y) / n, x)

    return repeats * 2 * n**3 / time_steps(lambda: products(x), 5, f"{repeats} products of {n} x {n} {dtype}", of=min)


def copy_rate() -> float:
    """Bytes per second of memory, read and written: the ceiling of what reads all weights for little work."""
    count = COPIED_BYTES[jax.default_backend()]
    x = jnp.zeros(count // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * count / time_steps(lambda: copy(x), 5, f"copying {count / 2**20:.0f} MiB", of=min)


def run_peer(shape, mode, *options) -> dict:
    """What `bench.peer` measured, in a process of its own. Ours must not have taken a card's memory yet.

    Args:
      shape: name or file.
      mode: of the peer.
      *options: further arguments.

    Raises:
      ImportError: torch or transformers is not installed.
      ChildProcessError: it failed; its own words have gone to stderr.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--peer needs {name}: pip install 'lmm_jax[hf]'")
    command = [sys.executable, "-m", "lmm_jax.bench.peer", "--shape", str(shape), "--mode", mode]
    done = subprocess.run([*command, *map(str, options)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(
            f"the peer ended with exit code {done.returncode}, as it says above; without --peer ours runs alone"
        )
    return json.loads(done.stdout.splitlines()[-1])


def peer_device() -> str:
    """Where the peer runs, beside ours. Another process looks, as a card that JAX looks for here loses its memory.

    Raises:
      ValueError: on a TPU.
    """
    look = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    platform = subprocess.run(look, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if platform not in ("cpu", "gpu"):
        raise ValueError(f"--peer runs on a CPU or a GPU, and this is a {platform}")
    return "cuda" if platform == "gpu" else "cpu"
