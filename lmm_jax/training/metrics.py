"""Metrics of a run: JSONL always, TensorBoard and W&B as extras, a progress bar on a terminal."""

import contextlib
import importlib
import json
import math
import sys
import time

import jax
from etils import epath
from tqdm import tqdm

from lmm_jax import storage, strict_json

NAME = "metrics.jsonl"


class MetricWriter:
    """Appends rows to `WORKDIR/metrics.jsonl`, and to TensorBoard or W&B where the config asks for them.

    Only process 0 writes.
    """

    def __init__(self, workdir, config, active=True):
        """Raises ImportError naming the extra to install, if `config.log` asks for a missing package."""
        self._lines = storage.Lines(epath.Path(workdir) / NAME) if active else None
        self._tensorboard = self._wandb = None
        if active and config.log.tensorboard:
            tensorboard = _extra("tensorboardX", "tensorboard")
            self._tensorboard = tensorboard.SummaryWriter(str(workdir))
        if active and config.log.wandb:
            wandb = _extra("wandb", "wandb")
            folder = None if storage.is_remote(workdir) else str(workdir)
            self._wandb = wandb.init(dir=folder, config=json.loads(config.to_json_best_effort()))

    def write(self, step, values):
        """Writes one row; `values` is a flat dict of numbers."""
        if self._lines is None:
            return
        self._lines.add([strict_json.line({"step": step, **values})])
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def flush(self):
        """Makes sure that all rows are in the file."""
        if self._lines:
            self._lines.flush()

    def close(self):
        """Makes sure that all is written, by the extras too; raises OSError if the disk is full."""
        if self._lines:
            self._lines.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def check_extras(log):
    """Raises ImportError naming the extra to install, if `config.log` asks for a package that is missing."""
    for wanted, module, name in ((log.tensorboard, "tensorboardX", "tensorboard"), (log.wandb, "wandb", "wandb")):
        if wanted:
            _extra(module, name)


def read_metrics(workdir) -> list[dict]:
    """Rows of `metrics.jsonl`, a later row replacing an earlier one of the same step and kind (after a resume).

    What was no finite number, such as the loss of a step that was skipped, stands there as null, and is NaN here.

    Raises:
      FileNotFoundError: there is none.
    """
    rows = {}
    for row in storage.read_lines(epath.Path(workdir) / NAME):
        if isinstance(row.get("step"), int):
            row = {name: math.nan if value is None else value for name, value in row.items()}
            rows[row["step"], "validation_loss" in row] = row
    return [rows[key] for key in sorted(rows)]


class Meter:
    """Throughput since it was last read, validation and saving left out, and the share of it spent waiting."""

    def __init__(self):
        self._reset()

    def _reset(self):
        self._start, self._off, self._wait, self._computing = time.monotonic(), 0.0, 0.0, 0.0
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
    def computing(self):
        begin = time.monotonic()
        yield
        self._computing += time.monotonic() - begin

    def seconds(self):
        """Seconds of a step that this host waited for its batch, did other things than wait, and all."""
        elapsed = time.monotonic() - self._start - self._off
        each = (self._wait, elapsed - self._wait - self._computing, elapsed)
        return tuple(seconds / self._steps for seconds in each)

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


class Progress:
    """Progress of training: a bar with loss, tokens/s and time left on a terminal, plain lines otherwise."""

    def __init__(self, start, steps, active=True):
        self._steps, self._active = steps, active
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=not (active and sys.stderr.isatty()))
        self._first, self._since = start, time.monotonic()

    def advance(self):
        """One more step is done."""
        self._bar.update()

    def show(self, step, values):
        """Shows the latest metrics."""
        losses = [
            f"{name.replace('_', ' ')} {values[name]:.4f}" for name in ("loss", "router_loss") if name in values
        ]
        text = f"{', '.join(losses)}, {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(text)
        if self._active and self._bar.disable:
            per_step = (time.monotonic() - self._since) / max(step - self._first, 1)
            left = (self._steps - step) * per_step
            self.note(f"step {step}/{self._steps}: {text}, {left // 60:.0f}m{left % 60:02.0f}s left")

    def note(self, text):
        """Prints a line without disturbing the bar."""
        if self._active:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self):
        """Ends the bar."""
        self._bar.close()


def _extra(module, name):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"config.log.{name} needs {module}: pip install 'lmm_jax[{name}]'") from error
