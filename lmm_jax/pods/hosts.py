"""Several hosts as one: who is here, who is missing, and what the end of one means for the others.

JAX's own service aborts a process after a host is missing or lost, with a fatal log that names nobody; see
`lmm_jax.pods.wire` for what stands beside it. Nothing here asks for a device before all hosts are there.
"""

import atexit
import contextlib
import json
import os
import shlex
import signal
import sys
import time
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmm_jax.pods import secret as secret_lib
from lmm_jax.pods.place import COORDINATOR, COUNT, NUMBER, VARIABLES, find_place, with_port
from lmm_jax.pods.wire import AGREE, FAREWELL, Wire, end, exit_code, listed

LIMIT = "LMM_HOSTS_TIMEOUT"  # environment variable: seconds until a missing host is an error

_wire = None
_in_step = False  # whether the hosts stop after the same step


def start(in_step=True, folder=None):
    """Joins this process with the other hosts of a run, before any device is used; nothing on a single host.

    Args:
      in_step: whether SIGTERM or Ctrl-C from here on asks all hosts to stop after the same step, see `is_last`. False
        where each may end at any time: the signals end it as they do any process, and the others learn of it.
      folder: one that all hosts see, and nobody else. While they meet, host 0 keeps a secret in it by which they know
        one another, unless the environment variable LMM_HOSTS_SECRET has one.

    Raises:
      ValueError: see `find_place` and `Wire`, or there is neither a secret nor a folder for one, or the other hosts
        run another command.
      OSError: see `find_place`, or the folder cannot be written to.
      MissingHost: some did not come within LMM_HOSTS_TIMEOUT (300) seconds; the message names them and says what to
        run there.
    """
    global _wire, _in_step
    place = None if jax.distributed.is_initialized() else find_place()
    if place is None:
        return
    limit = os.environ.get(LIMIT) or "300"
    if not limit.isdecimal():
        raise ValueError(f"{LIMIT}={limit}: expected seconds, a whole number")
    _in_step = in_step
    with _secret(place, folder) as secret:
        place.say(f"waiting for the others at {place.coordinator}")
        _wire = Wire(place, secret)
        _wire.meet(int(limit), lambda missing: _remedy(place, missing))
    address = None if os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") else _wire.listens_at
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.number,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address and with_port(address, place.port),
    )
    if in_step:
        with contextlib.suppress(ValueError):  # not the main thread
            handle_signals(_wire.ask_to_stop)
    atexit.register(_at_exit)  # after JAX's own, so that it runs before
    place.say(f"{jax.local_device_count()} of {jax.device_count()} devices are here")


@contextlib.contextmanager
def _secret(place, folder):
    """Gives a function that says what all hosts know, None while this one does not know it yet."""
    given = secret_lib.from_environment()
    if given:
        yield lambda: given
        return
    if folder is None:
        raise ValueError(
            f"several hosts know one another by a secret: set {secret_lib.VARIABLE} to the same text of "
            f"{secret_lib.SHORTEST} characters or more on all {place.count} hosts"
        )
    file = secret_lib.SecretFile(folder, place.port)
    if place.number:
        yield file.read
        return
    made = file.write()
    try:
        yield lambda: made
    finally:
        file.remove()


def handle_signals(ask) -> dict:
    """Calls `ask` at SIGTERM, and at the first Ctrl-C; a second Ctrl-C quits at once.

    Returns:
      the handlers that there were, by signal.

    Raises:
      ValueError: this is not the main thread, which alone can have handlers.
    """

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(
            "\nstopping after this step, which is saved; Ctrl-C once more quits at once", file=sys.stderr, flush=True
        )
        ask()

    handlers = {signal.SIGTERM: lambda *_: ask(), signal.SIGINT: interrupt}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def ask_to_stop():
    """Asks all hosts to stop after the same step, as SIGTERM to this one does; at once where none has taken a step.

    Any thread may call it, also while the main thread compiles; it returns at once. Nothing happens without other
    hosts, nor where they do not stop in step.
    """
    if _wire is not None and _in_step:
        _wire.ask_to_stop()


