"""Which host of how many a process is: by variables, by what GKE sets, or by a TPU VM's metadata server."""

import contextlib
import dataclasses
import functools
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request

import jax

COORDINATOR, COUNT, NUMBER = VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT = "8482"  # of JAX's service where only machines are known, as in JAX itself
ATTRIBUTES = "/computeMetadata/v1/instance/attributes/"
TRIES, ANSWER = 3, 3.0  # times that a metadata server is asked, and seconds that it has to answer


@dataclasses.dataclass(frozen=True)
class Place:
    """Which host of how many this process is.

    Attributes:
      coordinator: `"address:port"` of JAX's service, on host 0.
      count, number: hosts, and which of them this is, from 0.
      names: addresses of all hosts, empty where the environment does not tell.
    """

    coordinator: str
    count: int
    number: int
    names: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Of host 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of JAX's service; ours has the next one."""
        return int(self.coordinator.rpartition(":")[2])

    def say(self, text):
        """Prints a line of this host."""
        stream = sys.stdout  # kept while it is written to: a thread says this, and another may replace and close it
        with contextlib.suppress(ValueError, OSError):  # nobody reads it any more
            print(f"host {self.number} of {self.count}: {text}", file=stream, flush=True)


def with_port(address, port) -> str:
    """`"address:port"`, in which an address of IPv6 stands in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def find_place() -> Place | None:
    """The place that the environment gives this process; None on a single host.

    The variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID come first. Otherwise, only where JAX
    is to run on TPUs, it is what GKE sets, or on a TPU VM what its metadata server says.

    Raises:
      ValueError: variables that are incomplete or out of range.
      OSError: there is a metadata server, but it does not say what this machine is part of.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given:
        return _given_place(given)
    if "tpu" not in (jax.config.jax_platforms or ""):
        return None
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if names:
        names = names.split(",")
        number = os.environ.get("TPU_WORKER_ID") or "0" * (len(names) == 1)
        return _in_slices(names, _number("TPU_WORKER_ID", number), os.environ.get)
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return None
    number = _metadata("agent-worker-number")
    if number is None:
        return None
    workers = [worker.split(":") for worker in (_metadata("worker-network-endpoints") or "").split(",")]
    if not (number.isdigit() and all(len(parts) in (1, 3) and parts[-1] for parts in workers)):
        raise OSError(
            f"the metadata server says agent-worker-number={number}, worker-network-endpoints={workers}: expected a "
            f"number, and names or triples NAME:NUMBER:ADDRESS; set {', '.join(VARIABLES)} instead"
        )
    return _in_slices([parts[-1] for parts in workers], int(number), _of_machine())


def _given_place(given):
    if len(given) < len(VARIABLES):
        missing = [name for name in VARIABLES if name not in given]
        raise ValueError(
            f"{', '.join(given)} set, but not {', '.join(missing)}; a run of several hosts needs all three"
        )
    count, number, coordinator = given[COUNT], given[NUMBER], given[COORDINATOR]
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(f"{NUMBER}={number} of {COUNT}={count}: expected numbers from 0 to one less than the hosts")
    port = coordinator.rpartition(":")[2]
    if not (port.isdecimal() and 0 < int(port) < 65535):
        raise ValueError(f"{COORDINATOR}={coordinator}: expected ADDRESS:PORT of host 0")
    return Place(coordinator, int(count), int(number)) if int(count) > 1 else None


def _in_slices(names, number, value):
    """The place of worker `number` of a slice; `value` gives what is known of slices, by the name of its variable."""
    names = [name.strip().split(":")[0] for name in names]
    slices = _number("MEGASCALE_NUM_SLICES", value("MEGASCALE_NUM_SLICES") or "1")
    if len(names) * slices == 1:
        return None
    first = names[0]
    if slices > 1:
        number += len(names) * _number("MEGASCALE_SLICE_ID", value("MEGASCALE_SLICE_ID") or "0")
        first = value("MEGASCALE_COORDINATOR_ADDRESS") or first
    port = os.environ.get("JAX_COORDINATOR_PORT") or PORT
    count = len(names) * slices
    if number >= count:
        raise ValueError(f"this is worker {number} of {count}, by what TPU_WORKER_ID and MEGASCALE_SLICE_ID say")
    return Place(f"{first.split(':')[0]}:{port}", count, number, tuple(names) if slices == 1 else ())


def _number(name, value):
    if not value.isdecimal():
        raise ValueError(f"{name}={value}: expected a number")
    return int(value)


def _of_machine():
    """Gives variables of this machine, from the environment or else from those that its metadata server lists."""

    @functools.cache
    def listed():
        return dict(re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", _metadata("tpu-env") or "", re.MULTILINE))

    return lambda name: os.environ.get(name) or listed().get(name)


def _metadata(attribute):
    """An attribute of this machine; None if there is no metadata server, or none that knows of it."""
    server = os.environ.get("GCE_METADATA_IP") or "metadata.google.internal"
    request = urllib.request.Request(f"http://{server}{ATTRIBUTES}{attribute}", headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for tries in range(1, TRIES + 1):
        try:
            with direct.open(request, timeout=ANSWER) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            fault = e
        except urllib.error.URLError as e:
            if isinstance(e.reason, socket.gaierror | ConnectionRefusedError):  # no machine of Google Cloud
                return None
            fault = e
        except OSError as e:  # it began to answer, and took too long
            fault = e
        if tries < TRIES:
            time.sleep(0.5)
    raise OSError(
        f"the metadata server {server} does not say which host of how many this is ({attribute}: {fault}); "
        f"set {', '.join(VARIABLES)} on every host"
    )
