"""How a decoder's loop is laid out on a GPU: `plan` chooses, from sizes alone, among what csrc/cuda/decoder_*.h can do.

A group of blocks, one block, a cluster or a part of the grid, shares a loop of some rows of the batch; groups run side
by side and take further rows when they are done. Of every product a block owns a slice of the units. Its weights stay
in its shared memory as far as that goes, in the order of the phases; so do, after them, the keys and the memory of the
rows whose attention is its own. What does not fit is read from the second-level cache at every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .decoder_phases import CANDIDATE, SCORE, VOCABULARY, Phase, Program, Segment
from .devices import DeviceSpec
from .plan import DESIGNS, ELEMENT, TILE_BYTES, TILE_K, TILE_ROWS, WARPS, CannotPlan, rate

__all__ = ["DecoderPlan", "DecoderShape", "Sizes", "candidates", "laid_out", "plan", "sizes", "tiles_of"]

_LINE, _QUAD, _SCRATCH = 128, 4, 256 * 4 * 4
_WALK = _CHOICE = 16  # bytes, of csrc/cuda/decoder.h's
_MOST_ROWS = 64
# Special-function and other instructions of a unit of an additive score, by kind, as clocks of one SM's 128 lanes.
_TANH = {"full32": 30.0, "tensor32": 30.0, "brain_half": 12.0, "half": 20.0}
_CLOCK = 1755.0  # a us
_LONGEST = 32  # steps: the most that are asked for are a bound that is rarely met
_TABLES = 256  # this part of a GPU's memory at most: a search is one of many things there
_CHOOSING = 45.0  # * us of what fastseq/ops/chunked_greedy.py adds to a step: some 30 small kernels of a CUDA graph


@dataclass(frozen=True)
class DecoderShape:
    """csrc/cuda/decoder.h's DecoderShape."""

    design: str
    blocks: int
    rows: int
    groups: int
    chunk: int
    pieces: int = 1
    near: tuple[int, ...] = ()  # of each part of each product, the tiles of k whose weights stay in shared memory
    keys: bool = False
    memory: bool = False

    def native(self) -> tuple[int | bool, ...]:
        numbers = (self.blocks, self.rows, self.groups, self.chunk, self.pieces)
        return (DESIGNS.index(self.design), *numbers, self.keys, self.memory)


class Sizes(NamedTuple):
    """decoder_layout.cpp's sums, as far as cost and memory need them."""

    shared: int  # bytes of a block
    near: tuple[int, ...]  # bytes of a block's weights in shared memory, of each phase
    weights: tuple[int, ...]  # bytes of all of them
    units: tuple[int, ...]  # of a block, of each phase
    keys: int  # bytes of a block's keys, and of its memory
    memory: int
    slots: int

    @property
    def packed(self) -> int:
        return sum(self.weights)


@dataclass(frozen=True)
class DecoderPlan:
    """One way of a decoder's loop on one GPU. str() says it in words."""

    way: str  # "forward" | "backward" | "search"
    kind: str
    N: int
    S: int
    shape: DecoderShape
    phases: tuple[str, ...]  # names
    units: tuple[int, ...]  # of a block, of each phase; 0: of an attention
    near: tuple[float, ...]  # the part of each phase's weights that is in shared memory
    shared: int  # bytes of a block
    packed: int  # bytes of one block's weights
    waves: int  # blocks of rows that a group runs one after another
    step: float  # predicted us of a step of one of them
    device: str

    @property
    def keeps_vocabulary(self) -> bool:
        """No search, or the weights of the logits stay in shared memory."""
        return self.way != "search" or self.near[-1] == 1

    def __str__(self) -> str:
        s = self.shape
        where = {
            "block": "one block",
            "cluster": f"a cluster of {s.blocks} blocks",
            "grid": f"{s.blocks} blocks with a grid barrier",
        }
        owned = [
            f"{name} ({units} units a block{'' if near == 1 else f', {1 - near:.0%} of the weights through L2'})"
            for name, units, near in zip(self.phases, self.units, self.near, strict=True)
            if units
        ]
        text = (
            f"{self.way}: {where[s.design]}, {s.rows} rows a group, {s.groups} groups, {self.shared / 1024:.0f} KiB of "
            f"shared memory a block; {', '.join(owned)}"
        )
        if any(not units for units in self.units):
            here = [name for name, stays in (("keys", s.keys), ("memory", s.memory)) if stays]
            text += f"; a row's attention on {s.pieces} blocks, " + (
                f"{' and '.join(here)} in shared memory" if here else "keys and memory through L2"
            )
        return f"{text}; predicted {self.step:.1f} us a step" + (f", {self.waves} times" if self.waves > 1 else "")


