"""What backward of a decoder's loop does around its kernel on a GPU, whichever backend's that is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .decoder_products import LoopGradients, all_gradients, asking_states
from .decoder_types import KEPT, LoopSpec, LoopTensors, masked, parts
from .rnn_gpu import aligned, without_autocast

__all__ = ["Found", "backward", "started_carry"]

Found = Mapping[str, Tensor | None]  # what a kernel filled: d_gates, carry, d_queries, d_context, d_scores, d_read
KeyGradients = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

_RECURRENT = {"lstm": 4, "gru": 3, "gru_reset_before": 2}  # the first so many columns are the recurrent product's


def backward(
    kernel: Callable[[LoopSpec, Sequence[Any], LoopTensors, Sequence[Tensor | None]], Found],
    key_gradients: KeyGradients,  # (queries [N, T, A], keys, v, d_scores, mask) -> d_keys, d_v of an additive score
    loop: LoopSpec,
    grads: Sequence[Any],  # GRADIENTS, each None where there is none
    x: LoopTensors,
    kept: Sequence[Tensor | None],
    needs: Sequence[bool],  # of LoopTensors, flattened
    consume: bool,  # ignored: a GPU's allocator gives nothing back to the system
) -> list[Tensor | None]:
    """As fastseq::decoder_loop_backward, None where that has empty tensors."""
    if x.y.shape[0] == 0:
        pairs = zip(x.flat(), needs, strict=True)
        return [torch.zeros_like(t) if t is not None and need else None for t, need in pairs]
    x = LoopTensors.of(loop, [None if t is None else aligned(t) for t in x.flat()])
    kept, need = [None if t is None else aligned(t) for t in kept], LoopTensors.of(loop, needs)
    with without_autocast(x.y):
        found = kernel(loop, grads, x, kept)
        return all_gradients(loop, x, kept, _gradients(loop, x, kept, found, need, key_gradients), need, False, _keep)


def _keep(t: Tensor | None) -> None:
    """Nothing to free by hand."""


def started_carry(loop: LoopSpec, x: LoopTensors, grads: Sequence[Any]) -> Tensor:
    """carry [K, N, H] fp32 as a kernel finds it: an LSTM's begins with the gradients of c_n."""
    carry = torch.zeros((loop.layers, x.y.shape[0], x.hidden), dtype=torch.float32, device=x.y.device)
    if loop.cell == "lstm":
        for layer, d_c in enumerate(grads[-1]):
            if d_c is not None:
                carry.select(0, layer).copy_(d_c)
    return carry


def _gradients(
    loop: LoopSpec, x: LoopTensors, kept: Sequence[Tensor | None], found: Found, need: LoopTensors,
    key_gradients: KeyGradients,
) -> LoopGradients:  # fmt: skip
    """What the kernel made, and what follows from it about memory, keys, v and the initial state."""
    d_gates, d_queries, d_scores, d_context, d_read = (
        found.get(name) for name in ("d_gates", "d_queries", "d_scores", "d_context", "d_read")
    )
    assert d_gates is not None
    d_keys = d_memory = d_v = None
    if x.keys is not None and x.memory is not None:
        batch, source, _ = x.keys.shape
        weights = kept[KEPT.index("weights")]
        assert weights is not None and d_context is not None and d_scores is not None  # noqa: PT018
        if need.memory:
            lead = (batch, weights.shape[0] // batch * weights.shape[1])
            d_memory = torch.bmm(weights.view(*lead, source).mT, d_context.view(*lead, d_context.shape[2]))
        if x.v is not None and (need.keys or need.v):
            asked = asking_states(loop, kept) if x.w_query is None else kept[KEPT.index("queries")]
            assert asked is not None
            d_keys, d_v = key_gradients(asked, x.keys, x.v, d_scores, x.mask)
    d_h0, d_c0, d_feed0 = _initial(loop, x, found, need)
    return LoopGradients(
        list(d_gates.unbind(0)), None if x.w_query is None else d_queries, d_read, d_keys,
        d_scores if x.v is None else None, d_memory, d_v, d_feed0, d_h0, d_c0,
    )  # fmt: skip


def _initial(
    loop: LoopSpec, x: LoopTensors, found: Found, need: LoopTensors
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """Gradients of h0, c0 and feed0, None for those not needed: what the kernel would pull at step -1."""
    d_gates, carry = found["d_gates"], found["carry"]
    assert d_gates is not None and carry is not None  # noqa: PT018
    d_h0 = [_state_gradient(loop, x, found, layer) if need.h0[layer] else None for layer in range(loop.layers)]
    pairs = zip(x.c0, need.c0, carry, strict=False)
    d_c0 = [c.to(c0.dtype, copy=True) if needed else None for c0, needed, c in pairs]
    if x.feed0 is None or not need.feed0:
        return d_h0, d_c0, None
    at = x.y.shape[2]
    w, first, two = x.weights[0][:, at : at + x.feed0.shape[1]], d_gates[0].select(1, 0), 2 * x.hidden
    if loop.cell != "gru":
        return d_h0, d_c0, (first @ w).to(x.feed0.dtype)
    # U_n h, which the input does not reach, stands before W_n x
    return d_h0, d_c0, (first[:, :two] @ w[:two] + first[:, two + x.hidden :] @ w[two:]).to(x.feed0.dtype)


def _state_gradient(loop: LoopSpec, x: LoopTensors, found: Found, layer: int) -> Tensor:
    """Of h0 of one layer."""
    d_gates, carry, d_queries, d_read = (found.get(name) for name in ("d_gates", "carry", "d_queries", "d_read"))
    assert d_gates is not None and carry is not None  # noqa: PT018
    recurrent = _RECURRENT[loop.cell] * x.hidden
    d = (d_gates[layer].select(1, 0)[:, :recurrent] @ x.weights[4 * layer + 1][:recurrent]).float()
    if loop.cell != "lstm":
        d = d + carry.select(0, layer)
    if loop.attend == "before" and loop.query_cell == layer:
        assert d_queries is not None
        asked = d_queries.select(1, 0)
        d += asked if x.w_query is None else asked @ x.w_query
    if "prev_state" in loop.readout and loop.feed == "output" and layer == loop.layers - 1:
        assert d_read is not None and x.w_read is not None  # noqa: PT018
        at, end = parts(loop, x)["prev_state"]
        first = None if x.read_mask is None else x.read_mask.select(1, 0)
        d += masked(d_read.select(1, 0) @ x.w_read[:, at:end], first, at, end)
    return d.to(x.h0[layer].dtype)
