"""What is wrong with a call of attention: the value, the limit, the remedy. Runs once per kind of call."""

from typing import Any

import torch
from torch import Tensor

from .backends.call import GATES
from .backends.decoder_call import AttentionCall, DecoderCall
from .checks import CASTS, DTYPES, need_tensor
from .errors import InputError
from .spec import AttentionParams, DecoderParams, DecoderSpec, DecoderState, DropoutMasks, Keys

__all__ = ["check_attention", "check_decoder", "check_mask", "check_types"]

_PREPARE = "pass what Attention.prepare or Decoder.prepare made of the memory"
_INIT = "Decoder.init_state makes a fitting one, for N = B * k rows with copies=k"


def check_types(call: AttentionCall | DecoderCall) -> None:
    """Raise TypeError unless `call` is made of the named tuples it should be: to a plan one tuple is like another."""
    _need_kind("keys", call.keys, Keys, _PREPARE)
    if isinstance(call, AttentionCall):
        _need_kind("params", call.params, AttentionParams, "pass AttentionParams(query, v, window)")
        return
    _need_kind("spec", call.spec, DecoderSpec, "pass a DecoderSpec")
    _need_kind("state", call.state, DecoderState, _INIT)
    _need_kind("params", call.params, DecoderParams, "pass a DecoderParams")
    _need_kind("dropout_masks", call.masks, DropoutMasks, "pass a DropoutMasks, or None")


def check_attention(call: AttentionCall, autocast: torch.dtype | None) -> None:
    """Raise InputError or TypeError unless `call` is sound."""
    query = _need_shape("query", call.query, "[N, T, Q]", (None, None, None), "or [N, Q] for one query a row")
    rows, steps, size = query.shape
    if steps == 0:
        raise InputError("query has T=0 steps; at least one is needed")
    _check_dtypes("query", query, {"keys": call.keys, "params": call.params}, autocast)
    _check_attention("query", rows, size, call.keys, call.params, call.window)


def check_decoder(call: DecoderCall, autocast: torch.dtype | None) -> None:
    """Raise InputError or TypeError unless `call` is sound."""
    y = _need_shape("y", call.y, "[N, T, I]", (None, None, None), "one step is [N, 1, I]")
    if y.shape[1] == 0:
        raise InputError("y has T=0 steps; at least one is needed")
    trees = {"keys": call.keys, "params": call.params, "dropout_masks": call.masks}
    _check_dtypes("y", y, trees, autocast)
    _check_state_dtypes(call.state, y, autocast)
    sizes = _Sizes(call)
    _check_cells(call, sizes)
    _check_state(call, sizes)
    spec, params = call.spec, call.params
    _given("params.attention", params.attention, spec.attention, "spec.attention")
    if params.attention is not None:
        size = sizes.feed if spec.query == "feed" else sizes.hidden
        _check_attention("y", sizes.rows, size, call.keys, params.attention, spec.window)
    _given("params.readout", params.readout, spec.combine is not None, f"spec.combine={spec.combine!r}")
    if params.readout is not None:
        w, b = _pair("params.readout", params.readout, "(w, b or None)")
        parts = " + ".join(f"{part} {sizes.part(part)}" for part in spec.readout)
        _need_shape("params.readout[0]", w, "[R, P]", (None, sizes.parts), f"its parts are {parts}")
        if spec.combine == "maxout" and w.shape[0] % 2:
            raise InputError(f"params.readout[0] has {w.shape[0]} rows; maxout takes pairs, 2R of them")
        if b is not None:
            _need_shape("params.readout[1]", b, "[R], or [2R] of maxout", (w.shape[0],))
    _check_masks(call, sizes)


