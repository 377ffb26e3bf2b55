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
        for row, n in enumerate(lengths):
            if not isinstance(n, int) or isinstance(n, bool):
                remedy = (
                    "give each row's number of steps" if isinstance(n, (bool, list, tuple)) else "convert by int(n)"
                )
                raise TypeError(f"{name} must hold integers, got {name}[{row}]={n!r}; {remedy}")
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
        remedy = _of_mask(lengths, batch) or f"convert with {name}.long()"
        raise TypeError(f"{name} must hold integers, got {lengths.dtype}; {remedy}")
    if lengths.shape != (batch,):
        remedy = _of_mask(lengths, batch) or "one length for each batch row"
        raise InputError(f"{name} has shape {tuple(lengths.shape)}, expected ({batch},): {remedy}")
    return lengths


def _seen(lengths: Tensor) -> Tensor:
    """The values of all samples within torch.func.vmap, whose tensors do not show them."""
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        lengths = torch._C._functorch.get_unwrapped(lengths)
    return lengths


def _of_mask(lengths: Tensor, batch: int) -> str | None:
    """The remedy where a mask of steps stands for lengths; None: it is no mask."""
    if lengths.dim() != 2 or batch not in lengths.shape:
        return None
    return f"of a mask, True or 1 where a step counts, pass mask.sum({1 if lengths.shape[0] == batch else 0})"


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
    padded = "[B, T, I] (batch_first)" if call.batch_first else "[T, B, I]"
    kinds = "packed [N, I]" if call.batch_sizes is not None else f"{padded}, or unbatched [T, I]"
    if x.dim() != (2 if call.batch_sizes is not None else 3):
        raise InputError(f"input has shape {_shape(x)}, {x.dim()}-D; expected {kinds}")
    _check_weights(call)
    _check_norms(call)
    if call.steps == 0:
        raise InputError("input has T=0 steps; at least one is needed (rows may have length 0: use lengths=)")
    if call.resets is not None:
        check_resets(call.resets, x)
    rows = call.num_layers * (2 if call.bidirectional else 1)
    _check_inputs(call, autocast, (rows, call.batch), call.proj_size or call.hidden_size, "_l{}{}")


def check_cell(call: RnnCall, autocast: torch.dtype | None) -> None:
    """Raise InputError or TypeError unless `call`, of a cell, is sound."""
    x = need_tensor("input", call.input)
    if x.dim() != 2:
        raise InputError(f"input has shape {_shape(x)}, {x.dim()}-D; expected [B, I], or unbatched [I]")
    _check_weights(call)
    _check_inputs(call, autocast, (x.shape[0],), call.hidden_size, "")


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
        features = call.input.shape[-1]
        return (
            f"input has {features} features, the weights take input_size={w.shape[1]}; features are the last dimension:"
            f" give it {w.shape[1]}, or build with input_size={features}"
        )
    name = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[j] if j < 4 and w.dim() == len(shape) else "weight"
    return f"{name} (weights[{k}]) has shape {_shape(w)}, expected {shape}"


def _check_inputs(call: RnnCall, autocast: torch.dtype | None, lead: tuple[int, ...], state: int, ending: str) -> None:
    """The states' shapes, and one dtype and device for all. ending: of parameters' names, of layer and direction."""
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
        if w.dtype != x.dtype or w.device != x.device:
            _check_same(_parameter(call, k, ending), w, "input", x, autocast is not None, w is call.weights[0])
    for k, n in enumerate(call.norms or ()):
        _check_same(f"norms[{k}]", n, "input", x, autocast is not None)


def _parameter(call: RnnCall, k: int, ending: str) -> str:
    """The name that torch.nn gives the parameter, and its place among the weights."""
    kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if call.has_bias else [])]
    kinds += ["weight_hr"] if call.proj_size else []
    row, kind = divmod(k, len(kinds))
    layer, reverse = divmod(row, 2) if call.bidirectional else (row, 0)
    return f"{kinds[kind]}{ending.format(layer, '_reverse' if reverse else '')} (weights[{k}])"


def _check_same(name: str, t: Tensor, other: str, x: Tensor, cast: bool, module: bool = False) -> None:
    """One device, and one dtype unless both are dtypes that autocast or the kernels `cast`.

    module: t is the first of a module's parameters, so that all of them differ from x.
    """
    what = f"{other}.to({{}}), or the module: .to({{}})" if module else f"{name.partition(' ')[0]}.to({{1}})"
    if t.device != x.device:
        move = what.format(repr(str(t.device)), repr(str(x.device)))
        raise InputError(f"{name} is on {t.device}, {other} on {x.device}; move {move}")
    if t.dtype != x.dtype and not (cast and t.dtype in CASTS and x.dtype in CASTS):
        autocast = ", or use torch.autocast" if t.dtype in CASTS and x.dtype in CASTS else ""
        raise InputError(
            f"{name} is {t.dtype}, {other} is {x.dtype}; convert {what.format(t.dtype, x.dtype)}{autocast}"
        )


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)
