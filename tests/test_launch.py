"""The launch scripts and the files a newcomer reads."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_short(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert len(script.read_text().splitlines()) <= 100


def test_readme_is_short_and_its_files_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    named = re.findall(r"\b(?:configs|launch|notebooks|tests|lmm_jax)/[\w/]+\.(?:py|sh|ipynb)", text)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_readme_commands_name_real_verbs_and_flags():
    text = (ROOT / "README.md").read_text()
    for line in re.findall(r"^ *(lmm .*)$", text, re.MULTILINE):
        _, verb, *words = line.split()
        usage = subprocess.run(["python", "-m", "lmm_jax", verb, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert usage.returncode == 0, line
        for flag in (w for w in words if w.startswith("--") and not w.startswith("--config.")):
            assert flag.split("=")[0] in usage.stdout, line
