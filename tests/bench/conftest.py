"""The tiny shape as a file, and ceilings that are measured in no time."""

import json

import pytest

from lmm_jax.bench import measure as bench
from tests.bench.tiny import TINY


@pytest.fixture(scope="module")
def shape_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "MATMUL_SIDE", {"cpu": 32})
    monkeypatch.setattr(bench, "COPIED_BYTES", {"cpu": 4096})
