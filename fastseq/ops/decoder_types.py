"""What a decoder's loop is and reads. Letters as in `decoder`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["COLUMNS", "GRADIENTS", "KEPT", "LoopSpec", "LoopTensors", "masked", "parts"]

# What the loop makes beside its final state, and backward reads: states of each cell from the initial one on
# [C, N, T + 1, H]; contexts [N, T, D]; outputs [N, T, R]; of these two the one that is fed back begins with the initial
# value too, T + 1; weights [N, T, S]; saved gates [C, N, T, 4, H] (lstm i, f, g, o; gru r, z, U_n h + b, n;
# gru_reset_before r, z, r h, n); an LSTM's cell states [C, N, T, H] in fp32; queries [N, T, A] where there is a W_q;
# what the readout keeps, [N, T, R] (tanh, before an output mask) or [N, T, 2 R] (maxout).
KEPT = ("hs", "contexts", "outs", "weights", "gates", "cs", "queries", "read_saved")
GRADIENTS = 7  # that backward takes: of hs, contexts, outs, weights, the fed value, h_n, c_n
COLUMNS = {"lstm": 4, "gru": 4, "gru_reset_before": 3}  # pre-activations of a unit


class LoopSpec(NamedTuple):
    """What of a decoder loops; its sizes follow from the tensors."""

    cell: str
    attend: str = "none"  # "before", "after" or "between" as in DecoderSpec, the query that of cell `query_cell`
    query_cell: int = 0
    contexts: tuple[bool, ...] = (False,)  # for each cell, whether it reads the attention's context
    feed: str = "none"  # "context" | "output": what the first cell reads of the last step, of y besides
    combine: str = "linear"  # "tanh" | "maxout": of a readout that is fed
    readout: tuple[str, ...] = ()  # its parts, each at most once

    @property
    def cells(self) -> int:
        return len(self.contexts)

    @property
    def layers(self) -> int:
        """Those whose state is carried; the cells of attend="between" hand one state on."""
        return 1 if self.attend == "between" else len(self.contexts)


class LoopTensors(NamedTuple):
    """What a loop reads. All floating tensors have y's dtype; the state, or all of it, may be fp32 beside a bf16 y."""

    y: Tensor  # [N, T, I]
    keys: Tensor | None = None  # [B, S, A]
    memory: Tensor | None = None  # [B, S, D]
    mask: Tensor | None = None  # [B, S] bool, True = attend
    feed0: Tensor | None = None  # [N, F]
    beside: Tensor | None = None  # [N, G*H]: joins the first cell's recurrent product
    w_query: Tensor | None = None  # [A, H]
    v: Tensor | None = None  # [A]: the additive form
    w_read: Tensor | None = None  # [R', P]
    b_read: Tensor | None = None  # [R']
    layer_masks: Tensor | None = None  # [C - 1, N, T, H]
    read_mask: Tensor | None = None  # [N, T, P]
    out_mask: Tensor | None = None  # [N, T, R]
    h0: Sequence[Tensor] = ()  # K times [N, H]
    c0: Sequence[Tensor] = ()  # of an LSTM
    weights: Sequence[Tensor] = ()  # C times w_ih [G*H, X], w_hh [G*H, H], b_ih [G*H], b_hh [G*H]

    @classmethod
    def of(cls, loop: LoopSpec, flat: Sequence[Any]) -> "LoopTensors":
        """Of the tensors, or of anything that stands for each of them, in the order of `flat`."""
        states = _SINGLE + loop.layers
        cells = states + (loop.layers if loop.cell == "lstm" else 0)
        return cls._make((*flat[:_SINGLE], flat[_SINGLE:states], flat[states:cells], flat[cells:]))

    def flat(self) -> tuple[Any, ...]:
        return (*self[:_SINGLE], *self.h0, *self.c0, *self.weights)

    def dense(self, loop: LoopSpec) -> "LoopTensors":
        """As the kernels read them: y by rows, all else contiguous."""
        flat = [t if t is None or t.is_contiguous() else t.contiguous() for t in self.flat()[1:]]
        y = self.y if self.y.stride(-1) == 1 else self.y.contiguous()
        return LoopTensors.of(loop, (y, *flat))

    @property
    def hidden(self) -> int:
        return self.weights[1].shape[1]


_SINGLE = LoopTensors._fields.index("h0")


def parts(loop: LoopSpec, x: LoopTensors) -> dict[str, tuple[int, int]]:
    """The columns of w_read that each part of the readout meets."""
    at, found = 0, {}
    for part in loop.readout:
        of = x.memory if part == "context" else x.y if part == "input" else x.weights[1]
        assert of is not None
        found[part] = at, at + of.shape[-1]
        at += of.shape[-1]
    return found


def masked(t: Tensor, mask: Tensor | None, at: int, end: int) -> Tensor:
    """A part of the readout times its columns of the mask."""
    return t if mask is None else t * mask[..., at:end]
