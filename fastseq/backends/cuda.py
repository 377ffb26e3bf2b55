"""The CUDA C++ kernels on NVIDIA GPUs: csrc/cuda through fastseq/cuda and fastseq/ops."""

from functools import partial

import torch
from torch import Tensor

from ..cuda import devices
from ..cuda.native import kind_of, obstacle_on, unavailable
from ..cuda.plan import CannotPlan, RnnPlan, plan
from ..ops.rnn_gpu import tf32_flag
from . import fused
from .call import RnnCall

__all__ = ["NAME", "layout", "never", "refuses", "rnn", "rnn_cell", "unavailable", "without_room"]

NAME = "cuda"

rnn_cell = partial(fused.rnn_cell, on=NAME)


def refuses(call: RnnCall) -> str | None:
    reason = obstacle_on("the input", call.input) or fused.not_fused(call) or never(call)
    return reason or without_room(call.cell, call.hidden_size, call.dtype, call.device, 2 if call.bidirectional else 1)


def never(call: RnnCall) -> str | None:
    reason = fused.never(call)
    if reason is None and call.norms is not None:
        reason = "layer normalisation is not in these kernels"
    return reason


def without_room(cell: str, hidden: int, dtype: torch.dtype, device: torch.device, directions: int) -> str | None:
    """Why no layout holds these weights; None: one does. The batch changes nothing: groups take rows by turns."""
    try:
        for way in ("forward", "backward"):
            plan(cell, 1, hidden, kind_of(dtype, tf32_flag("rnn")), devices.of(device), directions, way)
    except CannotPlan as error:
        return str(error)
    return None


without_room._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks once, while it traces


def layout(call: RnnCall) -> tuple[RnnPlan, RnnPlan]:
    """How a layer's kernels are laid out, forward and backward. Raises CannotPlan."""
    of_call = (call.cell, call.batch, call.hidden_size, kind_of(call.dtype, tf32_flag("rnn")), devices.of(call.device))
    directions = 2 if call.bidirectional else 1
    return plan(*of_call, directions, "forward"), plan(*of_call, directions, "backward")


def rnn(call: RnnCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    if call.lengths is not None:
        call.lengths = call.lengths.to(call.device, non_blocking=True)  # once for all layers
    return fused.rnn(call, NAME)
