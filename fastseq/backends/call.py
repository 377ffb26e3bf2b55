"""What a backend is asked to compute: one value, built once per call and checked before any backend sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor, device, dtype

from ..ops.cells import CELLS
from ..ops.extras import Noise
from ..ops.packed import PackedLayer

__all__ = ["GATES", "Results", "RnnCall", "kind_of"]

GATES = {name: cell.gates for name, cell in CELLS.items()}

Results = tuple[Any, ...]  # of a layer stack: (output, (h_n,) or (h_n, c_n)), and with `states` c of every step

kind_of = attrgetter("shape", "dtype", "device")  # of a tensor: all that decides how a call runs


@dataclass(slots=True)
class RnnCall:
    """One call of a recurrent layer stack, or of one cell. L layers, D directions, G gates, P = proj_size or H.

    A layer's `input` is [T, B, I], [B, T, I] if batch_first, or packed data [N, I] with `batch_sizes`; it answers
    (output, (h_n,)) or (output, (h_n, c_n)), output in the input's layout with D*P features, states as h0 and c0.
    States may be fp32 beside a bf16 or fp16 input, and then come back so.
    A cell's `input` is [B, I], h0 and c0 are [B, H]; it answers (h,) or (h, c).
    """

    OPERATOR: ClassVar[str] = "rnn"

    cell: str  # a key of GATES
    input: Tensor
    h0: Tensor | None  # [L*D, B, P]; a cell: [B, H]; None: zeros
    c0: Tensor | None  # [L*D, B, H]; a cell: [B, H]; None: zeros, and always for the GRUs
    weights: list[Tensor]  # L*D times w_ih [G*H, I], w_hh [G*H, P] (, b_ih [G*H], b_hh [G*H]) (, w_hr [P, H])
    lengths: Tensor | None = None  # [B], any order: int64 on the CPU, in [0, T]; or on the input's GPU, unchecked
    batch_sizes: Tensor | None = None  # [T] int64 on the CPU, not increasing: the input is packed
    has_bias: bool = True
    num_layers: int = 1
    dropout: float = 0.0  # between layers, when training
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    proj_size: int = 0
    resets: Tensor | None = None  # bool, [T, B] or, if batch_first, [B, T]: the state is zeroed before that step
    noise: Noise | None = None  # masks that each layer draws; None where none would do anything
    states: bool = False  # of an LSTM: c of every step of the last layer is a third result, in the output's layout
    norms: list[Tensor] | None = None  # L*D times norm_ih, norm_hh [G*H] (, norm_c, norm_c_bias [H]); or None
    frozen: Sequence[PackedLayer] | None = None  # one a layer, for "cpu" where no gradient is recorded

    def kind(self) -> tuple[Any, ...]:
        """What calls of one kind share: options, shapes, dtypes, devices."""
        x, h, c = self.input, self.h0, self.c0
        return (
            self.cell, self.has_bias, self.num_layers, self.bidirectional, self.batch_first, self.proj_size,
            self.lengths is None, self.resets is None or kind_of(self.resets),
            None if self.batch_sizes is None else self.batch,
            self.noise, self.noise is None or self.training, self.states,
            kind_of(x), h is None or kind_of(h), c is None or kind_of(c), *map(kind_of, self.weights),
            self.norms is None or tuple(map(kind_of, self.norms)),
        )  # fmt: skip

    @property
    def device(self) -> device:
        return self.input.device

    @property
    def dtype(self) -> dtype:
        return self.input.dtype

    @property
    def hidden_size(self) -> int:
        return self.weights[0].shape[0] // GATES[self.cell]

    @property
    def batch(self) -> int:
        """Rows B; of packed data, those of its first step."""
        if self.batch_sizes is not None:
            return int(self.batch_sizes[0])
        return self.input.shape[0 if self.batch_first or self.input.dim() == 2 else 1]

    @property
    def steps(self) -> int:
        """Time steps T; 1 for a cell."""
        if self.batch_sizes is not None:
            return self.batch_sizes.shape[0]
        return 1 if self.input.dim() == 2 else self.input.shape[1 if self.batch_first else 0]
