"""What the kernels of a decoder's loop are told of it at compile time: `Static`, and the phases of a step.

Nothing here depends on the number of rows, steps or source positions. Letters as in fastseq/ops/decoder.py.
"""

from dataclasses import dataclass

import triton.language as tl

from fastseq.ops.decoder_types import LoopSpec, LoopTensors, parts

from .cells import CELLS

__all__ = [
    "CANDIDATE",
    "CELL",
    "CONTEXT",
    "CONTEXT_FED",
    "MAXOUT",
    "NOT_FED",
    "OUTPUT_FED",
    "QUERY",
    "READ",
    "RESET",
    "SCORE",
    "TANH",
    "Blocks",
    "Static",
    "static",
]  # fmt: skip

# Phases, as (kind, cell). Backward has the same in the opposite order, each undoing its own.
CELL = tl.constexpr(0)
RESET = tl.constexpr(1)  # r, z and r h of a gru_reset_before
CANDIDATE = tl.constexpr(2)  # its n and h'
QUERY = tl.constexpr(3)  # W_q times the state that asks
SCORE = tl.constexpr(4)
CONTEXT = tl.constexpr(5)  # softmax, and the memory's weighted sum
READ = tl.constexpr(6)  # a fed readout

NOT_FED = tl.constexpr(0)
CONTEXT_FED = tl.constexpr(1)
OUTPUT_FED = tl.constexpr(2)

TANH = tl.constexpr(0)
LINEAR = tl.constexpr(1)
MAXOUT = tl.constexpr(2)


# Frozen classes and not tuples: Triton hands a tuple on piece by piece.
@dataclass(frozen=True)
class Blocks:
    """Tile sizes: rows N, columns of a product, its K; source positions, and units and features met with them."""

    n: int
    u: int
    k: int
    s: int
    a: int
    d: int


@dataclass(frozen=True)
class StaticCell:
    """A cell of the loop; -1 where it reads no such part."""

    pitch: int  # of w_ih
    below: int  # columns of w_ih where its parts begin
    feed: int
    context: int
    layer: int  # whose carried state is its own
    before: int  # the cell whose state it starts from,
    offset: int  # of step t - 1 (0) or t (1)


@dataclass(frozen=True)
class Static:
    """All of a loop but N, B, T and S."""

    phases: tuple[tuple[int, int], ...]
    cells: tuple[StaticCell, ...]
    input_gates: tuple[int, ...]  # INPUT and HIDDEN of `cells.Cell`
    hidden_gates: tuple[int, ...]
    gates: int  # G
    columns: int  # of d_gates
    recurrent: int  # the first so many of them are the recurrent product's
    lstm: bool
    reset_before: bool
    H: int
    A: int
    D: int
    F: int  # features of what is fed, 0: nothing
    R: int  # the readout's outputs, 0: it is not in the loop
    P: int  # pitch of w_read
    feed: int
    combine: int
    r_state: int  # columns of w_read where its parts begin, or -1
    r_prev: int
    r_context: int
    query_cell: int  # the state that asks is this cell's,
    query_offset: int  # of step t - 1 (0) or t (1)
    attends: bool
    additive: bool
    fast: bool  # FAST_TANH of `scores`
    projects: bool  # there is a W_q
    save: bool
    blocks: Blocks
    dot: str  # as in `launch.precision`

    @property
    def undone(self) -> tuple[tuple[int, int], ...]:
        """The phases of a step backward: CONTEXT makes the context's gradient, SCORE the weights', QUERY the others."""
        attention = [(kind.value, 0) for kind in (CONTEXT, SCORE, QUERY)]
        of = [phase for phase in reversed(self.phases) if phase not in attention]
        if not self.attends:
            return tuple(of)
        first = len(self.phases) - 1 - self.phases.index((CONTEXT.value, 0))
        return (*of[:first], *attention, *of[first:])

    @property
    def PRECISION(self) -> tl.constexpr:
        return tl.constexpr(self.dot)

    @property
    def INPUT(self) -> tl.tuple:
        return tl.tuple([*map(tl.constexpr, self.input_gates)])

    @property
    def HIDDEN(self) -> tl.tuple:
        return tl.tuple([*map(tl.constexpr, self.hidden_gates)])


def static(loop: LoopSpec, x: LoopTensors, save: bool, blocks: Blocks, precision: str, fast: bool) -> Static:
    """Of a loop and its tensors."""
    attends, between, before_reset = loop.attend != "none", loop.attend == "between", loop.cell == "gru_reset_before"
    memory = 0 if x.memory is None else x.memory.shape[2]
    read = 0 if x.w_read is None else x.w_read.shape[0] // (2 if loop.combine == "maxout" else 1)
    fed = {"none": 0, "context": memory, "output": read}[loop.feed]
    columns = parts(loop, x) if loop.feed == "output" else {}
    cells = []
    for i in range(loop.cells):
        at = x.y.shape[2] if i == 0 else 0
        below = feed = context = -1
        if i == 0 and loop.feed != "none":
            feed, at = at, at + fed
        elif i and not between:
            below, at = 0, x.hidden
        if loop.contexts[i]:
            context = at
        source = (1 - i, i) if between else (i, 0)
        cells.append(StaticCell(x.weights[4 * i].shape[1], below, feed, context, 0 if between else i, *source))
    of = None if before_reset else CELLS[loop.cell]
    return Static(
        _phases(loop, x.w_query is not None), tuple(cells),
        (0, 1, 2, -1) if of is None else of.INPUT, (0, 1, -1, -1) if of is None else of.HIDDEN,
        3 if of is None else of.gates, 3 if of is None else 4, 3 if loop.cell == "gru" else 2 if before_reset else 4,
        loop.cell == "lstm", before_reset, x.hidden, 0 if x.keys is None else x.keys.shape[2], memory, fed,
        read if loop.feed == "output" else 0, 0 if x.w_read is None else x.w_read.shape[1],
        {"none": 0, "context": 1, "output": 2}[loop.feed], {"tanh": 0, "linear": 1, "maxout": 2}[loop.combine],
        *(columns[part][0] if part in columns else -1 for part in ("state", "prev_state", "context")),
        0 if between else loop.query_cell, 0 if loop.attend == "before" else 1, attends, x.v is not None, fast,
        x.w_query is not None, save, blocks, precision,
    )  # fmt: skip


def _phases(loop: LoopSpec, projects: bool) -> tuple[tuple[int, int], ...]:
    """Of a step, in order."""
    kinds = (RESET.value, CANDIDATE.value) if loop.cell == "gru_reset_before" else (CELL.value,)
    cells = [[(kind, i) for kind in kinds] for i in range(loop.cells)]
    attention = [(kind.value, 0) for kind in ((QUERY,) if projects else ()) + (SCORE, CONTEXT)]
    at = {"none": 0, "before": 0, "after": loop.query_cell + 1, "between": 1}[loop.attend]
    if loop.attend != "none":
        cells.insert(at, attention)
    if loop.feed == "output":
        cells.append([(READ.value, 0)])
    return tuple(phase for of in cells for phase in of)
