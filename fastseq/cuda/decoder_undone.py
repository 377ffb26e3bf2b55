"""A decoder's step backward, for csrc/cuda/decoder_backward.h: the phases of `program` undone, the last first.

A phase pulls, by products with the weights read the other way, over all that was made of its value.
"""

from typing import Any

from .decoder_phases import (
    CANDIDATE,
    CELL,
    COLUMNS,
    CONTEXT,
    NOWHERE,
    QUERY,
    READ,
    RESET,
    SCORE,
    Addend,
    Phase,
    Place,
    Segment,
    Shared,
    Vector,
    order,
)  # fmt: skip

__all__ = ["backward"]


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


def backward(of: Shared) -> tuple[tuple[Vector, ...], tuple[Phase, ...], tuple[int, int]]:
    loop, dims = of.loop, of.dims
    columns = COLUMNS[loop.cell].order
    vectors = [
        Vector(Place("d_gates", c, 0, True, len(columns) * dims.H), dims.H, len(columns), 2, column=columns)
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
    forward = order(
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
