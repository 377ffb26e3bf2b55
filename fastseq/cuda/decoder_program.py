"""What a step of a decoder's loop consists of, for the kernels of csrc/cuda/decoder_*.h: a `Program` of one direction.

A step is a list of phases. Each makes one vector [rows, blocks x width]: products of weights and of vectors that
earlier phases made, what is added to these, and an element function; or a part of the attention. Nothing here depends
on the numbers of rows, steps or source positions. Letters as in fastseq/ops/decoder.py.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ..ops.common import CELLS
from ..ops.decoder_types import LoopSpec, LoopTensors

__all__ = ["TENSORS", "Dims", "Phase", "Program", "Vector", "dims", "program"]

CELL, RESET, CANDIDATE, QUERY, SCORE, CONTEXT, READ = range(7)  # csrc/cuda/decoder.h's DecoderKind
MOST_CELLS = 8
PHASE_NAMES = ("cell", "reset", "candidate", "query", "score", "context", "read")
_FIRST = (
    "projected", "read_input", "keys", "memory", "mask", "v", "beside", "w_query", "w_read", "b_read", "layer_masks",
    "read_mask", "out_mask", "hs", "contexts", "outs", "weights", "gates", "cs", "queries", "read_saved", "scores",
    "reset",
)  # fmt: skip
_OF_CELLS = ("w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0", "h_n", "c_n")
_GIVEN = ("d_hs", "d_contexts", "d_outs", "d_weights", "d_feed_n")
_FOUND = ("d_gates", "d_queries", "d_read", "d_context", "d_scores", "carry")


def _each(names: tuple[str, ...]) -> list[str]:
    return [f"{name}.{i}" for name in names for i in range(MOST_CELLS)]


# In the order of FS_DECODER_TENSORS.
TENSORS = (*_FIRST, *_each(_OF_CELLS), *_GIVEN, *_each(("d_h_n",)), *_FOUND)
_INDEX = {name: i for i, name in enumerate(TENSORS)}


class Dims(NamedTuple):
    """Sizes and options of a loop that its program depends on."""

    I: int  # noqa: E741  (the project's letter)
    H: int
    A: int
    D: int
    R: int  # the fed readout's outputs, 0: it is not in the loop
    P: int  # columns of w_read
    pitches: tuple[int, ...]  # columns of w_ih
    projects: bool  # there is a W_q
    additive: bool
    layer_masks: bool
    read_mask: bool
    save: bool


class Place(NamedTuple):
    """Where a tensor's elements lie: [lead, N, T + extra, length], without steps [lead, N, length]; from offset on."""

    tensor: str = ""
    lead: int = 0
    extra: int = 0
    stepped: bool = True
    length: int = 0
    offset: int = 0

    def flat(self) -> Iterator[int]:
        yield from (_INDEX.get(self.tensor, -1), *map(int, self[1:]))


NOWHERE = Place()


class Vector(NamedTuple):
    """csrc/cuda/decoder.h's DecoderVector."""

    place: Place
    width: int
    blocks: int = 1
    slots: int = 1
    raw: bool = False
    initial: bool = False
    column: tuple[int, ...] = (0,)

    def flat(self) -> Iterator[int]:
        yield from self.place.flat()
        yield from (self.blocks, self.width, self.slots, self.raw, self.initial, *_four(self.column, 0))


class Segment(NamedTuple):
    """A product's part: weight (columns[c] + gates[b]) * gate + u * unit + k * k_ of `weights`, from `offset` on."""

    vector: int
    shift: int
    weights: str
    offset: int
    unit: int
    k: int
    gate: int = 0
    columns: tuple[int, ...] = (0,)
    first: int = 0
    gates: tuple[int, ...] = (0,)  # of each block
    mask: Place = NOWHERE

    def flat(self) -> Iterator[int]:
        yield from (self.vector, self.shift, self.first, len(self.gates), *_four(self.columns), *_four(self.gates, 0))
        yield from (_INDEX[self.weights], self.offset, self.unit, self.k, self.gate)
        yield from self.mask.flat()


