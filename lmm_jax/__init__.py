"""Train, study and ship high-resolution large multimodal models in JAX and Flax.

A run is a config file and a folder:

    import lmm_jax as lmm

    config = lmm.load_config("configs/digits.py", "train.steps=1000")   # a recipe, with any field overridden
    lmm.train(config, "runs/digits")                                    # the same call again resumes
    lmm.evaluate("runs/digits", tasks=("digits",), scales=(1, 4, 9, 36))  # scores at each number of visual tokens

A trained model, an export and a released LLaVA are loaded and asked alike:

    model = lmm.load("runs/digits")
    model.generate(images=["page.png"], prompt="read all", scale=9)     # scale: visual tokens of a picture
    lmm.export("runs/digits", "digits-hf")                              # a folder for transformers

Before a TPU slice is rented, the compiler says whether a step fits it, and what it costs:

    lmm.compile(config, "v5e-64")

The command `lmm` does the same from a shell: `lmm --help`. README.md says where to read on; lmm_jax/README.md
explains the words (pack, slot, scale, …) and draws the way from a picture to the loss.
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
