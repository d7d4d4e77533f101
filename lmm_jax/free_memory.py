"""The memory that is free here: of this host, and of a device."""

import contextlib
import os

import jax


def of_mesh(mesh):
    """Bytes that this process may still take on each of its devices of a mesh; 16 GiB where that is not known."""
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        free = of_host()
        free = None if free is None else free // len(devices)
    else:
        free = of_device(devices[0])
    return 16 * 2**30 if free is None else free


def of_device(device):
    """Bytes that are left of what the platform gives a program; None where it does not say."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def of_host():
    """Bytes of memory that this process may still take: what the machine has, and what its container is allowed."""
    free = [_of_machine(), _of_container()]
    known = [x for x in free if x is not None]
    return min(known) if known else None


def _of_machine():
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo") as f:
        lines = dict(line.split(":") for line in f)
        return int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):  # where there is no /proc, what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


# Files in which Linux says what a container may take, what it takes, and what of that it would give back: of control
# groups of version 2, and of version 1.
CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def _of_container():
    for limit, used, stat in CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # also of a limit that is "max"
            with open(stat) as f:
                cached = int(dict(line.split() for line in f)["inactive_file"])
            with open(limit) as of_limit, open(used) as of_used:
                return int(of_limit.read()) - int(of_used.read()) + cached
    return None
