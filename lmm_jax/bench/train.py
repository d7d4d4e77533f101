"""The training step, and M3's over all its scales, beside a large matrix product and the peer."""

import dataclasses
import math

import jax

from lmm_jax import sharding
from lmm_jax.aot.flops import step_flops
from lmm_jax.bench.measure import Measurement, matmul_rate, run_peer, time_steps
from lmm_jax.bench.shape import load_shape, model_config, side, synthetic_batch
from lmm_jax.training.state import init_state, make_program
from lmm_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class Timed:
    """A step: `seconds`; the most `bytes` in memory, parameters and optimizer included; its `layout`, [G, R, T]."""

    seconds: float
    bytes: int
    layout: tuple[int, ...]


def bench_train(name, dtype, states, steps=5, checkpoint=False, device=None, compile_peer=False) -> list[Measurement]:
    """Times full fine-tuning of a shape on one device: LLaVA's step at all visual tokens, and M3's over all scales.

    Args:
      name: of a shape, or its file.
      dtype: of the computation.
      states: dtypes of parameters and moments, each of which is measured.
      steps: timed steps.
      checkpoint: recomputes layers in the backward pass, ours and the peer's.
      device: of the peer, "cpu" or "cuda"; None goes without it.
      compile_peer: the peer under torch.compile.

    Returns:
      Rows of both steps for each state. Rates count what the mathematics asks for: `flops.step_flops`, and of M3's
      step `m3_flops`.
    """
    shape, peer = load_shape(name), {}
    if device:
        options = ["--device", device, "--dtype", dtype, "--steps", steps]
        options += ["--checkpoint"] * checkpoint + ["--compile"] * compile_peer
        peer = {what: run_peer(name, mode, *options) for what, mode in (("train", "train"), ("m3", "train_m3"))}
    scales, full = tuple(shape["scales"]), (side(shape) ** 2,)
    theirs, ours = m3_flops(shape, scales)
    # Where attention leaves out what other segments hold, one row without empty positions is faster than several.
    layouts = sorted({1, best_rows(shape, scales)})
    of_train, of_m3 = [synthetic_batch(shape, full)], [synthetic_batch(shape, scales, rows=n) for n in layouts]
    train_flops = step_flops(program_of(shape, dtype, full), of_train[0])
    matmul = matmul_rate(dtype)
    rows = [Measurement(f"large matmul, {dtype}", matmul / 1e12, "TFLOP/s")]
    for state in states:
        ratios = []
        for step, bank, batches, flops in (("train", full, of_train, train_flops), ("m3", scales, of_m3, ours)):
            what, program = f"{step}, {state} state", program_of(shape, dtype, bank, checkpoint)
            try:
                timed = min((time_train(program, b, state, steps, what) for b in batches), key=lambda t: t.seconds)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                rows.append(Measurement(what, None, "s", None, "does not fit into memory"))
                continue
            rows += _rows(what, timed, flops, matmul, peer.get(step))
            ratios += [rows[-4].ratio] if peer else []
        if len(ratios) == 2:
            goal = theirs / ours * ratios[0]
            against = f"arithmetic ceiling × train's ratio, {goal:.2f}"
            rows.append(Measurement(f"m3, {state} state, over the peer", ratios[1], "×", ratios[1] / goal, against))
    rows.append(Measurement("m3, arithmetic ceiling", theirs / ours, "×", None, "operations of the peer, over ours"))
    return rows


def program_of(shape, dtype, scales, checkpoint=False, **vision):
    """The `state.Program` of a shape on one device; `vision` are further fields of the encoder."""
    config = model_config(shape, dtype, scales, checkpoint)
    config.model.vision.update(vision)
    return make_program(config, sharding.make_mesh({}, jax.devices()[:1]))


def time_train(program, batch, state_dtype, steps, what) -> Timed:
    """Times the real training step on a batch."""
    with program.use():
        state = init_state(program, state_dtype)
        batch = jax.device_put(batch, sharding.batch_sharding(program.mesh, program.config.rules))
        step = jit_train_step(program).lower(state, batch).compile()

        def update():
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        seconds = time_steps(update, steps, what, warmup=2)
    sizes = step.memory_analysis()
    arrays = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Timed(seconds, arrays + sizes.temp_size_in_bytes, batch["id"].shape[1:])


def m3_flops(shape, scales) -> tuple[int, int]:
    """Operations of M3's step as the peer does it, with a pass of all parts for each scale, and of ours.

    Ours has one pass of the encoder, and leaves out the logits of positions without a target and the encoder's last
    block, of which nothing is used. Of a pack that holds all copies each needs to attend to itself alone. Theirs over
    ours is M3's arithmetic ceiling.
    """
    program = program_of(shape, "float32", scales)
    apart = unused = 0
    for scale in scales:
        batch = synthetic_batch(shape, scales, copies=(scale,))
        flops = step_flops(program, batch)
        apart, unused = apart + flops, unused + batch["id"].size - batch["target"].size
    once = flops - step_flops(program, {name: x for name, x in batch.items() if name != "pixels"})
    whole = program_of(shape, "float32", scales, level=-1)
    last = (step_flops(whole, batch) - flops) // 3  # forward alone, as it gets no gradient
    unused *= 6 * shape["text"]["width"] * shape["text"]["vocab_size"]
    return apart + unused + last * len(scales), apart - once * (len(scales) - 1)


def best_rows(shape, scales) -> int:
    """Rows of a pack of all copies for which the step, as it is computed, has the fewest operations.

    One row has no empty positions; several attend to fewer pairs.
    """
    program = program_of(shape, "float32", scales)
    counts = {
        rows: step_flops(program, synthetic_batch(shape, scales, rows=rows)) for rows in range(1, len(scales) + 1)
    }
    return min(counts, key=counts.get)


def _rows(name, ours, flops, matmul, peer):
    rate, (packs, per_pack, length) = flops / ours.seconds, ours.layout
    layout = f"{packs} packs of {per_pack} × {length} positions"
    rows = [
        Measurement(name, ours.seconds, "s"),
        Measurement(f"{name}, rate", rate / 1e12, "TFLOP/s", rate / matmul, "large matmul"),
        Measurement(f"{name}, positions", math.prod(ours.layout) / ours.seconds, "tokens/s", None, layout),
        Measurement(f"{name}, memory", ours.bytes / 2**30, "GiB"),
    ]
    if peer:
        seconds, size = peer["ms"] / 1e3, peer["peak_bytes"]
        against = f"peer's speed, {seconds:.3g} s"
        rows[0] = dataclasses.replace(rows[0], ratio=seconds / ours.seconds, against=against)
        against = f"peer's, {size / 2**30:.3g} GiB"
        rows[3] = dataclasses.replace(rows[3], ratio=ours.bytes / size, against=against)
    return rows
