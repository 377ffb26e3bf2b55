"""A decoder's loop on the native kernels: what `fastseq._C.decoder_forward` and `decoder_backward` are told.

Both take dicts of numbers and of addresses (0: absent), and one for each cell; csrc/cpu/decoder.h says what they mean.
Letters as in `decoder`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .cells import CELLS
from .common import address
from .decoder_products import LoopGradients, all_gradients
from .decoder_types import COLUMNS, KEPT, LoopSpec, LoopTensors, masked, parts
from .linear import product

__all__ = [
    "complete",
    "empty_results",
    "memory_gates_of",
    "native_cells",
    "native_sizes",
    "native_tensors",
    "run_backward",
    "run_forward",
]

_ATTEND = {"none": 0, "before": 1, "after": 2, "between": 3}
_FEED = {"none": 0, "context": 1, "output": 2}
_FEW_STEPS = 8  # below, a product with the whole memory costs more than it saves
_COMBINE = {"tanh": 0, "linear": 1, "maxout": 2}


def complete(like: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """As an operator returns them: an empty tensor for each None, a new one each time, since none may alias another."""
    return [like.new_empty(0) if t is None else t for t in tensors]


def empty_results(loop: LoopSpec, x: LoopTensors, need_weights: bool, save: bool) -> list[Tensor | None]:
    """Results of the loop, to be filled: KEPT, the fed value, h_n, c_n; None for those that this loop has not."""
    (rows, steps, _), hidden, y = x.y.shape, x.hidden, x.y
    hs = y.new_empty(loop.cells, rows, steps + 1, hidden)  # sizes one by one: a tuple takes twice as long to read
    contexts = outs = weights = gates = cs = queries = read_saved = None
    if x.keys is not None and x.memory is not None:
        contexts = y.new_empty(rows, steps + (loop.feed == "context"), x.memory.shape[2])
        if need_weights or save:
            weights = y.new_empty(rows, steps, x.keys.shape[1])
        if save and x.w_query is not None:
            queries = y.new_empty(rows, steps, x.keys.shape[2])
    if x.w_read is not None:
        read = x.w_read.shape[0]
        outs = y.new_empty(rows, steps + 1, read // 2 if loop.combine == "maxout" else read)
        if save and (loop.combine == "maxout" or (loop.combine == "tanh" and x.out_mask is not None)):
            read_saved = y.new_empty(rows, steps, read)
    if save:
        gates = y.new_empty(loop.cells, rows, steps, 4, hidden)
        if loop.cell == "lstm":
            cs = y.new_empty(loop.cells, rows, steps, hidden, dtype=torch.float32)
    feed_n = None if x.feed0 is None else _like(x.feed0)
    return [hs, contexts, outs, weights, gates, cs, queries, read_saved, feed_n, *map(_like, (*x.h0, *x.c0))]


def _like(t: Tensor) -> Tensor:
    """Empty and contiguous."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def run_forward(loop: LoopSpec, x: LoopTensors, need_weights: bool, save: bool) -> list[Tensor | None]:
    """As `empty_results`, filled."""
    results = empty_results(loop, x, need_weights, save)
    rows, _, inputs = x.y.shape
    if rows == 0:
        return results
    assert _native.C is not None
    x = x.dense(loop)
    kept, feed_n, states = results[: len(KEPT)], results[len(KEPT)], results[len(KEPT) + 1 :]
    h_n, c_n = states[: loop.layers], states[loop.layers :]
    gates = kept[KEPT.index("gates")]
    projected = product(x.y, x.weights[0][:, :inputs], out=None if gates is None else _first_columns(loop, x, gates))
    if loop.cell == "lstm" and x.beside is not None:  # its two products meet in the same pre-activations
        projected += x.beside[:, None]
        x = x._replace(beside=None)
    read_input = None
    if "input" in loop.readout:
        assert x.w_read is not None
        at, end = parts(loop, x)["input"]
        read_input = product(masked(x.y, x.read_mask, at, end), x.w_read[:, at:end])
    memory_gates = memory_gates_of(loop, x, x.y.shape[1])
    tensors = native_tensors(loop, x, kept)
    tensors |= {
        "projected": address(projected), "read_input": address(read_input), "feed_n": address(feed_n),
        "memory_gates": address(memory_gates), "projected_pitch": projected.stride(1),
    }  # fmt: skip
    cells = native_cells(loop, x)
    for i in range(loop.layers):  # of attend="between" the second cell's state is the layer's
        cells[i - loop.layers].update(h_n=address(h_n[i]), c_n=address(c_n[i]) if c_n else 0)
    _native.C.decoder_forward(native_sizes(loop, x, save), tensors, cells)
    return results


