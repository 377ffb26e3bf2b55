"""A decoder's step as a `Program`: its phases forward, here, and backward, in `decoder_undone`."""

from collections.abc import Iterator
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
    VOCABULARY,
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
    elif dims.D:  # a fixed one
        add("context", Vector(Place("memory", 0, 0, False, dims.D), dims.D, initial=True))
    if dims.R:
        fed = loop.feed == "output"
        add("out", Vector(Place("outs", 0, int(fed), True, dims.R), dims.R, initial=fed))
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
    if dims.V:
        phases.append(_vocabulary(of, index))
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
            Addend(Place("projected", 0, 0, not dims.V, gates * H), columns.input, H, token=dims.V > 0),
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


def _parts(of: Shared, index: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """The vector, its step's shift and the first column of each part of the readout but the input."""
    last = of.loop.cells - 1
    context = index.get("context", -1), int(of.loop.feed == "context")
    source = {"state": (last, 1), "prev_state": (last, 0), "context": context}
    for part, at in of.starts.items():
        if part != "input":
            yield (*source[part], at)


def _read(of: Shared, index: dict[str, int]) -> Phase:
    dims, pair = of.dims, of.pair
    columns = (0, 1)[:pair]
    segments = []
    for vector, shift, at in _parts(of, index):
        mask = Place("read_mask", 0, 0, True, dims.P, at) if dims.read_mask else NOWHERE
        segments.append(Segment(vector, shift, "w_read", at, pair * dims.P, 1, dims.P, columns, mask=mask))
    addends = [Addend(Place("b_read", stepped=False), columns, 1, pair, bias=True)]
    if "input" in of.starts:
        addends.append(Addend(Place("read_input", 0, 0, not dims.V, pair * dims.R), columns, 1, pair, token=dims.V > 0))
    return Phase(
        READ, width=dims.R, columns=pair, segments=tuple(segments), addends=tuple(addends), output=index["out"],
        factors=((Place("out_mask", 0, 0, True, dims.R), 0),),
    )  # fmt: skip


def _vocabulary(of: Shared, index: dict[str, int]) -> Phase:
    """Logits of what the readout makes or, where it has no weights, of its parts side by side."""
    dims = of.dims
    addends = [Addend(Place("b_out", stepped=False), bias=True)]
    if dims.R:
        segments = [Segment(index["out"], int(of.loop.feed == "output"), "w_out", 0, dims.R, 1)]
    else:
        segments = [Segment(vector, shift, "w_out", at, dims.P, 1) for vector, shift, at in _parts(of, index)]
        if "input" in of.starts:
            addends.append(Addend(Place("out_input", 0, 0, False, dims.V), token=True))
    return Phase(VOCABULARY, width=dims.V, segments=tuple(segments), addends=tuple(addends))
