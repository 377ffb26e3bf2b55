"""Layers as torch.onnx.export holds them: the standard nodes LSTM, GRU and RNN, which belong to no backend.

ONNX's operators (github.com/onnx/onnx/blob/main/docs/Operators.md) compute what torch.nn does, with other orders of the
gates, and take rows of several lengths.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.cells import CELLS
from ..ops.extras import Extras
from . import stack, stock
from .call import Results, RnnCall

__all__ = ["NAME", "exporting", "rnn", "rnn_cell"]

NAME = "torch"  # autocast's casts are those of torch's operators

# the node, its gates in torch's numbering (i f g o; r z n), its attributes
NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),  # i o f c
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z r h
    "gru_reset_before": ("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),  # of each direction
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


def exporting() -> bool:
    """Whether torch.onnx.export asks, by torch.export (dynamo=True) or by tracing."""
    return (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None) and _asked()


def _asked() -> bool:
    return torch.onnx.is_in_onnx_export()


_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo itself takes torch's function for False


def rnn(call: RnnCall) -> Results:
    """A layer stack; raises InputError where ONNX has no node for it."""
    _refuse(
        f"ONNX's {NODES[call.cell][0]} has no",
        ("resets= within a sequence; use torch.export", call.resets is not None),
        (_zoneout(call), call.noise is not None and any(call.noise.zoneout)),
        ("recurrent dropout; call .eval() first, which ends it, or use torch.export", call.noise is not None),
        ("layer normalisation; use torch.export", call.norms is not None),
        ("cell states of every step; use torch.export", call.states),
        (f"projection, proj_size={call.proj_size}; use torch.export", call.proj_size > 0),
        ("PackedSequence; pad it and pass lengths=", call.batch_sizes is not None),
    )
    if torch.compiler.is_compiling():
        return stack.run(call, _layer)
    _refuse(
        "torch.onnx.export(dynamo=False), use dynamo=True, records no",
        ("lengths=", call.lengths is not None),
        ("reset gate before the product", call.cell == "gru_reset_before"),
    )
    return stock.rnn(call)  # torch.onnx makes the node of torch's operator


def rnn_cell(call: RnnCall) -> tuple[Tensor, ...]:
    """One step, in torch's operators: ONNX has no cells."""
    return stock.rnn_cell(call)


def _zoneout(call: RnnCall) -> str:
    h, c = (0.0, 0.0) if call.noise is None else call.noise.zoneout
    of = f"(h {h}, c {c})" if call.cell == "lstm" else str(h)
    return f"zoneout {of}, which stays in evaluation, as a share of the old value; use torch.export"


def _refuse(who: str, *what: tuple[str, bool]) -> None:
    for name, given in what:
        if given:
            raise InputError(f"{who} {name}")


def _layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: None,
    batch_sizes: None,
    batch_first: bool,
    bidirectional: bool,
    extras: Extras,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """One node (`stack.Layer`)."""
    name, order, attributes = NODES[cell]
    dirs, hidden = 2 if bidirectional else 1, weights[1].shape[1]
    x = x.transpose(0, 1) if batch_first else x  # ONNX Runtime has time-major layers alone
    steps, rows = x.shape[:2]
    per = len(weights) // dirs
    each = [[_ordered(w, order) for w in weights[d * per : (d + 1) * per]] for d in range(dirs)]
    w_ih, w_hh = (torch.stack([direction[k] for direction in each]) for k in range(2))
    bias = torch.stack([torch.cat(direction[2:4]) for direction in each]) if per > 2 else None
    sizes = None if lengths is None else lengths.to(torch.int32)
    state = [None if s is None else s.to(x.dtype) for s in ((h0, c0) if cell == "lstm" else (h0,))]
    final = (dirs, rows, hidden)
    settings: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if bidirectional else "forward"}
    nodes: Any = torch.onnx.ops.symbolic_multi_out(
        name,
        [x, w_ih, w_hh, bias, sizes, *state],
        settings | {key: value * dirs if isinstance(value, list) else value for key, value in attributes.items()},
        dtypes=[x.dtype] * (1 + len(state)),
        shapes=[(steps, dirs, rows, hidden), *[final] * len(state)],
    )
    out, *finals = nodes  # [T, D, B, H], [D, B, H]
    if sizes is not None:  # of rows of length 0 ONNX Runtime gives 0
        empty = (sizes == 0)[:, None]
        finals = [n if s is None else torch.where(empty, s, n) for s, n in zip(state, finals, strict=True)]
    h_n, *c_n = finals
    out = out.transpose(1, 2).flatten(2)
    return out.transpose(0, 1) if batch_first else out, h_n, c_n[0] if c_n else None, None


def _ordered(w: Tensor, order: tuple[int, ...]) -> Tensor:
    """Rows [G*H, ...] of a weight or bias with the gates in ONNX's order."""
    hidden = w.shape[0] // len(order)
    return torch.cat([w[k * hidden : (k + 1) * hidden] for k in order])  # slices fold into constants, chunks do not


assert NODES.keys() == CELLS.keys()