def _first_columns(loop: LoopSpec, x: LoopTensors, gates: Tensor) -> Tensor:
    """[N, T, G*H] of where the first cell's gates will be saved, once a step has read what is there."""
    return gates[0].flatten(2)[..., : x.weights[0].shape[0]]


def memory_gates_of(loop: LoopSpec, x: LoopTensors, steps: int) -> Tensor | None:
    """The memory through the context's weights [B, S, G*H], where adding these up is less to read than the weights."""
    if x.memory is None or loop.attend == "after" or sum(loop.contexts) != 1 or x.y.dtype is not torch.float32:
        return None
    rows, (_, source, features) = x.y.shape[0], x.memory.shape
    if steps < _FEW_STEPS or source == 0 or 2 * rows * source > features:
        return None
    w_ih = x.weights[4 * loop.contexts.index(True)]
    return product(x.memory, w_ih[:, w_ih.shape[1] - features :])


def native_sizes(loop: LoopSpec, x: LoopTensors, keep: bool) -> dict[str, int]:
    """The numbers of a call."""
    rows, steps, _ = x.y.shape
    batch, source, units = (rows, 0, 0) if x.keys is None else x.keys.shape
    read = 0 if x.w_read is None else x.w_read.shape[0]
    return {
        "cell": CELLS[loop.cell].number, "dtype": int(x.y.dtype is torch.bfloat16),
        "state_is_f32": int(x.h0[0].dtype is torch.float32), "rows": rows, "copies": rows // batch, "steps": steps,
        "source": source, "units": units, "features": 0 if x.memory is None else x.memory.shape[2],
        "hidden": x.hidden, "output": read // 2 if loop.combine == "maxout" else read, "attend": _ATTEND[loop.attend],
        "query_cell": loop.query_cell, "feed": _FEED[loop.feed], "combine": _COMBINE[loop.combine],
        "additive": int(x.v is not None), "keep": int(keep), "threads": torch.get_num_threads(),
    }  # fmt: skip


def native_tensors(loop: LoopSpec, x: LoopTensors, kept: Sequence[Tensor | None]) -> dict[str, int]:
    """What forward and backward both read."""
    columns = parts(loop, x)

    def start(part: str) -> int:
        return columns[part][0] if part in columns else -1

    return {
        "keys": address(x.keys), "memory": address(x.memory), "mask": address(x.mask), "w_q": address(x.w_query),
        "v": address(x.v), "beside": address(x.beside), "feed0": address(x.feed0), "w_r": address(x.w_read),
        "w_r_pitch": 0 if x.w_read is None else x.w_read.shape[1], "b_r": address(x.b_read), "r_state": start("state"),
        "r_prev": start("prev_state"), "r_context": start("context"), "layer_masks": address(x.layer_masks),
        "read_mask": address(x.read_mask), "out_mask": address(x.out_mask),
        **dict(zip(KEPT, map(address, kept), strict=True)),
    }  # fmt: skip


def native_cells(loop: LoopSpec, x: LoopTensors) -> list[dict[str, int]]:
    """Each cell's weights and first state."""
    return [_cell(loop, x, i) for i in range(loop.cells)]


def _cell(loop: LoopSpec, x: LoopTensors, i: int) -> dict[str, int]:
    w_ih, w_hh, b_ih, b_hh = x.weights[4 * i : 4 * i + 4]
    past = 0 if i else x.y.shape[2]  # what it reads of y is projected beforehand
    carried = i < loop.layers
    return {
        "w_ih": w_ih.data_ptr() + past * w_ih.element_size(), "pitch_ih": w_ih.shape[1], "w_hh": w_hh.data_ptr(),
        "b_ih": b_ih.data_ptr(), "b_hh": b_hh.data_ptr(), "below": int(i > 0 and carried),
        "feed": int(i == 0 and loop.feed != "none"), "context": int(loop.contexts[i]),
        "h0": x.h0[i].data_ptr() if carried else 0, "c0": x.c0[i].data_ptr() if carried and x.c0 else 0, "h_n": 0,
        "c_n": 0,
    }  # fmt: skip


