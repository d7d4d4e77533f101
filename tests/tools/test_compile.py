"""Compiling ahead of time: sums over XLA's text, names of slices, shapes of a batch, one program for a TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import cli, sharding
from lmm_jax.config import ConfigError
from lmm_jax.data.pipeline import HOST_ONLY, Packs
from lmm_jax.tools import compile as tool
from lmm_jax.tools.hlo import Module, array_bytes
from lmm_jax.training.flops import step_flops
from lmm_jax.training.state import make_program

# As libtpu prints it, shortened: a loop with its limit in the condition, a gather that starts in one fusion, goes on
# beside a product in the next and ends in a third, and a kernel's attributes with a brace at the start of a line.
TPU_TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_start (p.0: bf16[64,128]) -> (bf16[64,128], bf16[4096,128]) {
  %p.0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[4096,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=1, dimensions={0}
  ROOT %custom-call.1 = (bf16[64,128]{1,0}, bf16[4096,128]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p.1: bf16[64,128]) -> f32[8,8] {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  %all-gather.2 = bf16[4096,128]{1,0} all-gather(%p.1), channel_id=1, dimensions={0}
  ROOT %dot.1 = f32[8,8]{1,0} constant(0)
}

%fused_done (p.2: bf16[64,128]) -> bf16[4096,128] {
  %p.2 = bf16[64,128]{1,0} parameter(0)
  %all-gather.3 = bf16[4096,128]{1,0} all-gather(%p.2), channel_id=1, dimensions={0}
  ROOT %custom-call.2 = bf16[4096,128]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (t.1: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %t.1 = (s32[], bf16[64,128]{1,0}) parameter(0)
  %x = bf16[64,128]{1,0} get-tuple-element(%t.1), index=1
  %start = (bf16[64,128]{1,0}, bf16[4096,128]{1,0}) fusion(%x), kind=kLoop, calls=%fused_start
  %middle = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.2, backend_config={"window_config":{"estimated_cycles":"100"}}
  %done = bf16[4096,128]{1,0} fusion(%x), kind=kLoop, calls=%fused_done
  %kernel = bf16[64,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", kernel_metadata={
"xprof_metadata":"{}"
}, metadata={op_name="splash"}
  %scatter = bf16[1,128]{1,0} reduce-scatter(%x), channel_id=2, dimensions={0}, to_apply=%add
  %copy.1 = bf16[64,128]{0,1} copy(%x), backend_config={"window_config":{"estimated_cycles":"20"}}
  ROOT %out = (s32[], bf16[64,128]{1,0}) tuple(%x, %copy.1)
}

%condition (t.2: (s32[], bf16[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  %t.2 = (s32[], bf16[64,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[64,128]) -> bf16[64,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[64,128]{1,0}) tuple(%zero, %p)
  %while.1 = (s32[], bf16[64,128]{1,0}) while(%t), condition=%condition, body=%body
  %reduce = (f32[4]{0}, /*index=1*/f32[2,2]{1,0}) all-reduce(%a, %b), channel_id=3, to_apply=%add
  ROOT %r = bf16[64,128]{1,0} get-tuple-element(%while.1), index=1, backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run_and_a_collective_once():
    module = Module(TPU_TEXT)
    assert module.estimated_cycles() == 32 * (100 + 20) + 7
    assert module.collective_bytes() == {
        "all-gather": 32 * 4096 * 128 * 2,
        "reduce-scatter": 32 * 64 * 128 * 2,
        "all-reduce": 4 * 4 + 4 * 4,
    }


def test_a_loop_that_does_not_count_is_an_error():
    with pytest.raises(ValueError, match=r"loop while.1: its condition is not a counter"):
        Module(TPU_TEXT.replace("direction=LT", "direction=GT")).estimated_cycles()
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("HloModule empty")


def test_collectives_of_a_program_compiled_here():
    mesh = sharding.make_mesh({"fsdp": 8})
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    whole = jax.NamedSharding(mesh, jax.P())

    def f(x, w):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, w)[0]

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    text = jax.jit(f, out_shardings=whole).lower(x, w).compile().as_text()
    # Each layer's weights are gathered in the loop, the result once; or x moves instead, which is 32 times less.
    found = sum(Module(text).collective_bytes().values())
    assert "while(" in text and found >= 5 * 8 * 64 * 4 and found % (8 * 64 * 4) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("f32[2,3]{1,0:T(8,128)S(1)}", 24), ("(bf16[4]{0}, pred[3], s32[])", 15), ("f8e4m3fn[5]", 5), ("u4[6]", 3)],
)
def test_bytes_of_types(text, size):
    assert array_bytes(text) == size


@pytest.mark.parametrize(
    ("name", "grid", "accelerator"),
    [
        ("v5e-16", "v5e:4x4", "v5litepod-16"),
        ("v5e-64", "v5e:8x8", "v5litepod-64"),
        ("v6e-256", "v6e:16x16", "v6e-256"),
        ("v5p-64", "v5p:4x4x4", "v5p-128"),  # the cloud counts cores
        ("v5p-128", "v5p:4x4x8", "v5p-256"),
        ("tpu7x-64", "tpu7x:4x4x4", "tpu7x-128"),
    ],
)
def test_slices_are_named_by_chips(name, grid, accelerator):
    found = tool.find_slice(name)
    assert (found.grid, found.accelerator) == (grid, accelerator)
    assert np.prod([int(side) for side in grid.split(":")[1].split("x")]) == int(name.split("-")[1])


def test_an_unknown_slice_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'v5e-17' does not exist; choose from v5e-4, v5e-8, v5e-16"):
        tool.find_slice("v5e-17")


@pytest.mark.parametrize("recipe", ["m3", "deepstack"])
def test_the_abstract_batch_has_the_shapes_of_a_real_one(tiny, recipe):
    config = tiny("train.micro_batches=2", recipe=recipe)
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    pack = Packs(config, "train", 8, shuffle=True)[0]
    want = {name: ((2, 4, *x.shape), x.dtype) for name, x in pack.items() if name not in HOST_ONLY}
    found = tool.abstract_batch(config, mesh)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == want
    assert {x.sharding for x in found.values()} == {sharding.batch_sharding(mesh, config.rules)}
    assert ("source" in found) == (recipe == "deepstack")


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
    overrides = ["--config.train.batch_size=16", f"--config.model.decoder.mlp_dim={width * 16}"]
    command = [sys.executable, "-m", "lmm_jax", "compile", *tiny_args, *overrides, "--topology", "v5e-16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["fits"], found["devices"], found["accelerator"]) == (fits, 16, "v5litepod-16")
    assert found["flops"] > 0 and found["compile_seconds"] > 0
    if fits:
        assert 0 < found["state_bytes"] < found["peak_hbm_bytes"] < found["hbm_bytes"]
        assert found["estimated_cycles"] > 0
        # Every gradient is summed over the slice once: a float32 for each parameter.
        assert found["collectives"]["all-reduce"] > found["state_bytes"] / 3
    else:
        assert found["peak_hbm_bytes"] > found["hbm_bytes"] and "RESOURCE_EXHAUSTED" in found["reason"]
