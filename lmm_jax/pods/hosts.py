"""Several hosts as one: who is here, who is missing, and what the end of one means for the others.

JAX's own service aborts a process minutes after a host is missing or lost, with a fatal log that names nobody; see
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
from jax._src.clusters import cloud_tpu_cluster as cloud
from jax.experimental import multihost_utils

from lmm_jax.pods.wire import FAREWELL, Place, Wire, end, listed

COORDINATOR, COUNT, NUMBER = VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LIMIT = "LMM_HOSTS_TIMEOUT"  # environment variable: seconds until a missing host is an error

_wire = None


def find_place() -> Place | None:
    """The place that the environment gives this process; None on a single host.

    The variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID come first. Otherwise, only where JAX
    is to run on TPUs, it is what GKE sets, or on a TPU VM what its metadata server says.

    Raises:
      ValueError: variables that are incomplete or out of range.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given:
        return _given_place(given)
    if "tpu" not in (jax.config.jax_platforms or ""):
        return None
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if names:
        names, slices = names.split(","), int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
        if len(names) * slices == 1:
            return None
        cluster = cloud.GkeTpuCluster
    elif cloud.GceTpuCluster.is_env_present():
        cluster, names = cloud.GceTpuCluster, cloud.GceTpuCluster._get_worker_list_in_slice()
        slices = cluster._get_num_slices()
    else:
        return None
    count = len(names) * slices
    first = (cloud.get_tpu_env_value("MEGASCALE_COORDINATOR_ADDRESS") if slices > 1 else None) or names[0]
    port = os.environ.get("JAX_COORDINATOR_PORT") or cloud.coordinator_port
    names = tuple(name.split(":")[0] for name in names) if slices == 1 else ()
    place = Place(f"{first.split(':')[0]}:{port}", count, cluster.get_process_id(), names)
    return place if count > 1 else None


def _given_place(given):
    if len(given) < len(VARIABLES):
        missing = [name for name in VARIABLES if name not in given]
        raise ValueError(
            f"{', '.join(given)} set, but not {', '.join(missing)}; a run of several hosts needs all three"
        )
    count, number, coordinator = given[COUNT], given[NUMBER], given[COORDINATOR]
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
        raise ValueError(f"{NUMBER}={number} of {COUNT}={count}: expected numbers from 0 to one less than the hosts")
    if not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"{COORDINATOR}={coordinator}: expected ADDRESS:PORT of host 0")
    return Place(coordinator, int(count), int(number)) if int(count) > 1 else None


def start(in_step=True):
    """Joins this process with the other hosts of a run, before any device is used; nothing on a single host.

    Args:
      in_step: whether SIGTERM or Ctrl-C from here on asks all hosts to stop after the same step, see `is_last`. False
        where each may end at any time: the signals end it as they do any process, and the others learn of it.

    Raises:
      ValueError: see `find_place`, or the other hosts run another command.
      MissingHost: some did not come within LMM_HOSTS_TIMEOUT (300) seconds; the message names them and says what to
        run there.
    """
    global _wire
    place = None if jax.distributed.is_initialized() else find_place()
    if place is None:
        return
    limit = os.environ.get(LIMIT) or "300"
    if not limit.isdigit():
        raise ValueError(f"{LIMIT}={limit}: expected seconds, a whole number")
    place.say(f"waiting for the others at {place.coordinator}")
    _wire = Wire(place)
    _wire.meet(int(limit), lambda missing: _remedy(place, missing))
    jax.distributed.initialize(place.coordinator, place.count, place.number, cluster_detection_method="deactivate")
    if in_step:
        with contextlib.suppress(ValueError):  # not the main thread
            handle_signals(_wire.ask_to_stop)
    atexit.register(_at_exit)  # after JAX's own, so that it runs before
    place.say(f"{jax.local_device_count()} of {jax.device_count()} devices are here")


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


def is_last(step) -> bool:
    """Whether a host got SIGTERM and all agree to stop after `step`; every host asks after each step, once."""
    return _wire.is_last(step) if _wire else multihost_utils.reached_preemption_sync_point(step)


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

    JAX's way out waits for all hosts, which an error of one leaves behind. Returns where there are no others.
    """
    if _wire is not None:
        _wire.say_last(failed=words, code=code)
        end(code)


def settle():
    """Gives the news that another host has ended a moment to come in: an error here may be no more than its echo."""
    if _wire is not None:
        time.sleep(2 * FAREWELL)


def everywhere(fine) -> bool:
    """Whether `fine` holds on all hosts, all of which must ask."""
    return fine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(fine)).all())


def anywhere(flags) -> np.ndarray:
    """Of each of some flags `[n]`, as many on all hosts, whether it holds on any host; all of them must ask."""
    flags = np.array(flags, bool)
    return flags if jax.process_count() == 1 else multihost_utils.process_allgather(flags).any(axis=0)


def check_same(**values):
    """Compares JSON-like values between hosts; all must call it, and none goes on before the last did.

    Raises:
      ValueError: on all hosts alike, naming what differs from host 0 and where.
    """
    if jax.process_count() == 1:
        return
    sums = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in values.values()]
    everywhere = multihost_utils.process_allgather(np.array(sums, np.uint32))
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
    if place.names:
        return f"run on {', '.join(place.names[i] for i in missing[:8])}\n  {command}"
    variables = f"{COORDINATOR}={place.coordinator} {COUNT}={place.count} {NUMBER}={missing[0]}"
    return f"run there{', each with its number' if len(missing) > 1 else ''}\n  {variables} {command}"


def _at_exit():
    if hasattr(sys, "last_value"):  # a script ends with an error, which Python has printed
        leave(1, f"{type(sys.last_value).__name__}: {sys.last_value}")
    _wire.say_last(bye=True)
