"""The notebooks, top to bottom; `launch/test.sh --notebooks`."""

import json
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs_from_a_fresh_copy(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # what tests set compiles fast, and trains slowly
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(clone / "notebooks")}}
    )
    client.execute()
    assert any("image/png" in str(cell.get("outputs")) for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 20  # what a reader runs in one sitting
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
