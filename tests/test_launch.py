"""The launch scripts."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_short(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert len(script.read_text().splitlines()) <= 100
