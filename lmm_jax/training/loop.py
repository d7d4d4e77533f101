"""The training loop."""

import contextlib
import dataclasses
import functools
import json
import signal
import threading
import time

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from lmm_jax import lock, sharding
from lmm_jax.config import ConfigError, check, flatten, read_config, save_config
from lmm_jax.data.pipeline import HOST_ONLY, Packs, batches
from lmm_jax.pods import hosts
from lmm_jax.training import adapters, start
from lmm_jax.training import base as base_lib
from lmm_jax.training import metrics as metrics_lib
from lmm_jax.training.bad_records import BadRecords
from lmm_jax.training.checkpoint import Checkpoints, saved_steps
from lmm_jax.training.optimizer import schedule
from lmm_jax.training.plan import Plan, check_stream, make_plan
from lmm_jax.training.state import Program, init_state
from lmm_jax.training.step import jit_eval_step, jit_train_step


class Preempted(Exception):
    """The process was asked to stop; everything is saved and the same command continues."""


def train(config, workdir, profile=0):
    """Trains, or continues the run that `workdir` holds; on several hosts all of them call it alike.

    Args:
      config: from `load_config`.
      workdir: folder of the run: config.json, metrics.jsonl, checkpoints/, tokenizer, loss.png. All hosts see it.
      profile: writes a profiler trace of so many steps, after compilation, to `workdir/profile`.

    Returns:
      dict of the last metrics: step, loss, validation_loss, tokens_per_second and others.

    Raises:
      ConfigError, FileNotFoundError, OSError, ImportError, ValueError: see `plan.make_plan`; nothing was written.
      Held: another process trains in `workdir`.
      FloatingPointError: `train.max_skipped` updates in a row were not finite.
      MissingHost: see `hosts.start`.
      Preempted: after SIGTERM or Ctrl-C to any host, once everything is saved.
    """
    check(config)
    hosts.start(folder=workdir)
    plan = make_plan(config, workdir)
    main = jax.process_index() == 0
    hosts.check_same(config=json.loads(config.to_json_best_effort()), data=plan.stream)
    with lock.hold(plan.workdir, "lmm train") if main else contextlib.nullcontext() as held:
        if next(iter(saved_steps(plan.workdir)), 0) != plan.step:
            raise ConfigError(
                f"{plan.workdir} was trained by another process meanwhile; start the same command again"
            )
        if main and not plan.step:
            _claim(plan)
        hosts.everywhere(True)  # none looks for what is claimed before it is
        if not (plan.workdir / "config.json").exists():
            raise ConfigError(
                f"{plan.workdir} is another folder here than on host 0; all hosts must see it, as they do gs://…"
            )
        return _run_plan(plan, main, held, profile)


