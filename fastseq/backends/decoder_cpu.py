"""Attention decoders on the fused CPU kernels: what these refuse, and their search."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import _native
from ..ops.decoder_search import Found, Search, Vocabulary, decoder_search
from . import decoder_fused
from .decoder_call import AttentionCall, DecoderCall

__all__ = [
    "NAME", "attention", "decoder", "refuses", "refuses_attention", "refuses_search", "search", "unavailable"
]  # fmt: skip

NAME = "cpu"
_MOST_CELLS = 16  # kMaxCells of csrc/cpu/decoder.h

attention = partial(decoder_fused.attention, on=NAME)
decoder = partial(decoder_fused.decoder, on=NAME)


def unavailable() -> str | None:
    return _native.reason


def refuses(call: DecoderCall) -> str | None:
    return next(_obstacles(call), None)


def refuses_attention(call: AttentionCall) -> str | None:
    return next(_obstacles_of_attention(call), None)


def refuses_search(call: DecoderCall) -> str | None:
    """Why the steps of this call cannot run natively with the choice of their tokens; None if they can."""
    return next(_obstacles_of_search(call), None)


def search(call: DecoderCall, of: Vocabulary, asked: Search) -> Found:
    """All steps of a search; `call` is of one step."""
    return decoder_search(*decoder_fused.search_tensors(call), of, asked)


def _obstacles_anywhere(name: str, t: Tensor) -> Iterator[str]:
    if t.device.type != "cpu":
        yield f"{name} is on {t.device}; these kernels run on the CPU"
    if t.dtype not in (torch.float32, torch.bfloat16):
        yield f"{name} is {t.dtype}; these kernels take float32 and bfloat16"


def _obstacles_of_attention(call: AttentionCall) -> Iterator[str]:
    yield from _obstacles_anywhere("the query", call.query)
    yield from decoder_fused.not_fused_attention(call)


def _obstacles(call: DecoderCall) -> Iterator[str]:
    yield from _obstacles_anywhere("y", call.y)
    yield from decoder_fused.not_fused(call, _MOST_CELLS)
    if call.y.dtype == torch.bfloat16:
        odd = [f"{letter}={size}" for letter, size in _sizes(call).items() if size % 2]
        if odd:
            yield f"bfloat16 with odd {', '.join(odd)}; these kernels read bfloat16 in pairs"


def _obstacles_of_search(call: DecoderCall) -> Iterator[str]:
    spec = call.spec
    yield from _obstacles(call)
    if spec.residual is not None:
        yield f"residual={spec.residual} lies within the loop, which is all of the decoder"
    if spec.num_layers > _MOST_CELLS:
        yield f"num_layers={spec.num_layers}: at most {_MOST_CELLS} layers loop"
    if len({*spec.readout}) < len(spec.readout):
        yield f"a part twice in readout={spec.readout}"
    if spec.context_side == "hidden" and spec.cell == "lstm":
        yield "context_side='hidden' of an LSTM"
    if any(mask is not None for mask in call.masks):
        yield "dropout, in training mode"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        yield "torch.func"


def _sizes(call: DecoderCall) -> dict[str, int]:
    """Those that the kernels sum over or step by."""
    keys, readout = call.keys, call.params.readout
    context = keys.context if keys.memory is None else keys.memory
    output = 0 if readout is None else readout[0].shape[0] // (2 if call.spec.combine == "maxout" else 1)
    return {
        "I": call.y.shape[2],
        "H": call.hidden_size,
        "A": 0 if keys.keys is None else keys.keys.shape[2],
        "D": 0 if context is None else context.shape[-1],
        "R": output,
    }