def run_backward(
    loop: LoopSpec,
    grads: Sequence[Any],  # GRADIENTS, each None where there is none
    x: LoopTensors,
    kept: Sequence[Tensor | None],
    needs: Sequence[bool],  # of LoopTensors, flattened
    consume: bool,
) -> list[Tensor | None]:
    """The gradients of LoopTensors, flattened, None for those not needed.

    `consume`: what forward kept for backward alone is written over, by the gradients that are made from it, and freed.
    """
    if x.y.shape[0] == 0:
        pairs = zip(x.flat(), needs, strict=True)
        return [torch.zeros_like(t) if t is not None and need else None for t, need in pairs]
    x, need = x.dense(loop), LoopTensors.of(loop, needs)
    found = _empty_gradients(loop, x, kept, need, consume)
    _run_native(loop, grads, x, kept, found)
    if consume:
        _free(kept[KEPT.index("cs")])
    return all_gradients(loop, x, kept, found, need, consume, _free)


def _free(t: Tensor | None) -> None:
    """At once, whoever refers to it: autograd does so until backward has ended. Its values are lost."""
    if t is not None:
        assert _native.C is not None
        _native.C.discard(t.data_ptr(), t.nbytes)


def _empty_gradients(
    loop: LoopSpec, x: LoopTensors, kept: Sequence[Tensor | None], need: LoopTensors, consume: bool
) -> LoopGradients:
    (rows, steps, _), new = x.y.shape, x.y.new_empty
    *_, gates, _, queries, read_saved = kept if consume else [None] * len(KEPT)
    if x.v is None:  # d_keys is made from the queries, after d_queries
        queries = None

    def fp32(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.empty_like(t, dtype=torch.float32)

    def state(s: Tensor | None, needed: Any) -> Tensor | None:
        return torch.empty_like(s) if s is not None and needed else None

    def width_of(w: Tensor | None, there: Tensor | None) -> Tensor | None:
        return None if w is None else new(rows, steps, w.shape[0]) if there is None else there

    columns = COLUMNS[loop.cell]
    if gates is None or gates.shape[3] != columns:
        d_gates = [new(rows, steps, columns * x.hidden) for _ in range(loop.cells)]
    else:
        d_gates = [of_cell.flatten(2) for of_cell in gates]
    return LoopGradients(
        d_gates, width_of(x.w_query, queries), width_of(x.w_read, read_saved), None if x.v is None else fp32(x.keys),
        new(rows, steps, x.keys.shape[1], dtype=torch.float32) if x.keys is not None and x.v is None else None,
        fp32(x.memory), fp32(x.v), state(x.feed0, need.feed0),
        [state(s, n) for s, n in zip(x.h0, need.h0, strict=True)],
        [state(s, n) for s, n in zip(x.c0, need.c0, strict=True)],
    )  # fmt: skip


def _run_native(
    loop: LoopSpec, grads: Sequence[Any], x: LoopTensors, kept: Sequence[Tensor | None], found: LoopGradients
) -> None:
    """Fills `found`."""
    assert _native.C is not None
    d_hs, *rest, d_h_n, d_c_n = grads
    dense = [None if g is None else g.contiguous() for g in (*rest, *d_h_n, *d_c_n)]  # alive until the call has ended
    d_contexts, d_outs, d_weights, d_feed_n = map(address, dense[:4])
    d_h_n, d_c_n = dense[4 : 4 + loop.layers], dense[4 + loop.layers :]
    tensors = native_tensors(loop, x, kept)
    tensors |= {
        "d_contexts": d_contexts, "d_outs": d_outs, "d_weights": d_weights, "d_feed_n": d_feed_n,
        "d_queries": address(found.d_queries), "d_read": address(found.d_read), "d_keys": address(found.d_keys),
        "d_scores": address(found.d_scores), "d_memory": address(found.d_memory), "d_v": address(found.d_v),
        "d_feed0": address(found.d_feed0),
    }  # fmt: skip
    cells = native_cells(loop, x)
    for cell, gates in zip(cells, found.d_gates, strict=True):
        cell |= {"d_hs": 0, "d_hs_row": 0, "d_hs_step": 0, "d_h_n": 0, "d_c_n": 0, "d_h0": 0, "d_c0": 0}
        cell["d_gates"] = gates.data_ptr()
    for i in range(loop.layers):
        cells[i].update(d_h0=address(found.d_h0[i]), d_c0=address(found.d_c0[i]) if x.c0 else 0)
        cells[i - loop.layers].update(d_h_n=address(d_h_n[i]), d_c_n=address(d_c_n[i]) if x.c0 else 0)
    if d_hs is not None:
        d_hs = d_hs if d_hs.stride(-1) == 1 else d_hs.contiguous()
        cells[-1].update(d_hs=d_hs.data_ptr(), d_hs_row=d_hs.stride(0), d_hs_step=d_hs.stride(1))
    _native.C.decoder_backward(native_sizes(loop, x, True), tensors, cells)
