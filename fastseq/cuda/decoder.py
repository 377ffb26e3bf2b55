"""A decoder's loop on the CUDA kernels of csrc/cuda/decoder_*.h: fastseq/ops/decoder.py calls `forward` and `backward`.

What happens at each step, the kernels do in one launch; products of all steps, before and after it, are PyTorch's.
Those of a search are of all tokens: `search` chooses what each step reads within the launch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..ops import decoder_gpu
from ..ops.chunked_greedy import Rows
from ..ops.decoder_gpu import started_carry
from ..ops.decoder_native import empty_results
from ..ops.decoder_search import Search, Vocabulary
from ..ops.decoder_types import COLUMNS, KEPT, LoopSpec, LoopTensors, masked, parts
from ..ops.linear import product
from ..ops.rnn_gpu import aligned, tf32_flag
from . import devices, native
from .decoder_phases import TENSORS, Program, dims
from .decoder_plan import DecoderPlan, plan
from .decoder_program import program
from .native import KINDS, address, kind_of

__all__ = ["backward", "forward", "layouts", "packed_once", "search", "search_layout"]

Named = dict[str, Tensor | None]  # by the names of decoder_phases.TENSORS


def forward(loop: LoopSpec, x: LoopTensors, need_weights: bool, save: bool) -> list[Tensor | None]:
    """As fastseq::decoder_loop, None where that has empty tensors."""
    x = _aligned(loop, x)
    results = empty_results(loop, x, need_weights, save)
    if x.y.shape[0] == 0:
        return results
    kept, feed_n, states = results[: len(KEPT)], results[len(KEPT)], results[len(KEPT) + 1 :]
    named = dict(zip(KEPT, kept, strict=True))
    _begin(loop, x, named)
    made = program(loop, dims(loop, x, save), True)
    chosen = _plan(made, x)
    projected = product(x.y, x.weights[0][:, : x.y.shape[2]], x.weights[2])
    named |= _read(x) | {"projected": projected, "read_input": _read_input(loop, x)}
    named |= {f"h_n.{i}": h for i, h in enumerate(states[: loop.layers])}
    named |= {f"c_n.{i}": c for i, c in enumerate(states[loop.layers :])}
    named |= _between_blocks(made, chosen, x, named)
    _run(made, chosen, x, save, named)
    if feed_n is not None:
        fed = named["outs" if loop.feed == "output" else "contexts"]
        assert fed is not None
        feed_n.copy_(fed[:, -1])
    return results


def _aligned(loop: LoopSpec, x: LoopTensors) -> LoopTensors:
    return LoopTensors.of(loop, [None if t is None else aligned(t) for t in x.flat()])


def _begin(loop: LoopSpec, x: LoopTensors, named: Named) -> None:
    """The initial state and fed value, where step -1 would have left them."""
    hs = named["hs"]
    assert hs is not None
    for layer, h0 in enumerate(x.h0):
        hs[loop.cells - 1 if loop.attend == "between" else layer, :, 0].copy_(h0)
    fed = {"none": None, "context": named["contexts"], "output": named["outs"]}[loop.feed]
    if fed is not None:
        assert x.feed0 is not None
        fed[:, 0].copy_(x.feed0)


def _read_input(loop: LoopSpec, x: LoopTensors) -> Tensor | None:
    """The readout's product with y, [N, T, R']."""
    if loop.feed != "output" or "input" not in loop.readout:
        return None
    assert x.w_read is not None
    at, end = parts(loop, x)["input"]
    return product(masked(x.y, x.read_mask, at, end), x.w_read[:, at:end])


def _read(x: LoopTensors) -> Named:
    """What both directions read of LoopTensors."""
    singles = ("keys", "memory", "mask", "v", "beside", "w_query", "w_read", "b_read", "layer_masks", "read_mask")
    named = {name: getattr(x, name) for name in (*singles, "out_mask")}
    for i in range(len(x.weights) // 4):
        named |= {f"{name}.{i}": x.weights[4 * i + j] for j, name in enumerate(("w_ih", "w_hh", "b_ih", "b_hh"))}
    return named | {f"h0.{i}": h for i, h in enumerate(x.h0)} | {f"c0.{i}": c for i, c in enumerate(x.c0)}


def _between_blocks(made: Program, chosen: DecoderPlan, x: LoopTensors, named: Named) -> Named:
    """Through global memory a grid's blocks exchange what is no result, too."""
    if chosen.shape.design != "grid":
        return {}
    rows = x.y.shape[0]
    found: Named = {}
    if x.keys is not None:
        found["scores"] = x.y.new_empty((rows, x.keys.shape[1]), dtype=torch.float32)
        if made.dims.projects and named["queries"] is None:
            found["queries"] = x.y.new_empty(rows, made.dims.A)
    if made.forward and made.loop.cell == "gru_reset_before":
        found["reset"] = x.y.new_empty(rows, made.dims.H)
    return found


