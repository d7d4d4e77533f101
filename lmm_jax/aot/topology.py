"""TPU slices by name: their grids, what a chip of each kind can do, and their devices without being there."""

import dataclasses
import importlib.util
import os

from jax.experimental import topologies

from lmm_jax.config import choose

GRIDS_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
GRIDS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU. Rates are of a chip, as Google's pages on each kind give them (docs.cloud.google.com/tpu).

    Attributes:
      grids: its slices, number of chips to grid.
      hbm: GiB that a program may use of a device's memory, as libtpu 0.0.51 says when one needs more.
      cloud: name of its slices in Google Cloud, before the number.
      cores: of a chip that the cloud's number counts.
      devices: of a chip that JAX sees.
      flops: bfloat16 operations a second.
      hbm_rate: bytes a second to and from its memory.
      ici_rate: bytes a second into a chip over all its links, half of the two-way rate that the pages give.
      dcn_rate: bytes a second into a chip from other slices.
    """

    grids: dict[int, str]
    hbm: float
    cloud: str
    cores: int
    devices: int
    flops: float
    hbm_rate: float
    ici_rate: float
    dcn_rate: float


CHIPS = {
    "v5e": Chip(GRIDS_2D, 15.75, "v5litepod", 1, 1, 197e12, 819e9, 200e9, 25e9 / 8),
    "v6e": Chip(GRIDS_2D, 31.24, "v6e", 1, 1, 918e12, 1640e9, 400e9, 100e9 / 8),
    "v5p": Chip(GRIDS_3D, 95.73, "v5p", 2, 1, 459e12, 2765e9, 600e9, 50e9 / 8),
    "tpu7x": Chip(GRIDS_3D, 94.74, "tpu7x", 2, 2, 2307e12, 7380e9, 600e9, 100e9 / 8),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several TPU slices alike.

    Attributes:
      kind: of their chips.
      chips: of one slice.
      slices: how many there are.
    """

    kind: str
    chips: int
    slices: int = 1

    @property
    def name(self) -> str:
        """As `find_slice` takes it."""
        return f"{self.slices}x{self.kind}-{self.chips}" if self.slices > 1 else f"{self.kind}-{self.chips}"

    @property
    def chip(self) -> Chip:
        """What its chips can do."""
        return CHIPS[self.kind]

    @property
    def grid(self) -> str:
        """Of one slice, as libtpu names it."""
        return f"{self.kind}:{self.chip.grids[self.chips]}"

    @property
    def accelerator(self) -> str:
        """Of one slice, as Google Cloud names it."""
        return f"{self.chip.cloud}-{self.chips * self.chip.cores}"

    @property
    def hbm_bytes(self) -> int:
        """Usable of a device."""
        return int(self.chip.hbm * 2**30)

    @property
    def devices(self) -> int:
        """That JAX sees, of all slices."""
        return self.slices * self.chips * self.chip.devices


def find_slice(topology) -> Slice:
    """The slice of a name that counts chips, such as "v5e-64", or of several such slices: "2xv5e-64".

    Raises:
      ConfigError: no such name; the message lists them.
    """
    names = {f"{kind}-{chips}": (kind, chips) for kind, chip in CHIPS.items() for chips in chip.grids}
    count, times, name = topology.partition("x")
    if not (times and count.isdigit() and int(count) > 1):  # the x of tpu7x-64 stands after more than a number
        count, name = 1, topology
    return Slice(*choose("topology", name, names), int(count))


def devices(target):
    """The devices of a slice that is not there, in the order in which they are neighbours.

    Several processes may ask at a time.

    Raises:
      ImportError: no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for a TPU needs its compiler: pip install 'lmm_jax[compile]' (libtpu)")
    # Without these, libtpu asks for the metadata of a TPU VM for a minute, and lets one process in at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "true")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", target.accelerator)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    several = {"num_slices": target.slices} if target.slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=target.grid, **several).devices


def larger(target) -> list[Slice]:
    """The slices of the same kind with more chips, smallest first."""
    return [Slice(target.kind, chips) for chips in sorted(target.chip.grids) if chips > target.chips]
