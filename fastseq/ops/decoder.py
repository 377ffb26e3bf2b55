"""What of an attention decoder feeds back, over all steps, as an operator: `torch.ops.fastseq.decoder_loop`,
`decoder_loop_backward` and their autograd.

Letters: N decoder rows, B rows of keys, T steps, S source positions, I input, H units, G gates, A attention units,
D memory features, R features of a fed readout (of R' = R pre-activations, 2 R for maxout) of parts with P features,
F features of what is fed back (D or R), C cells, K layers (of attend="between" one, of two cells).
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.decoder_reference import Decoder, Source, steps
from ..backends.reference import Weights, wide
from ..spec import AttentionParams, DecoderSpec, DecoderState, DropoutMasks, Keys
from .common import (
    Kernels,
    distinct,
    gpu_kernels,
    is_direct,
    needs_recording,
    not_recorded,
    runs_once,
    saved_by,
    saves_unseen,
    schema,
    through_reference,
)
from .decoder_native import complete, empty_results, run_backward, run_forward
from .decoder_types import GRADIENTS, KEPT, LoopSpec, LoopTensors

__all__ = ["LoopResults", "LoopSpec", "LoopTensors", "decoder_loop", "loop_reference"]

# The one schema of every backend's loop: the fields of a LoopSpec, then those of LoopTensors. decoder_loop returns the
# tensors named by KEPT, the fed value after the last step [N, F], then h_n and, of an LSTM, c_n of each layer [N, H];
# an empty tensor for each that this loop has not. `save`: with what backward reads; otherwise of KEPT only hs (one cell
# after another), contexts, outs and, with need_weights, weights.
_SPEC = "str cell, str attend, int query_cell, bool[] contexts, str feed, str combine, str[] readout"
_TENSORS = (
    "Tensor y, Tensor? keys, Tensor? memory, Tensor? mask, Tensor? feed0, Tensor? beside, Tensor? w_query, Tensor? v, "
    "Tensor? w_read, Tensor? b_read, Tensor? layer_masks, Tensor? read_mask, Tensor? out_mask, Tensor[] h0, "
    "Tensor[] c0, Tensor[] weights"
)
_LIBRARY = torch.library.Library("fastseq", "FRAGMENT")
_LIBRARY.define(f"decoder_loop({_SPEC}, {_TENSORS}, bool need_weights, bool save, *, str on='') -> Tensor[]")
# Gradients of: hs of the last cell without its initial state [N, T, H], contexts, outs, weights, the fed value, h_n and
# c_n of each layer.
# kept: as KEPT. needs: for each tensor of LoopTensors, flattened. Returns its gradient; those not needed are empty.
_LIBRARY.define(
    f"decoder_loop_backward({_SPEC}, Tensor? d_hs, Tensor? d_contexts, Tensor? d_outs, Tensor? d_weights, "
    f"Tensor? d_feed_n, Tensor?[] d_h_n, Tensor?[] d_c_n, {_TENSORS}, Tensor[] kept, bool[] needs, "
    "*, str on='') -> Tensor[]"
)


class LoopResults(NamedTuple):
    """What comes out of a loop."""

    hs: Tensor  # [N, T, H]: the last cell's states
    seen: Tensor | None  # the contexts [N, T, D], or where the readout is fed its outputs [N, T, R]
    weights: Tensor | None  # [N, T, S]
    feed_n: Tensor | None  # [N, F]
    h_n: tuple[Tensor, ...]  # of each layer [N, H]
    c_n: tuple[Tensor, ...]


@lru_cache(maxsize=256)
def as_decoder(loop: LoopSpec) -> DecoderSpec:
    """The decoder that is this loop and nothing else, its output what the loop shows."""
    fed, attends = loop.feed == "output", loop.attend != "none"
    context_to = "none"
    if attends and loop.attend != "between" and any(loop.contexts):
        context_to = "upper" if not loop.contexts[0] else "all" if all(loop.contexts) else "first"
    return DecoderSpec(
        loop.cell, loop.layers, attends, loop.attend if attends else "before", query_layer=loop.query_cell,
        context_to=context_to, feed=None if loop.feed == "none" else loop.feed,
        readout=loop.readout if fed else ("context",) if attends else ("state",),
        combine=loop.combine if fed else None,
    )  # fmt: skip


def loop_reference(loop: LoopSpec, need_weights: bool, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
    """The loop in plain PyTorch: a LoopResults, flattened, of LoopTensors, flattened."""
    x = LoopTensors.of(loop, [None if t is None else wide(t) for t in flat])
    assert flat[0] is not None
    dtype, attends = flat[0].dtype, loop.attend != "none"
    cells = [Weights(*x.weights[4 * i : 4 * i + 4]) for i in range(loop.cells)]
    cells[0] = cells[0]._replace(beside=x.beside)
    source = Source.of(Keys(x.keys, x.memory, x.mask), AttentionParams(x.w_query, x.v), None) if attends else None
    readout = None if x.w_read is None else (x.w_read, x.b_read)
    transition = cells.pop() if loop.attend == "between" else None
    decoder = Decoder(as_decoder(loop), cells, transition, source, None, readout)
    layers: tuple[tuple[Tensor, ...], ...] = tuple(zip(x.h0, x.c0, strict=True)) if x.c0 else tuple(zip(x.h0))
    masks = DropoutMasks(None, x.layer_masks, x.read_mask, x.out_mask)
    done = list(steps(decoder, x.y, DecoderState(layers, x.feed0), masks))
    hs = torch.stack([step.state.layers[-1][0] for step in done], 1)
    shows = attends or loop.feed == "output"
    weights = [step.weights for step in done if step.weights is not None] if need_weights else []
    state, given = done[-1].state, LoopTensors.of(loop, flat)
    return (
        hs.to(dtype),
        torch.stack([step.output for step in done], 1).to(dtype) if shows else None,
        torch.stack(weights, 1).to(dtype) if weights else None,
        None if state.feed is None else state.feed.to(given.h0[0].dtype),
        *(layer[0].to(given.h0[0].dtype) for layer in state.layers),
        *(layer[1].to(given.h0[0].dtype) for layer in state.layers if x.c0),
    )


_NATIVE = Kernels(run_forward, run_backward)


def _kernels(on: str) -> Kernels:
    """Forward takes (loop, tensors, need_weights, save), backward (loop, grads, tensors, kept, needs, consume)."""
    return _NATIVE if on == "cpu" else gpu_kernels(on, "decoder")


def _spec(args: Sequence[Any]) -> LoopSpec:
    """The first of an operator's arguments; of tuples it has made lists."""
    spec: list[Any] = [tuple(a) if isinstance(a, list) else a for a in args[: len(LoopSpec._fields)]]
    return LoopSpec(*spec)


