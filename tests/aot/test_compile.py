"""Compiling ahead of time: names of slices, shapes, least traffic and time, the search for a fit, real programs."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import flax.linen as nn
import jax
import pytest

from lmm_jax import cli, sharding
from lmm_jax.aot import collectives, topology
from lmm_jax.aot import compile as tool
from lmm_jax.aot.fit import fit, fit_config
from lmm_jax.aot.flops import executed_flops, step_flops
from lmm_jax.aot.report import report
from lmm_jax.config import ConfigError, flatten
from lmm_jax.data.pipeline import HOST_ONLY
from lmm_jax.training.state import make_program
from tests.opened import open_packs


@pytest.mark.parametrize(
    ("name", "grid", "accelerator"),
    [
        ("v5e-16", "v5e:4x4", "v5litepod-16"),
        ("v5e-64", "v5e:8x8", "v5litepod-64"),
        ("v6e-256", "v6e:16x16", "v6e-256"),
        ("v5p-64", "v5p:4x4x4", "v5p-128"),  # the cloud counts cores
        ("v5p-128", "v5p:4x4x8", "v5p-256"),
        ("tpu7x-64", "tpu7x:4x4x4", "tpu7x-128"),
        ("2xv5e-64", "v5e:8x8", "v5litepod-64"),  # each of two
        ("4xtpu7x-64", "tpu7x:4x4x4", "tpu7x-128"),
    ],
)
def test_slices_are_named_by_chips(name, grid, accelerator):
    found = topology.find_slice(name)
    assert (found.name, found.grid, found.accelerator) == (name, grid, accelerator)
    chips = math.prod(int(side) for side in grid.split(":")[1].split("x"))
    times = int(name[0]) if name[1] == "x" else 1
    assert chips == int(name.split("-")[1]) and found.devices == times * chips * (2 if "tpu7x" in name else 1)


def test_an_unknown_slice_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'v5e-17' does not exist; choose from v5e-4, v5e-8, v5e-16"):
        topology.find_slice("v5e-17")


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


def test_flops_are_those_of_the_formula(tiny):
    """Products of the weights and of attention; twice more where both factors have gradients."""
    one_scale = ("model.scales=(36,)", "train.scales_per_step=1")
    trained = make_program(tiny(*one_scale))
    frozen = make_program(tiny(*one_scale, 'optimizer.groups=(("vision", 0.0),)'))
    batch = tool.abstract_batch(trained.config, trained.mesh)
    packs, T, K = 8, 120, 40
    width, depth, mlp = 32, 3, 64
    layer = T * (width * width * 3 + 3 * width * mlp) + 2 * T * T * width  # q, o, and half as wide k and v
    decoder = depth * layer + K * width * 128
    vision = 37 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 37 * 37 * 16
    pixels, first, second = 36 * 48 * 16, 36 * 16 * 32, 36 * 32 * 32
    assert step_flops(trained, batch) == 2 * packs * (3 * (decoder + vision + first + second) + 2 * pixels)
    assert step_flops(frozen, batch) == 2 * packs * (
        3 * (decoder + second) + 2 * first + vision + pixels
    )  # no gradient flows into what comes before the projector


def test_what_is_computed_again_is_counted_as_it_runs(tiny):
    """A layer that keeps its input alone runs forward once more, but for its last product, which nothing needs."""
    one_scale = ("model.scales=(36,)", "train.scales_per_step=1", 'optimizer.groups=(("vision", 0.0),)')
    programs = {remat: make_program(tiny(*one_scale, f"model.decoder.remat={remat}")) for remat in ("none", "full")}
    batch = tool.abstract_batch(programs["full"].config, programs["full"].mesh)
    executed = {remat: executed_flops(program, batch) for remat, program in programs.items()}
    packs, T, width, depth, mlp, K = 8, 120, 32, 3, 64, 40
    head = 2 * packs * K * width * 128  # always runs once more
    assert executed["none"] == step_flops(programs["none"], batch) + head
    layer = T * (width * width * 3 + 2 * width * mlp) + 2 * T * T * width
    assert executed["full"] == executed["none"] + 2 * packs * depth * layer


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


def test_the_least_traffic_of_a_program(tiny):
    """Two gathers and a scatter of what trains, one gather of what is frozen; norms are whole on every device."""
    frozen = 'optimizer.groups=(("vision", 0.0),)'
    program = make_program(tiny("mesh.data=1", "mesh.fsdp=8", frozen))
    shardings = jax.tree.leaves(program.shardings.params)
    params = jax.tree.leaves_with_path(nn.unbox(program.boxed))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in params]
    sizes = [x.size for _, x in params]
    want = 0
    for size, placed, rate in zip(sizes, shardings, map(program.rates.__getitem__, paths), strict=True):
        if "fsdp" in placed.spec:
            want += 2 * size * 7 // 8 * (3 if rate else 1)
        elif rate:
            want += 2 * 2 * size * 7 // 8  # all-reduced
    assert collectives.minimum(program) == want > 0
    whole = make_program(tiny("mesh.data=8", frozen))
    trained = sum(size for size, path in zip(sizes, paths, strict=True) if program.rates[path])
    assert abs(collectives.minimum(whole) - 2 * 2 * trained * 7 / 8) < len(sizes)


def test_the_roofline_takes_the_slowest_part():
    target = topology.find_slice("v5e-4")
    moved = {"ici": {"fsdp": {"all-gather": 100e9}, "tensor": {"all-reduce": 100e9}}, "dcn": {}}
    found = tool.roofline(target, 4 * 197e12 / 4, 4 * 197e12 / 2, 819e9 / 4, moved)
    assert found["seconds"] == {"compute": 0.5, "memory": 0.25, "ici": 1.0, "dcn": 0.0}
    assert (found["step_seconds"], found["limits"], found["mfu"]) == (1.0, "ici", 0.25)
    chips = tool.roofline(topology.find_slice("tpu7x-4"), 0, 4 * 2307e12, 0, {"ici": {}, "dcn": {}})
    assert chips["seconds"]["compute"] == 1.0  # of chips, which are two devices each


@pytest.mark.parametrize(
    ("base", "each", "want", "tries"),
    [
        ({"none": 5, "dots": 3, "full": 2}, {"none": 4, "dots": 2, "full": 1}, (14, "full"), 6),
        ({"none": 5, "dots": 3, "full": 2}, {"none": 0.5, "dots": 0.3, "full": 0.2}, (70, "full"), 6),
        ({"none": 2, "dots": 2, "full": 2}, {"none": 1, "dots": 1, "full": 1}, (14, "none"), 5),
        (
            {"none": 90, "dots": 80, "full": 20, "offload": 14},
            dict.fromkeys(("full", "offload"), 1),
            (2, "offload"),
            4,
        ),
        ({"full": 40, "offload": 30}, {"full": 1, "offload": 1}, (0, "offload"), 2),
    ],
)
def test_fit_finds_the_largest_batch_in_few_tries(base, each, want, tries):
    lines = []

    def compile(packs, policy):
        peak = base[policy] + each[policy] * packs
        return {"fits": peak <= 16, "peak_hbm_bytes": peak, "hbm_bytes": 16}

    packs, policy, result = fit(compile, lines.append)
    assert (packs, policy) == want and len(lines) <= tries
    assert result["fits"] == (packs > 0)
    assert lines[0].startswith("1 packs a device, remat full: ")


def test_fit_changes_batch_and_policy_alone(tiny, monkeypatch):
    config, tried = tiny("mesh.data=4", "mesh.tensor=2", "train.micro_batches=2"), []

    def compile(config, topology):
        tried.append(config)
        peak = config.train.batch_size // (4 * 2) + {"none": 9, "dots": 1, "full": 0}[config.model.decoder.remat]
        return {"fits": peak <= 6, "peak_hbm_bytes": peak, "hbm_bytes": 6}

    monkeypatch.setattr(tool, "compile", compile)
    monkeypatch.setattr(tool, "slice_mesh", lambda config, target: sharding.make_mesh(config.mesh))
    found = fit_config(config, "v5e-8", progress=lambda line: None)
    assert (found["packs"], found["batch_size"], found["remat"]) == (6, 48, "full")
    assert {c.train.micro_batches for c in tried} == {2} and config.train.batch_size == 8
    changed = ("train.batch_size", "model.decoder.remat")
    for other in tried:
        flat = flatten(other)
        assert all(flat[name] == value for name, value in flatten(config).items() if name not in changed)


def test_what_does_not_fit_is_said_in_words():
    words = report(
        {
            "topology": "v5e-16",
            "step": "train",
            "accelerator": "v5litepod-16",
            "devices": 16,
            "mesh": {"fsdp": 16},
            "fits": False,
            "peak_hbm_bytes": 20 * 2**30,
            "hbm_bytes": 15 * 2**30,
            "state_bytes": 6 * 2**30,
            "memory": {"optimizer": 4 * 2**30, "batch": 2**20, "temporaries": 16 * 2**30, "largest": []},
            "collectives": None,
            "compile_seconds": 3.0,
            "reason": "RESOURCE_EXHAUSTED",
        }
    )
    assert "does NOT fit: needs 20.00 GiB a device, 5.00 GiB more than the 15.00 GiB there are" in words
    assert "optimizer 4.00 GiB, batch 1.00 MiB, temporaries 16.00 GiB" in words
    assert "model.decoder.remat=full, then offload; more train.micro_batches" in words


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lmm_jax[compile]'"
)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install(capsys, tiny_args):
    assert cli.main(["compile", *tiny_args[:2], "--topology", "v5e-16"]) == 2
    assert "pip install 'lmm_jax[compile]'" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize(("width", "fits"), [(32, True), (2**19, False)])
def test_a_real_program_for_a_slice(tiny_args, width, fits):
    """In a process of its own: libtpu stays with the one that loads it."""
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
def test_generation_for_a_slice(tiny_args, step):
    found = compiled(*tiny_args, "--topology", "v5e-4", "--step", step, "--prompts", "8")
    assert found["fits"] and found["minimum_bytes"] is None
    assert found["memory"]["cache" if step == "decode" else "batch"] > 0
    assert found["roofline"]["limits"] == ("memory" if step == "decode" else "compute")


def compiled(*args):
    """What `lmm compile --json` says, in a process of its own."""
    command = [sys.executable, "-m", "lmm_jax", "compile", *args, "--json"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # libtpu does not know all flags of CPUs
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