def _run_plan(plan, main, held, profile):
    """Does what a plan says; returns the last metrics."""
    config, program = plan.program.config, plan.program
    if main:
        _describe(plan)
    checkpoints = Checkpoints(plan.workdir, config.train.keep)
    restored = base_lib.restore(checkpoints, program, plan.workdir)
    if restored:
        state, saved, base = restored
        check_stream(plan.workdir, saved, plan.stream)
    else:
        state, base = start.begin(program, init_state(program))
    sharding.assert_sharded(state, program.shardings, "train state")

    writer = metrics_lib.MetricWriter(plan.workdir, config, main)
    run = _Run(plan, checkpoints, writer, held, main, base)
    with contextlib.closing(writer), checkpoints:
        if int(state.step) < config.train.steps:
            if main and plan.step:  # now that it could be restored
                _claim(plan)
            return _take_steps(run, state, profile)
    if main:
        print(f"{plan.workdir}: all {config.train.steps} steps are done")
    written = (plan.workdir / metrics_lib.NAME).exists()
    rows = metrics_lib.read_metrics(plan.workdir) if written else []
    return functools.reduce(dict.__or__, rows, {"step": int(state.step)})


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run consists of while it lasts, beside its state.

    Attributes:
      plan: what was known before it began.
      checkpoints, writer: where state and metrics go.
      held: the `lock.Hold` of the workdir; None on all hosts but the first.
      main: whether this process speaks and writes for all.
      base: what checkpoints leave out, see `base.describe`.
    """

    plan: Plan
    checkpoints: Checkpoints
    writer: metrics_lib.MetricWriter
    held: lock.Hold | None
    main: bool
    base: dict | None

    @property
    def program(self) -> Program:
        """See `state.make_program`."""
        return self.plan.program

    @property
    def packs(self) -> Packs:
        """Of the training split."""
        return self.plan.packs

    @property
    def workdir(self) -> epath.Path:
        """Of the run."""
        return self.plan.workdir

    def save(self, state):
        """Saves a state, and what was written beside it, unless another process has taken the workdir over."""
        if self.held:
            self.held.check()
        self.checkpoints.save(state, self.plan.stream, self.base)
        self.writer.flush()

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Micro-batches of a step, and packs of each."""
        t = self.program.config.train
        return t.micro_batches, t.batch_size // t.micro_batches

    @functools.cached_property
    def local_packs(self) -> np.ndarray:
        """Numbers of this host's packs in a global batch."""
        return sharding.local_packs(self.program.mesh, self.program.config.rules, self.batch_shape)

    def host_batches(self, packs, first, end):
        """This host's part of the global batches number `first` to `end` - 1 of some packs."""
        data = self.program.config.data
        return batches(packs, self.local_packs, first, end, threads=data.threads, workers=data.workers)

    def to_global(self, batch):
        """This host's part of a batch as a part of global arrays; what is for the host alone is left out."""
        arrays = {name: x for name, x in batch.items() if name not in HOST_ONLY}
        return sharding.to_global(
            arrays, self.local_packs, self.program.mesh, self.program.config.rules, self.batch_shape
        )


def _take_steps(run, state, profile):
    """Takes the steps that are left: trains, and now and then logs, validates and saves.

    Args:
      run: the `_Run`.
      state: `TrainState` to go on from.
      profile: steps to trace, after compilation; 0 for none.

    Returns:
      dict of the last metrics.

    Raises:
      BadData, FloatingPointError, Preempted: see `train`.
    """
    config, t, main = run.program.config, run.program.config.train, run.main
    done = int(state.step)
    validation = run.plan.validation
    if main and t.eval_every and validation is None:
        print(f"no split '{config.data.validation}' in the data: no validation loss")
    train_step, eval_step = jit_train_step(run.program), jit_eval_step(run.program)
    progress, meter = metrics_lib.Progress(done, t.steps, main), _Meter()
    bad_records = BadRecords(run.workdir, config.data.max_bad_share, config.data.max_bad_run)
    if main and not done:
        bad_records.note_left_out(run.packs)
    last, recent = {}, []  # metrics, and the records of each step since they were last looked at
    reading = contextlib.closing(run.host_batches(run.packs, done, t.steps))
    with reading as iterator, run.program.use(), _stop_signal() as stop, contextlib.ExitStack() as trace:
        for step in range(done + 1, t.steps + 1):
            if profile and main and step == done + 3:
                trace.enter_context(jax.profiler.trace(str(run.workdir / "profile")))
            with meter.waiting():
                batch = next(iterator)
            bad_records.add(batch["bad"][batch["record_index"] >= 0], batch["faults"])
            recent.append((step, batch["record_index"]))
            meter.count(batch)
            state, metrics = train_step(state, run.to_global(batch))
            progress.advance()
            if profile and main and step == done + 2 + profile:
                jax.block_until_ready(state)
                trace.close()
            stopping = stop(step)  # asked once: what comes from here on waits for the next step
            ends = step == t.steps or stopping
            if step % t.log_every == 0 or ends:
                last = _summarise(jax.device_get(metrics), state, run.program) | meter.rates()
                last |= _progress_of(run, step)
                last["bad_records"] = _sum_over_hosts(bad_records.bad)
                _check_finite(state, recent, t.max_skipped, run.checkpoints, progress)
                recent = []
                run.writer.write(step, last)
                progress.show(step, last)
            if validation and (step % t.eval_every == 0 or step == t.steps):
                with meter.paused():
                    held_out = run.host_batches(validation, 0, t.eval_batches)
                    found = validate(eval_step, state.params, map(run.to_global, held_out))
                named = _named_losses("validation_", *found, config.model.scales)
                run.writer.write(step, named)
                progress.note(f"step {step}: validation loss {named['validation_loss']:.4f}")
                last |= named
            if step % t.save_every == 0 or ends:
                with meter.paused():
                    run.save(state)
                    bad_records.flush()
            if stopping:
                run.checkpoints.wait()
                progress.close()
                raise Preempted(f"asked to stop; step {step} is saved in {run.workdir}, the same command continues")
    run.checkpoints.wait()
    progress.close()
    return {"step": t.steps, **last}