def _forward_operator(default: str) -> Any:
    def forward(*args, on=""):  # type: ignore[no-untyped-def]
        loop, x = _spec(args), LoopTensors(*args[len(LoopSpec._fields) : -2])
        with torch.no_grad():
            return complete(x.y, _kernels(on or default).forward(loop, x, *args[-2:]))

    return forward


def _fake_forward(*args, on=""):  # type: ignore[no-untyped-def]
    loop, x = _spec(args), LoopTensors(*args[len(LoopSpec._fields) : -2])
    return complete(x.y, empty_results(loop, x, *args[-2:]))


def _split_backward(args: Sequence[Any]) -> tuple[LoopSpec, Sequence[Any], LoopTensors, Sequence[Any], Sequence[bool]]:
    spec, grads = len(LoopSpec._fields), len(LoopSpec._fields) + GRADIENTS
    return _spec(args), args[spec:grads], LoopTensors(*args[grads:-2]), args[-2], args[-1]


def _backward_operator(default: str) -> Any:
    def backward(*args, on=""):  # type: ignore[no-untyped-def]
        _, _, x, _, _ = split = _split_backward(args)
        with torch.no_grad():
            return complete(x.y, _kernels(on or default).backward(*split, consume=False))

    return backward


def _fake_backward(*args, on=""):  # type: ignore[no-untyped-def]
    _, _, x, _, needs = _split_backward(args)
    pairs = zip(x.flat(), needs, strict=True)
    return [x.y.new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in pairs]


