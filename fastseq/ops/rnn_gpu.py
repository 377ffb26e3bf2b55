"""A recurrent layer on a GPU, around its recurrence: what backends on Triton and on CUDA share.

The products of all steps at once, x W_ih' before the recurrence and the weights' gradients after it, are PyTorch's.
What runs between them is a `Recurrence`. State is fp32; saved gates and gradients of gates have x's dtype. The schemas
are those of fastseq/ops/rnn.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .cells import CELLS
from .common import PLAIN
from .extras import Extras

__all__ = [
    "Batch", "GivenGradients", "Recurrence", "Saved", "StepResults", "aligned", "aligned_masks", "backward",
    "cell_gradients", "forward", "tf32_flag", "without_autocast",
]  # fmt: skip


class Batch(NamedTuple):
    """T steps of B rows, and the numbers and small tensors that find them.

    Token (t, b) of x, out, gates and all that is like them lies at t * step + b * row of a padded batch, or at
    starts[t] + b of a packed one.
    """

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
            return cls(steps, rows, steps * rows, 1, steps, None, lengths, resets)
        steps, rows = x.shape[:2]
        return cls(steps, rows, steps * rows, rows, 1, None, lengths, resets)

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


class Saved(NamedTuple):
    """What forward's recurrence writes and backward's reads."""

    out: Tensor  # x's layout, D * H features
    gates: Tensor | None  # [D, tokens, columns, H]
    cells: Tensor | None  # [D, tokens, H] fp32


class GivenGradients(NamedTuple):
    out: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cells: Tensor | None  # [D, tokens, H] fp32, of every step's c; 0 behind the lengths


class Recurrence(Protocol):
    """What a backend has of a layer. States are h0, c0 or None; w_hh and biases are of each direction."""

    def forward(
        self, cell: str, batch: Batch, inputs: Tensor, w_hh: Sequence[Tensor], b_ih: Sequence[Tensor],
        b_hh: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, saved: Saved, like: Tensor, extras: Extras,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Fill `saved`, from inputs [D, tokens, G * H]; h_n and c_n [D, B, H], of like's dtype. Masks lie as `out`."""

    def backward(
        self, cell: str, batch: Batch, given: GivenGradients, w_hh: Sequence[Tensor], h0: Tensor | None,
        c0: Tensor | None, saved: Saved, d_gates: Tensor, h_before: Tensor | None, d_h0: Tensor | None,
        d_c0: Tensor | None, extras: Extras,
    ) -> Tensor | None:  # fmt: skip
        """Fill d_gates and, unless they are None, h_before and d_h0; d_c0, which need not be the one handed in."""


def forward(
    recurrence: Recurrence,
    cell: str,  # a key of CELLS
    x: Tensor,  # [T, B, I], [B, T, I] if batch_first, or packed [N, I]
    h0: Tensor | None,  # [D, B, H], in x's dtype or fp32
    c0: Tensor | None,
    weights: Sequence[Tensor],  # D times w_ih [G*H, I], w_hh [G*H, H] (, b_ih, b_hh)
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B] bool, [B, T] if batch_first
    batch_sizes: Tensor | None,  # [T] int64 on the CPU
    batch_first: bool,
    bidirectional: bool,
    save: bool,
    extras: Extras,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """out, h_n, an LSTM's c_n and c_out; with `save` gates [D, tokens, columns, H] and cells [D, tokens, H] fp32."""
    kind, batch = CELLS[cell], Batch.of(x, lengths, resets, batch_sizes, batch_first)
    h0, c0 = _states(h0, c0)
    w_ih, w_hh, b_ih, b_hh = _split(weights, bidirectional)
    dirs, hidden = len(w_hh), w_hh[0].shape[1]
    new = x.new_zeros if batch.ragged else x.new_empty
    out = new((*x.shape[:-1], dirs * hidden))
    inputs = _projected(x, w_ih, batch.tokens)
    gates = cells = None
    if save:
        whole = kind.gates == kind.columns  # then each gate takes its input's place as it is computed
        gates = inputs if whole else x.new_empty((dirs, batch.tokens, kind.columns * hidden))
        gates = gates.view(dirs, batch.tokens, kind.columns, hidden)
    if kind.cell_state and (save or extras.states):
        cells = new((dirs, batch.tokens, hidden), dtype=torch.float32)
    like = x if h0 is None else h0
    if not batch.B:
        shape = (dirs, 0, hidden)
        c_out = torch.empty_like(out) if cells is not None and extras.states else None
        return out, like.new_empty(shape), like.new_empty(shape) if kind.cell_state else None, c_out, gates, cells
    saved = Saved(out, gates, cells)
    h_n, c_n = recurrence.forward(cell, batch, inputs, w_hh, b_ih, b_hh, h0, c0, saved, like, aligned_masks(extras))
    c_out = None
    if cells is not None and extras.states:  # [D, tokens, H], as x's rows -> [.., D * H]
        c_out = torch.empty_like(out)
        c_out.view(batch.tokens, dirs, hidden).copy_(cells.transpose(0, 1))
    return out, h_n, c_n, c_out, gates, cells if save else None


