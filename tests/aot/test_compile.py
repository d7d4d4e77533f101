"""Compiling ahead of time: the abstract batch, the roofline, and real programs for slices that are not there."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from lmm_jax import cli, sharding
from lmm_jax.aot import compile as tool
from lmm_jax.aot import topology
from lmm_jax.data.pipeline import HOST_ONLY
from tests.conftest import ROOT
from tests.opened import open_packs


@pytest.mark.parametrize("recipe", ["m3", "deepstack"])
def test_the_abstract_batch_has_the_shapes_of_a_real_one(tiny, recipe):
    config = tiny("train.micro_batches=2", recipe=recipe)
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    pack = open_packs(config, "train", 8, shuffle=True)[0]
    want = {name: ((2, 4, *x.shape), x.dtype) for name, x in pack.items() if name not in HOST_ONLY}
    found = tool.abstract_batch(config, mesh)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == want
    assert {x.sharding for x in found.values()} == {sharding.batch_sharding(mesh, config.rules)}
    assert ("gather" in found) == (recipe == "deepstack")


def test_packs_that_do_not_divide_are_refused(tiny):
    config = tiny("train.batch_size=12")
    with pytest.raises(ValueError, match="12 packs a micro-batch do not divide over"):
        tool.abstract_batch(config, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("… the total memory required for HLO temporaries (268.58G) exceeds available HBM (15.75G).", 268.58 * 2**30),
        ("Ran out of memory in memory space hbm. Used 18.50M of 15.75G hbm.", 18.5 * 2**20),
        ("no numbers", None),
    ],
)
def test_needed_bytes_of_the_compilers_words(message, size):
    assert tool.needed_bytes(message) == (size and int(size))


def test_the_roofline_takes_the_slowest_part():
    target = topology.find_slice("v5e-4")
    moved = {"ici": {"fsdp": {"all-gather": 100e9}, "tensor": {"all-reduce": 100e9}}, "dcn": {}}
    found = tool.roofline(target, 4 * 197e12 / 4, 4 * 197e12 / 2, 819e9 / 4, moved)
    assert found["seconds"] == {"compute": 0.5, "memory": 0.25, "ici": 1.0, "dcn": 0.0}
    assert (found["step_seconds"], found["limits"], found["mfu"]) == (1.0, "ici", 0.25)
    chips = tool.roofline(topology.find_slice("tpu7x-4"), 0, 4 * 2307e12, 0, {"ici": {}, "dcn": {}})
    assert chips["seconds"]["compute"] == 1.0  # of chips, which are two devices each


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lmm_jax[compile]'"
)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install(capsys, tiny_args):
    assert cli.main(["compile", *tiny_args[:2], "--topology", "v5e-16"]) == 2
    assert "pip install 'lmm_jax[compile]'" in capsys.readouterr().err


EACH = """
import json, sys
from lmm_jax import cli
for command in sys.stdin:
    assert cli.main(json.loads(command)) == 0
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def compiled():
    """`compiled(*args)`: what `lmm compile --json` says.

    All in one process of their own: libtpu stays with the one that loads it, and takes its time to be loaded.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # libtpu does not know all flags of CPUs
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "-c", EACH], cwd=ROOT, env=env, **pipes) as process:

        def answer(*args):
            process.stdin.write(json.dumps(["compile", *args, "--json"]) + "\n")
            process.stdin.flush()
            said = []
            for line in process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
                said.append(line)
            raise AssertionError("".join(said))

        yield answer


@needs_libtpu
@pytest.mark.parametrize(("width", "fits"), [(32, True), pytest.param(2**19, False, marks=pytest.mark.long)])
def test_a_real_program_for_a_slice(compiled, tiny_args, width, fits):
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    overrides = ["--config.train.batch_size=16", f"--config.model.decoder.mlp_dim={width * 16}"]
    found = compiled(*tiny_args, *overrides, *mesh, "--topology", "2xv5e-8")
    assert (found["fits"], found["devices"], found["accelerator"]) == (fits, 16, "v5litepod-8")
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 2}
    assert found["flops"] > 0 and found["compile_seconds"] > 0
    if fits:
        assert 0 < found["state_bytes"] < found["peak_hbm_bytes"] < found["hbm_bytes"]
        assert found["estimated_cycles"] > 0 and found["memory"]["largest"]
        assert found["collectives"]["ici"]["fsdp"]["reduce-scatter"] > 0
        assert found["collectives"]["dcn"]["data"]["all-reduce"] > 0
        assert found["collective_bytes"] > found["parameter_bytes"] > found["minimum_bytes"] > 0
        assert found["roofline"]["limits"] == "dcn"
    else:
        assert found["peak_hbm_bytes"] > found["hbm_bytes"] and "RESOURCE_EXHAUSTED" in found["reason"]


@needs_libtpu
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_generation_for_a_slice(compiled, tiny_args, step):
    found = compiled(*tiny_args, "--topology", "v5e-4", "--step", step, "--prompts", "8")
    assert found["fits"] and found["minimum_bytes"] is None
    assert found["memory"]["cache" if step == "decode" else "batch"] > 0
    assert found["roofline"]["limits"] == ("memory" if step == "decode" else "compute")
