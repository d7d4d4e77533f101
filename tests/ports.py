"""Ports for services that tests start."""

import contextlib
import itertools
import os
import socket

# Below those that the system gives out itself. A port is free until its service binds it, so that processes that look
# for one at the same time, of one run or of several on this machine, look in different hundreds.
HUNDRED = 20_000 + 100 * (os.getpid() % 120)
PORTS = itertools.cycle(range(HUNDRED, HUNDRED + 100, 2))


def free_port():
    """A port whose next one is free too."""
    while True:
        with socket.socket() as one, socket.socket() as following, contextlib.suppress(OSError):
            port = next(PORTS)
            for each in (one, following):  # as services do: where only connections of before are left, it is free
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("", port))
            following.bind(("", port + 1))
            return port
