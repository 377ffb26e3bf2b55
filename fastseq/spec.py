"""The vocabulary of attention decoders: what a decoder is (`DecoderSpec`), reads, carries, and returns.

Letters: B batch, N = B * k decoder rows (k rows read the same keys: beams), T target steps, S source steps, I input,
H hidden, G gates, A attention units, D memory features, R readout features, L layers. Batch first throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .checks import checked_lengths, need_tensor
from .errors import InputError

__all__ = [
    "CELLS",
    "AttentionParams",
    "CellParams",
    "DecoderOutput",
    "DecoderParams",
    "DecoderSpec",
    "DecoderState",
    "DropoutMasks",
    "Keys",
    "LayerState",
    "Memory",
    "one_of",
    "prefix_mask",
]

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu")
READOUT = ("state", "prev_state", "context", "input")

LayerState = tuple[Tensor, ...]  # (h [N, H],) or (h, c)
CellParams = tuple[Tensor, Tensor, Tensor, Tensor]  # w_ih [G*H, X], w_hh [G*H, H], b_ih [G*H], b_hh [G*H]


class Memory(NamedTuple):
    """What a decoder reads: an encoder's result, or any features (an image, one vector).

    out: [B, S, D], or None. mask: [B, S] bool, True = attend; None: all. state: for each layer (h,) or (h, c), each
    [B, dirs * H], directions side by side; None: a bridge that needs none. dirs: 1 or 2 of each layer in `state`; None:
    a bridge goes by their width.
    """

    out: Tensor | None = None  # [B, S, D]
    mask: Tensor | None = None  # [B, S] bool, True = attend; None: all
    state: tuple[LayerState, ...] | None = None  # per layer (h,) or (h, c), each [B, dirs * H], directions concatenated
    dirs: tuple[int, ...] | None = None  # of each layer in `state`: 1 or 2; None: a bridge goes by their width

    @classmethod
    def from_rnn(
        cls,
        output: Any,  # [S, B, D], [B, S, D] if batch_first, or a PackedSequence
        hidden: Any = None,  # h_n [L * dirs, B, H] or (h_n, c_n), as torch.nn.GRU and LSTM return them
        lengths: Sequence[int] | Tensor | None = None,  # [B], any order; a PackedSequence has its own
        *,
        batch_first: bool = False,
        bidirectional: bool = False,
    ) -> "Memory":
        """The memory that torch.nn's LSTM or GRU, or fastseq's, leaves. With lengths or packing it has a mask."""
        if isinstance(output, PackedSequence):
            if lengths is not None:
                raise InputError("lengths with a PackedSequence, which has its own; pass one of the two")
            out, lengths = pad_packed_sequence(output, batch_first=True)
        else:
            out = need_tensor("output", output, "or a PackedSequence")
            if out.dim() != 3:
                raise InputError(f"output has shape {tuple(out.shape)}, {out.dim()}-D; expected [S, B, D]")
            out = out if batch_first else out.transpose(0, 1)
        mask = None if lengths is None else prefix_mask(lengths, out)
        if hidden is None:
            return cls(out, mask)
        leaves = hidden if isinstance(hidden, (tuple, list)) else (hidden,)
        if not 1 <= len(leaves) <= 2:
            raise InputError(f"hidden has {len(leaves)} tensors; expected h_n, or (h_n, c_n)")
        each = [_of_layers(name, leaf, out, bidirectional) for name, leaf in zip(("h_n", "c_n"), leaves, strict=False)]
        units = each[0][0].shape[1] if each[0] else 0
        if not bidirectional and len(each[0]) % 2 == 0 and out.shape[2] == 2 * units > 0:
            raise InputError(
                f"output has {out.shape[2]} features, twice the {units} of hidden: these are two directions; pass"
                " bidirectional=True"
            )
        layers = tuple(zip(*each, strict=True))
        return cls(out, mask, layers, (2 if bidirectional else 1,) * len(layers))


class Keys(NamedTuple):
    """A memory made ready for a decoder: projected once, not at every step.

    Every score is one of two forms: v . tanh(key + W_q query) (additive, concat) where there is a v, else key . query
    (dot, general). Key projection, query bias and scale are within `keys`.
    """

    keys: Tensor | None = None  # [B, S, A]; of the dot form A = Q. None: no attention
    memory: Tensor | None = None  # [B, S, D]
    mask: Tensor | None = None  # [B, S] bool, True = attend
    context: Tensor | None = None  # [B, D]: the fixed context of a decoder without attention


class AttentionParams(NamedTuple):
    """What a score does with a query."""

    query: Tensor | None = None  # W_q [A, Q]; None: the query as it is
    v: Tensor | None = None  # [A]: the additive form, g v / |v| where normalized
    window: tuple[Tensor, Tensor] | None = None  # W_p [A', Q], v_p [A'] of Luong et al. 2015, eq. 9


class DecoderParams(NamedTuple):
    """Parameters in the order of the operators.

    A layer's w_ih reads its input parts side by side: layer 0 (y, feed, context), the others (state below, context),
    each where the spec has it.
    """

    layers: tuple[CellParams, ...]
    transition: CellParams | None = None  # attend="between": the second cell, which reads the context
    context_hidden: Tensor | None = None  # [G*H, D]: context_side="hidden"
    attention: AttentionParams | None = None
    readout: tuple[Tensor, Tensor | None] | None = None  # w [R, P], or [2R, P] for maxout; b. P: the parts' features


class DropoutMasks(NamedTuple):
    """Factors 0 or 1 / (1 - p), drawn outside the operators so that every backend sees the same."""

    input: Tensor | None = None  # [N, T, I], on y
    layers: Tensor | None = None  # [L - 1, N, T, H], on the state below as layer l + 1 reads it
    readout: Tensor | None = None  # [N, T, P], on the readout's concatenated parts
    output: Tensor | None = None  # [N, T, R], on the readout's result, before it is fed back


class DecoderState(NamedTuple):
    """What a decoder carries from step to step; the batch is dimension 0 of every leaf.

    layers: for each (h [N, H],) or (h, c). feed: what the next step is fed, [N, D] or [N, R], or None.
    """

    layers: tuple[LayerState, ...]
    feed: Tensor | None = None  # [N, D] or [N, R]

    def select(self, rows: Tensor) -> "DecoderState":
        """The state of these rows [M], any of them, in any order: a beam search goes on from the rows it keeps."""
        layers = tuple(tuple(leaf.index_select(0, rows) for leaf in layer) for layer in self.layers)
        return DecoderState(layers, None if self.feed is None else self.feed.index_select(0, rows))


class DecoderOutput(NamedTuple):
    """Results of a whole sequence, or of one step (then without the dimension T).

    output: [N, T, R]. state: the last `DecoderState`. weights: [N, T, S], 0 where masked, or None.
    """

    output: Tensor  # [N, T, R]
    state: DecoderState
    weights: Tensor | None  # [N, T, S], 0 where masked


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder but for its sizes, which follow from the parameters. Construction refuses what no step can compute.

    One step t, with y_t the input, c_t the context, s^l_t the state of layer l, f_t what is fed back (f_0 = 0):

    1. attend="before": c_t = attention(s^q_{t-1}), or of f_{t-1} if query="feed".
    2. Layer 0 reads (y_t, f_{t-1} if feed, c_t if context_to is "first" or "all"); layer l > 0 reads (s^{l-1}_t times
       its dropout mask, c_t if context_to is "upper" or "all"). From layer `residual` on (0 < residual), a layer's
       output is its state plus the state-below part of its input, and that is what the next layer and the readout see.
    3. attend="after": c_t = attention(s^q_t), right after layer q = query_layer.
       attend="between" (one layer): c_t = attention(s'_t) with s'_t = layer 0 of (y_t, ...), then
       s_t = transition(c_t, s'_t).
    4. output_t = mask * combine(W [readout parts] + b): tanh, linear, or maxout over adjacent pairs; None: the parts
       side by side. "state" is the last layer's output, "prev_state" that of step t - 1 (at t = 0 the initial h).
    5. f_t = c_t or output_t.

    Without attention c_t is the keys' fixed context, or absent. context_side="hidden" (a fixed context): its product
    C c joins the recurrent product of layer 0, so that the GRU's reset gate multiplies U h + C c (Cho et al. 2014,
    A.1.2).
    """

    cell: str = "lstm"
    num_layers: int = 1
    attention: bool = True
    attend: str = "before"  # "after" | "between"
    query: str = "state"  # "feed"
    query_layer: int = -1
    context_to: str = "none"  # "first" | "upper" | "all"
    context_side: str = "input"  # "hidden"
    feed: str | None = None  # "context" | "output"
    readout: tuple[str, ...] = ("context", "state")
    combine: str | None = None  # "tanh" | "linear" | "maxout"
    residual: int | None = None
    window: int | None = None  # D of Luong et al. 2015, eq. 10; the Gaussian's deviation is D / 2

    def __post_init__(self) -> None:
        if isinstance(self.readout, str):
            raise TypeError(f"readout={self.readout!r}; pass a tuple of parts: ({self.readout!r},)")
        object.__setattr__(self, "readout", tuple(self.readout))
        one_of("cell", self.cell, CELLS)
        one_of("attend", self.attend, ("before", "after", "between"))
        one_of("query", self.query, ("state", "feed"))
        one_of("context_to", self.context_to, ("none", "first", "upper", "all"))
        one_of("context_side", self.context_side, ("input", "hidden"))
        one_of("feed", self.feed, (None, "context", "output"))
        one_of("combine", self.combine, (None, "tanh", "linear", "maxout"))
        if not self.readout:
            raise InputError("readout is empty; name at least one of " + ", ".join(READOUT))
        for part in self.readout:
            one_of("readout", part, READOUT)
        if self.num_layers < 1:
            raise InputError(f"num_layers={self.num_layers}; a decoder has at least one")
        layer = self.query_layer + self.num_layers if self.query_layer < 0 else self.query_layer
        if not 0 <= layer < self.num_layers:
            raise InputError(
                f"query_layer={self.query_layer} of {self.num_layers} layer(s); use 0 to num_layers - 1, or -1"
            )
        object.__setattr__(self, "query_layer", layer)
        for refused, why in self._faults():
            if refused:
                raise InputError(why)

    def _faults(self) -> list[tuple[bool, str]]:
        top, after = self.query_layer == self.num_layers - 1, self.attention and self.attend == "after"
        return [
            (
                after and self.context_to in ("first", "all"),
                f"context_to={self.context_to!r} with attend='after': layer 0 runs before the context is known;"
                " use feed='context' for the last step's, or attend='before'",
            ),
            (
                after and self.context_to == "upper" and top,
                f"context_to='upper' with attend='after' and query_layer={self.query_layer}, the last: no layer is"
                " above it; use query_layer=0",
            ),
            (
                self.context_to == "upper" and self.num_layers == 1,
                "context_to='upper' with num_layers=1; use 'first'",
            ),
            (
                self.attend == "between" and (self.num_layers != 1 or not self.attention),
                f"attend='between' with num_layers={self.num_layers}, attention={self.attention}: it is one layer of"
                " two cells around an attention; stack layers outside, or use attend='before' or 'after'",
            ),
            (
                self.attend == "between" and self.context_to != "none",
                f"context_to={self.context_to!r} with attend='between', whose second cell reads the context;"
                " use 'none'",
            ),
            (
                self.query == "feed" and (self.feed is None or self.attend != "before" or not self.attention),
                "query='feed' needs attend='before' and feed='context' or 'output'; use query='state'",
            ),
            (
                self.context_side == "hidden" and self.attention,
                "context_side='hidden' with attention: it is for a fixed context; use context_side='input'",
            ),
            (
                self.context_side == "hidden" and self.context_to != "first",
                f"context_side='hidden' with context_to={self.context_to!r}; use context_to='first'",
            ),
            (
                self.context_side == "hidden" and self.cell == "gru_reset_before",
                "context_side='hidden' with cell='gru_reset_before': the reset gate multiplies U h + C c after the"
                " product; use cell='gru', which is Cho's decoder",
            ),
            (
                not self.attention and self.feed == "context",
                "feed='context' without attention: the context never changes; use context_to",
            ),
            (
                self.feed == "output" and self.combine is None and "input" in self.readout,
                "feed='output' with combine=None and 'input' in the readout: the input would be fed beside itself;"
                " drop it from readout or use combine='linear'",
            ),
            (
                self.residual is not None and not 0 < self.residual < self.num_layers,
                f"residual={self.residual} of {self.num_layers} layer(s); the first layer with a residual is 1 to"
                " num_layers - 1",
            ),
            (
                self.residual is not None and "prev_state" in self.readout,
                f"residual={self.residual} with 'prev_state' in the readout: the state carried from step to step"
                " holds no layer's output; use 'state'",
            ),
            (
                self.window is not None and (self.window < 1 or not self.attention),
                f"window={self.window}; it is D >= 1 of a decoder with attention",
            ),
        ]

    @property
    def reads_context(self) -> tuple[bool, ...]:
        """For each layer, whether the context is a part of its input."""
        return tuple(
            self.context_side == "input"
            and (self.context_to == "all" or self.context_to == ("first" if layer == 0 else "upper"))
            and not (self.attention and self.attend == "after" and layer <= self.query_layer)
            for layer in range(self.num_layers)
        )


def prefix_mask(lengths: Any, out: Tensor) -> Tensor:
    """[B, S] bool of `out` [B, S, D], True before each row's length."""
    ends = checked_lengths(lengths, out, out.shape[0], out.shape[1]).to(out.device)
    return torch.arange(out.shape[1], device=out.device) < ends[:, None]


def _of_layers(name: str, leaf: Any, out: Tensor, bidirectional: bool) -> tuple[Tensor, ...]:
    """For each layer [B, dirs * H], directions concatenated."""
    dirs, t = 2 if bidirectional else 1, need_tensor(name, leaf, "hidden is h_n, or (h_n, c_n)")
    if t.dim() != 3 or t.shape[1] != out.shape[0] or t.shape[0] % dirs:
        raise InputError(
            f"{name} has shape {tuple(t.shape)}; expected [L * dirs, B, H] with dirs={dirs}, B={out.shape[0]}, whatever"
            " batch_first"
        )
    layers = t.unflatten(0, (-1, dirs)).transpose(1, 2).flatten(2)  # [L, B, dirs * H]
    return layers.unbind(0)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless `value` is among the allowed ones."""
    if value not in allowed:
        raise InputError(f"{name}={value!r}; use one of {', '.join(map(repr, allowed))}")
