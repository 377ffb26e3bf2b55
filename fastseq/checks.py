"""What is wrong with a call: the value, the limit, the remedy. Runs once per kind of call, not per call."""

import os
from typing import Any

import torch
from torch import Tensor

from .backends.call import GATES, RnnCall
from .errors import InputError

__all__ = ["check_call", "check_cell", "check_resets", "checked_lengths", "lengths_on_cpu", "need_tensor"]

CASTS = (torch.float32, torch.bfloat16, torch.float16)  # what autocast converts
DTYPES = (*CASTS, torch.float64)


def need_tensor(name: str, value: Any, remedy: str = "pass a torch.Tensor") -> Tensor:
    """`value` if it is a tensor; otherwise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; {remedy}")
    return value


def lengths_on_cpu(lengths: Any, batch: int, steps: int, name: str = "lengths") -> Tensor:
    """`lengths`, a list or an integer tensor [B] on any device, as int64 on the CPU; each must lie within [0, T]."""
    if isinstance(lengths, (list, tuple)):
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in lengths):
            raise TypeError(f"{name} must hold integers; convert with lengths.long() or int(n)")
        lengths = torch.tensor(lengths, dtype=torch.int64)
    lengths = _integers(lengths, batch, name).to("cpu", torch.int64).contiguous()  # kernels read them as they lie
    if not torch.compiler.is_compiling():  # there the backend, which never reads behind T, is the only guard
        values = _seen(lengths).flatten().tolist()
        if values and not 0 <= min(values) <= max(values) <= steps:
            row, bad = next((row, n) for row, n in enumerate(values) if not 0 <= n <= steps)
            remedy = "clamp it" if bad < 0 else f"clamp it, or pad the input to {bad} steps"
            raise InputError(f"{name}[{row}]={bad} is outside [0, T={steps}]; {remedy}")
    return lengths


def checked_lengths(lengths: Any, x: Tensor, batch: int, steps: int, name: str = "lengths") -> Tensor:
    """`lengths` of the rows of x: on x's device if it is a tensor of that GPU, otherwise as `lengths_on_cpu` has them.

    To look at values on a GPU is to wait for it, so only FASTSEQ_CHECK=1 in the environment does: otherwise whoever
    uses them takes those outside [0, T] for 0 or T.
    """
    if not isinstance(lengths, Tensor) or lengths.device.type == "cpu" or lengths.device != x.device:
        return lengths_on_cpu(lengths, batch, steps, name)
    if not torch.compiler.is_compiling() and os.environ.get("FASTSEQ_CHECK") == "1":
        lengths_on_cpu(lengths, batch, steps, name)
    lengths = _integers(lengths, batch, name)
    return (lengths if lengths.dtype in (torch.int32, torch.int64) else lengths.long()).contiguous()


def _integers(lengths: Any, batch: int, name: str) -> Tensor:
    """`lengths` if it is an integer tensor [B]."""
    need_tensor(name, lengths, "pass a list or an integer tensor [B]")
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"{name} must hold integers, got {lengths.dtype}; convert with lengths.long()")
    if lengths.shape != (batch,):
        raise InputError(f"{name} has shape {tuple(lengths.shape)}, expected ({batch},): one length for each batch row")
    return lengths


def _seen(lengths: Tensor) -> Tensor:
    """The values of all samples within torch.func.vmap, whose tensors do not show them."""
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        lengths = torch._C._functorch.get_unwrapped(lengths)
    return lengths


def check_resets(resets: Any, x: Tensor) -> None:
    """Raise InputError or TypeError unless `resets` is bool, of x's leading dimensions, on its device."""
    lead = tuple(x.shape[:-1])
    if need_tensor("resets", resets, "pass a bool tensor, True = a segment begins").dtype != torch.bool:
        raise InputError(f"resets is {resets.dtype}, expected torch.bool, True = a segment begins; pass resets.bool()")
    if resets.shape != lead:
        raise InputError(f"resets has shape {_shape(resets)}, expected {lead}: the input's without its features")
    if resets.device != x.device:
        raise InputError(f"resets is on {resets.device}, input on {x.device}; move it: .to({str(x.device)!r})")


def check_call(call: RnnCall, autocast: torch.dtype | None) -> None:
    """Raise InputError or TypeError unless `call`, of a layer stack, is sound."""
    x = need_tensor("input", call.input, "or a PackedSequence")
    kinds = "packed [N, I]" if call.batch_sizes is not None else "[T, B, I], or unbatched [T, I]"
    if x.dim() != (2 if call.batch_sizes is not None else 3):
        raise InputError(f"input has shape {_shape(x)}, {x.dim()}-D; expected {kinds}")
    _check_weights(call)
    _check_norms(call)
    if call.steps == 0:
        raise InputError("input has T=0 steps; at least one is needed (rows may have length 0: use lengths=)")
    if call.resets is not None:
        check_resets(call.resets, x)
    rows = call.num_layers * (2 if call.bidirectional else 1)
    _check_inputs(call, autocast, (rows, call.batch), call.proj_size or call.hidden_size)


