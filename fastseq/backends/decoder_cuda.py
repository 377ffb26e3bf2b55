"""Attention decoders on the CUDA kernels: what these refuse, how they are laid out, and their search.

Attention of all steps at once, where nothing feeds back, is Triton's: as good there, and no loop.
"""

from collections.abc import Iterator
from functools import partial

import torch

from ..cuda.decoder import layouts
from ..cuda.decoder_plan import DecoderPlan
from ..cuda.native import obstacle_on, unavailable
from ..cuda.plan import CannotPlan
from . import cuda, decoder_fused, gpu_search
from .decoder_call import DecoderCall
from .gpu_search import not_searched

__all__ = ["NAME", "decoder", "layout", "refuses", "refuses_search", "search", "unavailable"]

NAME = "cuda"
MOST_CELLS = 8  # kMostCells of csrc/cuda/decoder.h

decoder = partial(decoder_fused.decoder, on=NAME)
search = partial(gpu_search.search, decoder)


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
        return layouts(todo.loop, decoder_fused.loop_tensors(call, todo, call.y))


def refuses_search(call: DecoderCall) -> str | None:
    """Why the steps of this call and the choice of their tokens cannot stay on the GPU; None if they can."""
    return not_searched(call) or refuses(call)
