"""Sums over the text of a compiled XLA program: cycles, collectives, arrays; a loop counts as often as it runs."""

import dataclasses
import functools
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}  # of the types whose name does not say it, or whose bits are not it

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,]*)\]")
_ARRAY_WITH_LAYOUT = re.compile(r"\b[a-z]+\d+(?:e\d\w*)?\[[\d,]*\](?:\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=\{?([^,}{]+)")
_ASYNC_PARTS = re.compile(r'custom_call_target="AsyncCollectiveDone"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    Attributes:
      kind: one of `COLLECTIVES`.
      size: bytes of a device: the larger of what goes in and what comes out.
      times: how often it runs.
      groups: positions, in the order of the devices of a slice, of those that take part together.
      source: the operation of the model that it belongs to, as JAX named it; "" if XLA lost it.
      slices: that exchange it over the data-center network, device by device; 0 if it stays inside slices.
    """

    kind: str
    size: int
    times: int
    groups: tuple[tuple[int, ...], ...]
    source: str
    slices: int = 0

    @property
    def traffic(self) -> int:
        """Bytes that a device receives: of n devices n - 1 have what it lacks.

        An all-reduce counts twice, as it is a reduce-scatter and an all-gather.
        """
        if self.kind == "collective-permute":
            return self.size * self.times
        n = self.slices or len(self.groups[0])
        return self.size * self.times * (n - 1) // n * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def source(self) -> str:
        """What JAX named the operation that it comes from; "" if XLA lost it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """Computations that it runs, a loop's condition left out."""
        return [name.strip().lstrip("%") for name in _CALLED.findall(self.rest)]


class Module:
    """A compiled program.

    Attributes:
      computations: name to its instructions.
      entry: name of the first to run.
    """

    def __init__(self, text):
        """`text`: what `compiled.as_text()` returned.

        Raises:
          ValueError: it holds no entry computation.
        """
        self.computations, self.entry, current = {}, None, None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif line == "}":  # alone; attributes of a kernel end with one too
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(Instruction(*found.groups()))
        if self.entry is None:
            raise ValueError("the text holds no ENTRY computation")

    def estimated_cycles(self) -> int:
        """Cycles of a device that the TPU compiler expects of its own instructions.

        It gives none for collectives and for custom kernels such as splash attention. A fusion counts as a whole.
        """
        return self._cycles(self.entry)

    @functools.cache  # noqa: B019, a module lives as long as its sums are wanted
    def _cycles(self, name):
        total = 0
        for instruction in self.computations[name]:
            own = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if own:
                total += int(own[1])
            elif instruction.opcode != "fusion":
                inside = [self._cycles(name) for name in instruction.called]
                total += self.trip_count(instruction) * (max if instruction.opcode == "conditional" else sum)(
                    inside or [0]
                )
        return total

    def collectives(self, devices, slices=1) -> list[Collective]:
        """Every collective of a program for so many `devices` a slice; of an asynchronous one the start counts."""
        whole = (tuple(range(devices)),)
        found = self._collectives(self.entry, 1)
        return [
            dataclasses.replace(c, slices=slices) if c.slices else dataclasses.replace(c, groups=c.groups or whole)
            for c in found
        ]

    def _collectives(self, name, times):
        types = {i.name: i.type for i in self.computations[name]}
        for instruction in self.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                result = array_bytes(instruction.type)
                given = sum(array_bytes(types[operand]) for operand in instruction.operands if operand in types)
                if instruction.opcode == "all-gather-start" or instruction.opcode == "collective-permute-start":
                    result -= given  # the start of these returns its operands too
                groups = replica_groups(instruction.rest)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a fusion that keeps its part
                    kind = "reduce-scatter"
                yield Collective(kind, max(result, given), times, groups, instruction.source)
            elif not self._continues(instruction):
                for called in instruction.called:
                    yield from self._collectives(called, times * self.trip_count(instruction))
        yield from self._between_slices(name, times)

    def _between_slices(self, name, times):
        """Collectives over the data-center network, each a pair of transfers to and from the host."""
        types = {i.name: i.type for i in self.computations[name]}
        found = {}
        for instruction in self.computations[name]:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
            if kind and instruction.opcode in ("send", "recv"):
                key = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.rest)[1]
                sent = types[instruction.operands[0]] if instruction.opcode == "send" else instruction.type
                size = array_bytes(sent) - (4 if instruction.opcode == "recv" else 0)  # a u32 comes with it
                kind = "collective-permute" if kind[1] == "ONE_TO_ONE" else kind[1].lower().replace("_", "-")
                found[key] = (kind, max(size, found.get(key, ("", 0))[1]), instruction.source)
        for kind, size, source in found.values():
            yield Collective(kind, size, times, (), source, 2)

    def live_at_peak(self, live_ranges) -> list[tuple[int, str, str]]:
        """What lies in HBM when most is in use, arguments left out, largest first: bytes, type and source.

        Args:
          live_ranges: text of XLA's dump `…after_optimizations-live-range.txt`.
        """
        where = {i.name: (i, computation) for computation in self.computations.values() for i in computation}
        arguments = {i.name for i in self.computations[self.entry] if i.opcode == "parameter"}
        found = {}
        for line in live_ranges.partition("(peak):")[2].splitlines()[1:]:
            live = re.match(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", line)
            if live is None:
                break
            name, index, size = live.groups()
            if name in where and name not in arguments:
                kind, source = _element(*where[name], int(index.partition(",")[0] or 0))
                if "S(" not in kind:  # a memory space other than HBM
                    found.setdefault((kind.partition("{")[0], source), []).append(int(size))
        rows = ((sum(sizes), f"{len(sizes)} × {kind}", source) for (kind, source), sizes in found.items())
        return sorted(rows, reverse=True)

    def _continues(self, instruction):
        """Whether a fusion only carries on, or ends, a collective that another one started."""
        if instruction.opcode != "fusion":
            return False
        return any(
            name.startswith("async_collective_fusion") or any(map(_ends_async, self.computations[name]))
            for name in instruction.called
        )

    def trip_count(self, instruction) -> int:
        """How often a loop's body runs; 1 of any other instruction.

        Raises:
          ValueError: the loop does not count from 0 to a constant by a constant.
        """
        if instruction.opcode != "while":
            return 1
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", instruction.rest)[1]]
        compared = condition[-1]
        limits = [c for c in (_constant(condition, name) for name in compared.operands) if c is not None]
        counters = [i for i in condition if i.name in compared.operands and i.opcode == "get-tuple-element"]
        if (
            compared.opcode != "compare"
            or "direction=LT" not in compared.rest
            or (len(limits), len(counters)) != (1, 1)
        ):
            raise ValueError(f"loop {instruction.name}: its condition is not a counter below a constant")
        place = int(re.search(r"index=(\d+)", counters[0].rest)[1])
        return -(-limits[0] // self._step(instruction, place))

    def _step(self, instruction, place):
        """What a loop's body adds to number `place` of its tuple: 2 where XLA runs a body twice a turn."""
        body = self.computations[re.search(r"body=%?([\w.\-]+)", instruction.rest)[1]]
        by_name = {i.name: i for i in body}
        counted = by_name[body[-1].operands[place]]
        while counted.opcode == "copy":  # to another memory space
            counted = by_name[counted.operands[0]]
        if counted.opcode == "fusion":
            body = self.computations[counted.called[0]]
            counted = body[-1]
        steps = [c for c in (_constant(body, name) for name in counted.operands) if c is not None]
        if counted.opcode != "add" or len(steps) != 1:
            raise ValueError(f"loop {instruction.name}: its counter does not grow by a constant")
        return steps[0]


def replica_groups(text) -> tuple[tuple[int, ...], ...]:
    """Groups of a collective, by its attributes; () if all devices are one group. Pairs of a permutation likewise.

    Raises:
      ValueError: they are written in a way not known here.
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _as_groups(_iota(found[2]).reshape(_integers(found[1])))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? ?\{([^}]*)\}", text):
        axes, order, grouped = found.groups()
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", axes))
        ids = np.arange(np.prod([int(size) for size in sizes.values()])) if order is None else _iota(order)
        shape, moved = [], {}
        for axis, size in sizes.items():  # an axis may be grouped in part: 'axis':(size before)size
            cuts = sorted(
                (int(before or 1), int(part or size))
                for name, before, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped)
                if name == axis
            )
            done = 1
            for before, part in cuts:
                shape += [before // done, part]
                moved[len(shape) - 1] = True
                done = before * part
            shape.append(int(size) // done)
        last = [d for d in range(len(shape)) if d not in moved] + list(moved)
        size = int(np.prod([shape[d] for d in moved]))
        return _as_groups(ids.reshape(shape).transpose(last).reshape(-1, size))
    if "replica_groups={}" in text or "replica_groups" not in text:
        return ()
    raise ValueError(f"unknown replica groups: {text[text.index('replica_groups') :][:80]}")


def _iota(text):
    """Flat device numbers of `[4,2]T(1,0)`: so many counted up, transposed."""
    shape, _, order = text.partition("T")
    ids = np.arange(np.prod(_integers(shape))).reshape(_integers(shape))
    return (ids.transpose(_integers(order)) if order else ids).reshape(-1)


def _integers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def _as_groups(ids):
    return tuple(tuple(group) for group in ids.tolist())


def array_bytes(text) -> int:
    """Bytes of all arrays of a type as XLA prints it, e.g. `(f32[2,3]{1,0}, pred[])`; layouts are left out."""
    total = 0
    for kind, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", text)):
        if kind == "token":
            continue
        bits = BITS.get(kind) or int(re.search(r"\d+", kind)[0])
        for size in filter(None, shape.split(",")):
            bits *= int(size)
        total += bits // 8
    return total


def _element(instruction, computation, index):
    """Type and source of an instruction's array, or of that number of its tuple; a loop's is what it started with."""
    kinds = _ARRAY_WITH_LAYOUT.findall(instruction.type)
    kind = kinds[index] if index < len(kinds) else instruction.type
    if instruction.opcode == "while" and not instruction.source:
        by_name = {i.name: i for i in computation}
        start = by_name.get(instruction.operands[0])
        if start is not None and start.opcode == "tuple" and start.operands[index] in by_name:
            return kind, by_name[start.operands[index]].source
    return kind, instruction.source


def _ends_async(instruction):
    return bool(_ASYNC_PARTS.search(instruction.rest))


def _constant(computation, name):
    """Value of the integer constant of that name, or None."""
    for i in computation:
        if i.name == name and i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type):
            return int(i.rest.partition(")")[0])
    return None
