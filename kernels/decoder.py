"""A decoder's loop on Triton: fastseq/ops/decoder.py calls `forward` and `backward`; the kernels are decoder_forward.py
and decoder_backward.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastseq.ops import decoder_gpu
from fastseq.ops.decoder_gpu import started_carry
from fastseq.ops.decoder_native import empty_results
from fastseq.ops.decoder_types import COLUMNS, KEPT, LoopSpec, LoopTensors, masked, parts
from fastseq.ops.linear import product

from . import cells, configs
from .attention_backward import key_gradients
from .configs import Config
from .decoder_backward import Found, Given, decoder_backward
from .decoder_forward import Made, Read, Work, decoder_forward
from .decoder_plan import Blocks, Static, static
from .launch import Launch, aligned, cdiv, device_of, precision, run, tf32_allowed
from .scores import as_bytes, fast_tanh

__all__ = ["backward", "forward"]


def forward(loop: LoopSpec, x: LoopTensors, need_weights: bool, save: bool) -> list[Tensor | None]:
    """As fastseq::decoder_loop, None where that has empty tensors."""
    x = _aligned(loop, x)
    results = empty_results(loop, x, need_weights, save)
    rows, _, inputs = x.y.shape
    if rows == 0:
        return results
    hs, contexts, outs, weights, gates, cs, queries, read_saved = results[: len(KEPT)]
    feed_n, states = results[len(KEPT)], results[len(KEPT) + 1 :]
    assert hs is not None
    _begin(loop, x, hs, contexts, outs)
    if x.w_query is not None and queries is None:
        assert x.keys is not None
        queries = x.y.new_empty(rows, 1, x.keys.shape[2])
    read_input = None
    if "input" in loop.readout:
        assert x.w_read is not None
        at, end = parts(loop, x)["input"]
        read_input = product(masked(x.y, x.read_mask, at, end), x.w_read[:, at:end])
    projected = product(x.y, x.weights[0][:, :inputs], x.weights[2])
    work = _work(loop, x)
    read = _read(x, projected, read_input)
    made = Made(hs, contexts, outs, weights, gates, cs, queries, read_saved)
    config, z = _choose("decoder_forward", loop, x, save)
    constants = {"Z": z, "FORWARD": None if z.reset_before else cells.CELLS[loop.cell].forward}
    _run(decoder_forward, (read, made, work), x, len(z.phases), constants, config)
    if feed_n is not None:
        fed = outs if loop.feed == "output" else contexts
        assert fed is not None
        feed_n.copy_(fed[:, -1])
    for given, last in zip(states, (*work.h, *(() if work.c is None else work.c)), strict=True):
        assert given is not None
        given.copy_(last)
    return results


def _aligned(loop: LoopSpec, x: LoopTensors) -> LoopTensors:
    return LoopTensors.of(loop, [None if t is None else aligned(t) for t in x.flat()])


def _read(x: LoopTensors, projected: Tensor | None, read_input: Tensor | None) -> Read:
    return Read(
        projected, read_input, x.keys, x.memory, as_bytes(x.mask), x.beside, x.w_query, x.v, x.w_read, x.b_read,
        x.layer_masks, x.read_mask, x.out_mask, *(tuple(x.weights[i::4]) for i in range(4)),
    )  # fmt: skip


def _choose(kernel: str, loop: LoopSpec, x: LoopTensors, save: bool) -> tuple[Config, Static]:
    device, dtype = device_of(x.y), x.y.dtype
    config = configs.choose(kernel, dtype, x.hidden, device)
    dot = precision(dtype, tf32_allowed(x.y, "matmul"))
    return config, static(loop, x, save, Blocks(**config.blocks), dot, fast_tanh(dtype, device))


def _begin(loop: LoopSpec, x: LoopTensors, hs: Tensor, contexts: Tensor | None, outs: Tensor | None) -> None:
    """The initial state and fed value, where step -1 would have left them."""
    for layer, h0 in enumerate(x.h0):
        hs[loop.cells - 1 if loop.attend == "between" else layer, :, 0].copy_(h0)
    fed = {"none": None, "context": contexts, "output": outs}[loop.feed]
    if fed is not None:
        assert x.feed0 is not None
        fed[:, 0].copy_(x.feed0)


def _work(loop: LoopSpec, x: LoopTensors) -> Work:
    rows, hidden, wide = x.y.shape[0], x.hidden, torch.float32
    new = x.y.new_empty
    h = torch.stack([t.to(wide) for t in x.h0])
    c = torch.stack([t.to(wide) for t in x.c0]) if x.c0 else None
    scores = None if x.keys is None else new((rows, x.keys.shape[1]), dtype=wide)
    arrived = torch.zeros(1, dtype=torch.int32, device=x.y.device)
    if loop.cell != "gru_reset_before":
        return Work(h, c, scores, None, None, None, arrived)
    z, candidate = (new((rows, hidden), dtype=wide) for _ in range(2))
    return Work(h, c, scores, z, candidate, new(rows, hidden), arrived)


def _run(
    kernel: Any, pointers: tuple[Any, ...], x: LoopTensors, phases: int, constants: dict[str, Any], config: Config
) -> None:
    """All steps: one launch where a grid can wait for itself, otherwise one for each phase of each."""
    device, (rows, steps, _) = device_of(x.y), x.y.shape
    source = 0 if x.keys is None else x.keys.shape[1]
    copies = 1 if x.keys is None else rows // x.keys.shape[0]
    sizes = (rows, steps, source, copies)
    programs = min(device.units, _most_tiles(constants["Z"], rows, source))  # more would only wait
    constants = constants | {"BARRIER": device.cooperative}
    alone = device.cooperative  # one program a unit, which may have all of its registers
    whole = (0, steps, 0, phases)
    each = [(t, t + 1, p, p + 1) for t in range(steps) for p in range(phases)]
    for part in [whole] if alone else each:
        args = (*pointers, *sizes, *part)
        launch = Launch(
            kernel, (programs,), args, constants, config.warps, config.stages, cooperative=alone, unshared=alone
        )
        run(x.y, launch)


def _most_tiles(z: Static, rows: int, source: int) -> int:
    """Of any phase, forward or backward."""
    of = z.blocks
    products = cdiv(rows, of.n) * cdiv(max(z.H, z.A, z.D, z.R), of.u)
    return max(products, rows * max(cdiv(source, of.s), cdiv(z.D, of.d), cdiv(z.A, of.a)))


def _backward(loop: LoopSpec, grads: Sequence[Any], x: LoopTensors, kept: Sequence[Tensor | None]) -> decoder_gpu.Found:
    """Run the kernel; what it fills."""
    found = _empty_found(loop, x, grads)
    config, z = _choose("decoder_backward", loop, x, True)
    constants = {"Z": z, "BACKWARD": None if z.reset_before else cells.CELLS[loop.cell].backward}
    pointers = (_read(x, None, None), Made(*kept), _given(grads), found, tuple(x.c0))
    _run(decoder_backward, pointers, x, len(z.undone), constants, config)
    return {
        "d_gates": found.gates, "carry": found.carry, "d_queries": found.queries, "d_read": found.read,
        "d_context": found.contexts, "d_scores": found.scores,
    }  # fmt: skip


def _given(grads: Sequence[Any]) -> Given:
    d_hs, d_contexts, d_outs, d_weights, d_feed_n, d_h_n, _ = grads
    dense = [None if g is None else aligned(g) for g in (d_hs, d_contexts, d_outs, d_weights, d_feed_n)]
    return Given(*dense, tuple(None if g is None else aligned(g) for g in d_h_n))


def _empty_found(loop: LoopSpec, x: LoopTensors, grads: Sequence[Any]) -> Found:
    (rows, steps, _), new, wide = x.y.shape, x.y.new_empty, torch.float32
    gates = new(loop.cells, rows, steps, COLUMNS[loop.cell] * x.hidden)
    carry = started_carry(loop, x, grads)
    queries = contexts = scores = weights = read = None
    if x.keys is not None and x.memory is not None:
        source = x.keys.shape[1]
        queries, contexts = new(rows, steps, x.keys.shape[2]), new(rows, steps, x.memory.shape[2])
        scores, weights = new((rows, steps, source), dtype=wide), new((rows, source), dtype=wide)
    if loop.feed == "output":
        assert x.w_read is not None
        read = new(rows, steps, x.w_read.shape[0])
    arrived = torch.zeros(1, dtype=torch.int32, device=x.y.device)
    return Found(gates, queries, read, contexts, scores, carry, weights, arrived)


backward = partial(decoder_gpu.backward, _backward, key_gradients)
