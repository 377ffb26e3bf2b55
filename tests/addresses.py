"""Which addresses of a compiled kernel 32 bits may not hold: an interval analysis of its TTIR, Triton's first form.

An integer is an interval, and the lines whose sum or product of 32 bits may have left them on its way. A number with
such lines must reach neither an address nor the mask of a load or store. Assumed: every size, stride or step that a
kernel is handed in 32 bits is within [0, LARGEST]; there are as many programs as `launch.run` lets be; and a tile's
number, which a loop counts, is within 32 bits, as more tiles than that have no memory. What is loaded may be anything.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

from fastseq.kernels.devices import Device
from fastseq.kernels.launch import GRID, Launch

from tests.compiled import ttir

__all__ = ["LARGEST", "overflows"]

LARGEST = 2**31 - 4096  # of a dimension: so that it may be rounded up to blocks


class Op(NamedTuple):
    """An operation of the text: its results, name, what follows the name, place, and blocks."""

    results: tuple[str, ...]
    name: str
    text: str
    place: str
    blocks: tuple[tuple["Op", ...], ...]

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w$.#-]+", self.text)

    @property
    def types(self) -> list[str]:
        """Of its results, or of its operands where the text says only these."""
        of = re.split(r" -> | : | to ", self.text)[-1].strip()
        return re.findall(r"(?:tensor<[^,]*>|!tt\.ptr<[^,]*>|[\w.]+)", of)


class Value(NamedTuple):
    """Any number of [low, high]; wraps: where it may have left 32 bits."""

    low: int
    high: int
    wraps: frozenset[str] = frozenset()


def overflows(launch: Launch, device: Device, programs: Sequence[int | None] = ()) -> list[str]:
    """What may wrap, and where it is an address. programs: the most along each axis of the grid, where known."""
    text = ttir(launch, device)
    (module,) = _parsed(iter(text.splitlines()), _places(text))[0]
    (kernel,) = module.blocks[0]
    known = (*programs, None, None, None)[:3]
    limits = [most if n is None else min(n, most) for n, most in zip(known, GRID, strict=True)]
    analysis = _Analysis(limits)
    analysis.begin(kernel)
    return [f"{launch.kernel.__name__}: {wrap} is {use}" for wrap, use in analysis.found.items()]


def _places(text: str) -> Callable[[str], str]:
    """(the text of a location) -> its lines, the innermost function's first."""
    named = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))

    def lines(of: str) -> Iterator[str]:
        for reference, file, line in re.findall(r'(#loc\d*)|"([^"]+)":(\d+)', of):
            if reference:
                yield from lines(named[reference])
            else:
                yield f"{PurePath(file).name}:{line}"

    return lambda of: " < ".join(lines(of))


def _parsed(lines: Iterator[str], place: Callable[[str], str]) -> tuple[tuple[Op, ...], str]:
    """The operations up to the end of their block, and the line that ends it."""
    found = []
    for raw in lines:
        line = raw.strip()
        if line.startswith("}"):
            return tuple(found), line
        match = re.match(r'(?:(%[\w$.:, %-]+) = )?"?([\w.]+|\^bb\d+)"?(.*)', line)
        if line.startswith("#") or match is None:
            continue
        blocks = []
        while line.endswith("{"):
            body, line = _parsed(lines, place)
            blocks.append(body)
        results, name, text = match.groups()
        text, _, at = (text + line if blocks else text).rpartition(" loc(")
        found.append(Op(tuple(_results(results or "")), name, text, place(at), tuple(blocks)))
    return tuple(found), ""


def _results(text: str) -> Iterator[str]:
    """`%a` is itself, `%a:2` are %a#0 and %a#1."""
    for name, _, many in (part.partition(":") for part in text.split(", ") if part):
        yield from (f"{name}#{k}" for k in range(int(many))) if many else (name,)


def _bits(kind: str) -> int | None:
    """Of an integer or a tensor of them."""
    match = re.fullmatch(r"(?:tensor<(?:\d+x)*)?i(\d+)>?", kind)
    return None if match is None else int(match[1])