class _Sizes:
    """The sizes that follow from a decoder's parameters and inputs; 0 where there is no such thing."""

    def __init__(self, call: DecoderCall) -> None:
        spec, keys, params = call.spec, call.keys, call.params
        if not isinstance(params.layers, tuple):
            raise TypeError(f"params.layers must be a tuple, got {type(params.layers).__name__}")
        if len(params.layers) != spec.num_layers:
            raise InputError(f"params.layers has {len(params.layers)} layers, spec.num_layers={spec.num_layers}")
        w_hh = _need_shape("params.layers[0][1]", params.layers[0][1], "w_hh [G*H, H]", (None, None))
        self.rows, self.steps, self.inputs = call.y.shape
        self.hidden = w_hh.shape[1]
        self.gates = GATES[spec.cell] * self.hidden
        self._needs_context(call)
        memory = keys.memory if spec.attention else keys.context
        self.memory = 0 if memory is None else need_tensor("keys", memory).shape[-1]
        self.parts = sum(self.part(part) for part in spec.readout)
        self.output = self.parts
        if spec.combine is not None and params.readout is not None:
            rows = _need_shape("params.readout[0]", params.readout[0], "[R, P]", (None, None)).shape[0]
            self.output = rows // 2 if spec.combine == "maxout" else rows
        self.feed = {None: 0, "context": self.memory, "output": self.output}[spec.feed]

    def part(self, name: str) -> int:
        """Features of a part of the readout."""
        return {"context": self.memory, "input": self.inputs}.get(name, self.hidden)

    def _needs_context(self, call: DecoderCall) -> None:
        """Keys of an attention, or a fixed context where something reads it."""
        spec, keys = call.spec, call.keys
        if spec.attention:
            if keys.keys is None or keys.memory is None:
                raise InputError("keys.keys and keys.memory are needed with spec.attention; " + _PREPARE)
            if keys.context is not None:
                raise InputError("keys.context is given with spec.attention, which makes its own; " + _PREPARE)
            return
        if keys.keys is not None or keys.memory is not None or keys.mask is not None:
            raise InputError("keys.keys, memory or mask given with spec.attention=False; pass Keys(context=...)")
        if keys.context is None:
            if spec.context_to != "none" or "context" in spec.readout:
                raise InputError(
                    f"keys.context=None, but context_to={spec.context_to!r} and readout={spec.readout} read it; pass"
                    " Keys(context=...) [B, D]"
                )
        else:
            _need_shape("keys.context", keys.context, "[B, D]", (None, None))
            _check_rows("y", call.y.shape[0], keys.context.shape[0])


def _check_cells(call: DecoderCall, sizes: _Sizes) -> None:
    spec, params = call.spec, call.params
    for index, reads in enumerate(spec.reads_context):
        parts = {"y": sizes.inputs, "feed": sizes.feed} if index == 0 else {"the state below": sizes.hidden}
        if reads:
            parts["context"] = sizes.memory
        _check_cell(f"params.layers[{index}]", params.layers[index], parts, sizes)
    between = spec.attention and spec.attend == "between"
    _given("params.transition", params.transition, between, f"spec.attend={spec.attend!r}")
    if params.transition is not None:
        _check_cell("params.transition", params.transition, {"context": sizes.memory}, sizes)
    beside = spec.context_side == "hidden"
    _given("params.context_hidden", params.context_hidden, beside, f"spec.context_side={spec.context_side!r}")
    if beside:
        _need_shape("params.context_hidden", params.context_hidden, "C [G*H, D]", (sizes.gates, sizes.memory))


def _check_cell(name: str, cell: Any, parts: dict[str, int], sizes: _Sizes) -> None:
    if not isinstance(cell, tuple) or len(cell) != 4:
        raise TypeError(f"{name} must be a tuple (w_ih, w_hh, b_ih, b_hh), got {type(cell).__name__}")
    reads = " + ".join(f"{part} {size}" for part, size in parts.items() if size)
    _need_shape(f"{name}[0]", cell[0], "w_ih [G*H, X]", (sizes.gates, sum(parts.values())), f"it reads {reads}")
    _need_shape(f"{name}[1]", cell[1], "w_hh [G*H, H]", (sizes.gates, sizes.hidden))
    _need_shape(f"{name}[2]", cell[2], "b_ih [G*H]", (sizes.gates,))
    _need_shape(f"{name}[3]", cell[3], "b_hh [G*H]", (sizes.gates,))


