"""Where the row-steps of a layer's tensors lie: the host's `Batch`, and what kernels make of it.

Token (t, b) of x, out, gates and all that is like them lies at t * step + b * row of a padded batch, or at
starts[t] + b of a packed one. Direction 1 runs t = T-1 .. 0 and holds its initial state while t >= length.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned

__all__ = ["Batch", "before", "bias_rows", "lengths_of", "load_either", "starts_anew", "token"]


class Batch(NamedTuple):
    """T steps of B rows, and the numbers and small tensors that find them."""

    T: int
    B: int
    tokens: int
    step: int
    row: int
    starts: Tensor | None = None  # [T] int64: packed
    lengths: Tensor | None = None  # [B] int32 or int64, clamped to [0, T] by the kernels; None: T
    resets: Tensor | None = None  # [tokens] uint8: where segments begin

    @classmethod
    def of(
        cls, x: Tensor, lengths: Tensor | None, resets: Tensor | None, batch_sizes: Tensor | None, batch_first: bool
    ) -> "Batch":
        """That of x [T, B, I], [B, T, I] if batch_first, or packed [N, I] with batch_sizes [T] on the CPU."""
        if batch_sizes is not None:
            return cls._packed(x, batch_sizes)
        if lengths is not None:
            lengths = aligned(lengths.to(x.device, non_blocking=True))
            if lengths.dtype not in (torch.int32, torch.int64):
                lengths = lengths.long()
        if resets is not None:
            resets = aligned(resets.view(torch.uint8))
        if batch_first:
            rows, steps = x.shape[:2]
            return cls(steps, rows, steps * rows, 1, steps, lengths=lengths, resets=resets)
        steps, rows = x.shape[:2]
        return cls(steps, rows, steps * rows, rows, 1, lengths=lengths, resets=resets)

    @classmethod
    def _packed(cls, x: Tensor, batch_sizes: Tensor) -> "Batch":
        sizes = batch_sizes.tolist()
        ends = 0
        for t, size in enumerate(sizes):  # else a kernel would read where nothing is
            if not 1 <= size <= (sizes[t - 1] if t else x.shape[0]):
                raise IndexError(f"batch_sizes[{t}] is {size}; they start at 1 or more and never grow")
            ends += size
        if ends != x.shape[0]:
            raise IndexError(f"batch_sizes add up to {ends}, the packed data has {x.shape[0]} rows")
        starts = batch_sizes.cumsum(0) - batch_sizes
        lengths = torch.searchsorted(-batch_sizes, -torch.arange(sizes[0]))  # of row b: steps of more than b rows
        T = len(sizes)
        room = T + T % 2  # so that both begin at a multiple of 16 bytes
        both = torch.cat((starts, starts.new_zeros(room - T), lengths)).to(x.device, non_blocking=True)  # one transfer
        return cls(T, sizes[0], ends, 0, 1, both[:T], both[room:])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' T, B, tokens, step, row."""
        return self.T, self.B, self.tokens, self.step, self.row

    @property
    def places(self) -> tuple[Tensor | None, ...]:
        """Their lengths, starts, resets."""
        return self.lengths, self.starts, self.resets

    @property
    def ragged(self) -> bool:
        """Whether there are tokens behind a row's end."""
        return self.lengths is not None and self.starts is None

    def valid(self, batch_first: bool) -> Tensor:
        """[T, B, 1], or [B, T, 1] if batch_first: the tokens of a ragged batch that are not behind an end."""
        assert self.lengths is not None
        steps, ends = torch.arange(self.T, device=self.lengths.device), self.lengths
        mask = steps < ends.unsqueeze(1) if batch_first else steps.unsqueeze(1) < ends
        return mask.unsqueeze(2)


@triton.jit
def lengths_of(lengths, rows, rows_in, T):
    """[rows] int32: each row's length within [0, T]; 0 of a row that does not exist."""
    if lengths is None:
        length = tl.where(rows_in, T, 0).to(tl.int32)
    else:
        length = tl.load(lengths + rows, rows_in, 0)
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    return length


@triton.jit
def token(t, rows, there, starts, step, row):
    """[rows] int64: where token (t[b], rows[b]) lies; whatever of rows that are not `there`."""
    if starts is None:
        at = t.to(tl.int64) * step + rows * row  # int64 first: T * B * H passes 2**31
    else:
        at = tl.load(starts + t, there, 0) + rows
    return at


@triton.jit
def before(t, d, length):
    """([rows] the step before step t in direction d, whether it is one; otherwise the initial state is before t)."""
    t = tl.where(d == 0, t - 1, t + 1)
    return t, (t >= 0) & (t < length)


@triton.jit
def starts_anew(resets, t, d, length, there, rows, starts, step, row):
    """[rows]: which of those that are `there` start from zeros at step t of direction d.

    Where a segment begins, forward; in reverse at its end, before which the next one begins, within the row's length.
    """
    begin = tl.where(d == 0, t, t + 1)
    there &= begin < length
    return tl.load(resets + token(begin, rows, there, starts, step, row), there, 0) != 0


@triton.jit
def load_either(p_steps, at, steps, p_initial, initial_at, initial):
    """[rows, units] fp32: of p_steps where the mask `steps` says so, of p_initial (or 0) where `initial` does."""
    value = tl.load(p_steps + at, steps, 0.0).to(tl.float32)
    if p_initial is not None:
        value += tl.load(p_initial + initial_at, initial, 0.0).to(tl.float32)
    return value


@triton.jit
def bias_rows(
    b_ih,  # [G * H] or None
    b_ih_reverse,  # of direction 1
    b_hh,
    b_hh_reverse,
    d,
    units,
    units_in,
    INPUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    H: tl.constexpr,
):
    """For each column [units] fp32: the biases that add to it."""
    if b_ih is not None:
        p_input = b_ih
        p_hidden = b_hh
        if DIRECTIONS == 2:
            if d == 1:
                p_input = b_ih_reverse
                p_hidden = b_hh_reverse
    rows = ()
    for k in tl.static_range(COLUMNS):
        bias = tl.zeros_like(units).to(tl.float32)
        if b_ih is not None:
            if INPUT[k] >= 0:
                bias += tl.load(p_input + INPUT[k] * H + units, units_in, 0.0).to(tl.float32)
            if HIDDEN[k] >= 0:
                bias += tl.load(p_hidden + HIDDEN[k] * H + units, units_in, 0.0).to(tl.float32)
        rows = rows + (bias,)
    return rows