def check_cell(call: RnnCall, autocast: torch.dtype | None) -> None:
    """Raise InputError or TypeError unless `call`, of a cell, is sound."""
    x = need_tensor("input", call.input)
    if x.dim() != 2:
        raise InputError(f"input has shape {_shape(x)}, {x.dim()}-D; expected [B, I], or unbatched [I]")
    _check_weights(call)
    _check_inputs(call, autocast, (x.shape[0],), call.hidden_size)


def _check_weights(call: RnnCall) -> None:
    """Names, number and shapes of the parameters."""
    for k, w in enumerate(call.weights):
        need_tensor(f"weights[{k}]", w)
    dirs = 2 if call.bidirectional else 1
    per = (4 if call.has_bias else 2) + (call.proj_size > 0)
    if len(call.weights) != call.num_layers * dirs * per:
        raise InputError(
            f"{len(call.weights)} weights for num_layers={call.num_layers} and {dirs} direction(s) of {per} each; "
            f"expected {call.num_layers * dirs * per}"
        )
    gates, hidden = GATES[call.cell], call.hidden_size
    state = call.proj_size or hidden
    for k in range(0, len(call.weights), per):
        features = call.input.shape[-1] if k < dirs * per else dirs * state
        expected: list[tuple[int, ...]] = [(gates * hidden, features), (gates * hidden, state)]
        expected += [(gates * hidden,)] * 2 if call.has_bias else []
        expected += [(state, hidden)] if call.proj_size else []
        for j, shape in enumerate(expected):
            if call.weights[k + j].shape != shape:
                raise InputError(_weight_fault(call, k + j, j, shape))


def _check_norms(call: RnnCall) -> None:
    """Number and shapes of layer normalisation's parameters."""
    if call.norms is None:
        return
    wide, narrow = (GATES[call.cell] * call.hidden_size,), (call.hidden_size,)
    expected = [wide, wide, narrow, narrow] if call.cell == "lstm" else [wide, wide]
    expected *= call.num_layers * (2 if call.bidirectional else 1)
    found = [_shape(need_tensor(f"norms[{k}]", n)) for k, n in enumerate(call.norms)]
    if found != expected:
        raise InputError(f"norms have shapes {found}, expected {expected}")


def _weight_fault(call: RnnCall, k: int, j: int, shape: tuple[int, ...]) -> str:
    w = call.weights[k]
    if k == 0 and w.dim() == 2 and w.shape[0] % GATES[call.cell] == 0:
        return f"input has {call.input.shape[-1]} features, the weights take input_size={w.shape[1]}"
    name = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[j] if j < 4 and w.dim() == len(shape) else "weight"
    return f"{name} (weights[{k}]) has shape {_shape(w)}, expected {shape}"


def _check_inputs(call: RnnCall, autocast: torch.dtype | None, lead: tuple[int, ...], state: int) -> None:
    """The states' shapes, and one dtype and device for all."""
    x = call.input
    if x.dtype not in DTYPES:
        raise InputError(f"input is {x.dtype}; expected a real floating dtype: input.float()")
    for name, t, features in (("h0", call.h0, state), ("c0", call.c0, call.hidden_size)):
        if t is None:
            continue
        if need_tensor(name, t).shape != (*lead, features):
            raise InputError(f"{name} has shape {_shape(t)}, expected {(*lead, features)}")
        wide = t.dtype == torch.float32 and x.dtype in CASTS  # a state may stay in fp32 from call to call
        _check_same(name, t, "input", x, wide or autocast is not None)
    if call.cell == "lstm" and (call.h0 is None) != (call.c0 is None):
        half = "h0" if call.h0 is None else "c0"
        raise TypeError(f"hx of an LSTM has {half}=None; pass both states, or hx=None for zeros")
    if call.h0 is not None and call.c0 is not None:
        _check_same("c0", call.c0, "h0", call.h0, autocast is not None)
    for k, w in enumerate(call.weights):
        _check_same(f"weights[{k}]", w, "input", x, autocast is not None)
    for k, n in enumerate(call.norms or ()):
        _check_same(f"norms[{k}]", n, "input", x, autocast is not None)


def _check_same(name: str, t: Tensor, other: str, x: Tensor, cast: bool) -> None:
    """One device, and one dtype unless both are dtypes that autocast or the kernels `cast`."""
    if t.device != x.device:
        raise InputError(f"{name} is on {t.device}, {other} on {x.device}; move one: .to({str(x.device)!r})")
    if t.dtype != x.dtype and not (cast and t.dtype in CASTS and x.dtype in CASTS):
        raise InputError(
            f"{name} is {t.dtype}, {other} is {x.dtype}; convert one: .to({x.dtype}), or use torch.autocast"
        )


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)