class Addend(NamedTuple):
    """What is added to a sum, of a tensor or, unless it is -1, of a vector."""

    place: Place
    columns: tuple[int, ...] = (0,)
    gate: int = 0
    unit: int = 1
    bias: bool = False  # of all rows and steps
    state: bool = False  # has the state's dtype
    last: bool = False  # at the last step alone
    vector: int = -1
    shift: int = 0

    def flat(self) -> Iterator[int]:
        yield from self.place.flat()
        yield from (
            self.vector,
            self.shift,
            self.gate,
            self.unit,
            *_four(self.columns),
            self.bias,
            self.state,
            self.last,
        )


class Phase(NamedTuple):
    """One of a step's. Without a width it is no product."""

    kind: int
    cell: int = 0
    layer: int = 0
    width: int = 0
    columns: int = 1  # 1, 2 or 4
    segments: tuple[Segment, ...] = ()
    addends: tuple[Addend, ...] = ()
    output: int = 0
    first: int = 0
    blocks: int = 1
    each: int = 1
    factors: tuple[tuple[Place, int], ...] = ()  # of each column, and the step's shift

    def __str__(self) -> str:
        return PHASE_NAMES[self.kind] + (f" {self.cell}" if self.kind <= CANDIDATE else "")


def _four(values: tuple[int, ...], fill: int = -1) -> tuple[int, ...]:
    return (*values, *(fill,) * (4 - len(values)))


class Program(NamedTuple):
    """All phases of a step, in order."""

    forward: bool
    loop: LoopSpec
    dims: Dims
    vectors: tuple[Vector, ...]
    phases: tuple[Phase, ...]
    query: tuple[int, int]  # the vector that asks, and the shift of its step
    asks: tuple[int, int]  # the cell whose state asks, of step t - 1 (0) or t (1)
    before: tuple[tuple[int, int], ...]  # of each cell: whose state it starts from, of step t - 1 (0) or t (1)

    @property
    def attends(self) -> bool:
        return self.loop.attend != "none"

    def flat(self) -> list[int]:
        """As DecoderProgram reads it."""
        loop, dims = self.loop, self.dims
        combine = {"tanh": 0, "linear": 1, "maxout": 2}[loop.combine]
        numbers = [
            self.forward, CELLS[loop.cell], loop.cells, loop.layers, dims.H, dims.A, dims.D, dims.R, combine,
            dims.additive, *self.query, *self.asks,
        ]  # fmt: skip
        for of in zip(*self.before, strict=True):
            numbers += [*of, *(0,) * (MOST_CELLS - len(of))]
        segments = [s for p in self.phases for s in p.segments]
        addends = [a for p in self.phases for a in p.addends]
        for items in (self.vectors, segments, addends):
            numbers.append(len(items))
            for item in items:
                numbers += item.flat()
        numbers.append(len(self.phases))
        at_segment = at_addend = 0
        for p in self.phases:
            numbers += [p.kind, p.cell, p.layer, p.width, p.columns, at_segment, len(p.segments), at_addend]
            numbers += [len(p.addends), p.output, p.first, p.blocks, p.each]
            for place, shift in (*p.factors, *((NOWHERE, 0),) * (4 - len(p.factors))):
                numbers += [*place.flat(), shift]
            at_segment, at_addend = at_segment + len(p.segments), at_addend + len(p.addends)
        return [int(number) for number in numbers]


def dims(loop: LoopSpec, x: LoopTensors, save: bool) -> Dims:
    """Of a loop's tensors."""
    read = 0 if x.w_read is None else x.w_read.shape[0] // (2 if loop.combine == "maxout" else 1)
    return Dims(
        x.y.shape[2], x.hidden, 0 if x.keys is None else x.keys.shape[2], 0 if x.memory is None else x.memory.shape[2],
        read if loop.feed == "output" else 0, 0 if x.w_read is None else x.w_read.shape[1],
        tuple(w.shape[1] for w in x.weights[::4]), x.w_query is not None, x.v is not None, x.layer_masks is not None,
        x.read_mask is not None, save,
    )  # fmt: skip


