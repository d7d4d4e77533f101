"""lmm_jax: train, study and ship high-resolution large multimodal models in JAX.

import lmm_jax as lmm
config = lmm.load_config("configs/digits.py", "train.steps=1000")
lmm.train(config, "runs/digits")
lmm.evaluate("runs/digits", tasks=("digits",), scales=(1, 4, 9, 36))
model = lmm.load("runs/digits")
model.generate(images=["page.png"], prompt="read all", scale=9)
lmm.export("runs/digits", "digits-hf")
lmm.compile(config, "v5e-64")
"""

import importlib

_HOME = {
    "load_config": "lmm_jax.config",
    "train": "lmm_jax.training.loop",
    "evaluate": "lmm_jax.evaluation",
    "load": "lmm_jax.generation.model",
    "export": "lmm_jax.release.export",
    "compile": "lmm_jax.aot.compile",
}

__all__ = list(_HOME)


def __getattr__(name):
    # Imported at first use: `import lmm_jax` stays fast and touches no JAX backend.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lmm_jax' has no attribute '{name}'")


def __dir__():
    return sorted({*globals(), *__all__})