def _check_state(call: DecoderCall, sizes: _Sizes) -> None:
    spec, state = call.spec, call.state
    leaves = ("h", "c") if spec.cell == "lstm" else ("h",)
    if not isinstance(state.layers, tuple):
        raise TypeError(f"state.layers must be a tuple, got {type(state.layers).__name__}; {_INIT}")
    if len(state.layers) != spec.num_layers:
        raise InputError(f"state.layers has {len(state.layers)} layers, spec.num_layers={spec.num_layers}; {_INIT}")
    for index, layer in enumerate(state.layers):
        if not isinstance(layer, tuple) or len(layer) != len(leaves):
            kind = type(layer).__name__ + (f" of length {len(layer)}" if isinstance(layer, (tuple, list)) else "")
            raise TypeError(f"state.layers[{index}] must be a tuple ({', '.join(leaves)},), got {kind}; {_INIT}")
        for leaf, letter in zip(layer, leaves, strict=True):
            name = f"{letter} of state.layers[{index}]"
            _need_shape(name, leaf, "[N, H]", (sizes.rows, sizes.hidden), _INIT)
    _given("state.feed", state.feed, spec.feed is not None, f"spec.feed={spec.feed!r}")
    if state.feed is not None:
        _need_shape("state.feed", state.feed, "[N, F]", (sizes.rows, sizes.feed), _INIT)


def _check_masks(call: DecoderCall, sizes: _Sizes) -> None:
    lead = (sizes.rows, sizes.steps)
    for name, letters, shape in (
        ("input", "[N, T, I]", (*lead, sizes.inputs)),
        ("layers", "[L - 1, N, T, H]", (call.spec.num_layers - 1, *lead, sizes.hidden)),
        ("readout", "[N, T, P]", (*lead, sizes.parts)),
        ("output", "[N, T, R]", (*lead, sizes.output)),
    ):
        mask = getattr(call.masks, name)
        if mask is not None:
            _need_shape(f"dropout_masks.{name}", mask, letters, shape)


def _check_attention(asks: str, rows: int, size: int, keys: Keys, params: AttentionParams, window: int | None) -> None:
    """Keys, parameters and N rows of queries of this size."""
    key = _need_shape("keys.keys", keys.keys, "[B, S, A]", (None, None, None), _PREPARE)
    batch, source, units = key.shape
    _need_shape("keys.memory", keys.memory, "[B, S, D]", (batch, source, None), _PREPARE)
    check_mask("keys.mask", keys.mask, batch, source)
    _check_rows(asks, rows, batch)
    if params.query is not None:
        w = _need_shape("params.query", params.query, "W_q [A, Q]", (None, None))
        if w.shape[1] != size:
            raise InputError(f"the query has Q={size} features, W_q {tuple(w.shape)} takes {w.shape[1]}")
        if w.shape[0] != units:
            raise InputError(f"W_q {tuple(w.shape)} maps the query to A={w.shape[0]}, keys.keys have A={units}")
    elif size != units:
        raise InputError(
            f"the query has Q={size} features, keys.keys A={units}; without W_q they must agree: use score='general',"
            " which maps the memory"
        )
    if params.v is not None:
        _need_shape("params.v", params.v, "[A]", (units,))
    if (window is None) != (params.window is None):
        given = "given" if params.window is not None else "None"
        raise InputError(f"window={window} with params.window {given}; local-p attention takes D and (W_p, v_p)")
    if params.window is not None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise InputError(f"window={window!r}; it is D of Luong et al. 2015, an int of at least 1")
        w, v = _pair("params.window", params.window, "(W_p, v_p)")
        w_p = _need_shape("params.window[0]", w, "W_p [A', Q]", (None, size))
        _need_shape("params.window[1]", v, "v_p [A']", (w_p.shape[0],))


def check_mask(name: str, mask: Any, batch: int, source: int) -> None:
    """Raise InputError or TypeError unless `mask` is None or [B, S] bool."""
    if mask is None:
        return
    if need_tensor(name, mask, "[B, S] bool, True = attend").dtype != torch.bool:
        raise TypeError(
            f"{name} is {mask.dtype}, expected torch.bool with True = attend; pass ~key_padding_mask, or mask.bool()"
        )
    _need_shape(name, mask, "[B, S]", (batch, source), "True = attend; pass ~key_padding_mask")


