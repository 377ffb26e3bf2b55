"""Gradients of a decoder's initial state and fed value on a GPU: what its backward kernel would pull at step -1."""

from collections.abc import Mapping

from torch import Tensor

from .decoder_types import LoopSpec, LoopTensors, masked, parts

__all__ = ["initial_gradients"]

_RECURRENT = {"lstm": 4, "gru": 3, "gru_reset_before": 2}  # the first so many columns are the recurrent product's


def initial_gradients(
    loop: LoopSpec,
    x: LoopTensors,
    found: Mapping[str, Tensor | None],  # d_gates [C, N, T, columns * H], carry [K, N, H], d_queries, d_read
    need: LoopTensors,
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """Of h0, c0 and feed0, None for those not needed."""
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


def _state_gradient(loop: LoopSpec, x: LoopTensors, found: Mapping[str, Tensor | None], layer: int) -> Tensor:
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
