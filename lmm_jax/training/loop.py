"""The training loop."""

import contextlib
import errno
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lmm_jax import lock, sharding
from lmm_jax.config import ConfigError, check, flatten, read_config, save_config
from lmm_jax.pods import hosts
from lmm_jax.training import adapters, events, soundness, start
from lmm_jax.training import base as base_lib
from lmm_jax.training import metrics as metrics_lib
from lmm_jax.training.bad_records import BadRecords
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.events import Events
from lmm_jax.training.optimizer import schedule
from lmm_jax.training.outcomes import Outcomes
from lmm_jax.training.plan import check_saved, make_plan
from lmm_jax.training.reader import Reader
from lmm_jax.training.run import Run, end_stalled, shapes_of
from lmm_jax.training.saved import newest_sound
from lmm_jax.training.state import init_state
from lmm_jax.training.step import jit_eval_step, jit_train_step
from lmm_jax.training.stop import stop_signal
from lmm_jax.watchdog import Watchdog


class Preempted(Exception):
    """The process was asked to stop; everything is saved and the same command continues."""


def train(config, workdir, profile=0, restart=False):
    """Trains, or continues the run that `workdir` holds; on several hosts all of them call it alike.

    Args:
      config: from `load_config`.
      workdir: folder of the run: config.json, metrics.jsonl, events.jsonl, checkpoints/, tokenizer, loss.png. All
        hosts see it.
      profile: writes a profiler trace of so many steps, after compilation, to `workdir/profile`.
      restart: begins at step 0 in a workdir whose checkpoints are gone.

    Returns:
      dict of the last metrics: step, loss, validation_loss, tokens_per_second and others.

    Raises:
      ConfigError, FileNotFoundError, OSError, ImportError, ValueError: see `plan.make_plan`; nothing was written.
      Held: another process trains in `workdir`.
      BadData: too many records could not be read.
      FloatingPointError: `train.max_skipped` updates in a row were skipped, or parameters are no numbers any more.
      Corrupted: devices that must hold the same hold something else.
      OSError: `train.max_failed_saves` saves one after another failed.
      MissingHost: see `hosts.start`.
      Preempted: after SIGTERM or Ctrl-C to any host, once everything is saved.
    """
    check(config)
    hosts.start(folder=workdir)
    plan = make_plan(config, workdir, restart)
    main = jax.process_index() == 0
    hosts.check_same(config=json.loads(config.to_json_best_effort()), data=plan.stream)
    holding = lock.hold(plan.workdir, "lmm train") if main else contextlib.nullcontext()
    with holding as held, contextlib.ExitStack() as signals:
        stop = signals.enter_context(stop_signal(held))
        if newest_sound(plan.workdir) != plan.step:
            raise lock.Held(f"{plan.workdir} was trained by another process meanwhile; start the same command again")
        if main and not plan.step:
            _claim(plan)
        hosts.everywhere(True)  # none looks for what is claimed before it is
        if not (plan.workdir / "config.json").exists():
            raise ConfigError(
                f"{plan.workdir} is another folder here than on host 0; all hosts must see it, as they do gs://…"
            )
        return _run_plan(plan, main, held, stop, profile)


def _run_plan(plan, main, held, stop, profile):
    """Does what a plan says; returns the last metrics."""
    config, program = plan.program.config, plan.program
    if main:
        _describe(plan)
    happened = Events(plan.workdir, main)
    checkpoints = Checkpoints(plan.workdir, config.train.keep, config.train.keep_every)
    faults = []
    limit, what = config.train.deadline_compile, "reading or making the state to go on from"
    with contextlib.closing(Watchdog(end_stalled)) as watchdog, watchdog.within(limit, what):
        restored = base_lib.restore(checkpoints, program, plan.workdir, note=_both(print, faults.append))
        if restored:
            state, about, base = restored
            check_saved(plan.workdir, about, config, plan.stream, base)
        else:
            state, base = start.begin(program, init_state(program))
            about = {}
        sharding.assert_sharded(state, program.shardings, "train state")

    step = int(state.step)
    writer = metrics_lib.MetricWriter(plan.workdir, config, main)
    run = Run(plan, checkpoints, writer, happened, held, main, base, about.get("bad_records"), step)
    with contextlib.closing(run.watchdog), contextlib.closing(writer), checkpoints:
        if step < config.train.steps:
            if main:
                _begin(run, restored is not None, faults)
            hosts.everywhere(True)  # none saves before what is in the way is gone
            try:
                return _take_steps(run, _not_stopped(state, config.train.max_skipped), stop, profile)
            except Preempted:
                raise
            except Exception as error:  # whatever ends a run is written down, and goes on to whoever began it
                with contextlib.suppress(Exception):  # of the disk, which may be what ended it
                    happened.add(events.FAILED, run.saved, words=f"{type(error).__name__}: {error}")
                raise
    if main:
        print(f"{plan.workdir}: all {config.train.steps} steps are done")
    written = (plan.workdir / metrics_lib.NAME).exists()
    rows = metrics_lib.read_metrics(plan.workdir) if written else []
    return functools.reduce(dict.__or__, rows, {"step": step})


