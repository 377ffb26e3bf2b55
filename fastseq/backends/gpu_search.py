"""Searches whose steps and choice of tokens stay on a GPU, by the decoder of whichever backend."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..ops.chunked_greedy import Rows, State
from ..ops.chunked_search import chunked_search
from ..ops.decoder_search import Found, Search, Vocabulary
from ..spec import DecoderOutput, DecoderState
from .decoder_call import DecoderCall

__all__ = ["not_searched", "search"]

Launch = Callable[[DecoderCall, Vocabulary, Search, Rows], None]  # fills the rows


def not_searched(call: DecoderCall) -> str | None:
    """Why the steps of this call and the choice of their tokens cannot stay on the GPU; None if they can."""
    if any(mask is not None for mask in call.masks):
        return "dropout, in training mode"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    return None


def search(
    decoder: Callable[[DecoderCall], DecoderOutput], call: DecoderCall, of: Vocabulary, asked: Search,
    launch: Launch | None = None,
) -> Found:  # fmt: skip
    """A search from `call`, of one step.

    launch: what runs all steps of a greedy one at once; None: a step at a time.
    """
    one = replace(call, need_weights=asked.need_weights)
    depth = len(call.state.layers[0])

    def run(y: Tensor, leaves: State) -> tuple[Tensor, State, Tensor | None]:
        output, state, weights = decoder(replace(one, y=y, state=_state(leaves, depth, call.state)))
        return output[:, -1], _leaves(state), weights

    def whole(leaves: State, rows: Rows) -> None:
        assert launch is not None
        launch(replace(one, state=_state(leaves, depth, call.state)), of, asked, rows)

    with torch.no_grad():
        source = 0 if call.keys.memory is None else call.keys.memory.shape[1]
        return chunked_search(run, _leaves(call.state), of, asked, source, None if launch is None else whole)


def _leaves(state: DecoderState) -> State:
    of_layers = tuple(leaf for layer in state.layers for leaf in layer)
    return of_layers if state.feed is None else (*of_layers, state.feed)


def _state(leaves: State, depth: int, like: DecoderState) -> DecoderState:
    count = depth * len(like.layers)
    layers = tuple(leaves[i : i + depth] for i in range(0, count, depth))
    return DecoderState(layers, None if like.feed is None else leaves[count])
