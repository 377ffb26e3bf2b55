"""From the gradients of a loop's pre-activations to those of parameters and inputs: products over all steps at once,
each parameter's gradient in one buffer. Letters as in `decoder`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .decoder_types import KEPT, LoopSpec, LoopTensors, masked, parts
from .linear import input_gradient, weight_gradient

__all__ = [
    "LoopGradients", "beside_gradient", "cell_gradients", "input_gradients", "query_gradient", "readout_gradients"
]  # fmt: skip

Kept = Sequence[Tensor | None]  # what KEPT names


class LoopGradients(NamedTuple):
    """What the loop itself makes in backward."""

    d_gates: list[Tensor]  # of each cell [N, T, columns * H]: lstm i, f, g, o; gru r, z, U_n h, W_n x; else r, z, n
    d_queries: Tensor | None  # [N, T, A], where there is a W_q
    d_read: Tensor | None  # [N, T, R']
    d_keys: Tensor | None  # [B, S, A] in fp32
    d_memory: Tensor | None  # [B, S, D] in fp32
    d_v: Tensor | None  # [A] in fp32
    d_feed0: Tensor | None  # [N, F]; None here and below: not needed
    d_h0: list[Tensor | None]
    d_c0: list[Tensor | None]


def cell_gradients(
    loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients, need: LoopTensors, i: int
) -> list[Tensor | None]:
    """d_w_ih, d_w_hh, d_b_ih, d_b_hh of cell i."""
    wanted = need.weights[4 * i : 4 * i + 4]
    d_ih, d_hh, d_b_ih, d_b_hh = (w.new_empty(w.shape) for w in x.weights[4 * i : 4 * i + 4])
    d_gates, hidden = found.d_gates[i], x.hidden
    if wanted[0] or wanted[2]:
        reads = _reads(loop, x, kept, i)
        for at, d in _input_rows(loop, d_gates, hidden):
            end, column = at + d.shape[-1], 0
            for part in reads:
                into = d_ih[at:end, column : column + part.shape[-1]]
                weight_gradient(d, part, into, None if column else d_b_ih[at:end])
                column += part.shape[-1]
    if wanted[1] or wanted[3]:
        before = _before(loop, kept, i)
        if loop.cell != "gru_reset_before":
            weight_gradient(d_gates[..., : d_hh.shape[0]], before, d_hh, d_b_hh)
        else:
            gates, two = kept[_GATES], 2 * hidden
            assert gates is not None
            weight_gradient(d_gates[..., :two], before, d_hh[:two], d_b_hh[:two])
            weight_gradient(d_gates[..., two:], gates[i, :, :, 2], d_hh[two:], d_b_hh[two:])  # U_n reads r h
    return [d if w else None for d, w in zip((d_ih, d_hh, d_b_ih, d_b_hh), wanted, strict=True)]


_HS, _CONTEXTS, _OUTS, _GATES = map(KEPT.index, ("hs", "contexts", "outs", "gates"))


def _input_rows(loop: LoopSpec, d_gates: Tensor, hidden: int) -> list[tuple[int, Tensor]]:
    """The columns of the input product's gradients, each stretch with its first row of w_ih."""
    if loop.cell != "gru":
        return [(0, d_gates)]
    return [(0, d_gates[..., : 2 * hidden]), (2 * hidden, d_gates[..., 3 * hidden :])]


def _states(kept: Kept, i: int) -> Tensor:
    """States [N, T + 1, H] of cell i."""
    hs = kept[_HS]
    assert hs is not None
    return hs[i]


def _before(loop: LoopSpec, kept: Kept, i: int) -> Tensor:
    """The states [N, T, H] that cell i started from."""
    if loop.attend != "between":
        return _states(kept, i)[:, :-1]
    return _states(kept, 0)[:, 1:] if i else _states(kept, 1)[:, :-1]


def _reads(loop: LoopSpec, x: LoopTensors, kept: Kept, i: int) -> list[Tensor]:
    """The parts of cell i's input, in the order of w_ih's columns."""
    contexts, found = kept[_CONTEXTS], []
    if i == 0:
        found.append(x.y)
        fed = contexts if loop.feed == "context" else kept[_OUTS]
        if x.feed0 is not None and fed is not None:
            found.append(torch.cat((x.feed0.to(fed.dtype)[:, None], fed[:, :-1]), 1))
    elif loop.attend != "between":
        below = _states(kept, i - 1)[:, 1:]
        found.append(below if x.layer_masks is None else below * x.layer_masks[i - 1])
    if loop.contexts[i]:
        assert contexts is not None
        found.append(contexts)
    return found


def input_gradients(loop: LoopSpec, x: LoopTensors, found: LoopGradients) -> Tensor:
    """d_y, through the first cell and the readout."""
    d_y, w_ih, inputs = x.y.new_empty(x.y.shape), x.weights[0], x.y.shape[-1]
    for at, d in _input_rows(loop, found.d_gates[0], x.hidden):
        input_gradient(d, w_ih[at : at + d.shape[-1], :inputs], out=d_y, add=at > 0)
    if "input" in loop.readout:
        assert found.d_read is not None and x.w_read is not None  # noqa: PT018
        at, end = parts(loop, x)["input"]
        if x.read_mask is None:
            input_gradient(found.d_read, x.w_read[:, at:end], out=d_y, add=True)
        else:
            d_y += masked(input_gradient(found.d_read, x.w_read[:, at:end]), x.read_mask, at, end)
    return d_y


def beside_gradient(x: LoopTensors, found: LoopGradients) -> Tensor:
    """d_beside [N, G*H]: the first cell's recurrent product at all steps."""
    return found.d_gates[0][..., : x.weights[1].shape[0]].sum(1)


def query_gradient(loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients) -> Tensor:
    """d_w_query."""
    assert found.d_queries is not None and x.w_query is not None  # noqa: PT018
    hs, d_w_query = _states(kept, loop.query_cell), x.w_query.new_empty(x.w_query.shape)
    weight_gradient(found.d_queries, hs[:, :-1] if loop.attend == "before" else hs[:, 1:], d_w_query)
    return d_w_query


def readout_gradients(
    loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients, need: LoopTensors
) -> tuple[Tensor | None, Tensor | None]:
    """d_w_read, d_b_read."""
    if not (need.w_read or need.b_read) or found.d_read is None or x.w_read is None:
        return None, None
    d_w = x.w_read.new_empty(x.w_read.shape)
    d_b = None if x.b_read is None else x.b_read.new_empty(x.b_read.shape)
    hs = _states(kept, -1)
    seen = {"state": hs[:, 1:], "prev_state": hs[:, :-1], "context": kept[_CONTEXTS], "input": x.y}
    for part, (at, end) in parts(loop, x).items():
        read = seen[part]
        assert read is not None
        weight_gradient(found.d_read, masked(read, x.read_mask, at, end), d_w[:, at:end], None if at else d_b)
    return d_w if need.w_read else None, d_b if need.b_read else None