def _any(bits: int) -> Value:
    return Value(0, 1) if bits == 1 else Value(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _corners(a: Value, b: Value, of: Callable[[int, int], int]) -> tuple[int, int]:
    every = [of(x, y) for x in a[:2] for y in b[:2]]
    return min(every), max(every)


def _quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def _remainder(a: Value, b: Value) -> tuple[int, int]:
    most = max(abs(b.low), abs(b.high)) - 1
    return max(a.low, -most) if a.low < 0 else 0, max(0, min(a.high, most))


def _divisor(b: Value) -> Value:
    """Of those that may be a divisor; all here are positive."""
    return Value(max(b.low, 1), max(b.high, 1), b.wraps)


SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi")
ANYTHING = ("tt.load", "tt.atomic_rmw", "arith.fptosi")
ARITHMETIC: dict[str, Callable[[Value, Value], tuple[int, int]]] = {
    "arith.addi": lambda a, b: (a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b: (a.low - b.high, a.high - b.low),
    "arith.muli": lambda a, b: _corners(a, b, lambda x, y: x * y),
    "arith.divsi": lambda a, b: _corners(a, _divisor(b), _quotient),
    "arith.remsi": lambda a, b: _remainder(a, _divisor(b)),
    "arith.maxsi": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "arith.minsi": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
}
BOOLEAN = ("arith.andi", "arith.ori", "arith.xori", "arith.cmpi", "arith.cmpf")


class _Analysis:
    def __init__(self, programs: Sequence[int]) -> None:
        self.programs = dict(zip("xyz", programs, strict=True))
        self.known: dict[str, Value] = {}  # no floats, no pointers
        self.found: dict[str, str] = {}  # what wraps, and where it is used first

    def begin(self, function: Op) -> None:
        for name, bits in re.findall(r"(%\w+): i(\d+)\b", function.text):
            self.known[name] = Value(0, LARGEST) if int(bits) == 32 else _any(int(bits))
        self.run(function.blocks[0])

    def run(self, block: Sequence[Op]) -> list[Value | None]:
        """What a block hands on."""
        for op in block:
            if op.name in ("scf.yield", "tt.reduce.return", "tt.return"):
                return [self.known.get(name) for name in op.operands]
            results = self.results(op)
            for name, value in zip(op.results, results, strict=True):
                self.known.pop(name, None)  # of a block beside this one
                if value is not None:
                    self.known[name] = value
        return []

    def results(self, op: Op) -> list[Value | None]:
        """Those of one operation, None for what is no integer."""
        if op.name == "scf.for":
            return self.loop(op)
        if op.name == "scf.if":
            each = [self.run(block) for block in op.blocks]
            return [_joined(of) for of in zip(*each, strict=True)][: len(op.results)]
        if op.name == "scf.while":
            assert not op.results, "a `while` with values is not known here"
            for block in op.blocks:
                self.run(block)
            return []
        self.check(op)
        if not op.results or op.name == "tt.addptr":
            return [None] * len(op.results)
        pointee = [re.sub(r"!tt\.ptr<(\w+)>", r"\1", kind) for kind in op.types] if op.name == "tt.load" else op.types
        bits = 1 if op.name in ("arith.cmpi", "arith.cmpf") else _bits(pointee[-1])
        return [None] * len(op.results) if bits is None else [self.value(op, bits)]

    def loop(self, op: Op) -> list[Value | None]:
        match = re.match(r" (%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)", op.text)
        assert match is not None, op.text
        first, end, step = (self.known[name] for name in match.groups()[1:])
        wraps = first.wraps | (end.wraps if step.low == step.high else frozenset())  # else it counts tiles
        self.known[match[1]] = Value(first.low, max(first.low, min(end.high, 2**31) - 1), wraps)
        carried = re.findall(r"(%\w+) = (%[\w#]+)", op.text.partition("iter_args")[2])
        now = [self.known.get(initial) for _, initial in carried]
        for turn in range(4):
            for (name, _), value in zip(carried, now, strict=True):
                self.known.pop(name, None)
                if value is not None:
                    self.known[name] = value
            after = [_joined(both) for both in zip(now, self.run(op.blocks[0]), strict=True)]
            if after == now:
                return now
            now = after if turn == 0 else [a and Value(*_any(64)[:2], a.wraps) for a in after]
        raise AssertionError(f"no bounds for what is carried at {op.place}")

    def value(self, op: Op, bits: int) -> Value:
        """Of an operation with one result, an integer of so many bits."""
        if op.name == "arith.constant":
            numbers = [*map(int, re.findall(r"-?\d+", op.text.rpartition(" : ")[0])), *[1] * ("true" in op.text)] or [0]
            return Value(min(numbers), max(numbers))
        if op.name == "tt.make_range":
            end, start = (int(n) for n in re.findall(r"(?:end|start) = (\d+)", op.text))
            return Value(start, end - 1)
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            most = self.programs[op.text.split()[0]]
            return Value(0, most - 1) if op.name == "tt.get_program_id" else Value(1, most)
        if op.name in ANYTHING:
            return _any(bits)
        if op.name == "tt.reduce":
            return self.reduced(op, bits)
        of = [self.known[name] for name in op.operands if name in self.known]
        wraps = frozenset().union(*(value.wraps for value in of))
        if op.name in BOOLEAN and bits == 1:
            return Value(0, 1, wraps)
        if op.name in SAME:
            return of[0]
        if op.name == "arith.extui":
            return of[0] if of[0].low >= 0 else Value(0, 2**bits - 1, wraps)
        if op.name == "arith.select":
            return Value(min(v.low for v in of[1:]), max(v.high for v in of[1:]), wraps)
        if op.name == "arith.trunci":
            low, high = of[0][:2]
        elif op.name in ARITHMETIC:
            low, high = ARITHMETIC[op.name](*of)
        else:
            raise AssertionError(f"{op.name} at {op.place} is not known to tests/addresses.py")
        least, most = _any(bits)[:2]
        if least <= low and high <= most:
            return Value(low, high, wraps)
        ranges = " and ".join(f"[{value.low}, {value.high}]" for value in of)
        told = {f"{op.name.removeprefix('arith.')} of {ranges} at {op.place}"} if bits <= 32 and not wraps else set()
        return Value(least, most, wraps | told)

    def reduced(self, op: Op, bits: int) -> Value:
        """A maximum or minimum is one of the numbers; of sums nothing is known."""
        of = self.known[op.operands[0]]
        return of if re.search(r"arith\.(max|min)si", str(op.blocks)) else Value(*_any(bits)[:2], of.wraps)

    def check(self, op: Op) -> None:
        """Note what is wrong with an address or a mask."""
        role = {"tt.addptr": "an address", "tt.load": "a load's mask", "tt.store": "a store's mask"}.get(op.name)
        if role is None:
            return
        places = {"tt.addptr": slice(1, 2), "tt.load": slice(1, 2), "tt.store": slice(2, 3)}[op.name]
        for name in op.operands[places]:
            for wrap in self.known[name].wraps if name in self.known else ():
                self.found.setdefault(wrap, f"{role} at {op.place}")


def _joined(values: Sequence[Value | None]) -> Value | None:
    of = [value for value in values if value is not None]
    if len(of) < len(values):
        return None
    return Value(min(v.low for v in of), max(v.high for v in of), frozenset().union(*(v.wraps for v in of)))