def validate(eval_step, params, batches):
    """Mean loss of each group over `batches`: `(losses, counts)`, of the groups of `step.eval_step`."""
    sums = [jax.device_get(eval_step(params, batch)) for batch in batches]
    loss, count = (np.sum([s[i] for s in sums], axis=0) for i in range(2))
    return loss / np.maximum(count, 1), count


class _Meter:
    """Throughput since it was last read, validation and saving left out, and the share of it spent waiting."""

    def __init__(self):
        self._reset()

    def _reset(self):
        self._start, self._off, self._wait = time.monotonic(), 0.0, 0.0
        self._tokens = self._positions = self._supervised = self._steps = 0

    def count(self, batch):
        self._tokens += int((batch["segment"] > 0).sum())
        self._positions += batch["segment"].size
        self._supervised += int((batch["group"] > 0).sum())
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self):
        begin = time.monotonic()
        yield
        self._wait += time.monotonic() - begin

    @contextlib.contextmanager
    def paused(self):
        begin = time.monotonic()
        yield
        self._off += time.monotonic() - begin

    def rates(self):
        """Rates of the whole run, every host counted like this one; call after the step has finished."""
        elapsed = max(time.monotonic() - self._start - self._off, 1e-9)
        rates = {
            "tokens_per_second": self._tokens * jax.process_count() / elapsed,
            "supervised_tokens": self._supervised * jax.process_count() / self._steps,
            "seconds_per_step": elapsed / self._steps,
            "positions_used": self._tokens / self._positions,
            "input_wait": self._wait / elapsed,
        }
        self._reset()
        return rates


@contextlib.contextmanager
def _stop_signal():
    """Turns SIGTERM and Ctrl-C into an answer to `stop(step)`, asked after each step: whether this is the last.

    Several hosts, of which any may get it, agree on the step. On one, only the main thread can have a handler.
    """
    if jax.process_count() > 1:
        yield hosts.is_last
        return
    asked = threading.Event()
    try:
        old = hosts.handle_signals(asked.set)
    except ValueError:
        yield lambda step: False
        return
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _sum_over_hosts(number):
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(number)).sum())


def _claim(plan):
    """Writes config and tokenizer to the workdir of a run that begins or continues.

    What an earlier command left there that saved no step is no run: its metrics and records are put aside.
    """
    path = plan.workdir / "config.json"
    if not plan.step and path.exists() and flatten(read_config(path)) != flatten(plan.program.config):
        for name in (metrics_lib.NAME, *(file.name for file in plan.workdir.glob("bad_records*.jsonl"))):
            if (plan.workdir / name).exists():
                (plan.workdir / name).rename(plan.workdir / f"unsaved_{name}")
    save_config(plan.program.config, path)
    plan.packs.tokenizer.save(plan.workdir)


