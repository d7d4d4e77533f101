"""The peer: a process of its own, which is told apart where it fails."""

import importlib.util
import sys

import pytest

from lmm_jax import cli
from tests.bench.tiny import run


def test_a_peer_that_fails_is_told(capfd, monkeypatch, tmp_path, shape_file):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no card')")
    (tmp_path / "transformers.py").write_text("")
    for name in ("torch", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["bench", "attention", "--shape", str(shape_file), "--peer"]) == 2
    err = capfd.readouterr().err
    assert "no card" in err and "the peer ended with exit code 1" in err


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the peer needs the extra hf")
@pytest.mark.parametrize("what", ["train", "decode", "attention"])
def test_beside_the_peer(capsys, shape_file, what):
    rows = run(capsys, what, "--shape", shape_file, "--steps", 1, "--peer")
    compared = [name for name, row in rows.items() if row["against"].startswith("peer")]
    assert len(compared) == {"train": 4, "decode": 2, "attention": 6}[what]
    assert all(rows[name]["ratio"] > 0 for name in compared)
