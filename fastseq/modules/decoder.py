"""fastseq.Decoder: attention decoders of every kind; the whole teacher-forced loop is one operator."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.call import GATES
from ..backends.decoder_call import DecoderCall, mapped
from ..checks import need_tensor
from ..config import described, part
from ..decoding import run_decoder
from ..dispatch import check_name
from ..errors import InputError
from ..spec import (
    CellParams,
    DecoderOutput,
    DecoderParams,
    DecoderSpec,
    DecoderState,
    DropoutMasks,
    Keys,
    LayerState,
    Memory,
)
from .attention import Attention, AttentionMaker, check_memory, need_dtype, parameter, uniform
from .bridge import Bridge, BridgeMap, StateMaker, mean
from .modes import not_scriptable
from .presets import Presets
from .recurrent import backend_repr

__all__ = ["Decoder"]

COPY = Bridge()
CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
PLAIN = DecoderSpec(combine="tanh")  # the defaults
NO_MASKS = DropoutMasks()
DROPOUTS = ("dropout", "input_dropout", "readout_dropout", "output_dropout")


@part
class Decoder(Presets):
    """A recurrent decoder that reads a `Memory`: what `DecoderSpec` describes, with its parameters.

    input_size: features I of the embedded target. hidden_size: units H of each layer. memory_size: features D of
    `Memory.out`; needed where a context is read, unless `attention` has it.
    attention: None (a fixed context: the top layer's last h, or without a state the mean of `out`); an `Attention`; the
    name of its score; or a function (query_size, memory_size) -> Attention.
    cell, attend, query, query_layer, context_to, context_side, feed, readout, residual: as in `DecoderSpec`, which
    refuses what no step can compute.
    combine: what is made of the readout's parts side by side: tanh(W x), "linear" W x, "maxout" over pairs of W x, or
    None, the parts themselves. W x has combine_size features (None: hidden_size), with combine_bias + b.
    bridge: a `Bridge`, the name of its source, or any function Memory -> for each layer (h [B, H],) or (h, c).
    dropout: on what a layer reads of the one below; input_dropout: on y; readout_dropout: on the readout's parts;
    output_dropout: on its result, before it is fed back. Drawn in that order of input, layers, readout, output from
    torch's generator, outside the operator.
    summary_size: without attention, c = tanh(V h) of that many features is all that the decoder and its bridge see of
    the memory (Cho et al. 2014, A.1). backend as for `fastseq.LSTM`.

    Parameters: weight_ih_l0 [G*H, X], weight_hh_l0 [G*H, H], bias_ih_l0, bias_hh_l0 [G*H], ... as torch.nn.LSTM and GRU
    have them, where X is (y, feed, context) of layer 0, (state below, context) of the others; the same with
    `_transition` for attend="between"; weight_ch_l0 [G*H, D] for context_side="hidden"; readout.weight, readout.bias;
    attention.*, bridge.*, summary.*. They start as those of torch.nn's cells and nn.Linear.
    """

    __prepare_scriptable__ = not_scriptable
    backend: str = "auto"
    attention: Attention | None
    readout: nn.Linear | None
    summary: nn.Linear | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        memory_size: int | None = None,
        attention: Attention | str | AttentionMaker | None = None,
        attend: str = "before",
        query: str = "state",
        query_layer: int = -1,
        context_to: str = "none",
        context_side: str = "input",
        feed: str | None = None,
        readout: Sequence[str] = ("context", "state"),
        combine: str | None = "tanh",
        combine_size: int | None = None,
        combine_bias: bool = False,
        residual: int | None = None,
        bridge: Bridge | str | StateMaker = COPY,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        readout_dropout: float = 0.0,
        output_dropout: float = 0.0,
        summary_size: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = check_name(backend)
        spec = DecoderSpec(
            cell, num_layers, attention is not None, attend, query, query_layer, context_to, context_side, feed,
            readout,  # type: ignore[arg-type]  # a tuple of it is the spec's
            combine, residual,
        )  # fmt: skip
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.dropout, self.input_dropout = dropout, input_dropout
        self.readout_dropout, self.output_dropout = readout_dropout, output_dropout
        self.memory_size = _memory_size(spec, attention, memory_size, summary_size)
        self._set_sizes(spec, summary_size, combine_size)
        self._check(spec, combine_size, combine_bias)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        asks = self.feed_size if query == "feed" else hidden_size
        made = _attention(attention, asks, self.context_size, factory)
        self.spec = replace(spec, window=None if made is None or made.window is None else made.window.D)
        self._add_cells(factory)
        rows = self.output_size * (2 if combine == "maxout" else 1)
        self.register_module("attention", made)
        self.register_module(
            "readout", None if combine is None else nn.Linear(self.parts_size, rows, combine_bias, **factory)
        )
        summary = None if summary_size is None else nn.Linear(self.memory_size or 0, summary_size, **factory)
        self.register_module("summary", summary)
        source = summary_size or self.memory_size
        made_bridge = _bridge(bridge)
        self.bridge = (
            made_bridge.build(hidden_size, num_layers, cell, source, **factory)
            if isinstance(made_bridge, Bridge)
            else made_bridge
        )
        self.reset_parameters()

    def _set_sizes(self, spec: DecoderSpec, summary_size: int | None, combine_size: int | None) -> None:
        """The sizes that follow from the arguments; 0 where there is no such thing."""
        self.context_size = (summary_size or self.memory_size or 0) if reads_context(spec) else 0
        sizes = {"context": self.context_size, "input": self.input_size}
        self.parts_size = sum(sizes.get(part, self.hidden_size) for part in spec.readout)
        self.output_size = self.parts_size if spec.combine is None else combine_size or self.hidden_size
        self.feed_size = {None: 0, "context": self.context_size, "output": self.output_size}[spec.feed]

    def _check(self, spec: DecoderSpec, combine_size: int | None, combine_bias: bool) -> None:
        """Refuse what `DecoderSpec` knows nothing of."""
        for name, size in (("input_size", self.input_size), ("hidden_size", self.hidden_size),
                           ("combine_size", combine_size)):  # fmt: skip
            if size is not None and size < 1:
                raise InputError(f"{name}={size}; it is at least 1")
        if spec.combine is None and (combine_size is not None or combine_bias):
            raise InputError(
                f"combine_size={combine_size}, combine_bias={combine_bias} with combine=None, which maps nothing; use"
                " combine='linear'"
            )
        read = spec.context_to != "none" or spec.attend == "between" or spec.feed == "context"
        if spec.attention and not read and "context" not in spec.readout:
            raise InputError(
                f"attention, but nothing reads its context: context_to={spec.context_to!r}, feed={spec.feed!r},"
                f" readout={spec.readout}; put 'context' into readout, use context_to or feed='context', or leave"
                " attention out"
            )
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}; it is a probability, 0 to 1")
        if self.dropout and spec.num_layers == 1:
            warnings.warn(
                f"dropout={self.dropout} is between layers, of which there is one; use input_dropout, readout_dropout"
                " or output_dropout",
                stacklevel=3,
            )

    def _add_cells(self, factory: dict[str, Any]) -> None:
        """The cells' parameters; self._cells, their names."""
        hidden, self._cells = self.hidden_size, []
        rows = GATES[self.spec.cell] * hidden
        reads = [self.input_size + self.feed_size] + [hidden] * (self.num_layers - 1)
        reads = [n + reads_too * self.context_size for n, reads_too in zip(reads, self.spec.reads_context, strict=True)]
        suffixes = [f"l{index}" for index in range(self.num_layers)]
        if self.spec.attention and self.spec.attend == "between":
            reads, suffixes = [*reads, self.context_size], [*suffixes, "transition"]
        for suffix, size in zip(suffixes, reads, strict=True):
            names = tuple(f"{name}_{suffix}" for name in CELL)
            for name, shape in zip(names, ((rows, size), (rows, hidden), (rows,), (rows,)), strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
            self._cells.append(names)
        beside = self.spec.context_side == "hidden"
        self.register_parameter(
            "weight_ch_l0", nn.Parameter(torch.empty(rows, self.context_size, **factory)) if beside else None
        )

    def reset_parameters(self) -> None:
        """Draw the cells' parameters anew, as torch.nn's cells do: uniform within 1 / sqrt(H)."""
        for parameters in self._parameters.values():
            uniform(parameters, self.hidden_size)

    def prepare(self, memory: Memory) -> Keys:
        """The memory made ready for `step`: projected once. Without attention, its fixed context where one is read."""
        check_memory(memory)
        return self._keys(self._seen(memory))

    def init_state(self, memory: Memory, copies: int = 1) -> DecoderState:
        """The first state, by the bridge; what is fed starts at 0. In fp32 where the bridge gives fp16 or bf16.

        copies: k rows for each of the memory's B, for N = B * k rows of `step`, as in a beam search.
        """
        check_memory(memory)
        state = self._state(self._seen(memory))
        return _repeated(state, copies * state.layers[0][0].shape[0])

    def forward(
        self,
        y: Tensor,  # [N, T, I], the embedded target, shifted; N = B * k: row n reads the memory's row n // k
        memory: Memory | Keys,  # the latter from `prepare`, then with a state
        state: DecoderState | None = None,  # None: init_state(memory), repeated for the k rows
        *,
        need_weights: bool = False,
    ) -> DecoderOutput:
        """The whole teacher-forced loop: output [N, T, output_size], the last state, weights [N, T, S] or None.

        Raises InputError or TypeError, naming the argument.
        """
        return run_decoder(self._call(y, memory, state, need_weights, _draw), self.backend)

    def step(self, y: Tensor, keys: Keys, state: DecoderState, *, need_weights: bool = False) -> DecoderOutput:
        """One step of y [N, I]: output [N, output_size], the next state, weights [N, S] or None.

        keys: of `prepare`, B rows; N = B * k, row n reads keys n // k. Nothing is copied for a beam.
        """
        if need_tensor("y", y).dim() != 2:
            raise InputError(f"y of a step has shape {tuple(y.shape)}, {y.dim()}-D; expected [N, I]")
        if not isinstance(keys, Keys):
            raise TypeError(f"keys must be a fastseq.Keys, got {type(keys).__name__}; pass prepare(memory), made once")
        call = self._call(y[:, None], keys, state, need_weights, _draw)
        output, state, weights = run_decoder(call, self.backend)
        return DecoderOutput(output[:, 0], state, None if weights is None else weights[:, 0])

    def as_call(self, y: Tensor, memory: Memory | Keys, state: DecoderState | None = None) -> DecoderCall:
        """The call that `forward` makes, but for its dropout: nothing is drawn."""
        return self._call(y, memory, state, False, _ones)

    def _call(
        self, y: Tensor, memory: Memory | Keys, state: DecoderState | None, need_weights: bool, draw: "Draw"
    ) -> DecoderCall:
        if need_tensor("y", y).shape[-1] != self.input_size:
            raise InputError(f"y has shape {tuple(y.shape)}; expected [N, T, I] with I={self.input_size}, input_size")
        if isinstance(memory, Keys):
            if state is None:
                raise InputError("keys without a state; pass init_state(memory), or the memory itself")
            keys = memory
        else:
            check_memory(memory)
            memory = self._seen(memory)
            if state is None:
                state = _repeated(self._state(memory), y.shape[0])
            keys = self._keys(memory)
        masks = self._masks(y, draw) if self.training else NO_MASKS
        return DecoderCall(self.spec, y, keys, state, self._params(), masks, need_weights)

    def _seen(self, memory: Memory) -> Memory:
        """What the decoder sees of the memory: with summary_size, tanh(V h) alone."""
        if self.summary is None:
            return memory
        vector = self._fixed(memory, self.summary.in_features)
        need_dtype("what the summary reads of the memory", vector, self.summary.weight)
        context = torch.tanh(self.summary(vector))
        return Memory(context[:, None], None, ((context,),))

    def check_first(self, memory: Memory) -> None:
        """Raise what `init_state` would of a memory of these shapes, which may be on the meta device; nothing runs.

        A function for a bridge is not asked.
        """
        bridge = self.bridge
        if not isinstance(bridge, BridgeMap) or type(bridge).forward is not BridgeMap.forward:
            return
        if self.summary is not None:
            context = torch.empty(1, self.summary.out_features, device="meta")
            memory = Memory(context[:, None], None, ((context,),))
        ours = (self.hidden_size, self.num_layers, self.spec.cell == "lstm")
        if (theirs := (bridge.hidden_size, bridge.num_layers, bridge.lstm)) != ours:
            kinds = ["an LSTM's" if lstm else "no LSTM's" for *_, lstm in (theirs, ours)]
            raise InputError(
                f"bridge makes {theirs[1]} layer(s) of {theirs[0]}, {kinds[0]} states, the decoder has {ours[1]} of"
                f" {ours[0]}, {kinds[1]}; pass the Bridge itself, {bridge.bridge}: each decoder builds its own"
            )
        bridge.check(memory)

    def _fixed(self, memory: Memory, size: int) -> Tensor:
        """The one vector [B, D] of a memory that is read without attention."""
        if memory.state is not None:
            vector, name = memory.state[-1][0], "memory.state[-1][0]"
        elif memory.out is not None:
            vector, name = mean(memory), "memory.out"
        else:
            raise InputError("memory has neither state nor out, which the fixed context is made of; pass one of them")
        if vector.shape[-1] != size:
            raise InputError(f"{name} gives a context of {vector.shape[-1]} features; expected {size}, the memory_size")
        return vector

    def _keys(self, memory: Memory) -> Keys:
        if self.attention is not None:
            return self.attention.prepare(memory)
        return Keys(context=self._fixed(memory, self.context_size)) if self.context_size else Keys()

    def _state(self, memory: Memory) -> DecoderState:
        made = self.bridge(memory)
        if not isinstance(self.bridge, BridgeMap):
            known = memory.out if memory.out is not None or memory.state is None else memory.state[0][0]
            self._check_states(made, None if known is None else known.shape[0])
        layers: tuple[LayerState, ...] = mapped(_wide, made)
        h = layers[0][0]
        return DecoderState(layers, h.new_zeros(h.shape[0], self.feed_size) if self.spec.feed else None)

    def _check_states(self, layers: Any, rows: int | None) -> None:
        """Raise InputError unless the bridge, a function, made a state for each layer."""
        leaves = 2 if self.spec.cell == "lstm" else 1
        if not isinstance(layers, tuple) or len(layers) != self.num_layers:
            raise InputError(f"bridge gave {_kind(layers)}; expected a tuple of {self.num_layers} layer state(s)")
        for index, layer in enumerate(layers):
            if not isinstance(layer, tuple) or len(layer) != leaves:
                expected = "(h, c)" if leaves == 2 else "(h,)"
                raise InputError(f"bridge gave {_kind(layer)} for layer {index}; expected a tuple {expected}")
            for leaf in layer:
                shape = need_tensor(f"bridge's state of layer {index}", leaf).shape
                if shape[1:] != (self.hidden_size,) or rows not in (None, shape[0]):
                    batch = "B" if rows is None else f"B={rows}"
                    raise InputError(
                        f"bridge gave {tuple(shape)} for layer {index}; expected [{batch}, H={self.hidden_size}]"
                    )

    def _params(self) -> DecoderParams:
        cells = [_cell(self, names) for names in self._cells]
        modules, readout, attention = self._modules, None, None
        if (linear := modules["readout"]) is not None:
            readout = (parameter(linear, "weight"), parameter(linear, "bias"))
        if modules["attention"] is not None:
            attention = modules["attention"].params()  # type: ignore[operator]
        layers, rest = tuple(cells[: self.num_layers]), cells[self.num_layers :]
        return DecoderParams(layers, rest[0] if rest else None, parameter(self, "weight_ch_l0"), attention, readout)

    def _masks(self, y: Tensor, draw: "Draw") -> DropoutMasks:
        """Factors 0 or 1 / (1 - p), in the order of the fields; None where p is 0."""
        lead = y.shape[:2]

        def factors(p: float, *shape: int) -> Tensor | None:
            return draw(y.new_empty(shape), p) if p else None

        layers = self.num_layers - 1
        return DropoutMasks(
            factors(self.input_dropout, *y.shape),
            factors(self.dropout, layers, *lead, self.hidden_size) if layers else None,
            factors(self.readout_dropout, *lead, self.parts_size),
            factors(self.output_dropout, *lead, self.output_size),
        )

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, whichever preset did, as plain data; a part is such data with its `kind`.

        Raises TypeError where a part, a bridge of the user's own say, is no such data.
        """
        own = {
            "attention": self.attention,
            "combine_size": None if self.readout is None else self.output_size,
            "combine_bias": self.readout is not None and self.readout.bias is not None,
            "bridge": self.bridge.bridge if isinstance(self.bridge, BridgeMap) else self.bridge,
            "summary_size": None if self.summary is None else self.summary.out_features,
        }
        return described(self, **(vars(self.spec) | own))

    def extra_repr(self) -> str:
        spec, text = self.spec, f"{self.input_size}, {self.hidden_size}"
        text += f", num_layers={self.num_layers}" if self.num_layers > 1 else ""
        text += f", memory_size={self.memory_size}" if self.memory_size else ""
        for name in ("cell", "attend", "query", "query_layer", "context_to", "context_side", "feed", "readout",
                     "combine", "residual"):  # fmt: skip
            value = getattr(spec, name)
            if value != getattr(PLAIN, name) and not (name == "query_layer" and value == spec.num_layers - 1):
                text += f", {name}={value!r}"
        for name in DROPOUTS:
            text += f", {name}={getattr(self, name)}" if getattr(self, name) else ""
        return text + backend_repr(self)


Draw = Callable[[Tensor, float], Tensor]


def _draw(factors: Tensor, p: float) -> Tensor:
    """Factors of dropout, as torch.nn.functional.dropout draws them."""
    return factors.bernoulli_(1 - p).div_(1 - p) if p < 1 else factors.zero_()


def _ones(factors: Tensor, p: float) -> Tensor:
    return factors.fill_(1)


def _memory_size(
    spec: DecoderSpec, attention: Any, memory_size: int | None, summary_size: int | None
) -> int | None:  # fmt: skip
    """memory_size, also where `attention` has it; None where no context is read and none is given."""
    if summary_size is not None and spec.attention:
        raise InputError(f"summary_size={summary_size} with attention; it makes a fixed context: use attention=None")
    if isinstance(attention, Attention):
        if memory_size not in (None, attention.memory_size):
            raise InputError(
                f"memory_size={memory_size}, but the attention reads {attention.memory_size} features; leave it out"
            )
        return attention.memory_size
    if memory_size is None and (reads_context(spec) or summary_size is not None):
        who = "attention reads it" if spec.attention else f"context_to={spec.context_to!r}, readout={spec.readout}"
        raise InputError(
            f"memory_size=None, but {who}; pass memory_size, the features of Memory.out (encoder.output_size), or drop"
            " the context: readout=('state',)"
        )
    if memory_size is not None and memory_size < 1:
        raise InputError(f"memory_size={memory_size}; it is at least 1")
    return memory_size


def reads_context(spec: DecoderSpec) -> bool:
    """Whether anything reads a context."""
    return spec.attention or spec.context_to != "none" or "context" in spec.readout


def _attention(attention: Any, query_size: int, memory_size: int, factory: dict[str, Any]) -> Attention | None:
    """The Attention that the argument stands for."""
    if isinstance(attention, str):
        return Attention(query_size, memory_size, score=attention, **factory)
    if attention is None or isinstance(attention, Attention):
        made = attention
    elif callable(attention) and not isinstance(attention, nn.Module):
        made = attention(query_size, memory_size)
        if isinstance(made, Attention):
            made = made.to(**factory)
    else:
        made = attention
    if made is not None and not isinstance(made, Attention):
        raise TypeError(
            f"attention must be an Attention, a score's name or a function that makes one, got {_kind(made)}"
        )
    if made is not None and (made.query_size, made.memory_size) != (query_size, memory_size):
        raise InputError(
            f"attention takes queries of {made.query_size} features and a memory of {made.memory_size}; this decoder"
            f" has {query_size} and {memory_size}"
        )
    return made


def _bridge(bridge: Any) -> Any:
    """A Bridge, or a function."""
    if isinstance(bridge, str):
        return Bridge(bridge)
    if isinstance(bridge, type) or (not callable(bridge) and not isinstance(bridge, Bridge)):
        raise TypeError(
            f"bridge must be a Bridge, the name of its source or a function Memory -> layer states, got {bridge!r}; use"
            " Bridge()"
        )
    return bridge


def _cell(module: nn.Module, names: tuple[str, ...]) -> CellParams:
    parameters, (ih, hh, b_ih, b_hh) = module._parameters, names
    try:
        return parameters[ih], parameters[hh], parameters[b_ih], parameters[b_hh]  # type: ignore[return-value]
    except KeyError:  # parametrized
        return tuple(getattr(module, name) for name in names)


def _repeated(state: DecoderState, rows: int) -> DecoderState:
    """For N = B * k rows each of the B rows k times."""
    batch = state.layers[0][0].shape[0]
    if rows == batch:
        return state
    if batch == 0 or rows % batch:
        raise InputError(f"y has N={rows} rows, the memory B={batch}; N must be a multiple of B")
    return mapped(lambda t: t.repeat_interleave(rows // batch, 0), state)


def _wide(t: Tensor) -> Tensor:
    """A state in fp32 beside fp16 or bf16: else every step would round it."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _kind(value: Any) -> str:
    return (
        f"{type(value).__name__} of length {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
    )
