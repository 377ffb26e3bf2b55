"""Attention decoders on the Triton kernels: what these refuse, and their search."""

from collections.abc import Iterator
from functools import partial

from .._triton import obstacle_on, unavailable
from . import decoder_fused, gpu_search
from .decoder_call import AttentionCall, DecoderCall
from .gpu_search import not_searched

__all__ = [
    "NAME", "attention", "decoder", "refuses", "refuses_attention", "refuses_search", "search", "unavailable"
]  # fmt: skip

NAME = "triton"
MOST_CELLS = 8  # each is code of its own within the loop's kernel

attention = partial(decoder_fused.attention, on=NAME)
decoder = partial(decoder_fused.decoder, on=NAME)
search = partial(gpu_search.search, decoder)


def refuses(call: DecoderCall) -> str | None:
    return next(_obstacles(call), None)


def refuses_attention(call: AttentionCall) -> str | None:
    return obstacle_on("the query", call.query) or next(decoder_fused.not_fused_attention(call), None)


def _obstacles(call: DecoderCall) -> Iterator[str]:
    obstacle = obstacle_on("y", call.y)
    if obstacle is not None:
        yield obstacle
    yield from decoder_fused.not_fused(call, MOST_CELLS)


def refuses_search(call: DecoderCall) -> str | None:
    """Why the steps of this call and the choice of their tokens cannot stay on the GPU; None if they can."""
    return not_searched(call) or refuses(call)