def _begin(run, goes_on, faults):
    """Claims the workdir, says how a run begins, and clears away what is in its way.

    Args:
      run: the `Run`, about to take its first step.
      goes_on: whether its state was restored.
      faults: lines about steps that could not be.
    """
    workdir, step = run.workdir, run.saved
    if run.plan.step:  # now that it could be restored
        _claim(run.plan)

    def tell(event):
        return lambda words: run.happened.add(event, step, words=words)

    for fault in faults:
        tell(events.FELL_BACK)(fault)
    gone = events.saved_step(workdir)
    if gone > max(run.checkpoints.steps(), default=0):
        words = f"step {gone} was saved, and is not there any more; going on from step {step}"
        _both(print, tell(events.FELL_BACK))(words)
    run.checkpoints.clear_away(step if goes_on else None, _both(print, tell(events.MOVED)))
    run.happened.add(events.CONTINUED if goes_on else events.STARTED, step, steps=run.program.config.train.steps)


def _both(one, other):
    """A function that hands what it gets to two others."""

    def both(words):
        one(words)
        other(words)

    return both


def _not_stopped(state, limit):
    """The state of a run that goes on; one that had stopped after so many skipped updates in a row counts anew."""
    if int(state.skipped_in_row) < limit:
        return state
    return state.replace(skipped_in_row=jax.device_put(jnp.zeros((), jnp.int32), state.skipped_in_row.sharding))