def is_last(step, limit=AGREE) -> bool:
    """Whether a host got SIGTERM and all agree to stop after `step`; every host asks after each step, once.

    Raises:
      TimeoutError: some hosts, which it names, did not say within `limit` seconds how far they have come.
    """
    return _wire.is_last(step, limit) if _wire else multihost_utils.reached_preemption_sync_point(step)


def refuse(verb):
    """Raises ValueError where several hosts were started to do what one does alone."""
    place = find_place()
    if place is not None:
        raise ValueError(
            f"{verb} runs on one host, and this is host {place.number} of {place.count}; start it without "
            f"{', '.join(VARIABLES)}, on a machine that is no part of a slice, or with JAX_PLATFORMS=cpu"
        )


def leave(code, words):
    """Ends this process after an error, if there are other hosts: they learn why and end too, with the same code.

    JAX's way out waits for all hosts, which an error of one leaves behind. Any thread may call it, whatever the main
    thread is held by, and it takes three seconds at most. Returns where there are no others.
    """
    if _wire is not None:
        _wire.say_last(failed=words, code=exit_code(code))
        end(code)


def when_another_ends(tell):
    """Has `tell` called with a sentence about another host because of which this process ends, before it does."""
    if _wire is not None:
        _wire.when_another_ends = tell


def settle():
    """Gives the news that another host has ended a moment to come in: an error here may be no more than its echo."""
    if _wire is not None:
        time.sleep(2 * FAREWELL)


def spread(values) -> np.ndarray:
    """Some numbers of every host `[hosts, n]` float64, exactly; all hosts must ask, with as many each."""
    values = np.array(values, np.float64)
    if jax.process_count() == 1:
        return values[None]
    # As bytes: JAX makes float32 of what it is given.
    return np.array(multihost_utils.process_allgather(values.view(np.uint8))).view(np.float64)


def everywhere(fine) -> bool:
    """Whether `fine` holds on all hosts, all of which must ask."""
    return bool(spread([fine]).all())


def anywhere(flags) -> np.ndarray:
    """Of each of some flags `[n]`, as many on all hosts, whether it holds on any host; all of them must ask."""
    return spread(flags).any(axis=0)


def check_same(**values):
    """Compares JSON-like values between hosts; all must call it, and none goes on before the last did.

    Raises:
      ValueError: on all hosts alike, naming what differs from host 0 and where.
    """
    if jax.process_count() == 1:
        return
    sums = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in values.values()]
    everywhere = spread(sums)
    faults = [
        f"{name}: {listed(np.flatnonzero(column != column[0]).tolist())} differ from host 0"
        for name, column in zip(values, everywhere.T, strict=True)
        if (column != column[0]).any()
    ]
    if faults:
        raise ValueError("\n  ".join(["the hosts of a run do not have the same", *faults]))


def _remedy(place, missing):
    name = os.path.basename(sys.argv[0])
    command = shlex.join([*(["lmm"] if name in ("lmm", "__main__.py") else ["python", sys.argv[0]]), *sys.argv[1:]])
    if os.environ.get(secret_lib.VARIABLE):
        command = f"{secret_lib.VARIABLE}=… {command}"  # which no log shall have
    if place.names:
        return f"run on {', '.join(place.names[i] for i in missing[:8])}\n  {command}"
    variables = f"{COORDINATOR}={place.coordinator} {COUNT}={place.count} {NUMBER}={missing[0]}"
    return f"run there{', each with its number' if len(missing) > 1 else ''}\n  {variables} {command}"


def _at_exit():
    if hasattr(sys, "last_value"):  # a script ends with an error, which Python has printed
        leave(1, f"{type(sys.last_value).__name__}: {sys.last_value}")
    _wire.say_last(bye=True)
