"""The way from a function or module to a backend for attention and attention decoders: `engine` with their checks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backends.decoder_call import AttentionCall, DecoderCall, mapped
from .decoder_checks import check_attention, check_decoder, check_types
from .dispatch import choose
from .engine import Plan, autocast_dtype, plan, prefer
from .ops.decoder_search import Found, Search, Vocabulary
from .spec import DecoderOutput

__all__ = ["as_asked", "refuses_search", "run_attention", "run_decoder", "run_search"]


def run_decoder(call: DecoderCall, backend: str) -> DecoderOutput:
    """A teacher-forced decoder; with T = 1, one step of it."""
    check_types(call)
    result: DecoderOutput = plan(call, backend, _plan)(call)
    return result


def run_attention(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor | None]:
    """Context [N, T, D] and, if asked for, weights [N, T, S]."""
    check_types(call)
    result: tuple[Tensor, Tensor | None] = plan(call, backend, _plan)(call)
    return result


def run_search(call: DecoderCall, of: Vocabulary, search: Search, backend: str) -> Found | None:
    """A search from a call of one step; None where the backend that would run the step has none for it."""
    check_types(call)
    result: Found | None = plan(call, backend, _plan_search)(call, of, search)
    return result


def as_asked(call: AttentionCall | DecoderCall) -> AttentionCall | DecoderCall:
    """`call`, checked, as a backend is asked to run it: under autocast in its dtype, with the state in fp32."""
    x = call.query if isinstance(call, AttentionCall) else call.y
    autocast = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:  # traced by torch.jit, sizes are tensors
        check_types(call)
        check: Callable[..., None] = check_attention if isinstance(call, AttentionCall) else check_decoder
        check(call, autocast)
    return call if autocast is None or x.dtype == torch.float64 else _cast(call, autocast)


def _plan(call: Any, backend: str) -> Plan:
    """Check `call` in full and choose its backend."""
    asked = as_asked(call)
    run: Plan = getattr(choose(asked, prefer(backend)), call.OPERATOR)
    return run if asked is call else partial(_run_cast, run)


def refuses_search(call: DecoderCall, backend: str) -> str | None:
    """Why the backend that would run this call of one step has no search for it; None if it has."""
    if as_asked(call) is not call:
        return "autocast"
    chosen: Any = choose(call, prefer(backend))
    if not hasattr(chosen, "search"):
        return f"the backend {chosen.NAME} has none"
    return chosen.refuses_search(call)


def _plan_search(call: Any, backend: str) -> Plan:
    if refuses_search(call, backend) is not None:
        return _without_search
    search: Plan = choose(call, prefer(backend)).search
    return search


def _without_search(*_: Any) -> None:
    return None


def _run_cast(run: Plan, call: Any) -> Any:
    """`call` in autocast's dtype, whatever it is, which is that of the results; the state's is fp32."""
    dtype = autocast_dtype(call.device.type)
    assert dtype is not None
    with torch.autocast(call.device.type, enabled=False):
        return run(_cast(call, dtype))


def _cast(call: AttentionCall | DecoderCall, dtype: torch.dtype) -> AttentionCall | DecoderCall:
    def lower(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    if isinstance(call, AttentionCall):
        query, keys, params = mapped(lower, (call.query, call.keys, call.params))
        return AttentionCall(query, keys, params, call.window, call.need_weights)
    state = mapped(Tensor.float, call.state)
    y, keys, cells, masks = mapped(lower, (call.y, call.keys, call.params, call.masks))
    return DecoderCall(call.spec, y, keys, state, cells, masks, call.need_weights)
