"""What follows a recurrence's backward: the weights' gradients, PyTorch's products over all tokens."""

import torch
from torch import Tensor

from .cells import Cell
from .launch import without_autocast

__all__ = ["weight_gradients"]


def weight_gradients(kind: Cell, d_gates: Tensor, x: Tensor, h_before: Tensor, bias: bool) -> list[Tensor]:
    """Those of w_ih, w_hh (, b_ih, b_hh) of one direction, from d_gates [tokens, COLUMNS * H]."""
    with without_autocast(x):
        hidden = h_before.shape[1]
        rows, runs = kind.gates * hidden, _runs(kind)
        d_w_hh = h_before.new_empty((rows, hidden))
        for gate, place, count in runs:
            columns = d_gates.narrow(1, place * hidden, count * hidden)
            torch.mm(columns.t(), h_before, out=d_w_hh.narrow(0, gate * hidden, count * hidden))
        products = [torch.mm(d_gates.narrow(1, 0, rows).t(), x), d_w_hh]
        if not bias:
            return products
        sums = d_gates.sum(0, dtype=torch.float32).to(x.dtype)
        of_hidden = torch.cat([sums.narrow(0, place * hidden, count * hidden) for _, place, count in runs])
        return [*products, sums.narrow(0, 0, rows).clone(), of_hidden]  # no two results share memory


def _runs(kind: Cell) -> list[tuple[int, int, int]]:
    """(first gate, first place, count) of W_hh's gates whose gradients lie side by side in d_gates."""
    places = {gate: kind.PLACE[column] for column, gate in enumerate(kind.HIDDEN) if gate >= 0}
    runs: list[tuple[int, int, int]] = []
    for gate in range(kind.gates):
        if runs and places[gate] == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((gate, places[gate], 1))
    return runs
