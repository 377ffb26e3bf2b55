"""From the gradients of a loop's pre-activations to those of parameters and inputs: products over all steps at once,
each parameter's gradient in one buffer. Letters as in `decoder`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .decoder_types import KEPT, LoopSpec, LoopTensors, masked, parts
from .linear import input_gradient, weight_gradient

__all__ = ["LoopGradients", "all_gradients", "asking_states"]

Kept = Sequence[Tensor | None]  # what KEPT names


class LoopGradients(NamedTuple):
    """What the loop itself makes in backward."""

    d_gates: list[Tensor]  # of each cell [N, T, columns * H]: lstm i, f, g, o; gru r, z, U_n h, W_n x; else r, z, n
    d_queries: Tensor | None  # [N, T, A], where there is a W_q
    d_read: Tensor | None  # [N, T, R']
    d_keys: Tensor | None  # [B, S, A] in fp32, of the additive form
    d_scores: Tensor | None  # [N, T, S] in fp32, of the dot form
    d_memory: Tensor | None  # [B, S, D] in fp32
    d_v: Tensor | None  # [A] in fp32
    d_feed0: Tensor | None  # [N, F]; None here and below: not needed
    d_h0: list[Tensor | None]
    d_c0: list[Tensor | None]


def all_gradients(
    loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients, need: LoopTensors, consume: bool,
    free: Callable[[Tensor | None], None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of LoopTensors, flattened, None for those not needed.

    `free` is told what is read no more, before the next, larger gradients are allocated: of `found`, and with `consume`
    of `kept`.
    """
    d_w_read, d_b_read = readout_gradients(loop, x, kept, found, need)
    if consume and loop.feed == "output" and not any(loop.contexts):  # seen neither outside nor by a cell
        free(kept[_CONTEXTS])
    d_keys = key_gradient(loop, x, kept, found) if need.keys else None
    d_w_query = query_gradient(loop, x, kept, found) if need.w_query else None
    free(found.d_queries)
    d_y = input_gradients(loop, x, found) if need.y else None
    free(found.d_read)
    d_weights = [d for i in range(loop.cells) for d in cell_gradients(loop, x, kept, found, need, i)]
    dtype = x.y.dtype
    return [
        d_y, _needed(d_keys, need.keys, dtype), _needed(found.d_memory, need.memory, dtype), None, found.d_feed0,
        beside_gradient(loop, x, found) if need.beside else None, d_w_query, _needed(found.d_v, need.v, dtype),
        d_w_read, d_b_read, None, None, None, *found.d_h0, *found.d_c0, *d_weights,
    ]  # fmt: skip


def _needed(gradient: Tensor | None, need: Any, dtype: torch.dtype) -> Tensor | None:
    return gradient.to(dtype) if need and gradient is not None else None


def cell_gradients(
    loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients, need: LoopTensors, i: int
) -> list[Tensor | None]:
    """d_w_ih, d_w_hh, d_b_ih, d_b_hh of cell i."""
    wanted, two = need.weights[4 * i : 4 * i + 4], 2 * x.hidden
    d_ih, d_hh, d_b_ih, d_b_hh = map(torch.empty_like, x.weights[4 * i : 4 * i + 4])
    d_gates = found.d_gates[i]
    if wanted[0] or wanted[2]:
        reads = _reads(loop, x, kept, i)
        if loop.cell == "gru":  # U_n h, which the input does not reach, stands before W_n x
            _weight_gradients(d_gates[..., :two], reads, d_ih[:two], d_b_ih[:two])
            _weight_gradients(d_gates[..., two + x.hidden :], reads, d_ih[two:], d_b_ih[two:])
        else:
            _weight_gradients(d_gates, reads, d_ih, d_b_ih)
    if wanted[1] or wanted[3]:
        before = _before(loop, kept, i)
        if loop.cell == "gru_reset_before":  # U_n reads r h
            gates = kept[_GATES]
            assert gates is not None
            weight_gradient(d_gates[..., :two], before, d_hh[:two], d_b_hh[:two])
            weight_gradient(d_gates[..., two:], gates[i, :, :, 2], d_hh[two:], d_b_hh[two:])
        else:
            weight_gradient(_recurrent(loop, x, d_gates), before, d_hh, d_b_hh)
    return [d if w else None for d, w in zip((d_ih, d_hh, d_b_ih, d_b_hh), wanted, strict=True)]


_HS, _CONTEXTS, _OUTS, _GATES, _QUERIES = map(KEPT.index, ("hs", "contexts", "outs", "gates", "queries"))