def plan(program: Program, N: int, S: int, kind: str, device: DeviceSpec, steps: int = 1) -> DecoderPlan:
    """The cheapest layout by the model. Raises CannotPlan.

    kind: a key of native.KINDS. steps: of a search, which are worth its tables or not; of others they only scale it.
    """
    found = _plan(program, max(N, 1), S, kind, device)
    if program.dims.V:
        _check_tables(program, kind, device)
        _check_time(program, found, device, min(max(steps, 1), _LONGEST))
    return found


@lru_cache(maxsize=4096)
def _plan(program: Program, N: int, S: int, kind: str, device: DeviceSpec) -> DecoderPlan:
    found = min(
        candidates(program, N, S, kind, device),
        key=lambda p: (p.step * p.waves, p.shape.blocks * p.shape.groups, p.shared),
        default=None,
    )
    if found is None:
        raise CannotPlan(_obstacle(program, S, kind, device))
    return found


def _check_tables(program: Program, kind: str, device: DeviceSpec) -> None:
    """CannotPlan if what a search's launch reads of every token's input takes too much memory."""
    tokens, columns, limit = program.dims.V, _columns(program), device.memory // _TABLES
    found = tokens * columns * ELEMENT[kind]
    if found > limit:
        beside = any(a.place.tensor == "out_input" for a in program.phases[-1].addends)
        raise CannotPlan(
            f"what a step makes of its input would be a table of {tokens} tokens x {columns} numbers in {kind}, "
            f"{found >> 20} MiB; at most 1/{_TABLES} of the memory of {device.name}, {limit >> 20} MiB, is taken for it"
            + ("; with weights of its own (combine) a readout of the input has a smaller one" if beside else "")
        )


def _check_time(program: Program, found: DecoderPlan, device: DeviceSpec, steps: int) -> None:
    """CannotPlan if a search in one launch is predicted to take longer than one step by step."""
    kind, tables = found.kind, _tables_time(program, found.kind, device) / steps
    whole, apart = found.step * found.waves + tables, _apart(program, found.N, found.S, kind, device)
    if whole > apart:
        raise CannotPlan(
            f"a step of {found.N} rows is predicted to take {whole:.0f} us in one launch, {tables:.0f} of them for its "
            f"part of tables of all tokens, which {steps} steps read; {apart:.0f} us with product and choice of the "
            "tokens in launches of their own"
        )


def _columns(program: Program) -> int:
    """Of a search's tables of all tokens, side by side."""
    return sum(a.place.length for p in program.phases for a in p.addends if a.token)


def _tables_time(program: Program, kind: str, device: DeviceSpec) -> float:
    """us of the products that make the tables, or of writing these, whichever is more."""
    numbers = program.dims.V * _columns(program)
    flops = 2 * numbers * program.dims.I
    return max(flops / (rate(kind, device) * device.units), numbers * ELEMENT[kind] / device.memory_bytes)


def _features(program: Program) -> int:
    """What each logit of a search is a sum of."""
    return sum(program.vectors[s.vector].width for s in program.phases[-1].segments)


def _without_vocabulary(program: Program) -> Program:
    return program._replace(phases=program.phases[:-1], dims=program.dims._replace(V=0))


