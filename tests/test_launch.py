"""The launch scripts."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_can_be_started(script):
    subprocess.run(["bash", "-n", script], check=True)
    if script.read_text().startswith("#!"):  # the others are sourced
        assert os.access(script, os.X_OK)
