"""Imports go one way, and importing costs nothing until something is used."""

import ast
import pathlib
import subprocess
import sys
import time

import pytest

from lmm_jax.hf import deepstack

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lmm_jax"

# What each part may import of ours (DESIGN: cli, tools -> training.loop -> … -> models -> sharding; data alone).
ALLOWED = {
    "sharding": set(),
    "hosts": {"wire"},
    "wire": set(),
    "storage": set(),
    "config": {"data.arrangement"},
    "models": {"models", "sharding"},
    "data": {"data", "storage"},
    "training": {"training", "hf", "models", "sharding", "config", "data", "hosts", "storage"},
    "hf": {"hf", "models", "data", "config"},
    "hf.export": {"hf", "models", "data", "config", "sharding", "training.state", "training.checkpoint"},
    "hf.verify": {"generation", "training.state"},
    "hf.safetensors": {"storage"},
    "generation": {"training.state", "training.checkpoint", "hf", "models", "data", "sharding", "config"},
    "evaluation": {"evaluation", "generation", "data", "config"},
    "tools.peer_hf": {"tools.bench_shapes"},
    "tools": {"tools", "training", "hf", "evaluation", "generation", "models", "data", "sharding", "config"},
}
FORBIDDEN = {"torch", "transformers", "tensorflow"}
# Where an extra is asked for, and imported only then.
RUNS_OTHERS = {
    ("hf.verify", "torch"),
    ("hf.verify", "transformers"),
    ("hf.safetensors", "torch"),
    ("tools.peer_hf", "torch"),  # a process of its own
    ("tools.peer_hf", "transformers"),
}
# Never imported by ours: transformers runs copies of them, so that they may import of ours but one another.
SHIPPED = [PACKAGE / "hf/deepstack" / name for name in deepstack.FILES]
OF_SHIPPED = {"torch", "transformers", "numpy", "PIL", *sys.stdlib_module_names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted(set(PACKAGE.rglob("*.py")) - set(SHIPPED)), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    part = ".".join(parts) if ".".join(parts) in ALLOWED else parts[0]
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in FORBIDDEN or (part, top) in RUNS_OTHERS, name
        assert not (part == "data" and top == "jax"), f"{path.name}: data must not import jax"
        if top == "lmm_jax" and part in ALLOWED:
            ours = ".".join(rest)
            assert any(ours == a or ours.startswith(a + ".") for a in ALLOWED[part]), f"{part} imports {name}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_what_an_export_ships_needs_nothing_of_ours(path):
    for name in imported(path):
        if name.startswith("."):
            assert name.split(".")[1] in [other.stem for other in SHIPPED], name
        else:
            assert name.split(".")[0] in OF_SHIPPED, name


def test_import_is_fast_and_touches_no_backend():
    code = (
        "import sys, lmm_jax; lmm_jax.load_config; assert 'jax' not in sys.modules; "
        "import jax, lmm_jax.models.lmm, lmm_jax.training.loop, lmm_jax.generation; "
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import lmm_jax"], check=True)
    assert time.monotonic() - begin < 2


def test_help_is_fast_and_names_every_verb():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lmm_jax", "--help"], check=True, capture_output=True, text=True)
    assert time.monotonic() - begin < 1.5
    for verb in ("prepare", "train", "evaluate", "generate", "export", "compile", "show", "bench"):
        assert verb in done.stdout
