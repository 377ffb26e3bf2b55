"""What a step of a decoder's loop consists of, for the kernels of csrc/cuda/decoder_*.h: the values of a `Program`.

A step is a list of phases. Each makes one vector [rows, blocks x width]: products of weights and of vectors that
earlier phases made, what is added to these, and an element function; or a part of the attention. Nothing here depends
on the numbers of rows, steps or source positions. Letters as in fastseq/ops/decoder.py.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..ops.cells import CELLS
from ..ops.decoder_search import Vocabulary
from ..ops.decoder_types import LoopSpec, LoopTensors

__all__ = [
    "CANDIDATE", "CELL", "COLUMNS", "CONTEXT", "NOWHERE", "QUERY", "READ", "RESET", "SCORE", "TENSORS",
    "VOCABULARY", "Addend", "Dims", "Phase", "Place", "Program", "Segment", "Shared", "Vector", "dims", "order",
    "shared",
]  # fmt: skip

CELL, RESET, CANDIDATE, QUERY, SCORE, CONTEXT, READ, VOCABULARY = range(8)  # csrc/cuda/decoder.h's DecoderKind
MOST_CELLS = 8
PHASE_NAMES = ("cell", "reset", "candidate", "query", "score", "context", "read", "vocabulary")
_FIRST = (
    "projected", "read_input", "keys", "memory", "mask", "v", "beside", "w_query", "w_read", "b_read", "layer_masks",
    "read_mask", "out_mask", "hs", "contexts", "outs", "weights", "gates", "cs", "queries", "read_saved", "scores",
    "reset",
)  # fmt: skip
_OF_CELLS = ("w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0", "h_n", "c_n")
_GIVEN = ("d_hs", "d_contexts", "d_outs", "d_weights", "d_feed_n")
_FOUND = ("d_gates", "d_queries", "d_read", "d_context", "d_scores", "carry")
_SEARCH = ("w_out", "b_out", "out_input", "choices", "tokens", "ids", "lengths", "total", "wrong")


def _each(names: tuple[str, ...]) -> list[str]:
    return [f"{name}.{i}" for name in names for i in range(MOST_CELLS)]


# In the order of FS_DECODER_TENSORS.
TENSORS = (*_FIRST, *_each(_OF_CELLS), *_GIVEN, *_each(("d_h_n",)), *_FOUND, *_SEARCH)
_INDEX = {name: i for i, name in enumerate(TENSORS)}


class Dims(NamedTuple):
    """Sizes and options of a loop that its program depends on."""

    I: int  # noqa: E741  (the project's letter)
    H: int
    A: int
    D: int
    R: int  # the readout's outputs, 0: it is not in the loop
    P: int  # columns of w_read, or where a search has none of w_out
    pitches: tuple[int, ...]  # columns of w_ih
    projects: bool  # there is a W_q
    additive: bool
    layer_masks: bool
    read_mask: bool
    save: bool
    V: int = 0  # tokens of a search, 0: it is none


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
    token: bool = False  # a row of it for each token

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
            self.token,
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
            self.forward, CELLS[loop.cell].number, loop.cells, loop.layers, dims.H, dims.A, dims.D, dims.R, combine,
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


def dims(loop: LoopSpec, x: LoopTensors, save: bool, of: Vocabulary | None = None) -> Dims:
    """Of a loop's tensors; of: of a search's."""
    read = 0 if x.w_read is None else x.w_read.shape[0] // (2 if loop.combine == "maxout" else 1)
    reads = x.w_read if x.w_read is not None or of is None else of.weight
    return Dims(
        x.y.shape[2], x.hidden, 0 if x.keys is None else x.keys.shape[2], 0 if x.memory is None else x.memory.shape[2],
        read if loop.feed == "output" or of is not None else 0, 0 if reads is None else reads.shape[1],
        tuple(w.shape[1] for w in x.weights[::4]), x.w_query is not None, x.v is not None, x.layer_masks is not None,
        x.read_mask is not None, save, 0 if of is None else len(of.weight),
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


def shared(loop: LoopSpec, dims: Dims) -> Shared:
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
        loop, dims, starts if dims.R or dims.V else {}, tuple(below), feed, tuple(context), tuple(before),
        0 if between else loop.query_cell, 0 if loop.attend == "before" else 1,
    )  # fmt: skip


def order(of: Shared, cell_phases: Any, attention: list[Phase], read: Phase | None) -> list[Phase]:
    """Of a step forward."""
    loop = of.loop
    cells = [cell_phases(i) for i in range(loop.cells)]
    if loop.attend != "none":
        cells.insert({"before": 0, "after": loop.query_cell + 1, "between": 1}[loop.attend], attention)
    if read is not None:
        cells.append([read])
    return [phase for phases in cells for phase in phases]
