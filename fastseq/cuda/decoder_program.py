"""A decoder's step as a `Program`: its phases forward, here, and backward, in `decoder_undone`."""

from functools import lru_cache
from typing import Any

from ..ops.decoder_types import LoopSpec
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
    Dims,
    Phase,
    Place,
    Program,
    Segment,
    Shared,
    Vector,
    order,
    shared,
)  # fmt: skip
from .decoder_undone import backward

__all__ = ["program"]


@lru_cache(maxsize=256)
def program(loop: LoopSpec, dims: Dims, forward: bool) -> Program:
    """The phases of a step."""
    of = shared(loop, dims)
    vectors, phases, query = _forward(of) if forward else backward(of)
    return Program(forward, loop, dims, vectors, phases, query, (of.query_cell, of.query_offset), of.before)


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
    phases = order(of, lambda c: _cell(of, index, c), attention, _read(of, index) if dims.R else None)
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