def _take_steps(run, state, stop, profile):
    """Takes the steps that are left: trains, and now and then logs, validates and saves.

    Args:
      run: the `Run`.
      state: `TrainState` to go on from.
      stop: the `Stop` that says when to.
      profile: steps to trace, after compilation; 0 for none.

    Returns:
      dict of the last metrics.

    Raises:
      BadData, Corrupted, FloatingPointError, OSError, Preempted: see `train`.
    """
    config, t, main = run.program.config, run.program.config.train, run.main
    first = int(state.step)
    validation = run.plan.validation
    if main and t.eval_every and validation is None:
        print(f"no split '{config.data.validation}' in the data: no validation loss")
    train_step, eval_step = jit_train_step(run.program), jit_eval_step(run.program)
    progress, meter = metrics_lib.Progress(first, t.steps, main), metrics_lib.Meter()
    bad_records = BadRecords(run.workdir, config.data.max_bad_share, config.data.max_bad_run, run.bad_before)
    if main and not first:
        bad_records.note_left_out(run.packs)
    compiled = set()  # shapes of batches that the step is compiled for

    def waiting_for(step):
        return run.watchdog.within(t.deadline_step, f"step {step}")

    outcomes, last = Outcomes(t.max_skipped, run.happened, progress.note, waiting_for), {}

    def save(state):
        with meter.paused():
            run.save(state, bad_records, progress.note)
            bad_records.flush()

    def settle(state):
        """Makes sure that a state is on disk."""
        if int(state.step) not in (run.saved, run.coming):
            save(state)
        run.finish_saving(progress.note)
        if run.saved != int(state.step):
            raise OSError(errno.EIO, "the last step could not be saved", str(run.workdir))

    def preempt(state):
        """Ends the run where it was asked to stop."""
        settle(state)
        progress.close()
        run.happened.add(events.STOPPING, state.step)
        raise Preempted(f"asked to stop; step {state.step} is saved in {run.workdir}, the same command continues")

    def stop_skipping(state):
        """Ends the run where nothing but skipped updates came; the updates before them are saved."""
        made = outcomes.stopped - outcomes.in_row  # the step of the last update
        if made > run.saved:
            settle(state)
        newest = f"step {run.saved}, which is sound, is saved" if run.saved else "no step was saved before"
        raise FloatingPointError(f"{outcomes.words()}; {newest}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(bad_records))
        reader = stack.enter_context(contextlib.closing(Reader(run.host_batches(run.packs, first, t.steps))))
        stack.enter_context(run.program.use())
        trace = stack.enter_context(contextlib.ExitStack())
        for step in range(first + 1, t.steps + 1):
            if profile and main and step == first + 3:
                trace.enter_context(jax.profiler.trace(str(run.workdir / "profile")))
            with meter.waiting(), run.watchdog.within(t.deadline_batch, f"waiting for the batch of step {step}"):
                batch = reader.take(stop.asked)
            if batch is None and step == first + 1:
                raise Preempted("asked to stop before a step was taken; the same command continues")
            if batch is None:
                stop_skipping(state) if outcomes.take(all=True) else preempt(state)
            with run.writing(step):
                bad_records.add(batch["bad"][batch["record_index"] >= 0], batch["faults"])
            meter.count(batch)
            shapes = shapes_of(batch)
            limit = t.deadline_step if shapes in compiled else t.deadline_compile
            with run.watchdog.within(limit, f"step {step}"):
                state, metrics = train_step(state, run.to_global(batch))
                if shapes not in compiled:
                    jax.block_until_ready(metrics)
                    compiled.add(shapes)
                    stop.begun()
            outcomes.add(step, batch["record_index"], metrics)
            progress.advance()
            if profile and main and step == first + 2 + profile:
                jax.block_until_ready(state)
                trace.close()
            stopping = run.is_last(stop, step)  # asked once: what comes from here on waits for the next step
            ends = step == t.steps or stopping
            logs, saves = (step % every == 0 or ends for every in (t.log_every, t.save_every))
            with meter.computing():
                stops = outcomes.take(all=logs or saves)
            if logs and not stops:
                with run.writing(step):
                    run.name_slow_hosts(step, meter, progress.note)
                    last = _summarise(outcomes.latest, state, run.program) | meter.rates()
                    last |= _progress_of(run, step)
                    last["bad_records"] = bad_records.total()["bad"]
                    run.writer.write(step, last)
                    progress.show(step, last)
            if stops:
                stop_skipping(state)
            if validation and (step % t.eval_every == 0 or step == t.steps):
                with meter.paused():
                    found = validate(eval_step, state.params, run.held_out(validation, stop.asked))
                if not stop.asked():
                    named = _named_losses("validation_", *found, config.model.scales)
                    with run.writing(step):
                        run.writer.write(step, named)
                    progress.note(f"step {step}: validation loss {named['validation_loss']:.4f}")
                    last |= named
            if saves:
                save(state)
            elif t.compare_every and step % t.compare_every == 0:
                with run.watchdog.within(t.deadline_compile, f"comparing what devices hold after step {step}"):
                    soundness.check_replicas(state)
            run.look_after_saving(progress.note)
            if stopping:
                preempt(state)
        settle(state)
    progress.close()
    run.happened.add(events.DONE, t.steps)
    return {"step": t.steps, **last}


def validate(eval_step, params, batches):
    """Mean loss of each group over `batches`: `(losses, counts)`, of the groups of `step.eval_step`."""
    sums = [jax.device_get(eval_step(params, batch)) for batch in batches]
    loss, count = (np.sum([s[i] for s in sums], axis=0) for i in range(2))
    return loss / np.maximum(count, 1), count


def _claim(plan):
    """Writes config and tokenizer to the workdir of a run that begins or continues.

    What an earlier command left there that saved no step is no run: its metrics and records are put aside.
    """
    path = plan.workdir / "config.json"
    if not plan.step and path.exists() and (plan.restart or _differs(path, plan.program.config)):
        for name in (metrics_lib.NAME, events.NAME, *(file.name for file in plan.workdir.glob("bad_records*.jsonl"))):
            if (plan.workdir / name).exists():
                (plan.workdir / name).rename(plan.workdir / f"unsaved_{name}")
    save_config(plan.program.config, path)
    plan.packs.tokenizer.save(plan.workdir)


def _differs(path, config):
    """Whether another config stands in a file, or none that can be read."""
    try:
        return flatten(read_config(path)) != flatten(config)
    except (OSError, ValueError):
        return True


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
