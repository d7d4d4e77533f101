"""What a checkpoint holds, read beside the library: by Orbax alone, as numbers of this host."""

import hashlib

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp


def state_of(folder) -> dict[str, np.ndarray]:
    """Every array of a step's folder by its path."""
    about = ocp.checkpointables_metadata(folder).metadata
    abstract = {
        name: jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)
        for name, tree in about.items()
        if name in ("params", "train")
    }
    found = ocp.load_checkpointables(folder, abstract)
    leaves = jax.tree.leaves_with_path(found)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def hash_of(folder) -> str:
    """Of all bits of a step."""
    found = hashlib.sha256()
    for name, x in sorted(state_of(folder).items()):
        found.update(f"{name} {x.dtype} {x.shape} ".encode() + np.ascontiguousarray(x).tobytes())
    return found.hexdigest()
