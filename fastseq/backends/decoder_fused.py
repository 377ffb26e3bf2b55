"""Attention decoders on fused kernels of any kind: what feeds back runs as one loop, all else over all steps at once.

A `Plan` says which is which. Layers above the loop are sequences of their own, an attention without feedback asks all
its queries together, and a readout that is not fed is one product.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _triton
from ..ops import attention as ops
from ..ops.decoder import LoopSpec, LoopTensors, decoder_loop
from ..ops.linear import linear
from ..ops.rnn import rnn_layer
from ..spec import AttentionParams, CellParams, DecoderOutput, DecoderSpec, DecoderState, Keys, LayerState
from . import decoder_reference
from .decoder_call import AttentionCall, DecoderCall

__all__ = [
    "Plan",
    "attention",
    "decoder",
    "loop_tensors",
    "make_plan",
    "not_fused",
    "not_fused_attention",
    "plan",
    "search_tensors",
    "whole",
]


class Plan(NamedTuple):
    """What of a decoder loops. str() says it in words."""

    loop: LoopSpec | None  # None: nothing feeds back
    layers: int  # the first so many layers are within the loop
    attends: bool  # the attention is outside the loop
    reads: bool  # the readout is outside the loop

    def __str__(self) -> str:
        if self.loop is None:
            return "nothing loops"
        looped = ["1 layer" if self.layers == 1 else f"{self.layers} layers"]
        if self.loop.attend != "none":
            looped.append(f"attention ({self.loop.attend})")
        return f"loop of {', '.join(looped if self.reads else [*looped, 'readout'])}"


def make_plan(spec: DecoderSpec) -> Plan:
    """What of this decoder loops, and what is done for all steps at once."""
    last, fed = spec.query_layer + 1, spec.feed == "output"
    between = spec.attention and spec.attend == "between"
    before = spec.attention and spec.attend == "before" and any(spec.reads_context[:last])
    layers = 0
    if fed:
        layers = spec.num_layers
    elif spec.feed == "context" or between or before:
        layers = last
    elif spec.context_side == "hidden":  # C c joins a product that `rnn_layer` has to itself
        layers = 1
    if layers == 0:
        return Plan(None, 0, spec.attention, True)
    contexts = (False, True) if between else spec.reads_context[:layers] if spec.attention else (False,) * layers
    loop = LoopSpec(
        spec.cell, spec.attend if spec.attention else "none", spec.query_layer if spec.attention else 0, contexts,
        spec.feed or "none", (spec.combine or "linear") if fed else "linear", spec.readout if fed else (),
    )  # fmt: skip
    return Plan(loop, layers, False, not fed)


plan = lru_cache(maxsize=256)(make_plan)


def whole(spec: DecoderSpec) -> LoopSpec:
    """All of this decoder as a loop, as a search needs it. A fixed context is what its cells see of an attention."""
    contexts = (False, True) if spec.attention and spec.attend == "between" else spec.reads_context
    return LoopSpec(
        spec.cell, spec.attend if spec.attention else "none", spec.query_layer if spec.attention else 0, contexts,
        spec.feed or "none", spec.combine or "linear", spec.readout,
    )  # fmt: skip


def not_fused_attention(call: AttentionCall) -> Iterator[str]:
    """What no kernel has, whatever the device."""
    yield from _untraceable()
    if call.window is not None:
        yield f"window={call.window}: local-p attention is not fused"


def not_fused(call: DecoderCall, most_cells: int) -> Iterator[str]:
    """What no kernel has, whatever the device; `most_cells` is this one's limit."""
    spec = call.spec
    yield from _untraceable()
    if spec.window is not None:
        yield f"window={spec.window}: local-p attention is not fused"
    if spec.query == "feed":
        yield "query='feed' is not fused; only a state asks"
    looped = make_plan(spec).layers
    if looped and spec.cell in ("rnn_tanh", "rnn_relu"):
        yield f"cell={spec.cell!r} within a decoder's loop is not fused"
    if spec.residual is not None and spec.residual < looped:
        yield f"residual={spec.residual} lies within the loop of {looped} layers; only layers above it may have one"
    if looped > most_cells:
        yield f"num_layers={spec.num_layers} with feed={spec.feed!r}: at most {most_cells} layers loop"
    if spec.feed == "output":
        yield from _obstacles_of_a_fed_readout(spec)


