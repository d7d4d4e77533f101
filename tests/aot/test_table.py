"""The table of compiled recipes: meshes, what is said where one does not fit, and what is compiled anew."""

import datetime

import pytest

from lmm_jax.aot import table
from lmm_jax.config import load_config


def result(topology, fits):
    return {
        "topology": topology,
        "mesh": {"fsdp": 64},
        "fits": fits,
        "peak_hbm_bytes": 12 * 2**30 if fits else 40 * 2**30,
        "hbm_bytes": 16 * 2**30,
        "state_bytes": 2 * 2**30,
        "parameter_bytes": 33 * 2**30,
        "collective_bytes": 35 * 2**30,
        "minimum_bytes": 30 * 2**30,
        "roofline": {"step_seconds": 0.6, "limits": "compute", "mfu": 1.0},
        "compile_seconds": 61.2,
        "date": "2026-11-27",
    }


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        ("llava.py", 64, (64, 1)),
        ("llava.py", 256, (64, 4)),
        ("m3.py", 256, (32, 8)),
        ("deepstack.py:recipe=hd", 256, (128, 2)),
        ("convllava.py:stage=2", 256, (64, 4)),  # 128 packs, but a stage 192 wide
        ("llava.py", 16, (16, 1)),
    ],
)
def test_meshes_are_those_of_the_readme(config, devices, sizes):
    most = table.MOST_FSDP.get(config.partition(":")[0], devices)
    found = table.mesh_sizes(load_config(f"{table.ROOT}/configs/{config}"), devices, most)
    assert (found["fsdp"], found["tensor"]) == sizes


def test_a_cell_that_does_not_fit_names_the_smallest_slice_that_does():
    tried = []

    def run(arguments, topology):
        tried.append((topology, arguments))
        return result(topology, topology == "v5e-256")

    results = table.cell("M3", "13b", "v5e-64", run)
    assert [topology for topology, _ in tried] == ["v5e-64", "v5e-128", "v5e-256"]
    assert tried[0][1] == ("m3.py:size=13b", "data.views=5", "mesh.fsdp=32", "mesh.tensor=2")
    line = table.row("M3", "13b", results)
    assert line.startswith("| M3 | 13b | v5e-64 | fsdp 64 | 32 | **40.0** of 16.0: fits on v5e-256 | 2.0 |")
    none = table.row("M3", "13b", table.cell("M3", "13b", "v5e-64", lambda _, topology: result(topology, False)))
    assert "on no larger one either" in none
    assert line.count("|") == none.count("|") == table.HEAD.splitlines()[-1].count("|")


def test_a_cell_that_fits_is_compiled_once():
    calls = []

    def run(arguments, topology):
        calls.append(topology)
        return result(topology, True)

    line = table.row("DeepStack-L-HD", "7b", table.cell("DeepStack-L-HD", "7b", "v6e-64", run))
    assert calls == ["v6e-64"]
    assert "| 12.0 of 16.0 | 2.0 | 33.0 (1.10×) | 2.0 | 0.60 | compute | 100% | 61 | 2026-11-27 |" in line


def test_results_are_kept_by_config_slice_and_code(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "versions", lambda: {"jax": "1", "libtpu": "2"})
    key = table.fingerprint(("llava.py:size=7b", "data.views=2"), "v5e-64")
    assert key == table.fingerprint(("llava.py:size=7b", "data.views=2"), "v5e-64")
    assert key != table.fingerprint(("llava.py:size=7b", "data.views=1"), "v5e-64")
    assert key != table.fingerprint(("llava.py:size=7b", "data.views=2"), "v5e-128")
    (tmp_path / f"{key}.json").write_text('{"fits": true}')  # no process is started for what is there
    found = table.cached(tmp_path)(("llava.py:size=7b", "data.views=2"), "v5e-64")
    assert found == {"fits": True, "date": datetime.date.today().isoformat()}
    monkeypatch.setattr(table, "versions", lambda: {"jax": "1", "libtpu": "3"})
    assert key != table.fingerprint(("llava.py:size=7b", "data.views=2"), "v5e-64")


def test_rows_of_cells_that_were_not_compiled_now_stay(monkeypatch):
    monkeypatch.setattr(table, "versions", lambda: {"jax": "1", "libtpu": "2"})

    def run(arguments, topology):
        if topology == "v5e-64" and arguments[0] == "m3.py:size=7b":
            return result(topology, True)
        raise table.NotCompiled(topology)

    first = table.table(run, "")
    assert [line.split(" | ")[:3] for line in first.splitlines()[-1:]] == [["| M3", "7b", "v5e-64"]]
    earlier = "| LLaVA-1.5 | 7b | v5e-64 | as it stands | 2026-11-20 |"
    stale = "| M3 | 7b | v5e-64 | is replaced | 2026-11-20 |"
    unknown = "| Another | 7b | v5e-64 | is no cell any more |"
    head, written = table.HEAD.format(**table.versions()), "\n".join((stale, unknown, earlier))
    assert table.table(run, head + written) == f"{head}{earlier}\n{first.removeprefix(head)}"
    other = table.HEAD.format(jax="1", libtpu="1")
    assert table.table(run, other + written) == first  # rows of another compiler do not
