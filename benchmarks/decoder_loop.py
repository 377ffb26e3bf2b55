"""The peer of the decoders: the loop over target steps as a careful PyTorch user writes it.

The keys are projected once, outside the loop; cells are torch.nn's; nothing is computed or kept that the step does not
need. It runs eagerly, and under torch.compile as a peer of its own.
"""

import torch
from torch import Tensor, nn

__all__ = ["CELLS", "BahdanauLoop", "LuongLoop"]

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


class BahdanauLoop(nn.Module):
    """c_t of additive attention by h_{t-1}; h_t = cell([y_t, c_t], h_{t-1}), which is the output."""

    def __init__(self, cell: str, hidden: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.lstm = cell == "lstm"
        self.cell = CELLS[cell](2 * hidden, hidden, dtype=dtype)
        self.keys = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.query = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.energy = nn.Linear(hidden, 1, bias=False, dtype=dtype)

    def forward(
        self,
        y: Tensor,  # [B, T, H]
        memory: Tensor,  # [B, S, H]
        mask: Tensor,  # [B, S], True = attend
    ) -> Tensor:  # [B, T, H]
        keys, states = self.keys(memory), []
        h = c = y.new_zeros(y.shape[0], y.shape[2])
        for y_t in y.unbind(1):
            scores = self.energy(torch.tanh(keys + self.query(h)[:, None])).squeeze(-1)
            x = torch.cat([y_t, _context(scores, memory, mask)], -1)
            if self.lstm:
                h, c = self.cell(x, (h, c))
            else:
                h = self.cell(x, h)
            states.append(h)
        return torch.stack(states, 1)


class LuongLoop(nn.Module):
    """h_t = cell([y_t, a_{t-1}], h_{t-1}); c_t of general attention by h_t; a_t = tanh(W [c_t, h_t]), the output."""

    def __init__(self, cell: str, hidden: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.lstm = cell == "lstm"
        self.cell = CELLS[cell](2 * hidden, hidden, dtype=dtype)
        self.keys = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.combine = nn.Linear(2 * hidden, hidden, bias=False, dtype=dtype)

    def forward(
        self,
        y: Tensor,  # as in BahdanauLoop
        memory: Tensor,
        mask: Tensor,
    ) -> Tensor:  # [B, T, H]
        keys, outputs = self.keys(memory), []
        h = c = a = y.new_zeros(y.shape[0], y.shape[2])
        for y_t in y.unbind(1):
            x = torch.cat([y_t, a], -1)
            if self.lstm:
                h, c = self.cell(x, (h, c))
            else:
                h = self.cell(x, h)
            scores = torch.bmm(keys, h[:, :, None])[:, :, 0]
            a = torch.tanh(self.combine(torch.cat([_context(scores, memory, mask), h], -1)))
            outputs.append(a)
        return torch.stack(outputs, 1)


def _context(scores: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    """[B, S], [B, S, H], [B, S] -> [B, H]."""
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.bmm(weights[:, None], memory)[:, 0]