def backward(
    recurrence: Recurrence,
    cell: str,
    d_out: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_c_out: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    batch_first: bool,
    bidirectional: bool,
    out: Tensor,
    gates: Tensor,
    cells: Tensor | None,
    needs: Sequence[bool],  # x, h0, c0, weights
    extras: Extras,
) -> list[Tensor]:
    """d_x, d_h0, d_c0, then one a weight; those not needed are empty."""
    kind, batch = CELLS[cell], Batch.of(x, lengths, resets, batch_sizes, batch_first)
    w_ih, w_hh, b_ih, _ = _split(weights, bidirectional)
    dirs, hidden = len(w_hh), w_hh[0].shape[1]
    d_h0, d_c0 = (
        s.new_empty(s.shape) if need and s is not None else None for s, need in zip((h0, c0), needs[1:3], strict=True)
    )
    new = x.new_zeros if batch.ragged else x.new_empty
    d_gates = new((dirs, batch.tokens, kind.columns * hidden))
    h_before = new((dirs, batch.tokens, hidden)) if needs[3] else None
    if batch.B:
        given = GivenGradients(
            None if d_out is None else aligned(d_out.to(out.dtype)),
            None if d_h_n is None else aligned(d_h_n),
            None if d_c_n is None else aligned(d_c_n),
            None if d_c_out is None else _of_directions(d_c_out, dirs, batch.tokens),
        )
        h0, c0 = (None if t is None else aligned(t) for t in (h0, c0))
        saved = Saved(out, gates, cells if kind.cell_state else None)
        d_c0 = recurrence.backward(
            cell, batch, given, w_hh, h0, c0, saved, d_gates, h_before, d_h0, d_c0, aligned_masks(extras)
        )
    if needs[3] and batch.ragged:  # behind a row's end may stand NaN
        x = torch.where(batch.valid(batch_first), x, 0.0)
    rows = x.reshape(batch.tokens, x.shape[-1])
    d_x = _input_gradient(x, w_ih, d_gates) if needs[0] else None
    found: list[Tensor | None] = [d_x, d_h0, d_c0]
    if h_before is None:
        found += [None] * len(weights)
    else:
        for of_direction, before in zip(d_gates.unbind(), h_before.unbind(), strict=True):
            found += cell_gradients(kind, of_direction, rows, before, bool(b_ih))
    return [x.new_empty(0) if g is None else g for g in found]


def _split(weights: Sequence[Tensor], bidirectional: bool) -> tuple[list[Tensor], ...]:
    """w_ih, w_hh, b_ih, b_hh of each direction; the latter two are empty without biases."""
    per = len(weights) // (2 if bidirectional else 1)
    kinds = [[aligned(w) for w in weights[k::per]] for k in range(per)]
    return (*kinds, [], [])[:4]


