"""Counted operations against a formula."""

from lmm_jax.aot import compile as tool
from lmm_jax.aot.flops import executed_flops, step_flops
from lmm_jax.training.state import make_program


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


def test_a_router_costs_no_gradient_of_what_it_reads(tiny):
    """Beside a model that trains it adds as much as beside one that is frozen: its own products."""
    rates = {"trained": (), "frozen": ('optimizer.groups=(("vision", 0.0), ("projector", 0.0), ("decoder", 0.0))',)}
    router = ("model.router.width=8", "model.router.heads=2", "model.router.tokens=8")
    added = {}
    for name, more in rates.items():
        plain, routed = (make_program(tiny(*more, *extra)) for extra in ((), router))
        batches = [tool.abstract_batch(program.config, program.mesh) for program in (plain, routed)]
        assert batches[1]["question"].shape == (1, 8, tool.QUESTIONS, 8)
        added[name] = step_flops(routed, batches[1]) - step_flops(plain, batches[0])
    assert added["trained"] == added["frozen"] > 0