def layouts(loop: LoopSpec, x: LoopTensors) -> tuple[DecoderPlan, DecoderPlan]:
    """How both ways of a loop would be laid out. Raises CannotPlan."""
    of = dims(loop, x, True)
    return _plan(program(loop, of, True), x), _plan(program(loop, of, False), x)


def _plan(made: Program, x: LoopTensors, steps: int = 1) -> DecoderPlan:
    source = 0 if x.keys is None else x.keys.shape[1]
    kind = kind_of(x.y.dtype, tf32_flag("matmul"))
    return plan(made, x.y.shape[0], source, kind, devices.of(x.y.device), steps)


@lru_cache(maxsize=256)
def _native_program(module: Any, made: Program) -> Any:
    return module.DecoderProgram(made.flat())


def _run(
    made: Program, chosen: DecoderPlan, x: LoopTensors, save: bool, named: Named, of: Search | None = None
) -> None:
    assert native.C is not None
    rows, steps, _ = x.y.shape
    batch, source = (rows, 0) if x.keys is None else x.keys.shape[:2]
    rules = 0, 0, 0
    if of is not None:
        steps, rules = len(of.norms) - 1, (of.eos_id, of.pad_id, of.min_new_tokens)
    sizes = (rows, steps, source, rows // batch, x.h0[0].dtype is torch.float32, save, *rules)
    packed, pack = _packed(made, chosen, x, named)
    counters, stop = _counters(chosen, x), native.stop_flag(x.y)
    native.launch(
        "decoder_run", x.y, _native_program(native.C, made), KINDS[chosen.kind], sizes, chosen.shape.native(),
        chosen.shape.near, [address(named.get(name)) for name in TENSORS], packed.data_ptr(), pack,
        (address(counters), stop.data_ptr(), native.patience()),
    )  # fmt: skip


_kept: ContextVar[dict[Any, tuple[Tensor, list[Tensor | None]]] | None] = ContextVar("fastseq_packed", default=None)


@contextmanager
def packed_once() -> Iterator[None]:
    """Within the block weights are packed at the first launch that reads them, and must not change after it."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def _packed(made: Program, chosen: DecoderPlan, x: LoopTensors, named: Named) -> tuple[Tensor, bool]:
    """Room for the packed weights of a launch, and whether they must be packed into it."""
    kept = _kept.get()
    if kept is None:
        return _room(chosen, x), True
    weights = [named.get(s.weights) for p in made.phases for s in p.segments]
    key = made, chosen, *map(address, weights)
    new = key not in kept
    if new:
        kept[key] = _room(chosen, x), weights  # which live on, so that no others come to their addresses
    return kept[key][0], new


def _room(chosen: DecoderPlan, x: LoopTensors) -> Tensor:
    return torch.empty(chosen.packed * chosen.shape.blocks, dtype=torch.uint8, device=x.y.device)


def _counters(chosen: DecoderPlan, x: LoopTensors) -> Tensor | None:
    """Of the groups of a grid: how often their blocks have arrived."""
    if chosen.shape.design != "grid":
        return None
    return torch.zeros(chosen.shape.groups, dtype=torch.int32, device=x.y.device)


def search_layout(loop: LoopSpec, x: LoopTensors, of: Vocabulary, steps: int) -> DecoderPlan:
    """How a search would be laid out, whose loop is all of the decoder; x.y [N, 1, I] is but a shape. Or CannotPlan."""
    return _plan(program(loop, dims(loop, x, False, of), True), x, steps)


def search(loop: LoopSpec, x: LoopTensors, of: Vocabulary, asked: Search, rows: Rows) -> None:
    """A greedy search from the state in x and the tokens in `rows`, whose results it fills."""
    x, of = _aligned(loop, x), Vocabulary(*(None if t is None else aligned(t) for t in of))  # type: ignore[arg-type]
    made = program(loop, dims(loop, x, False, of), True)
    chosen = _plan(made, x, len(asked.norms) - 1)
    named = _of_two_steps(made, x) | _tables(loop, x, of)
    _begin(loop, x, named)
    named |= _read(x) | _between_blocks(made, chosen, x, named)
    if chosen.shape.design == "grid":
        named["choices"] = rows.total.new_empty(chosen.shape.groups, chosen.shape.blocks, chosen.shape.rows, 4)
    named |= {name: getattr(rows, name) for name in ("tokens", "ids", "lengths", "total", "wrong", "weights")}
    _run(made, chosen, x, False, named, asked)


def _of_two_steps(made: Program, x: LoopTensors) -> Named:
    """What the blocks of a grid hand on; of others, what is there before the first step."""
    (rows, _, _), of = x.y.shape, made.dims
    named: Named = {"hs": x.y.new_empty(made.loop.cells, rows, 2, of.H), "queries": None}
    named["contexts"] = x.y.new_empty(rows, 2, of.D) if made.attends else None
    named["outs"] = x.y.new_empty(rows, 2, of.R) if of.R else None
    return named


def _tables(loop: LoopSpec, x: LoopTensors, of: Vocabulary) -> Named:
    """What the first cell [V, G*H] and the readout [V, R'], or the logits [V, V], make of every token."""
    embedding = of.embedding[: len(of.weight)]
    inputs = embedding.shape[1]
    named: Named = {"projected": product(embedding, x.weights[0][:, :inputs], x.weights[2])}
    named |= {"w_out": of.weight, "b_out": of.bias}
    if "input" in loop.readout:
        at, end = parts(loop, x)["input"]
        name, weights = ("out_input", of.weight) if x.w_read is None else ("read_input", x.w_read)
        named[name] = product(embedding, weights[:, at:end])
    return named


def _backward(loop: LoopSpec, grads: Sequence[Any], x: LoopTensors, kept: Sequence[Tensor | None]) -> Named:
    """Run the kernel; what it fills."""
    made = program(loop, dims(loop, x, True), False)
    chosen = _plan(made, x)
    found = _empty_found(loop, x, grads)
    named = dict(zip(KEPT, kept, strict=True)) | _read(x) | _given(grads, x) | found
    named |= _between_blocks(made, chosen, x, named)
    _run(made, chosen, x, True, named)
    return found


def _given(grads: Sequence[Any], x: LoopTensors) -> Named:
    """Gradients of the loop's results; those of the state have its dtype."""
    *dense, d_h_n, _ = grads
    names = ("d_hs", "d_contexts", "d_outs", "d_weights", "d_feed_n")
    named = {name: None if g is None else aligned(g) for name, g in zip(names, dense, strict=True)}
    named |= {f"d_h_n.{i}": None if g is None else aligned(g) for i, g in enumerate(d_h_n)}
    of_state = x.h0[0].dtype
    for name, g in named.items():
        if g is not None:
            named[name] = g.to(of_state if name.startswith(("d_feed_n", "d_h_n")) else x.y.dtype)
    return named


def _empty_found(loop: LoopSpec, x: LoopTensors, grads: Sequence[Any]) -> Named:
    """What the kernel fills."""
    (rows, steps, _), new, wide = x.y.shape, x.y.new_empty, torch.float32
    carry = started_carry(loop, x, grads)
    found: Named = {"d_gates": new(loop.cells, rows, steps, COLUMNS[loop.cell] * x.hidden), "carry": carry}
    if x.keys is not None and x.memory is not None:
        found["d_queries"] = new(rows, steps, x.keys.shape[2])
        found["d_context"] = new(rows, steps, x.memory.shape[2])
        found["d_scores"] = new((rows, steps, x.keys.shape[1]), dtype=wide)
    if loop.feed == "output":
        assert x.w_read is not None
        found["d_read"] = new(rows, steps, x.w_read.shape[0])
    return found


def key_gradients(
    asked: Tensor,  # [N, T, A]; N = B * copies, row n asked keys n // copies
    keys: Tensor,  # [B, S, A]; what d_scores is 0 for is not read into a result
    v: Tensor,  # [A]
    d_scores: Tensor,  # fp32 [N, T, S]
    mask: Tensor | None,  # not asked: where it is False d_scores is 0
) -> tuple[Tensor, Tensor]:
    """d_keys [B, S, A] and d_v [A] of the additive score, fp32, in a fixed order: without atomics."""
    assert native.C is not None
    batch, source, units = keys.shape
    asked = aligned(asked)
    d_keys = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    d_v = torch.empty((batch * native.C.decoder_key_blocks(source), units), dtype=torch.float32, device=keys.device)
    if d_v.numel():
        kind, queries = KINDS[kind_of(keys.dtype, False)], asked.shape[0] * asked.shape[1] // batch
        read, made = (asked, keys, v, d_scores), (d_keys, d_v)
        native.launch("decoder_keys", keys, kind, batch, queries, source, units, *map(address, (*read, *made)))
    return d_keys, d_v.sum(0)


backward = partial(decoder_gpu.backward, _backward, key_gradients)
