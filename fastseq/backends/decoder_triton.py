"""Attention decoders on the Triton kernels: what these refuse, and their search."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .._triton import obstacle_on, unavailable
from ..ops.chunked_search import State, chunked_search
from ..ops.decoder_search import Found, Search, Vocabulary
from ..spec import DecoderState
from . import decoder_fused
from .decoder_call import AttentionCall, DecoderCall

__all__ = [
    "NAME", "attention", "decoder", "refuses", "refuses_attention", "refuses_search", "search", "unavailable"
]  # fmt: skip

NAME = "triton"
MOST_CELLS = 8  # each is code of its own within the loop's kernel

attention = partial(decoder_fused.attention, on=NAME)
decoder = partial(decoder_fused.decoder, on=NAME)


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
    memory = call.keys.context if call.keys.memory is None else call.keys.memory
    if memory is not None and memory.shape[0] not in (0, call.y.shape[0]):
        return "several rows for each memory row: beams are chosen from Python"
    if any(mask is not None for mask in call.masks):
        return "dropout, in training mode"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    return refuses(call)


def search(call: DecoderCall, of: Vocabulary, asked: Search) -> Found | None:
    """A greedy search from `call`, of one step; None of beams, which are chosen from Python."""
    if asked.copies > 1:
        return None
    one = replace(call, need_weights=asked.need_weights)
    depth = len(call.state.layers[0])

    def run(y: Tensor, leaves: State) -> tuple[Tensor, State, Tensor | None]:
        output, state, weights = decoder(replace(one, y=y, state=_state(leaves, depth, call.state)))
        return output[:, -1], _leaves(state), weights

    with torch.no_grad():
        source = 0 if call.keys.memory is None else call.keys.memory.shape[1]
        return chunked_search(run, _leaves(call.state), of, asked, source)


def _leaves(state: DecoderState) -> State:
    of_layers = tuple(leaf for layer in state.layers for leaf in layer)
    return of_layers if state.feed is None else (*of_layers, state.feed)


def _state(leaves: State, depth: int, like: DecoderState) -> DecoderState:
    count = depth * len(like.layers)
    layers = tuple(leaves[i : i + depth] for i in range(0, count, depth))
    return DecoderState(layers, None if like.feed is None else leaves[count])
