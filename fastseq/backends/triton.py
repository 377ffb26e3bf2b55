"""The Triton kernels on any GPU: kernels/ through fastseq/ops."""

from functools import partial

from torch import Tensor

from .._triton import obstacle_on, unavailable
from . import fused
from .call import RnnCall

__all__ = ["NAME", "never", "refuses", "rnn", "rnn_cell", "unavailable"]

NAME = "triton"

rnn_cell = partial(fused.rnn_cell, on=NAME)
never = fused.never


def refuses(call: RnnCall) -> str | None:
    return obstacle_on("the input", call.input) or fused.not_fused(call)


def rnn(call: RnnCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    if call.lengths is not None:
        call.lengths = call.lengths.to(call.device, non_blocking=True)  # once for all layers
    return fused.rnn(call, NAME)
