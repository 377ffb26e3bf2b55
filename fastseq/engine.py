"""The one way from a module or function to a backend.

What depends only on the kind of a call (options, shapes, dtypes, devices) is checked and decided once and kept as a
plan, the function that runs calls of that kind; after that a call costs one look-up.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .autocast import output_dtype
from .backends import onnx
from .backends.call import Results, RnnCall
from .checks import check_call, check_cell, check_resets, checked_lengths, need_tensor
from .dispatch import Call, choose, forced
from .errors import InputError

__all__ = [
    "as_asked",
    "autocast_dtype",
    "plan",
    "prefer",
    "run",
    "run_cell",
    "set_batched",
    "set_batched_cell",
    "set_lengths",
    "set_packed",
]


Check = Callable[[RnnCall, torch.dtype | None], None]  # check_call or check_cell
Plan = Callable[..., Any]  # takes a call, gives its results


def run(call: RnnCall, backend: str, lengths: Any = None, resets: Any = None) -> Results:
    """A layer stack on all that torch.nn takes: a padded or unbatched tensor, or a PackedSequence.

    lengths: [B]. resets: bool, the input's leading dimensions.
    """
    x = call.input
    if isinstance(x, Tensor) and x.dim() != 2:
        if lengths is not None:
            set_lengths(call, lengths)
        if resets is not None:
            call.resets = resets
        return plan(call, backend, _plan_layers)(call)
    if isinstance(x, PackedSequence):
        return _run_packed(call, x, backend, lengths, resets)
    set_batched(call, lengths, resets)
    out, state, *c_out = run(call, backend)
    row = 0 if call.batch_first else 1
    return out.squeeze(row), tuple(s.squeeze(1) for s in state), *(c.squeeze(row) for c in c_out)


def run_cell(call: RnnCall, backend: str) -> tuple[Tensor, ...]:
    """One step on [B, I], or unbatched [I]."""
    if need_tensor("input", call.input).dim() == 1:
        set_batched_cell(call)
        return tuple(s[0] for s in run_cell(call, backend))
    return plan(call, backend, _plan_cell)(call)


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 4096  # a program of ever new shapes must not grow without end


def plan(call: Call, backend: str, make: Callable[[Any, str], Plan]) -> Plan:
    """What runs calls like this one: of the first of its kind `make(call, backend)`, which checks it in full."""
    if torch.compiler.is_compiling():
        return make(call, backend)
    try:
        key = (
            backend, forced(), make, call.kind(),
            torch.is_grad_enabled(), torch.get_num_threads(),
            torch._C._get_tracing_state() is not None and 1 + torch.onnx.is_in_onnx_export(),
            torch._C._functorch.peek_interpreter_stack() is None,
            torch._C._is_any_autocast_enabled() and autocast_dtype(call.device.type),
        )  # fmt: skip
    except AttributeError:  # not a tensor: the check will say so
        return make(call, backend)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        found = _plans[key] = make(call, backend)
    return found


def prefer(backend: str) -> str:
    """The backend that `backend` stands for here and now, or "auto"."""
    return (forced() or "auto") if backend == "auto" else backend


def _plan_layers(call: RnnCall, backend: str) -> Plan:
    return _plan(call, backend, check_call, "rnn")


def _plan_cell(call: RnnCall, backend: str) -> Plan:
    return _plan(call, backend, check_cell, "rnn_cell")


def _plan(call: RnnCall, backend: str, check: Check, function: str) -> Plan:
    """Check `call` in full and choose its backend."""
    asked, output = as_asked(call, check)
    chosen = onnx if onnx.exporting() else choose(asked, prefer(backend))
    rnn: Plan = getattr(chosen, function)
    if output is None or chosen.NAME == "torch":  # torch's operators do autocast's casts themselves
        return rnn
    return partial(_run_cast, rnn, asked.input.dtype, output)


def as_asked(call: RnnCall, check: Check) -> tuple[RnnCall, torch.dtype | None]:
    """`call`, checked, as a backend is asked to run it: under autocast with its casts, and then the output's dtype."""
    autocast = autocast_dtype(call.input.device.type) if isinstance(call.input, Tensor) else None
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:  # traced by torch.jit, sizes are tensors
        check(call, autocast)
    if autocast is None or call.input.dtype == torch.float64:
        return call, None
    # one step reads each weight once: to cast it first would cost as much as the step
    compute = call.weights[0].dtype if call.steps == 1 else autocast
    state = call.input.dtype if call.h0 is None else call.h0.dtype
    kind = "cell" if check is check_cell else "padded" if call.batch_sizes is None else "packed"
    return _cast(call, compute), output_dtype(call.device.type, call.cell, kind, autocast, state, call.proj_size)