for _on, _key in (("cpu", "CPU"), ("triton", "CUDA")):
    _LIBRARY.impl("decoder_loop", _forward_operator(_on), _key)
    _LIBRARY.impl("decoder_loop_backward", _backward_operator(_on), _key)
torch.library.register_fake("fastseq::decoder_loop", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fastseq::decoder_loop_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("fastseq::decoder_loop", not_recorded, lib=_LIBRARY)


def _run(
    loop: LoopSpec, x: LoopTensors, need_weights: bool, save: bool, on: str
) -> tuple[LoopResults, Sequence[Tensor | None]]:
    """The results, and what KEPT names."""
    if is_direct([t for t in x.flat() if t is not None]):
        made: Sequence[Tensor | None] = _kernels(on).forward(loop, x, need_weights, save)
    else:
        made = schema(torch.ops.fastseq.decoder_loop.default, on)(*loop, *x, need_weights, save)
    hs, contexts, outs, weights, *_ = kept = made[: len(KEPT)]
    feed_n, *states = made[len(KEPT) :]
    assert hs is not None
    seen = outs if loop.feed == "output" else contexts if loop.attend != "none" else None
    if loop.feed != "none" and seen is not None:  # from the initial value on
        seen = seen[:, 1:]
    results = LoopResults(
        hs[-1, :, 1:], seen, weights if need_weights and loop.attend != "none" else None,
        None if loop.feed == "none" else feed_n, tuple(states[: loop.layers]), tuple(states[loop.layers :]),  # type: ignore[arg-type]
    )  # fmt: skip
    return results, kept


def _flatten(results: LoopResults) -> tuple[Tensor | None, ...]:
    return (*results[:-2], *results.h_n, *results.c_n)


class _DecoderLoop(torch.autograd.Function):
    """Old style, as in `rnn`."""

    @staticmethod
    def forward(ctx, on, loop, need_weights, *flat):  # type: ignore[no-untyped-def]
        results, kept = _run(loop, LoopTensors.of(loop, flat), need_weights, True, on)
        ctx.save_for_backward(*flat, *kept)
        ctx.on, ctx.loop, ctx.need_weights, ctx.needs = on, loop, need_weights, ctx.needs_input_grad[3:]
        ctx.unseen = not torch.compiler.is_compiling() and saves_unseen()
        ctx.set_materialize_grads(False)
        return _flatten(results)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, None, None, *_backward_of(ctx, grads)


def _backward_of(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients of LoopTensors, flattened, from what the Function saved."""
    loop, needs, saved = ctx.loop, ctx.needs, saved_by(ctx)
    if all(g is None for g in grads):
        return [None] * len(needs)
    flat, kept = saved[: len(needs)], saved[len(needs) :]
    if needs_recording(grads):
        return through_reference(partial(loop_reference, loop, ctx.need_weights), flat, grads)
    d_hs, d_seen, d_weights, d_feed, *d_states = grads
    d_contexts, d_outs = (None, d_seen) if loop.feed == "output" else (d_seen, None)
    gradients = (d_hs, d_contexts, d_outs, d_weights, d_feed, d_states[: loop.layers], d_states[loop.layers :])
    x = LoopTensors.of(loop, flat)
    if is_direct([t for t in flat if t is not None]):
        return _kernels(ctx.on).backward(loop, gradients, x, kept, needs, ctx.unseen and runs_once())
    run = schema(torch.ops.fastseq.decoder_loop_backward.default, ctx.on)
    found = run(*loop, *gradients, *x, complete(x.y, kept), needs)
    return [d if need else None for d, need in zip(found, needs, strict=True)]


def decoder_loop(loop: LoopSpec, x: LoopTensors, need_weights: bool, on: str = "cpu") -> LoopResults:
    """The loop on fused kernels, differentiable but for the masks."""
    if not torch.is_grad_enabled():
        return _run(loop, x, need_weights, False, on)[0]
    flat = x.flat()
    if not any(t is not None and t.requires_grad for t in flat):
        return _run(loop, x, need_weights, False, on)[0]
    hs, seen, weights, feed_n, *states = _DecoderLoop.apply(on, loop, need_weights, *distinct(*flat))
    return LoopResults(hs, seen, weights, feed_n, tuple(states[: loop.layers]), tuple(states[loop.layers :]))
