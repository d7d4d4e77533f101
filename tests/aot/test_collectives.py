"""The least traffic that a sharding asks for."""

import flax.linen as nn
import jax

from lmm_jax.aot import collectives
from lmm_jax.training.state import make_program


def test_the_least_traffic_of_a_program(tiny):
    """Two gathers and a scatter of what trains, one gather of what is frozen; norms are whole on every device."""
    frozen = 'optimizer.groups=(("vision", 0.0),)'
    program = make_program(tiny("mesh.data=1", "mesh.fsdp=8", frozen))
    shardings = jax.tree.leaves(program.shardings.params)
    params = jax.tree.leaves_with_path(nn.unbox(program.boxed))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in params]
    sizes = [x.size for _, x in params]
    want = 0
    for size, placed, rate in zip(sizes, shardings, map(program.rates.__getitem__, paths), strict=True):
        if "fsdp" in placed.spec:
            want += 2 * size * 7 // 8 * (3 if rate else 1)
        elif rate:
            want += 2 * 2 * size * 7 // 8  # all-reduced
    assert collectives.minimum(program) == want > 0
    whole = make_program(tiny("mesh.data=8", frozen))
    trained = sum(size for size, path in zip(sizes, paths, strict=True) if program.rates[path])
    assert abs(collectives.minimum(whole) - 2 * 2 * trained * 7 / 8) < len(sizes)