def _apart(program: Program, N: int, S: int, kind: str, device: DeviceSpec) -> float:
    """us of a search's step by step: the decoder's launch, the logits' product, and the choice."""
    loop, tokens = _plan(_without_vocabulary(program), N, S, kind, device), program.dims.V
    weights = tokens * _features(program)
    product = max(2 * N * weights / (rate(kind, device) * device.units), weights * ELEMENT[kind] / device.l2_bytes)
    return loop.step * loop.waves + product + _CHOOSING


def _obstacle(program: Program, S: int, kind: str, device: DeviceSpec) -> str:
    """Why there is no layout."""
    loop = _without_vocabulary(program) if program.dims.V else program
    smallest = sizes(loop, DecoderShape("grid", device.units, 8, 1, 8), S, kind).shared
    if program.dims.V and smallest <= device.shared:
        return (
            f"the output's weights of {program.dims.V} tokens x {_features(program)} features in {kind} do not fit the "
            f"shared memory of {device.name}, {device.units} x {device.shared // 1024} KiB, beside the steps' buffers"
        )
    return (
        f"a decoder's loop of hidden_size={program.dims.H} with {S} source positions needs {smallest // 1024} KiB "
        f"of shared memory a block for its steps' buffers; {device.name} has {device.shared // 1024}"
    )


