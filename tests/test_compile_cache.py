"""Programs on disk: they are taken by the next process, and a folder that cannot be used ends nothing."""

import os
import pathlib
import subprocess
import sys
import time
import zlib

import jax
import pytest

from lmm_jax import compile_cache, storage

ROOT = pathlib.Path(__file__).parent.parent
COMPILES = """
import jax, jax.numpy as jnp
from lmm_jax import compile_cache
compile_cache.LEAST_SECONDS = 0.0
print(compile_cache.start())
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name.rpartition("/")[2]))
jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((20, 20))).block_until_ready()
print("cache_hits" in found, jax.config.jax_compilation_cache_dir)
"""


def run(cache, **more):
    env = os.environ | {"XDG_CACHE_HOME": str(cache), storage.CACHE: "", "JAX_PLATFORMS": "cpu", **more}
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_the_next_process_takes_what_was_compiled_and_says_nothing(tmp_path):
    folder = tmp_path / "lmm_jax/compiled" / compile_cache.machine()
    for hit in (False, True):
        (where, found, _), err = run(tmp_path)
        assert (where, found) == (str(folder), str(hit)) and err == ""
    assert folder.stat().st_mode & 0o77 == 0
    for file in folder.glob("*-cache"):  # as a command that was killed may leave it
        file.write_bytes(file.read_bytes()[:100])
    for hit in (False, True):
        (_, found, _), err = run(tmp_path)
        assert found == str(hit) and err == ""


def test_a_folder_that_cannot_be_made_is_told_and_ends_nothing(tmp_path):
    (tmp_path / "lmm_jax").write_text("a file in its place")
    out, err = run(tmp_path)
    assert out == ["None", "False", "None"]
    assert err.startswith("lmm: compiled programs are not kept: ") and err.count("\n") == 1


def test_the_folder_that_jax_was_given_stays(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv(storage.CACHE, str(tmp_path))
    assert before and compile_cache.start() is None
    assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(OSError, match="can be written to by others"):
        compile_cache.prepare(tmp_path)


def test_what_was_written_first_goes_when_there_is_too_much(monkeypatch, tmp_path):
    for n in range(4):
        file = tmp_path / f"{n}-cache"
        file.write_bytes(b"\x28" * 100)
        os.utime(file, (time.time() - 100 + n,) * 2)
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 250)
    compile_cache.prepare(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*-cache")) == ["2-cache", "3-cache"]


def test_each_program_is_looked_at_once(monkeypatch, tmp_path):
    whole = tmp_path / "a-cache"
    whole.write_bytes(zlib.compress(b"program"))
    os.utime(whole, (time.time() - 10,) * 2)
    compile_cache.prepare(tmp_path)
    monkeypatch.setattr(compile_cache, "_is_whole", lambda file: pytest.fail("it was looked at again"))
    compile_cache.prepare(tmp_path)
    assert whole.exists()


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    for name in (storage.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(storage.cache_folder()) == "/home/me/.cache/lmm_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert str(storage.cache_folder()) == "/fast/lmm_jax"
    monkeypatch.setenv(storage.CACHE, "/mine")
    assert str(storage.cache_folder()) == "/mine"