class CellColumns(NamedTuple):
    """A cell's columns of sums: the gate of W_ih and of W_hh that adds to each, or -1; how its gradients lie."""

    input: tuple[int, ...]
    hidden: tuple[int, ...]
    order: tuple[int, ...]  # the column that each block of d_gates is: what W_hh made and what W_ih made are neighbours
    hidden_gates: tuple[int, ...]  # of the blocks that W_hh made: from the first on
    input_gates: tuple[int, ...]  # of the blocks that W_ih made: up to the last


COLUMNS = {
    "lstm": CellColumns((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),
    "gru": CellColumns((0, 1, -1, 2), (0, 1, 2, -1), (2, 0, 1, 3), (2, 0, 1), (0, 1, 2)),
    "gru_reset_before": CellColumns((0, 1, 2, -1), (0, 1, -1, -1), (0, 1, 2), (0, 1), (0, 1, 2)),
}


class Shared(NamedTuple):
    """What both directions ask of a loop."""

    loop: LoopSpec
    dims: Dims
    starts: dict[str, int]  # of the readout's parts, the column of w_read where each begins
    below: tuple[int, ...]  # of each cell, columns of w_ih where its parts begin, or -1
    feed: int
    context: tuple[int, ...]
    before: tuple[tuple[int, int], ...]
    query_cell: int
    query_offset: int

    def layer(self, cell: int) -> int:
        return 0 if self.loop.attend == "between" else cell

    @property
    def pair(self) -> int:
        return 2 if self.loop.combine == "maxout" else 1


def _shared(loop: LoopSpec, dims: Dims) -> Shared:
    between, fed = loop.attend == "between", {"none": 0, "context": dims.D, "output": dims.R}[loop.feed]
    below, context, before, feed = [], [], [], -1
    for i in range(loop.cells):
        at = dims.I if i == 0 else 0
        below.append(-1)
        if i == 0 and loop.feed != "none":
            feed, at = at, at + fed
        elif i and not between:
            below[i], at = 0, dims.H
        context.append(at if loop.contexts[i] else -1)
        before.append((1 - i, i) if between else (i, 0))
    starts, at = {}, 0
    for part in loop.readout:
        starts[part] = at
        at += {"context": dims.D, "input": dims.I}.get(part, dims.H)
    return Shared(
        loop, dims, starts if loop.feed == "output" else {}, tuple(below), feed, tuple(context), tuple(before),
        0 if between else loop.query_cell, 0 if loop.attend == "before" else 1,
    )  # fmt: skip


@lru_cache(maxsize=256)
def program(loop: LoopSpec, dims: Dims, forward: bool) -> Program:
    """The phases of a step."""
    of = _shared(loop, dims)
    vectors, phases, query = _forward(of) if forward else _backward(of)
    return Program(forward, loop, dims, vectors, phases, query, (of.query_cell, of.query_offset), of.before)


def _order(of: Shared, cell_phases: Any, attention: list[Phase], read: Phase | None) -> list[Phase]:
    """Of a step forward."""
    loop = of.loop
    cells = [cell_phases(i) for i in range(loop.cells)]
    if loop.attend != "none":
        cells.insert({"before": 0, "after": loop.query_cell + 1, "between": 1}[loop.attend], attention)
    if read is not None:
        cells.append([read])
    return [phase for phases in cells for phase in phases]


def _forward(of: Shared) -> tuple[tuple[Vector, ...], tuple[Phase, ...], tuple[int, int]]:
    loop, dims = of.loop, of.dims
    attends, between = loop.attend != "none", loop.attend == "between"
    vectors = [
        Vector(Place("hs", c, 1, True, dims.H), dims.H, slots=2, initial=not between or c == 1)
        for c in range(loop.cells)
    ]
    index: dict[str, int] = {}

    def add(name: str, vector: Vector) -> None:
        index[name] = len(vectors)
        vectors.append(vector)

    if attends:
        fed = loop.feed == "context"  # then a step may read two contexts
        add("context", Vector(Place("contexts", 0, int(fed), True, dims.D), dims.D, slots=1 + fed, initial=fed))
    if dims.R:
        add("out", Vector(Place("outs", 0, 1, True, dims.R), dims.R, initial=True))
    if dims.projects:
        add("query", Vector(Place("queries", 0, 0, dims.save, dims.A), dims.A, raw=True))
    if loop.cell == "gru_reset_before":
        add("reset", Vector(Place("reset", 0, 0, False, dims.H), dims.H))
    attention = [Phase(SCORE), Phase(CONTEXT, output=index.get("context", 0))]
    if dims.projects:
        asks = Segment(of.query_cell, of.query_offset, "w_query", 0, dims.H, 1)
        attention.insert(0, Phase(QUERY, width=dims.A, segments=(asks,), output=index["query"]))
    query = (index["query"], 0) if dims.projects else (of.query_cell, of.query_offset)
    phases = _order(of, lambda c: _cell(of, index, c), attention, _read(of, index) if dims.R else None)
    return tuple(vectors), tuple(phases), query


def _cell(of: Shared, index: dict[str, int], c: int) -> list[Phase]:
    loop, dims, columns = of.loop, of.dims, COLUMNS[of.loop.cell]
    name, pitch, H = f"w_ih.{c}", dims.pitches[c], dims.H
    segments, shift = [], int(loop.feed == "context")

    def reads(vector: int, at: int, shift: int, mask: Place = NOWHERE) -> None:
        segments.append(Segment(vector, shift, name, at, pitch, 1, H * pitch, columns.input, mask=mask))

    if of.below[c] >= 0:
        mask = Place("layer_masks", c - 1, 0, True, H) if dims.layer_masks else NOWHERE
        reads(c - 1, of.below[c], 1, mask)
    if c == 0 and loop.feed != "none":
        reads(index["context" if loop.feed == "context" else "out"], of.feed, 0)
    if of.context[c] >= 0:
        reads(index["context"], of.context[c], shift)
    source, offset = of.before[c]
    segments.append(Segment(source, offset, f"w_hh.{c}", 0, H, 1, H * H, columns.hidden))
    gates = 4 if loop.cell == "lstm" else 3
    if c == 0:
        addends = [
            Addend(Place("projected", 0, 0, True, gates * H), columns.input, H),
            Addend(Place("beside", 0, 0, False, gates * H), columns.hidden, H),
        ]
    else:
        addends = [Addend(Place(f"b_ih.{c}", stepped=False), columns.input, H, bias=True)]
    addends.append(Addend(Place(f"b_hh.{c}", stepped=False), columns.hidden, H, bias=True))
    whole: dict[str, Any] = {"cell": c, "layer": of.layer(c), "width": H}
    if loop.cell != "gru_reset_before":
        return [Phase(CELL, columns=4, segments=tuple(segments), addends=tuple(addends), output=c, **whole)]
    candidate = Segment(index["reset"], 0, f"w_hh.{c}", 2 * H * H, H, 1)
    bias = Addend(Place(f"b_hh.{c}", stepped=False), (2,), H, bias=True)
    return [
        Phase(RESET, columns=4, segments=tuple(segments), addends=tuple(addends), output=index["reset"], **whole),
        Phase(CANDIDATE, segments=(candidate,), addends=(bias,), output=c, **whole),
    ]


def _read(of: Shared, index: dict[str, int]) -> Phase:
    dims, pair, last = of.dims, of.pair, of.loop.cells - 1
    columns = (0, 1)[:pair]
    source = {"state": (last, 1), "prev_state": (last, 0), "context": (index.get("context", -1), 0)}
    segments = []
    for part, at in of.starts.items():
        if part == "input":  # a product of all steps
            continue
        mask = Place("read_mask", 0, 0, True, dims.P, at) if dims.read_mask else NOWHERE
        segments.append(Segment(*source[part], "w_read", at, pair * dims.P, 1, dims.P, columns, mask=mask))
    addends = [Addend(Place("b_read", stepped=False), columns, 1, pair, bias=True)]
    if "input" in of.starts:
        addends.append(Addend(Place("read_input", 0, 0, True, pair * dims.R), columns, 1, pair))
    return Phase(
        READ, width=dims.R, columns=pair, segments=tuple(segments), addends=tuple(addends), output=index["out"],
        factors=((Place("out_mask", 0, 0, True, dims.R), 0),),
    )  # fmt: skip


class _Pull:
    """Backward: a phase's segments, each in the column of its factor."""

    def __init__(self, of: Shared, index: dict[str, int]) -> None:
        self.of, self.index = of, index
        self.segments: list[Segment] = []
        self.addends: list[Addend] = []
        self.factors: list[tuple[Place, int]] = [(NOWHERE, 0)]

    def _column(self, factor: Place, shift: int) -> tuple[int, ...]:
        if not factor.tensor:
            return (0,)
        self.factors.append((factor, shift))
        return (*(-1,) * (len(self.factors) - 1), 0)

    def recurrent(self, c: int, shift: int) -> None:
        H, gates = self.of.dims.H, COLUMNS[self.of.loop.cell].hidden_gates
        self.segments.append(Segment(c, shift, f"w_hh.{c}", 0, 1, H, H * H, gates=gates))

    def input(self, c: int, at: int, shift: int, factor: Place = NOWHERE) -> None:
        pitch, columns = self.of.dims.pitches[c], COLUMNS[self.of.loop.cell]
        gates, H = columns.input_gates, self.of.dims.H
        first = len(columns.order) - len(gates)
        self.segments.append(
            Segment(c, shift, f"w_ih.{c}", at, 1, pitch, H * pitch, self._column(factor, shift), first, gates)
        )

    def part(self, name: str, shift: int) -> None:
        dims, at = self.of.dims, self.of.starts.get(name)
        if at is None:
            return
        mask = Place("read_mask", 0, 0, True, dims.P, at) if dims.read_mask else NOWHERE
        self.segments.append(Segment(self.index["read"], shift, "w_read", at, 1, dims.P, 0, self._column(mask, shift)))

    def asked(self, shift: int) -> None:
        H, query = self.of.dims.H, self.index["query"]
        if self.of.dims.projects:
            self.segments.append(Segment(query, shift, "w_query", 0, 1, H))
        else:
            self.addends.append(Addend(NOWHERE, vector=query, shift=shift))

    def given(self, name: str, length: int, **how: Any) -> None:
        self.addends.append(Addend(Place(name, 0, 0, not how.get("last", False), length), **how))

    def phase(self, kind: int, width: int, output: int, **how: Any) -> Phase:
        columns = {1: 1, 2: 2}.get(len(self.factors), 4)
        return Phase(
            kind, width=width, columns=columns, segments=tuple(self.segments), addends=tuple(self.addends),
            output=output, factors=tuple(self.factors), **how,
        )  # fmt: skip


def _backward(of: Shared) -> tuple[tuple[Vector, ...], tuple[Phase, ...], tuple[int, int]]:
    loop, dims = of.loop, of.dims
    order = COLUMNS[loop.cell].order
    vectors = [
        Vector(Place("d_gates", c, 0, True, len(order) * dims.H), dims.H, len(order), 2, column=order)
        for c in range(loop.cells)
    ]
    index: dict[str, int] = {}
    if loop.attend != "none":
        index |= {"context": len(vectors), "query": len(vectors) + 1}
        vectors += [
            Vector(Place("d_context", 0, 0, True, dims.D), dims.D, raw=True),
            Vector(Place("d_queries", 0, 0, True, dims.A), dims.A, raw=not dims.projects),
        ]
    if dims.R:
        index["read"] = len(vectors)
        vectors.append(Vector(Place("d_read", 0, 0, True, of.pair * dims.R), of.pair * dims.R, slots=2))
    phases = []
    attention = [(CONTEXT, 0), (SCORE, 0), (QUERY, 0)]
    kinds = (RESET, CANDIDATE) if loop.cell == "gru_reset_before" else (CELL,)
    forward = _order(
        of, lambda c: [Phase(kind, c) for kind in kinds], [Phase(kind) for kind, _ in reversed(attention)],
        Phase(READ) if dims.R else None,
    )  # fmt: skip
    for kind, c in [(p.kind, p.cell) for p in reversed(forward)]:
        if kind in (SCORE, QUERY):
            phases.append(Phase(kind, output=index["query"]))
        elif kind == CONTEXT:
            phases.append(_undo_context(of, index))
        elif kind == READ:
            phases.append(_undo_read(of, index))
        elif kind == RESET:
            phases.append(_undo_reset(of, c))
        else:
            phases.append(_undo_cell(of, index, kind, c))
    return tuple(vectors), tuple(phases), (index.get("context", 0), 0)


def _undo_cell(of: Shared, index: dict[str, int], kind: int, c: int) -> Phase:
    loop, dims, last = of.loop, of.dims, of.loop.cells - 1
    between, pull = loop.attend == "between", _Pull(of, index)
    if c == last:
        pull.given("d_hs", dims.H)
        if dims.R:
            pull.part("state", 0)
            pull.part("prev_state", 1)
    if c == last or not between:
        pull.given(f"d_h_n.{of.layer(c)}", dims.H, state=True, last=True)
    if between:  # the second cell starts from the first one's state
        pull.recurrent(1 - c, c)
    else:
        pull.recurrent(c, 1)
        if c < last:
            factor = Place("layer_masks", c, 0, True, dims.H) if dims.layer_masks else NOWHERE
            pull.input(c + 1, 0, 0, factor)
    if loop.attend != "none" and of.query_cell == c:
        pull.asked(1 - of.query_offset)
    blocks = {"first": 1, "blocks": 2} if kind == CANDIDATE else {"blocks": 4}
    return pull.phase(kind, dims.H, c, cell=c, layer=of.layer(c), **blocks)


def _undo_reset(of: Shared, c: int) -> Phase:
    H = of.dims.H
    segment = Segment(c, 0, f"w_hh.{c}", 0, 1, H, H * H, first=2, gates=(2,))
    return Phase(RESET, c, of.layer(c), H, segments=(segment,), output=c)


def _undo_context(of: Shared, index: dict[str, int]) -> Phase:
    dims, pull = of.dims, _Pull(of, index)
    pull.given("d_contexts", dims.D)
    if of.loop.feed == "context":
        pull.input(0, of.feed, 1)
        pull.given("d_feed_n", dims.D, state=True, last=True)
    if dims.R:
        pull.part("context", 0)
    for c, at in enumerate(of.context):
        if at >= 0:
            pull.input(c, at, 0)
    return pull.phase(CONTEXT, dims.D, index["context"])


def _undo_read(of: Shared, index: dict[str, int]) -> Phase:
    dims, pull = of.dims, _Pull(of, index)
    pull.given("d_outs", dims.R)
    pull.input(0, of.feed, 1)
    pull.given("d_feed_n", dims.R, state=True, last=True)
    pull.factors = [(Place("out_mask", 0, 0, True, dims.R), 0)]
    return pull.phase(READ, dims.R, index["read"], each=of.pair)
