"""The Triton kernels on any GPU: kernels/ through fastseq/ops."""

import importlib
from functools import partial

import torch
from torch import Tensor

from .._triton import obstacle_on, unavailable
from . import fused
from .call import RnnCall

__all__ = ["NAME", "refuses", "rnn", "rnn_cell", "unavailable"]

NAME = "triton"

rnn_cell = partial(fused.rnn_cell, on=NAME)


def refuses(call: RnnCall) -> str | None:
    return obstacle_on("the input", call.input) or fused.not_fused(call) or _too_large(call)


def rnn(call: RnnCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    if call.lengths is not None:
        call.lengths = call.lengths.to(call.device, non_blocking=True)  # once for all layers
    return fused.rnn(call, NAME)


def _too_large(call: RnnCall) -> str | None:
    if call.norms is not None and (call.noise is not None or call.states):
        return "layer normalisation with zoneout, recurrent dropout or every cell state is not in these kernels"
    return None if call.norms is None else _without_room(call.hidden_size, call.dtype, call.device.index)


def _without_room(hidden: int, dtype: torch.dtype, index: int | None) -> str | None:
    """Why no program of layer normalisation's kernels holds these weights; None: one does."""
    reason: str | None = importlib.import_module("fastseq.kernels.rnn_norm").without_room(hidden, dtype, index)
    return reason


_without_room._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks once, while it traces