def _check_rows(asks: str, rows: int, batch: int) -> None:
    if rows % batch if batch else rows:
        raise InputError(
            f"{asks} has N={rows} rows, the keys have B={batch}; N must be a multiple of B (row n reads keys n // k)"
        )


def _check_dtypes(name: str, x: Tensor, trees: dict[str, Any], autocast: torch.dtype | None) -> None:
    """One device and, unless autocast converts them, one floating dtype for all but the boolean mask."""
    if x.dtype not in DTYPES:
        raise InputError(f"{name} is {x.dtype}; expected a real floating dtype: {name}.float()")
    for where, tree in trees.items():
        for path, t in _named(where, tree):
            _need_device(path, t, name, x)
            cast = autocast is not None and t.dtype in CASTS and x.dtype in CASTS
            if path != "keys.mask" and t.dtype != x.dtype and not cast:
                raise InputError(
                    f"{path} is {t.dtype}, {name} is {x.dtype}; convert one: .to({x.dtype}), or use torch.autocast"
                )


def _check_state_dtypes(state: DecoderState, y: Tensor, autocast: torch.dtype | None) -> None:
    """All in y's dtype, or all in fp32."""
    leaves = list(_named("state", state))
    for path, t in leaves:
        _need_device(path, t, "y", y)
        wide = y.dtype in CASTS and (t.dtype == torch.float32 or (autocast is not None and t.dtype in CASTS))
        if t.dtype != y.dtype and not wide:
            raise InputError(f"{path} is {t.dtype}, y is {y.dtype}; pass the state in y's dtype or, beside fp16 or"
                             f" bf16, in torch.float32: .to({y.dtype})")  # fmt: skip
        if t.dtype != leaves[0][1].dtype and autocast is None:
            first, one = leaves[0]
            raise InputError(f"{path} is {t.dtype}, {first} is {one.dtype}; a state has one dtype: .to({one.dtype})")


def _need_device(name: str, t: Tensor, other: str, x: Tensor) -> None:
    if t.device != x.device:
        raise InputError(f"{name} is on {t.device}, {other} on {x.device}; move one: .to({str(x.device)!r})")


def _named(name: str, tree: Any) -> list[tuple[str, Tensor]]:
    """The tensors of nested tuples, each with its path."""
    if tree is None:
        return []
    if isinstance(tree, tuple):
        fields = getattr(tree, "_fields", None)
        keys = [f".{field}" for field in fields] if fields else [f"[{index}]" for index in range(len(tree))]
        return [pair for key, branch in zip(keys, tree, strict=True) for pair in _named(name + key, branch)]
    return [(name, need_tensor(name, tree, "pass a torch.Tensor; several go in a tuple"))]


def _need_kind(name: str, value: Any, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}; {remedy}")


def _need_shape(name: str, value: Any, letters: str, shape: tuple[int | None, ...], remedy: str = "") -> Tensor:
    """`value`, a tensor of this shape; None stands for any size."""
    t = need_tensor(name, value)
    if t.dim() != len(shape) or any(want is not None and got != want for got, want in zip(t.shape, shape, strict=True)):
        sizes = f" = ({', '.join('any' if want is None else str(want) for want in shape)})" if any(shape) else ""
        raise InputError(
            f"{name} has shape {tuple(t.shape)}, {t.dim()}-D; expected {letters}{sizes}{'; ' if remedy else ''}{remedy}"
        )
    return t


def _pair(name: str, value: Any, letters: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{name} must be a pair {letters}, got {type(value).__name__}")
    return value


def _given(name: str, value: Any, wanted: bool, because: str) -> None:
    """Given exactly where the spec wants it."""
    if (value is not None) != wanted:
        state, remedy = ("is given", "pass None") if value is not None else ("is None", "pass it")
        raise InputError(f"{name} {state} with {because}; {remedy}, or change the spec")