def _recurrent(loop: LoopSpec, x: LoopTensors, d_gates: Tensor) -> Tensor:
    """The columns of the recurrent product's gradients."""
    return d_gates[..., : 3 * x.hidden] if loop.cell == "gru" else d_gates


def _weight_gradients(dy: Tensor, reads: list[Tensor], d_w: Tensor, d_b: Tensor | None) -> None:
    """Of a product that reads several parts side by side: each fills its columns, without a copy of all of them."""
    at = 0
    for read in reads:
        end = at + read.shape[-1]
        weight_gradient(dy, read, d_w[:, at:end], None if at else d_b)
        at = end


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
        if loop.feed != "none" and fed is not None:
            found.append(fed[:, :-1])
    elif loop.attend != "between":
        below = _states(kept, i - 1)[:, 1:]
        found.append(below if x.layer_masks is None else below * x.layer_masks[i - 1])
    if loop.contexts[i]:
        found.append(_contexts(loop, kept))
    return found


def _contexts(loop: LoopSpec, kept: Kept) -> Tensor:
    """Of every step [N, T, D]."""
    contexts = kept[_CONTEXTS]
    assert contexts is not None
    return contexts[:, 1:] if loop.feed == "context" else contexts


def input_gradients(loop: LoopSpec, x: LoopTensors, found: LoopGradients) -> Tensor:
    """d_y, through the first cell and the readout."""
    d_gates, w, two = found.d_gates[0], x.weights[0][:, : x.y.shape[-1]], 2 * x.hidden
    if loop.cell == "gru":
        d_y = input_gradient(d_gates[..., :two], w[:two])
        input_gradient(d_gates[..., two + x.hidden :], w[two:], out=d_y, add=True)
    else:
        d_y = input_gradient(d_gates, w)
    if "input" in loop.readout:
        assert found.d_read is not None and x.w_read is not None  # noqa: PT018
        at, end = parts(loop, x)["input"]
        if x.read_mask is None:
            input_gradient(found.d_read, x.w_read[:, at:end], out=d_y, add=True)
        else:
            d_y += masked(input_gradient(found.d_read, x.w_read[:, at:end]), x.read_mask, at, end)
    return d_y


def beside_gradient(loop: LoopSpec, x: LoopTensors, found: LoopGradients) -> Tensor:
    """d_beside [N, G*H]: the first cell's recurrent product at all steps."""
    return _recurrent(loop, x, found.d_gates[0]).sum(1)


def key_gradient(loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients) -> Tensor | None:
    """d_keys [B, S, A] in fp32. A dot score leaves it to one product of all steps: S A additions less at each."""
    if found.d_scores is None or x.keys is None:
        return found.d_keys
    batch, source, units = x.keys.shape
    asked = asking_states(loop, kept) if x.w_query is None else kept[_QUERIES]
    assert asked is not None
    d_scores = found.d_scores.view(batch, asked.shape[0] // batch * asked.shape[1], source)
    return torch.bmm(d_scores.mT, asked.reshape(batch, -1, units).float())


def asking_states(loop: LoopSpec, kept: Kept) -> Tensor:
    """The states [N, T, H] that ask."""
    hs = _states(kept, loop.query_cell)
    return hs[:, :-1] if loop.attend == "before" else hs[:, 1:]


def query_gradient(loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients) -> Tensor:
    """d_w_query."""
    assert found.d_queries is not None and x.w_query is not None  # noqa: PT018
    d_w_query = torch.empty_like(x.w_query)
    weight_gradient(found.d_queries, asking_states(loop, kept), d_w_query)
    return d_w_query


def readout_gradients(
    loop: LoopSpec, x: LoopTensors, kept: Kept, found: LoopGradients, need: LoopTensors
) -> tuple[Tensor | None, Tensor | None]:
    """d_w_read, d_b_read."""
    if not (need.w_read or need.b_read) or found.d_read is None or x.w_read is None:
        return None, None
    d_w, d_b = torch.empty_like(x.w_read), None if x.b_read is None else torch.empty_like(x.b_read)
    columns = parts(loop, x)
    reads = [masked(_part(loop, part, x, kept), x.read_mask, *columns[part]) for part in loop.readout]
    _weight_gradients(found.d_read, reads, d_w, d_b)
    return d_w if need.w_read else None, d_b if need.b_read else None


def _part(loop: LoopSpec, part: str, x: LoopTensors, kept: Kept) -> Tensor:
    """A part [N, T, ·] of a fed readout."""
    if part == "input":
        return x.y
    if part == "context":
        return _contexts(loop, kept)
    hs = _states(kept, -1)
    return hs[:, 1:] if part == "state" else hs[:, :-1]
