"""Sums over XLA's text: loops, collectives and who takes part in them, arrays."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.aot import collectives
from lmm_jax.aot.hlo import Module, replica_groups

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
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %out = (s32[], bf16[64,128]{1,0}) tuple(%next, %copy.1)
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
    assert [(c.kind, c.size, c.times) for c in module.collectives(64)] == [
        ("all-gather", 4096 * 128 * 2, 32),
        ("reduce-scatter", 64 * 128 * 2, 32),
        ("all-reduce", 4 * 4 + 4 * 4, 1),
    ]


def test_a_loop_that_counts_by_two_runs_half_as_often():
    twice = Module(TPU_TEXT.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))
    assert twice.estimated_cycles() == 16 * (100 + 20) + 7


def test_a_counter_may_be_copied_to_another_memory():
    copied = TPU_TEXT.replace("%next = s32[] add", "%sum = s32[]{:T(128)S(6)} add").replace(
        "  ROOT %out = ", "  %next = s32[] copy(%sum)\n  ROOT %out = "
    )
    assert Module(copied).estimated_cycles() == Module(TPU_TEXT).estimated_cycles()


def test_a_loop_that_does_not_count_is_an_error():
    with pytest.raises(ValueError, match=r"loop while.1: its condition is not a counter"):
        Module(TPU_TEXT.replace("direction=LT", "direction=GT")).estimated_cycles()
    with pytest.raises(ValueError, match=r"loop while.1: its counter does not grow by a constant"):
        Module(TPU_TEXT.replace("add(%i.1, %one)", "add(%i.1, %i.1)")).estimated_cycles()
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
    found = sum(c.size * c.times for c in Module(text).collectives(8))
    assert "while(" in text and found >= 5 * 8 * 64 * 4 and found % (8 * 64 * 4) == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", ((0, 1), (2, 3))),
        ("replica_groups={}, to_apply=%add", ()),
        ("replica_groups=[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={0}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
    ],
)
def test_replica_groups_in_every_way_they_are_written(text, groups):
    assert replica_groups(text) == groups


def test_unknown_replica_groups_are_an_error():
    with pytest.raises(ValueError, match="unknown replica groups: replica_groups=<2>"):
        replica_groups("replica_groups=<2>, x")


# Of a program for two slices of four: a scatter as libtpu fuses it, then the part is summed between the slices.
SLICES_TEXT = """HloModule jit_f, is_scheduled=true

%all-reduce-scatter (input: bf16[512,128]) -> bf16[128,128] {
  %input = bf16[512,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[512,128]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %part = bf16[128,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero)
}

ENTRY %main (p: bf16[512,128]) -> bf16[128,128] {
  %p = bf16[512,128]{1,0} parameter(0)
  %big = f32[512,128]{1,0:T(8,128)} convert(%p), metadata={op_name="jit(f)/convert"}
  %fast = f32[1024,128]{1,0:T(8,128)S(1)} convert(%p)
  %fusion = bf16[128,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
  %all = token[] after-all()
  %send = (bf16[128,128]{1,0}, u32[], token[]) send(%fusion, %all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[128,128]{1,0}, u32[], token[]) recv(%all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (bf16[128,128]{1,0}, token[]) recv-done(%recv), channel_id=1
  ROOT %r = bf16[128,128]{1,0} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


class FakeDevice:
    def __init__(self, slice_index):
        self.slice_index = slice_index


def test_traffic_by_link_and_mesh_axes():
    devices = np.array([FakeDevice(i // 4) for i in range(8)], object).reshape(2, 2, 2, 1)
    mesh = types.SimpleNamespace(devices=devices, size=8, axis_names=sharding.MESH_AXES)
    half = 512 * 128 * 2 // 2  # of two devices each lacks half
    assert collectives.traffic(Module(SLICES_TEXT), mesh) == {
        "ici": {"tensor": {"reduce-scatter": half}},
        "dcn": {"data": {"all-reduce": 128 * 128 * 2}},  # between two, half of it twice
    }


LIVE = """HloLiveRange (max 5):
  Live ranges at 3 (peak):
    p{}: 131072 bytes (cumulative: 131072 bytes)
    big{}: 262144 bytes (cumulative: 393216 bytes)
    fast{}: 524288 bytes (cumulative: 917504 bytes)
    send{0}: 32768 bytes (cumulative: 950272 bytes)
    fusion{}: 32768 bytes (cumulative: 983040 bytes)
  Stack trace breakdown for peak usage: 983 040 bytes
    p{}: 7 bytes
"""


def test_what_is_live_at_the_peak_without_arguments_and_fast_memory():
    assert Module(SLICES_TEXT).live_at_peak(LIVE) == [
        (512 * 128 * 4, "1 × f32[512,128]", "jit(f)/convert"),
        (2 * 128 * 128 * 2, "2 × bf16[128,128]", ""),
    ]