def _untraceable() -> Iterator[str]:
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        yield "torch.jit.trace cannot record these kernels"


def _obstacles_of_a_fed_readout(spec: DecoderSpec) -> Iterator[str]:
    if spec.combine is None:
        yield "feed='output' with combine=None is not fused"
    if len({*spec.readout}) < len(spec.readout):
        yield f"feed='output' with a part twice in readout={spec.readout} is not fused"
    if not spec.attention and ("context" in spec.readout or any(spec.reads_context)):
        yield "feed='output' beside a fixed context is not fused"


def attention(call: AttentionCall, on: str) -> tuple[Tensor, Tensor | None]:
    """All queries at once."""
    if _transformed():
        return decoder_reference.attention(call)
    return _attend(call.query, call.keys, call.params, call.need_weights, on)


def decoder(call: DecoderCall, on: str) -> DecoderOutput:
    """All steps: the loop, the layers above it, then attention and readout where they are not fed.

    on: whose kernels, "cpu", "triton" or "cuda".
    """
    if _needs_reference(call):
        return decoder_reference.decoder(call)
    spec, masks = call.spec, call.masks
    todo = make_plan(spec) if torch.compiler.is_compiling() else plan(spec)
    y = call.y if masks.input is None else call.y * masks.input
    below, context, weights, feed = y, _fixed_context(call), None, None
    states: list[LayerState] = []
    if todo.loop is not None:
        below, seen, weights, feed, h_n, c_n = decoder_loop(
            todo.loop, loop_tensors(call, todo, y), call.need_weights, on
        )
        states = list(zip(h_n, c_n, strict=True)) if c_n else [(h,) for h in h_n]
        if not todo.reads:
            assert seen is not None
            return DecoderOutput(seen, DecoderState(tuple(states), feed), weights)
        context = context if seen is None else seen
    out = below
    for index in range(todo.layers, spec.num_layers):
        if index and masks.layers is not None:
            below = below * masks.layers[index - 1]
        x = below
        if spec.reads_context[index]:
            assert context is not None
            x = torch.cat((below, context), -1)
        out, state = _layer(spec.cell, x, call.state.layers[index], call.params.layers[index], on)
        states.append(state)
        below = out + below if spec.residual is not None and index >= spec.residual else out
        if todo.attends and index == spec.query_layer:
            queries = out if spec.attend == "after" else _before(call, index, out)
            assert call.params.attention is not None  # since the call was checked
            context, weights = _attend(queries, call.keys, call.params.attention, call.need_weights, on)
    seen_by = {"state": below, "input": y} | ({} if context is None else {"context": context})
    if "prev_state" in spec.readout:
        seen_by["prev_state"] = _before(call, -1, out)
    output = _readout(call, [seen_by[part] for part in spec.readout])
    return DecoderOutput(output, DecoderState(tuple(states), feed), weights)


def search_tensors(call: DecoderCall) -> tuple[LoopSpec, LoopTensors]:
    """All of the decoder as a loop of one step, `call`'s; a fixed context is the memory [B, 1, D]."""
    loop = whole(call.spec)
    x = loop_tensors(call, Plan(loop, call.spec.num_layers, attends=False, reads=False), call.y)
    if call.keys.context is not None:
        x = x._replace(memory=call.keys.context[:, None])
    return loop, x


def _needs_reference(call: DecoderCall) -> bool:
    """Transforms, forward-mode gradients and gradients of masks: the kernels have none of these."""
    masks = torch.is_grad_enabled() and any(mask is not None and mask.requires_grad for mask in call.masks)
    return masks or _transformed()


