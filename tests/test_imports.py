"""Imports go one way, and importing costs nothing until something is used."""

import ast
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lmm_jax"

# What each part may import of ours (DESIGN: cli, tools -> training.loop -> … -> models -> sharding; data alone).
ALLOWED = {
    "sharding": set(),
    "config": {"data.arrangement"},
    "models": {"models", "sharding"},
    "data": {"data"},
    "training": {"training", "models", "sharding", "config", "data"},
    "generation": {"training.state", "training.checkpoint", "models", "data", "sharding", "config"},
    "evaluation": {"evaluation", "generation", "data", "config"},
    "tools": {"tools", "training", "evaluation", "generation", "models", "data", "sharding", "config"},
}
FORBIDDEN = {"torch", "transformers", "tensorflow"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in FORBIDDEN, name
        assert not (part == "data" and top == "jax"), f"{path.name}: data must not import jax"
        if top == "lmm_jax" and part in ALLOWED:
            ours = ".".join(rest)
            assert any(ours == a or ours.startswith(a + ".") for a in ALLOWED[part]), f"{part} imports {name}"


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
    for verb in ("prepare", "train", "evaluate", "generate", "show", "bench"):
        assert verb in done.stdout