def _describe(plan):
    """Says what is about to be allocated, and what the run reads."""
    program, packs = plan.program, plan.packs
    config = program.config
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    c, (positions, views) = packs.stream.capacity, packs.stream.usage()
    held = packs.records_per_step
    records = sum(map(len, packs.data)) - len(packs.left_out)
    print(
        f"{'continuing' if plan.step else 'training'} {plan.workdir} from step {plan.step} of "
        f"{config.train.steps}\n"
        f"  {plan.memory}\n"
        f"  learning rates: {_rates(program.rates)}; {config.model.dtype}, layers recompute: "
        f"{config.model.decoder.remat}\n"
        f"{_adapters(program)}"
        f"  {program.mesh.size} × {sharding.platform()}: {mesh}\n"
        f"  {sum(map(len, packs.data)):,} records, {len(packs.left_out):,} left out; packs of {c.rows} × {c.length} "
        f"positions, {positions:.0%} used, and {c.views} views, {views:.0%} used\n"
        f"  the {packs.per_step} packs of a step hold about {held:,.0f} records: an epoch is about "
        f"{records / held:,.1f} steps",
        flush=True,
    )


def _adapters(program):
    """A line about the adapters of a run; "" if it has none."""
    rank, rates = program.config.lora.rank, program.rates
    if not rank:
        return ""
    sizes = {path: x.size for path, x in flatten_dict(nn.unbox(program.boxed), sep="/").items()}
    trained = sum(size for path, size in sizes.items() if rates[path])
    return (
        f"  adapters of rank {rank} on {len(adapters.layers(sizes))} kinds of linear layer: {trained:,} of "
        f"{sum(sizes.values()):,} parameters train\n"
    )


def _rates(rates):
    """The peak rates of a run in words, part by part; a part of which only some trains has several."""
    of_part = {}
    for path, rate in rates.items():
        of_part.setdefault(path.split("/")[0], set()).add(rate)
    told = {
        part: " and ".join(f"{rate:g}" if rate else "frozen" for rate in sorted(found))
        for part, found in of_part.items()
    }
    return ", ".join(f"{part} {words}" for part, words in told.items())


def _summarise(metrics, state, program):
    named = _named_losses("", metrics["group_loss"], metrics["group_count"], program.config.model.scales)
    return named | {
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "skipped": int(state.skipped),
    }


def _progress_of(run, step):
    """Where a run stands after `step`: the rate of its last update, and how often all records were read."""
    config = run.program.config
    peak = max(run.program.rates.values())
    share = float(schedule(config.optimizer, config.train.steps)(step - 1))
    return {"learning_rate": peak * share, "epoch": run.packs.stream.epoch(step * run.packs.per_step)}


def _named_losses(prefix, losses, counts, scales):
    """The losses of `step.eval_step` under their names: those of the model, and behind them those of a router."""
    S = len(scales)
    named = _by_scale(f"{prefix}loss", losses[:S], counts[:S], scales)
    if len(losses) > S:
        named |= _by_scale(f"{prefix}router_loss", losses[S:], counts[S:], scales)
    return named


def _by_scale(name, losses, counts, scales):
    """Mean over non-empty groups, and each of them under its scale."""
    named = {f"{name}/{s}": float(x) for s, x, n in zip(scales, losses, counts, strict=True) if n}
    return {name: float(np.mean(list(named.values()))) if named else 0.0, **named}


def _check_finite(state, recent, limit, checkpoints, progress):
    in_row = int(state.skipped_in_row)
    if not in_row:
        return
    records = {int(r) for _, rows in recent[-in_row:] for r in rows.flat if r >= 0}
    whose = f" of host {jax.process_index()}" if jax.process_count() > 1 else ""
    text = f"loss or gradient not finite in the last {in_row} steps, updates skipped; records{whose}"
    text = f"{text} {sorted(records)[:8]}"
    (print if jax.process_index() else progress.note)(text)  # each host knows its own
    if in_row >= limit:
        checkpoints.wait()
        raise FloatingPointError(f"{text}; train.max_skipped={limit} reached, the last sound step is saved")
