"""Attention decoders on the CUDA kernels: what these refuse, how they are laid out, and their search.

Attention of all steps at once, where nothing feeds back, is Triton's: as good there, and no loop.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from ..cuda import decoder as kernels
from ..cuda.decoder_plan import DecoderPlan
from ..cuda.native import obstacle_on, stop_flag, unavailable
from ..cuda.plan import CannotPlan
from ..ops.chunked_greedy import Rows
from ..ops.decoder_search import Found, Search, Vocabulary
from ..ops.decoder_types import COLUMNS
from . import cuda, decoder_fused, gpu_search
from .decoder_call import DecoderCall
from .gpu_search import not_searched

__all__ = [
    "NAME", "decoder", "greedy", "layout", "layout_of_search", "refuses", "refuses_search", "search", "unavailable"
]  # fmt: skip

NAME = "cuda"
MOST_CELLS = 8  # kMostCells of csrc/cuda/decoder.h

decoder = partial(decoder_fused.decoder, on=NAME)


def refuses(call: DecoderCall) -> str | None:
    return next(_obstacles(call), None)


def _obstacles(call: DecoderCall) -> Iterator[str]:
    obstacle = obstacle_on("y", call.y)
    if obstacle is not None:
        yield obstacle
    yield from decoder_fused.not_fused(call, MOST_CELLS)
    if torch.compiler.is_compiling():  # whose sizes may be symbols; without room the kernel's host says so
        return
    if decoder_fused.plan(call.spec).layers < call.spec.num_layers and call.spec.cell != "gru_reset_before":
        hidden = call.state.layers[0][0].shape[1]
        reason = cuda.without_room(call.spec.cell, hidden, call.y.dtype, call.y.device, 1)
        if reason is not None:
            yield reason
    try:
        layout(call)
    except CannotPlan as error:
        yield str(error)


def layout(call: DecoderCall) -> tuple[DecoderPlan, ...]:
    """How the loop's kernels are laid out, forward and backward; empty where nothing loops. Raises CannotPlan."""
    todo = decoder_fused.plan(call.spec)
    if todo.loop is None or 0 in call.y.shape[:2]:
        return ()
    with torch.no_grad():
        return kernels.layouts(todo.loop, decoder_fused.loop_tensors(call, todo, call.y))


def refuses_search(call: DecoderCall) -> str | None:
    """Why the steps of this call and the choice of their tokens cannot stay on the GPU; None if they can."""
    return not_searched(call) or refuses(call)


def search(call: DecoderCall, of: Vocabulary, asked: Search) -> Found:
    """A greedy search, in one launch where there is room, or one by beams. Raises RuntimeError if a kernel gave up."""
    in_one = asked.copies == 1 and isinstance(_whole(call, of, len(asked.norms) - 1), DecoderPlan)
    with kernels.packed_once():
        found = gpu_search.search(decoder, call, of, asked, _launch if in_one else None)
    stop_flag(call.y)  # the GPU has been waited for; a CUDA graph's launches do not look, and there is no next one
    return found


def greedy(call: DecoderCall, of: Vocabulary) -> str:
    """How a greedy search of as many steps as this call has runs, in words."""
    found = layout_of_search(replace(call, y=call.y[:, :1]), of, call.y.shape[1])
    return f"in one launch, {found}" if isinstance(found, DecoderPlan) else f"step by step: {found}"


def layout_of_search(call: DecoderCall, of: Vocabulary, steps: int) -> DecoderPlan | str:
    """How one launch of so many steps from this call, of one, would be laid out; or why there is none."""
    return refuses_search(call) or _whole(call, of, steps)


def _whole(call: DecoderCall, of: Vocabulary, steps: int) -> DecoderPlan | str:
    """As layout_of_search, of a call that is not refused."""
    spec = call.spec
    if len(call.y) == 0:
        return "there are no rows"
    if spec.cell not in COLUMNS:
        return f"cell={spec.cell!r} within a decoder's loop is not fused"
    if spec.num_layers > MOST_CELLS:
        return f"num_layers={spec.num_layers}: at most {MOST_CELLS} layers loop"
    if spec.residual is not None:
        return f"residual={spec.residual} lies within the loop, which is all of the decoder"
    if len({*spec.readout}) < len(spec.readout):
        return f"a part twice in readout={spec.readout}"
    try:
        with torch.no_grad():
            return kernels.search_layout(*decoder_fused.search_tensors(call), of, steps)
    except CannotPlan as error:
        return str(error)


def _launch(call: DecoderCall, of: Vocabulary, asked: Search, rows: Rows) -> None:
    kernels.search(*decoder_fused.search_tensors(call), of, asked, rows)