def _states(h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous, in one dtype."""
    if h0 is not None and c0 is not None and c0.dtype != h0.dtype:
        h0, c0 = h0.float(), c0.float()
    return None if h0 is None else aligned(h0), None if c0 is None else aligned(c0)


def aligned_masks(extras: Extras) -> Extras:
    """Its masks contiguous, and bools as bytes."""
    update, hold_h, hold_c = (None if m is None else aligned(m.view(torch.uint8)) for m in extras[:3])
    recurrent = None if extras.recurrent is None else aligned(extras.recurrent)
    return extras._replace(update=update, hold_h=hold_h, hold_c=hold_c, recurrent=recurrent)


def _of_directions(t: Tensor, dirs: int, tokens: int) -> Tensor:
    """[D, tokens, H] fp32 of a tensor that is laid out as `out`."""
    return aligned(t.reshape(tokens, dirs, -1).transpose(0, 1).float())


def _projected(x: Tensor, w_ih: Sequence[Tensor], tokens: int) -> Tensor:
    """x W_ih' of each direction: [D, tokens, G * H]."""
    rows = x.reshape(tokens, x.shape[-1])
    products = x.new_empty((len(w_ih), tokens, w_ih[0].shape[0]))
    for product, w in zip(products.unbind(), w_ih, strict=True):
        torch.mm(rows, w.t(), out=product)
    return products


def _input_gradient(x: Tensor, w_ih: Sequence[Tensor], d_gates: Tensor) -> Tensor:
    """sum over directions of (d_gates W_ih), in x's shape."""
    first, *others = d_gates.narrow(2, 0, w_ih[0].shape[0]).unbind()
    with without_autocast(x):
        d_x = torch.mm(first, w_ih[0])
        for d, other in enumerate(others, 1):
            d_x.addmm_(other, w_ih[d])
    return d_x.view(x.shape)


def cell_gradients(kind: Any, d_gates: Tensor, x: Tensor, h_before: Tensor, bias: bool) -> list[Tensor]:
    """Those of w_ih, w_hh (, b_ih, b_hh) of one direction, from d_gates [tokens, columns * H]."""
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


def _runs(kind: Any) -> list[tuple[int, int, int]]:
    """(first gate, first place, count) of W_hh's gates whose gradients lie side by side in d_gates."""
    places = {gate: kind.PLACE[column] for column, gate in enumerate(kind.HIDDEN) if gate >= 0}
    runs: list[tuple[int, int, int]] = []
    for gate in range(kind.gates):
        if runs and places[gate] == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((gate, places[gate], 1))
    return runs


class StepResults(NamedTuple):
    """What a step fills: of a layer `out` too; for backward gates [B, 4, H], and an LSTM's cells [B, H] in fp32."""

    h: Tensor
    c: Tensor | None
    out: Tensor | None
    gates: Tensor | None
    cells: Tensor | None

    @classmethod
    def empty(cls, shape: Any, x: Tensor, h0: Tensor | None, save: bool) -> "StepResults":
        """Of a StepShape."""
        name, rows, _, state, out_shape = shape
        cell, hidden = CELLS[name], state[-1]
        h = x.new_empty(state) if h0 is None else torch.empty_like(h0)
        c = torch.empty_like(h) if cell.cell_state else None
        out = None if out_shape is None else x.new_empty(out_shape)
        gates = x.new_empty((rows, cell.columns, hidden)) if save else None
        cells = x.new_empty((rows, hidden), dtype=torch.float32) if save and c is not None else None
        return cls(h, c, out, gates, cells)

    def complete(self) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
        """As ops/step.py wants them: (out of a layer, h, c of an LSTM), gates, cells."""
        results = (self.h,) if self.c is None else (self.h, self.c)
        return results if self.out is None else (self.out, *results), self.gates, self.cells


def tf32_flag(operator: str) -> bool:
    """Whether PyTorch allows TF32 to "rnn", layers as by cuDNN, or to "matmul", all else.

    A flag of before torch 2.9 raises once the user has set one of the newer ones, which know of the older.
    """
    of_layers = operator == "rnn"
    flags: Any = torch.backends.cudnn.rnn if of_layers else torch.backends.cuda.matmul
    if hasattr(flags, "fp32_precision"):
        return flags.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32 if of_layers else flags.allow_tf32


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For products of PyTorch's on x's device: a backward may be called where autocast is on."""
    return torch.autocast(x.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


def aligned(t: Tensor) -> Tensor:
    """`t`, contiguous and at a multiple of 16 bytes, which kernels are compiled for or read at once."""
    t = t.contiguous()
    return t.clone() if type(t) in PLAIN and t.data_ptr() % 16 else t  # others, as fake ones, have no address
