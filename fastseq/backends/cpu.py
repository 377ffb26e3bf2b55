"""The fused CPU kernels: csrc/cpu through fastseq/ops."""

from functools import partial

import torch

from .. import _native
from . import fused
from .call import RnnCall

__all__ = ["NAME", "never", "refuses", "rnn", "rnn_cell", "unavailable"]

NAME = "cpu"

rnn = partial(fused.rnn, on=NAME)
rnn_cell = partial(fused.rnn_cell, on=NAME)
never = fused.never


def unavailable() -> str | None:
    return _native.reason


def refuses(call: RnnCall) -> str | None:
    if call.input.device.type != "cpu":
        return f"the input is on {call.input.device}; these kernels run on the CPU"
    if call.input.dtype not in (torch.float32, torch.bfloat16):
        return f"the input is {call.input.dtype}; these kernels take float32 and bfloat16"
    return fused.not_fused(call)
