"""Errors of files, disks, memory and servers are sentences; only a fault of ours has a traceback."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lmm_jax import cli, errors, verbs
from lmm_jax.config import ConfigError, load_config
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.data.views import select_tiling


def raised(call, *args):
    try:
        call(*args)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def wrapped(inner, outer):
    """`inner` as a library passes it on."""
    try:
        try:
            raise inner
        except Exception as error:
            raise outer from error
    except Exception as error:
        return error


@pytest.mark.parametrize("number", sorted(errors.OF_SYSTEM), ids=errno.errorcode.get)
def test_what_the_system_says_of_a_file_is_a_sentence_with_its_path(number):
    sentence, code = errors.explain(OSError(number, os.strerror(number), "/some/where"))
    assert code in (1, 2) and "\n" not in sentence and "Errno" not in sentence
    assert "/some/where" in sentence or "{path}" not in errors.OF_SYSTEM[number][0]
    behind = wrapped(OSError(number, os.strerror(number), "/some/where"), RuntimeError("save failed"))
    assert errors.explain(behind) == (sentence, code)
    unknown, _ = errors.explain(OSError(number, os.strerror(number)))
    assert "{path}" not in unknown and "None" not in unknown


def test_a_number_that_is_not_in_the_table_is_told_in_the_system_s_words():
    sentence, code = errors.explain(OSError(errno.EXDEV, os.strerror(errno.EXDEV), "/a", None, "/b"))
    assert sentence == f"/a → /b: {os.strerror(errno.EXDEV)}" and code == 1


@pytest.mark.parametrize("words", errors.WORDS)
def test_libraries_that_say_it_in_words_are_understood(words):
    error = wrapped(ValueError(f"INTERNAL: writing /some/where: {words} [source locations=…]"), RuntimeError("async"))
    sentence, _ = errors.explain(error)
    assert sentence and "Traceback" not in sentence


@pytest.mark.parametrize("library", errors.NETWORK)
def test_a_server_that_cannot_be_used_is_said_so_also_where_its_library_calls_it_an_error_of_files(library):
    """aiohttp's are OSErrors with a number, "a file" was said to be missing."""
    kind = type("ConnectorError", (OSError,), {"__module__": f"{library}.client"})
    error = wrapped(kind(-2, "Name or service not known"), RuntimeError("out of retries"))
    sentence, code = errors.explain(error)
    assert "server could not be used" in sentence and "gs://" in sentence and "a file" not in sentence and code == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"), MemoryError()]
)
def test_memory_that_runs_out_is_a_sentence(error):
    sentence, code = errors.explain(error)
    assert "out of memory" in sentence and code == 1


def test_our_sentences_are_told_from_faults_in_the_same_files(tmp_path):
    """A `raise` of ours is meant for the user; what numpy raises in a line of ours is a fault."""
    assert errors.explain(raised(load_config, "nowhere.py")) == ("no config file nowhere.py", 2)
    assert errors.explain(raised(load_tokenizer, tmp_path / "x"))[1] == 2
    fault = raised(select_tiling, "wide", None, 1, ())
    assert isinstance(fault, TypeError | ValueError) and errors.explain(fault) is None
    assert errors.explain(raised(json.loads, "{")) is None
    assert errors.explain(raised(np.zeros(3).reshape, 2, 2)) is None
    assert errors.explain(ConfigError("never raised")) is None


def test_a_fault_of_ours_asks_for_a_report(capsys, monkeypatch):
    monkeypatch.setattr(verbs, "show", lambda args: {}["missing"])
    monkeypatch.setattr(verbs.show, "__name__", "show")
    assert cli.main(["show", "params"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "KeyError" in err and err.rstrip().endswith(errors.REPORT)


def test_an_error_of_a_file_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(verbs, "show", lambda args: tmp_path.read_text())
    monkeypatch.setattr(verbs.show, "__name__", "show")
    assert cli.main(["show", "params"]) == 2
    assert capsys.readouterr().err == f"lmm: error: {tmp_path} is a folder, where a file is expected\n"


def test_output_that_nobody_reads_any_more_is_no_error():
    code = "import sys; from lmm_jax.cli import main; sys.exit(main(['show', 'config']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert b"Traceback" not in err and process.returncode in (0, 1)
