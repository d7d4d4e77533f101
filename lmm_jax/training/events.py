"""What happened to a run beside its metrics: a JSON line each in `WORKDIR/events.jsonl`.

A line has the time, what happened, the step it happened at, and words or numbers that say more.
"""

import datetime
import threading

from etils import epath

from lmm_jax import storage, strict_json

NAME = "events.jsonl"

# What can happen: `launch/README.md` says of each what it means and what to do.
STARTED, CONTINUED, DONE = "started", "continued", "done"
SAVED, SAVE_FAILED = "saved", "save_failed"
FELL_BACK, MOVED = "fell_back", "moved"
NOT_FINITE, SPIKE = "not_finite", "spike"
SLOW_HOST, STOPPING, STALLED, FAILED = "slow_host", "stopping", "stalled", "failed"


class Events:
    """Appends what happens to a run; only process 0 writes."""

    def __init__(self, workdir, active=True):
        self._lines = storage.Lines(epath.Path(workdir) / NAME) if active else None
        self._lock = threading.Lock()  # saves end in a thread of their own

    def add(self, event, step, **more):
        """Writes a line down: `event` is one of those above, `more` JSON values."""
        if self._lines is None:
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        with self._lock:
            self._lines.add([strict_json.line({"time": now, "event": event, "step": int(step), **more})])
            self._lines.flush()


def read_events(workdir) -> list[dict]:
    """The events of a run, oldest first; none where nothing was written."""
    path = epath.Path(workdir) / NAME
    return [row for row in storage.read_lines(path) if isinstance(row.get("event"), str)] if path.exists() else []


def saved_step(workdir) -> int:
    """The newest step that a run says was saved, whether it is still there or not; 0 if none was.

    What was saved beyond a step that the run went on from later does not count any more.
    """
    newest = 0
    for row in read_events(workdir):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        if row["event"] == SAVED:
            newest = max(newest, step)
        elif row["event"] in (STARTED, CONTINUED):
            newest = min(newest, step)
    return newest
