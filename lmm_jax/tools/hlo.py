"""Sums over the text of a compiled XLA program: cycles and collectives, loops counted as often as they run."""

import dataclasses
import functools
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}  # of the types whose name does not say it, or whose bits are not it

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=\{?([^,}{]+)")
_ASYNC_PARTS = re.compile(r'custom_call_target="AsyncCollectiveDone"')


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

    def collective_bytes(self) -> dict[str, int]:
        """Bytes of a device that pass through each kind of collective: the larger of what goes in and comes out.

        Of an asynchronous collective only the start counts.
        """
        total = dict.fromkeys(COLLECTIVES, 0)
        for kind, size in self._collectives(self.entry):
            total[kind] += size
        return {kind: size for kind, size in total.items() if size}

    def _collectives(self, name):
        types = {i.name: i.type for i in self.computations[name]}
        for instruction in self.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                result = array_bytes(instruction.type)
                given = sum(array_bytes(types[operand]) for operand in instruction.operands if operand in types)
                if instruction.opcode == "all-gather-start" or instruction.opcode == "collective-permute-start":
                    result -= given  # the start of these returns its operands too
                yield kind, max(result, given)
            elif not self._continues(instruction):
                for called in instruction.called:
                    for kind, size in self._collectives(called):
                        yield kind, size * self.trip_count(instruction)

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
          ValueError: the loop does not count from 0 to a constant.
        """
        if instruction.opcode != "while":
            return 1
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", instruction.rest)[1]]
        constants = {i.name: int(i.rest.partition(")")[0]) for i in condition if _is_integer(i)}
        root = condition[-1]
        limits = [constants[name] for name in root.operands if name in constants]
        if root.opcode != "compare" or "direction=LT" not in root.rest or len(limits) != 1:
            raise ValueError(f"loop {instruction.name}: its condition is not a counter below a constant")
        return limits[0]


def array_bytes(text) -> int:
    """Bytes of all arrays of a type as XLA prints it, e.g. `(f32[2,3]{1,0}, pred[])`; layouts are left out."""
    total = 0
    for kind, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", text)):
        bits = BITS.get(kind) or int(re.search(r"\d+", kind)[0])
        for size in filter(None, shape.split(",")):
            bits *= int(size)
        total += bits // 8
    return total


def _ends_async(instruction):
    return bool(_ASYNC_PARTS.search(instruction.rest))


def _is_integer(instruction):
    return instruction.opcode == "constant" and re.match(r"[su]\d+\[\]", instruction.type) is not None