def _transformed() -> bool:
    """Whether torch.func or forward-mode gradients see this call: the kernels carry neither batches nor tangents."""
    return torch.autograd.forward_ad._current_level >= 0 or (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    )


def _copies(call: DecoderCall, t: Tensor) -> Tensor:
    """[B, ...] as [N, ...]."""
    copies = call.y.shape[0] // max(t.shape[0], 1)
    return t if copies == 1 else t.repeat_interleave(copies, 0)


def _fixed_context(call: DecoderCall) -> Tensor | None:
    """[N, T, D], the same at every step."""
    if call.keys.context is None:
        return None
    return _copies(call, call.keys.context)[:, None].expand(-1, call.y.shape[1], -1)


def loop_tensors(call: DecoderCall, todo: Plan, y: Tensor) -> LoopTensors:
    spec, (keys, memory, mask, context), params, masks = call.spec, call.keys, call.params, call.masks
    beside = None
    if context is not None and params.context_hidden is not None:
        beside = _copies(call, linear(context, params.context_hidden))
    query, v, _ = (None, None, None) if params.attention is None else params.attention
    cells = params.layers[: todo.layers] if params.transition is None else (*params.layers, params.transition)
    w_read, b_read = (None, None) if todo.reads or params.readout is None else params.readout
    carried = call.state.layers[: todo.layers]
    return LoopTensors(
        y, keys, memory, mask, call.state.feed, beside, query, v, w_read, b_read,
        masks.layers[: todo.layers - 1] if masks.layers is not None and todo.layers > 1 else None,
        None if todo.reads else masks.readout, None if todo.reads else masks.output,
        tuple(layer[0] for layer in carried), tuple(layer[1] for layer in carried if spec.cell == "lstm"),
        tuple(w for cell in cells for w in cell),
    )  # fmt: skip


def _layer(
    cell: str, x: Tensor, state: LayerState, weights: CellParams, on: str
) -> tuple[Tensor, LayerState]:  # fmt: skip
    """One layer over x [N, T, X]: its states [N, T, H] and the last one."""
    h0, c0 = state if len(state) == 2 else (state[0], None)
    if cell == "gru_reset_before":  # its recurrent product has two phases: the loop's kernels alone have that
        hs, _, _, _, state, _ = decoder_loop(LoopSpec(cell), LoopTensors(x, h0=(h0,), weights=weights), False, on)
        return hs, state
    c = None if c0 is None else c0[None]
    out, h_n, c_n, _ = rnn_layer(cell, x, h0[None], c, weights, None, None, None, True, False, on=on)
    return out, (h_n[0],) if c_n is None else (h_n[0], c_n[0])


def _before(call: DecoderCall, index: int, out: Tensor) -> Tensor:
    """A layer's states [N, T, H] one step earlier."""
    return torch.cat((call.state.layers[index][0].to(out.dtype)[:, None], out[:, :-1]), 1)


def _attend(
    queries: Tensor, of: Keys, params: AttentionParams, need_weights: bool, on: str
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert of.keys is not None  # since the call was checked
    assert of.memory is not None
    q = queries if params.query is None else linear(queries, params.query)
    if on == "cuda":  # which has no kernel of its own for that
        if _triton.unavailable() is not None:
            return decoder_reference.attention(AttentionCall(q, of, AttentionParams(v=params.v), need_weights))
        on = "triton"
    return ops.attention(q, of.keys, of.memory, of.mask, params.v, need_weights, on)


def _readout(call: DecoderCall, parts: list[Tensor]) -> Tensor:
    """The output [N, T, R] of the readout's parts."""
    masks, combine = call.masks, call.spec.combine
    output = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if masks.readout is not None:
        output = output * masks.readout
    if call.params.readout is not None:
        output = linear(output, *call.params.readout)
    if combine == "tanh":
        output = output.tanh()
    elif combine == "maxout":
        output = torch.maximum(output[..., 0::2], output[..., 1::2])
    return output if masks.output is None else output * masks.output
