"""Attention decoders as the papers write them, in plain PyTorch: every `DecoderSpec`, the other backends' oracle.

Any floating dtype and device; differentiable any number of times; no in-place operation and no control flow on values.
fp16 and bf16 are computed in fp32 and rounded once, at the end. The cells are those of `reference`.

Sutskever et al. 2014    the encoder's state is the decoder's first: no attention, no context
Cho et al. 2014          A.1.2: the fixed context c beside the recurrent product, and in the maxout readout
Bahdanau et al. 2014     A.1.2 and A.2.2: the additive score of s_{i-1}, then the cell, then the maxout readout
Luong et al. 2015        section 3: the cell, then the dot, general or concat score; eq. 5, the attentional state;
                         section 3.3, input feeding; eq. 9 and 10, local-p attention
Firat and Cho 2016       the conditional GRU: cell, attention, cell (as Nematus, Sennrich et al. 2017)
Wu et al. 2016           GNMT: eq. 6, residuals; the lowest layer asks, the upper ones read the context
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..spec import AttentionParams, CellParams, DecoderOutput, DecoderSpec, DecoderState, DropoutMasks, Keys
from .decoder_call import AttentionCall, DecoderCall, mapped
from .reference import STEPS, Weights, wide

__all__ = [
    "NAME", "Decoder", "Source", "attention", "decoder", "refuses", "refuses_attention", "steps", "unavailable"
]  # fmt: skip

NAME = "reference"


def unavailable() -> str | None:
    """Always usable."""
    return None


def refuses(call: DecoderCall) -> str | None:
    """Nothing."""
    return None


def refuses_attention(call: AttentionCall) -> str | None:
    """Nothing."""
    return None


def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Context [N, T, D] and weights [N, T, S] of all queries at once."""
    (rows, steps, size), dtype = call.query.shape, call.query.dtype
    source = Source.of(call.keys, mapped(wide, call.params), call.window)
    batch = source.memory.shape[0]
    query = wide(call.query).reshape(batch, rows * steps // max(batch, 1), size)  # [B, k * T, Q]
    context, weights = _attend(query, source)
    context = context.reshape(rows, steps, context.shape[-1]).to(dtype)
    return context, weights.reshape(rows, steps, weights.shape[-1]).to(dtype) if call.need_weights else None


def decoder(call: DecoderCall) -> DecoderOutput:
    """All steps, one after another."""
    y, masks = wide(call.y), mapped(wide, call.masks)
    if masks.input is not None:
        y = y * masks.input
    done = list(steps(Decoder.of(call), y, mapped(wide, call.state), masks))
    state = done[-1].state
    weights = [step.weights for step in done if step.weights is not None] if call.need_weights else []
    layers = tuple(
        tuple(leaf.to(given.dtype) for leaf, given in zip(layer, before, strict=True))
        for layer, before in zip(state.layers, call.state.layers, strict=True)
    )
    feed = None if state.feed is None or call.state.feed is None else state.feed.to(call.state.feed.dtype)
    return DecoderOutput(
        torch.stack([step.output for step in done], 1).to(call.y.dtype),
        DecoderState(layers, feed),
        torch.stack(weights, 1).to(call.y.dtype) if weights else None,
    )


def steps(decoder: "Decoder", y: Tensor, state: DecoderState, masks: DropoutMasks) -> Iterator[DecoderOutput]:
    """Each step's output, state and weights. All tensors are at least fp32, y has had its mask."""
    for t in range(y.shape[1]):
        here = DropoutMasks(
            layers=None if masks.layers is None else masks.layers[:, :, t],
            readout=None if masks.readout is None else masks.readout[:, t],
            output=None if masks.output is None else masks.output[:, t],
        )
        done = _step(decoder, y[:, t], state, here)
        state = done.state
        yield done


class Source(NamedTuple):
    """What an attention reads, at least fp32. What stands behind mask False is replaced by 0: it may be NaN."""

    keys: Tensor  # [B, S, A]
    memory: Tensor  # [B, S, D]
    mask: Tensor | None  # [B, 1, S]
    params: AttentionParams
    window: int | None

    @classmethod
    def of(cls, keys: Keys, params: AttentionParams, window: int | None) -> "Source":
        assert keys.keys is not None  # since the call was checked
        assert keys.memory is not None
        key, memory, mask = wide(keys.keys), wide(keys.memory), keys.mask
        if mask is None:
            return cls(key, memory, None, params, window)
        there = mask[:, :, None]
        return cls(torch.where(there, key, 0.0), torch.where(there, memory, 0.0), mask[:, None], params, window)


def _attend(query: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """Context [B, M, D] and weights [B, M, S] of the queries [B, M, Q]."""
    keys, params, mask = source.keys, source.params, source.mask
    q = query if params.query is None else linear(query, params.query)  # [B, M, A]
    # Luong et al. 2015, section 3.1: dot, general; or Bahdanau et al. 2014, A.1.2, and Luong's concat
    scores = q @ keys.mT if params.v is None else (q[:, :, None] + keys[:, None]).tanh() @ params.v
    if params.window is None or source.window is None:
        weights = _softmax(scores, mask)
    else:
        offset = torch.arange(keys.shape[1], device=keys.device) - _aim(query, source)[:, :, None]  # s - p_t
        near = offset.abs() <= source.window
        weights = _softmax(scores, near if mask is None else near & mask)
        weights = weights * (-2 * (offset / source.window) ** 2).exp()  # eq. 10 with sigma = D / 2
    return weights @ source.memory, weights


def _aim(query: Tensor, source: Source) -> Tensor:
    """p_t [B, M] of Luong et al. 2015, eq. 9: the position, counted from 0 in the whole source, around which to look.

    Their S is the row's number of attended positions: the length of a padded row. Of a mask with holes it is less than
    the last attended position, and the positions at its end are out of reach.
    """
    assert source.params.window is not None
    w_p, v_p = source.params.window
    aim = (linear(query, w_p).tanh() @ v_p).sigmoid()
    return aim * (source.keys.shape[1] if source.mask is None else source.mask.sum(-1))


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over the last dimension where mask is True; 0 elsewhere, and everywhere where it is all False."""
    if mask is None:
        return scores.softmax(-1)
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row of nothing else would be NaN, and so its gradient
    return torch.where(mask, torch.where(mask, scores, lowest).softmax(-1), 0.0)


class Decoder(NamedTuple):
    """What all steps share, at least fp32."""

    spec: DecoderSpec
    cells: list[Weights]
    transition: Weights | None
    source: Source | None
    context: Tensor | None  # [N, D]: the fixed one
    readout: tuple[Tensor, Tensor | None] | None

    @classmethod
    def of(cls, call: DecoderCall) -> "Decoder":
        spec, keys, params = call.spec, call.keys, mapped(wide, call.params)
        source = context = None
        if spec.attention:
            assert params.attention is not None  # since the call was checked
            source = Source.of(keys, params.attention, spec.window)
        elif keys.context is not None:
            copies = call.y.shape[0] // max(keys.context.shape[0], 1)
            context = wide(keys.context).repeat_interleave(copies, 0)
        cells = [_weights(layer) for layer in params.layers]
        if context is not None and params.context_hidden is not None:  # Cho et al. 2014, A.1.2: r * (U h + C c)
            cells[0] = cells[0]._replace(beside=linear(context, params.context_hidden))
        transition = None if params.transition is None else _weights(params.transition)
        return cls(spec, cells, transition, source, context, params.readout)

    def attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Context [N, D] and weights [N, S] of the query [N, Q]."""
        assert self.source is not None
        rows, batch = query.shape[0], self.source.memory.shape[0]
        grouped = query.reshape(batch, rows // max(batch, 1), query.shape[-1])  # [B, k, Q]
        context, weights = _attend(grouped, self.source)
        return context.reshape(rows, context.shape[-1]), weights.reshape(rows, weights.shape[-1])


def _weights(cell: CellParams) -> Weights:
    ih, hh, b_ih, b_hh = cell
    return Weights(ih, hh, b_ih, b_hh)


def _step(decoder: Decoder, y: Tensor, state: DecoderState, masks: DropoutMasks) -> DecoderOutput:
    """One step of y [N, I], numbered as in `DecoderSpec`; masks are this step's."""
    spec, step, context, weights = decoder.spec, STEPS[decoder.spec.cell], decoder.context, None
    layers = list(state.layers)
    if spec.attention and spec.attend == "before":  # 1
        query = state.feed if spec.query == "feed" else layers[spec.query_layer][0]
        assert query is not None
        context, weights = decoder.attend(query)
    below, previous = y, layers[-1][0]
    for index, cell in enumerate(decoder.cells):  # 2
        if index and masks.layers is not None:
            below = below * masks.layers[index - 1]
        parts = [below]
        if index == 0 and state.feed is not None:
            parts.append(state.feed)
        if spec.reads_context[index]:
            assert context is not None
            parts.append(context)
        layers[index] = step(linear(torch.cat(parts, -1), cell.ih, cell.b_ih), layers[index], cell)
        residual = spec.residual is not None and index >= spec.residual  # Wu et al. 2016, eq. 6
        below = layers[index][0] + below if residual else layers[index][0]
        if spec.attention and spec.attend == "after" and index == spec.query_layer:  # 3
            context, weights = decoder.attend(layers[index][0])
    if decoder.transition is not None:  # Firat and Cho 2016
        context, weights = decoder.attend(layers[0][0])
        layers[0] = step(linear(context, decoder.transition.ih, decoder.transition.b_ih), layers[0], decoder.transition)
        below = layers[0][0]
    seen = {"state": below, "prev_state": previous, "input": y} | ({} if context is None else {"context": context})
    output = _readout(decoder, [seen[name] for name in spec.readout], masks)  # 4
    feed = context if spec.feed == "context" else output if spec.feed == "output" else None  # 5
    return DecoderOutput(output, DecoderState(tuple(layers), feed), weights)


def _readout(decoder: Decoder, parts: list[Tensor], masks: DropoutMasks) -> Tensor:
    """The output [N, R] of the readout's parts."""
    output = torch.cat(parts, -1)
    if masks.readout is not None:
        output = output * masks.readout
    if decoder.readout is not None:
        output = linear(output, *decoder.readout)
    if decoder.spec.combine == "tanh":  # Luong et al. 2015, eq. 5
        output = output.tanh()
    elif decoder.spec.combine == "maxout":  # Bahdanau et al. 2014, A.2.2: the larger of each two neighbours
        output = torch.maximum(output[:, 0::2], output[:, 1::2])
    return output if masks.output is None else output * masks.output