def candidates(program: Program, N: int, S: int, kind: str, device: DeviceSpec) -> Iterator[DecoderPlan]:
    """Every layout that fits, in no order; of what stays in shared memory, as much as fits.

    A search's vocabulary must: otherwise a product by itself, over all rows at once, reads its weights less often.
    """
    for design, blocks, capacity in _placements(program, device):
        for rows in range(8, _MOST_ROWS + 1, 8):
            if rows - 8 >= N:
                break
            chunk = 8 if rows % 16 else 16
            groups = min(-(-N // rows), capacity)
            pieces = max(1, blocks // rows) if program.attends else 1
            shape = DecoderShape(design, blocks, rows, groups, chunk, pieces)
            made = laid_out(program, N, S, kind, device, _filled(program, shape, S, kind, device))
            if made is not None and made.keeps_vocabulary:
                yield made


def _placements(program: Program, device: DeviceSpec) -> Iterator[tuple[str, int, int]]:
    """(design, blocks of a group, groups that are resident at once)."""
    widest = max(p.width for p in program.phases)
    yield "block", 1, device.units
    for size, count in device.clusters:
        if size // 2 * TILE_ROWS < widest:  # fewer would do
            yield "cluster", size, count
    for groups in (1, 2, 3, 4, 6, 8):
        blocks = min(device.units // groups, -(-widest // TILE_ROWS))
        if blocks > 1:
            yield "grid", blocks, device.units // blocks


def _filled(program: Program, shape: DecoderShape, S: int, kind: str, device: DeviceSpec) -> DecoderShape:
    """The shape with as much in shared memory as there is room for: weights, then keys, then memory."""
    found = sizes(program, shape, S, kind)
    room = device.shared - found.shared
    segments = [(p, s, units) for p, units in zip(program.phases, found.units, strict=True) for s in p.segments]
    near = [0] * len(segments)
    for i in sorted(range(len(segments)), key=lambda i: segments[i][0].kind != VOCABULARY):  # the vocabulary's first
        p, s, units = segments[i]
        tile = TILE_BYTES * _wide(p, s, units)
        near[i] = min(tiles_of(program, s, kind), max(room, 0) // tile)
        room -= near[i] * tile
    keys = 0 < found.keys <= room
    room -= found.keys if keys else 0
    return replace(shape, near=tuple(near), keys=keys, memory=0 < found.memory <= room)


def laid_out(
    program: Program, N: int, S: int, kind: str, device: DeviceSpec, shape: DecoderShape
) -> DecoderPlan | None:
    """The plan of this shape, None if its buffers do not fit."""
    found = sizes(program, shape, S, kind)
    if found.shared > device.shared:
        return None
    way = "search" if program.dims.V else "forward" if program.forward else "backward"
    names = tuple(map(str, program.phases))
    near = tuple(here / (every or 1) for here, every in zip(found.near, found.weights, strict=True))
    step, waves = _step(program, shape, found, S, kind, device), -(-N // (shape.rows * shape.groups))
    return DecoderPlan(
        way, kind, N, S, shape, names, found.units, near, found.shared, found.packed, waves, step, device.name
    )


def _rounded(n: int, to: int) -> int:
    return -(-n // to) * to


def _line(n: int) -> int:
    return _rounded(n, _LINE)


def _pitch(depth: int, element: int) -> int:
    """Rows start 4 banks apart: 8 rows x 4 lanes then read from 32 of them."""
    return _rounded(-(-depth * element // 4), 32) * 4 // element + 16 // element


def _padded(program: Program, vector: int) -> int:
    return _rounded(program.vectors[vector].width, TILE_ROWS)


def sizes(program: Program, shape: DecoderShape, S: int, kind: str) -> Sizes:
    """decoder_layout.cpp's DecoderProgram::lay_out once more."""
    element, grid = ELEMENT[kind], shape.design == "grid"
    units = tuple(_rounded(-(-p.width // shape.blocks), TILE_ROWS) if p.width else 0 for p in program.phases)
    at = 0
    for i, v in enumerate(program.vectors):
        if not grid:
            at += _line(v.slots * shape.rows * _pitch(len(v.column) * _padded(program, i), element) * element)
    staged = max((_staged(program, p, grid) for p in program.phases), default=0)
    if staged:
        at += _line(shape.chunk * _pitch(staged, element) * element)
    at += _steps_buffers(program, shape, units)
    buffers, keys, memory, slots = _attention_bytes(program, shape, S, element) if program.attends else (0, 0, 0, 0)
    at += buffers + (keys if shape.keys else 0) + (memory if shape.memory else 0)
    near, stay = iter(shape.near), []
    for p, own in zip(program.phases, units, strict=True):
        stay.append(sum(_wide(p, s, own) * next(near, 0) * TILE_BYTES for s in p.segments))
    weights = tuple(
        sum(_wide(p, s, own) * tiles_of(program, s, kind) * TILE_BYTES for s in p.segments)
        for p, own in zip(program.phases, units, strict=True)
    )
    return Sizes(at + sum(stay), tuple(stay), weights, units, keys, memory, slots)


def _steps_buffers(program: Program, shape: DecoderShape, units: tuple[int, ...]) -> int:
    """Bytes of sums, of what is loaded ahead, of the state, the biases, the group's flag and a search's rows."""
    layers, dims = program.loop.layers, program.dims
    work, ahead, biases, of_state = (_SCRATCH if dims.A or dims.D else 0), 0, 0, 0
    for p, own in zip(program.phases, units, strict=True):
        if own:
            quads = -(-(own // TILE_ROWS * p.columns) // _QUAD)
            slices = max(WARPS // quads, 1)
            chooses = p.kind == VOCABULARY  # of what it makes it keeps and loads only the logits
            work = max(work, max(slices * p.columns, 1 if chooses else 4) * shape.chunk * (own + 4) * 4)
            ahead = max(ahead, (1 if chooses else 4 if program.forward else 7) * own)
            biases += p.columns * own
            of_state = own if p.kind <= CANDIDATE else of_state
    lines = layers
    if program.forward:
        lines = {"lstm": 2 * layers, "gru": layers, "gru_reset_before": layers + 2}[program.loop.cell]
    search = 0
    if dims.V:
        search = _line(shape.rows * _WALK + WARPS * 4)
        search += 0 if shape.design == "grid" else _line(shape.blocks * shape.rows * _CHOICE)
    loop = _line(work) + _line(ahead * shape.chunk * 4) + _line(lines * shape.rows * of_state * 4)
    return loop + _line(biases * 4) + _line(16) + search


def _attention_bytes(program: Program, shape: DecoderShape, S: int, element: int) -> tuple[int, int, int, int]:
    """Of the buffers, of the keys and of the memory, should they stay; and pieces of attention that a block has."""
    dims = program.dims
    over, width = (dims.D, dims.A) if program.forward else (dims.A, dims.D)
    slots = -(-shape.rows * shape.pieces // shape.blocks)
    span_s, span_f = -(-S // shape.pieces), _rounded(-(-over // shape.pieces), TILE_ROWS)
    buffers = _line(_rounded(max(dims.A, dims.D), 4) * 4) + _line(_rounded(dims.A, 4) * 4 if dims.additive else 0)
    buffers += _line(slots * _rounded(S, 4) * 4)
    pieces = _line(slots * span_s * _rounded(width, 16) * element), _line(slots * S * span_f * element)
    return (buffers, *(pieces if program.forward else pieces[::-1]), slots)


def _staged(program: Program, p: Phase, grid: bool) -> int:
    """Elements of a row that a phase copies before it multiplies them."""
    return sum(len(s.gates) * _padded(program, s.vector) for s in p.segments if grid or s.mask.tensor)


def _wide(p: Phase, s: Segment, units: int) -> int:
    """Tiles of a block's weights, of one tile of k."""
    tiles = units // TILE_ROWS * p.columns
    there = [m % p.columns < len(s.columns) and s.columns[m % p.columns] >= 0 for m in range(_QUAD)]
    return tiles // _QUAD * sum(there) + sum(there[: tiles % _QUAD])


def tiles_of(program: Program, s: Segment, kind: str) -> int:
    """Tiles of k."""
    return len(s.gates) * _padded(program, s.vector) // TILE_K[kind]


def _step(program: Program, shape: DecoderShape, found: Sizes, S: int, kind: str, device: DeviceSpec) -> float:
    """us of a step: of each phase a meeting, latencies, arithmetic or reads, whichever is more, and the exchange."""
    meeting = {"block": 0.0, "cluster": device.cluster_barrier, "grid": device.grid_barrier}[shape.design]
    blocks = shape.blocks * shape.groups
    tiles = shape.rows // 8
    of_product = rate(kind, device)
    total = 0.0
    for p, units, near, weights in zip(program.phases, found.units, found.near, found.weights, strict=True):
        attention = not p.width
        alone = attention and p.kind == SCORE and shape.pieces == 1
        total += device.step + (0.0 if alone else meeting)
        if attention:
            total += _attention(program, p, shape, found, S, kind, device)
            continue
        again = -(-shape.rows // shape.chunk)
        flops = 2 * weights // TILE_BYTES * tiles * TILE_ROWS * 8 * TILE_K[kind]
        reads = weights / device.shared_bytes, blocks * (weights - near) / device.l2_bytes
        total += max(flops / of_product, again * max(reads))
        chooses = p.kind == VOCABULARY
        moved = shape.rows * (_CHOICE if chooses else units * p.blocks * p.each * ELEMENT[kind])
        if shape.design == "cluster":
            total += moved * (shape.blocks - 1) / device.remote_bytes
        elif shape.design == "grid":
            total += blocks * shape.rows * _staged(program, p, grid=True) * ELEMENT[kind] / device.l2_bytes
            total += blocks * moved * shape.blocks / device.l2_bytes if chooses else 0.0
    return total


def _attention(
    program: Program, p: Phase, shape: DecoderShape, found: Sizes, S: int, kind: str, device: DeviceSpec
) -> float:
    of_keys = (p.kind == SCORE) == program.forward
    here = shape.keys if of_keys else shape.memory
    bytes = found.keys if of_keys else found.memory
    blocks = shape.blocks * shape.groups
    cost = bytes / device.shared_bytes if here else blocks * bytes / device.l2_bytes
    if of_keys and program.dims.additive:
        cost = max(cost, bytes / ELEMENT[kind] * _TANH[kind] / 128 / _CLOCK)
    return cost