def autocast_dtype(device: str) -> torch.dtype | None:
    """autocast's dtype for this kind of device; None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(call: RnnCall, dtype: torch.dtype) -> RnnCall:
    return RnnCall(
        call.cell, call.input.to(dtype), None if call.h0 is None else call.h0.to(dtype),
        None if call.c0 is None else call.c0.to(dtype), [w.to(dtype) for w in call.weights], call.lengths,
        call.batch_sizes, call.has_bias, call.num_layers, call.dropout, call.training, call.bidirectional,
        call.batch_first, call.proj_size, call.resets, call.noise, call.states,
        None if call.norms is None else [n.to(dtype) for n in call.norms],
    )  # fmt: skip


def _run_cast(rnn: Plan, compute: torch.dtype, output: torch.dtype, call: RnnCall) -> Any:
    """`call` in `compute`, its results in `output`."""
    with torch.autocast(call.input.device.type, enabled=False):
        head, *rest = rnn(_cast(call, compute))
        if rest and isinstance(rest[0], tuple):  # a layer stack: `Results`; otherwise a cell's states
            return head.to(output), tuple(s.to(output) for s in rest[0]), *(s.to(output) for s in rest[1:])
        return tuple(s.to(output) for s in (head, *rest))


def _run_packed(call: RnnCall, x: PackedSequence, backend: str, lengths: Any, resets: Any) -> Results:
    set_packed(call, x, lengths, resets)
    out, state, *c_out = plan(call, backend, _plan_layers)(call)
    if x.unsorted_indices is not None:
        state = tuple(s.index_select(1, x.unsorted_indices) for s in state)
    order = (call.batch_sizes, x.sorted_indices, x.unsorted_indices)
    return PackedSequence(out, *order), state, *(PackedSequence(c, *order) for c in c_out)


def set_lengths(call: RnnCall, lengths: Any) -> None:
    """Lengths of the rows of a padded call."""
    if call.input.dim() == 3:  # otherwise the check of the whole call says what is wrong
        call.lengths = checked_lengths(lengths, call.input, call.batch, call.steps)


def set_packed(call: RnnCall, x: PackedSequence, lengths: Any, resets: Any) -> None:
    """Packed input: hx comes in the caller's row order, kernels want that of the packing."""
    if lengths is not None:
        raise InputError("lengths with a PackedSequence, which has its own; pass one of the two")
    if resets is not None:
        raise InputError("resets with a PackedSequence; pad it (pad_packed_sequence) and pass lengths= beside resets=")
    call.input, call.batch_sizes, order, _ = x
    if order is not None:
        if call.h0 is not None:
            call.h0 = need_tensor("h0", call.h0).index_select(1, order)
        if call.c0 is not None:
            call.c0 = need_tensor("c0", call.c0).index_select(1, order)


def set_batched(call: RnnCall, lengths: Any, resets: Any) -> None:
    """Unbatched input [T, I] and hx [L*D, .] as a batch of one row."""
    if lengths is not None:
        raise InputError("lengths with an unbatched input; cut it instead: input[:length]")
    x = need_tensor("input", call.input, "or a PackedSequence")
    row = 0 if call.batch_first else 1
    if resets is not None:
        check_resets(resets, x)
        call.resets = resets.unsqueeze(row)
    call.input = x.unsqueeze(row)
    call.h0, call.c0 = _add_row("h0", call.h0, 1), _add_row("c0", call.c0, 1)


def set_batched_cell(call: RnnCall) -> None:
    """Unbatched input [I] and hx [H] as a batch of one row."""
    call.input = call.input[None]
    call.h0, call.c0 = _add_row("h0", call.h0, 0), _add_row("c0", call.c0, 0)


def _add_row(name: str, state: Any, dim: int) -> Tensor | None:
    """An unbatched state as a batch of one row."""
    if state is None:
        return None
    if need_tensor(name, state).dim() != dim + 1:
        raise InputError(
            f"{name} has shape {tuple(state.shape)}, {state.dim()}-D, with an unbatched input; expected {dim + 1}-D"
        )
    return state.unsqueeze(dim)
