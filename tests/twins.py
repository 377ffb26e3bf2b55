"""A fastseq module beside the torch.nn one it replaces: the same parameters, the same inputs, every gradient."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq

__all__ = ["BACKENDS", "H", "I", "check_call", "compare", "draw", "flatten", "outcome", "twins"]

Results = dict[str, Tensor]  # out0, out1, ...; d_in0, ..., d_<parameter>

BACKENDS = [name for name, reason in fastseq.backends().items() if reason is None]
I, H, P = 5, 6, 3  # noqa: E741
ROWS = {"padded": None, "unbatched": None, "sorted": [6, 4, 4, 1], "unsorted": [2, 6, 1, 5]}  # lengths of packed rows


def twins(kind: str, seed: int = 3, backend: str = "auto", **options: Any) -> tuple[nn.Module, nn.Module]:
    """(torch.nn's, fastseq's), built from one seed."""
    torch.manual_seed(seed)
    stock = getattr(nn, kind)(I, H, **options)
    torch.manual_seed(seed)
    return stock, getattr(fastseq, kind)(I, H, backend=backend, **options)


def draw(module: nn.Module, rows: str, hx: bool, steps: int = 6, batch: int = 4) -> tuple[Any, Any]:
    """(input, hx or None) for a layer module: float64, with values that fp32 holds."""
    shape = (batch, steps) if module.batch_first else (steps, batch)
    x: Any = torch.randn(*(shape if rows != "unbatched" else (steps,)), I).double()
    if ROWS[rows] is not None:
        x = pack_padded_sequence(x, ROWS[rows], module.batch_first, enforce_sorted=rows == "sorted")
    if not hx:
        return x, None
    lead = (module.num_layers * (1 + module.bidirectional), *(() if rows == "unbatched" else (batch,)))
    h = torch.randn(*lead, module.proj_size or H).double()
    return x, (h, torch.randn(*lead, H).double()) if isinstance(module, nn.LSTM) else h


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a module's input or output, in order."""
    if value is None:
        return []
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flatten(part)]


def outcome(module: nn.Module, x: Any, hx: Any, dtype: torch.dtype, seed: int = 9, **kwargs: Any) -> Results:
    """Outputs of `module(x, hx, **kwargs)` in `dtype`, and the gradients of x, hx and every parameter."""
    module = module.to(dtype)
    x, hx = (_leaf(v, dtype) for v in (x, hx))
    torch.manual_seed(seed)  # dropout
    outputs = flatten(module(x, hx, **kwargs))
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=g).to(o.dtype) for o in outputs]
    inputs = {f"in{k}": t for k, t in enumerate([*flatten(x), *flatten(hx)])} | dict(module.named_parameters())
    found = torch.autograd.grad(outputs, list(inputs.values()), grads)
    results = {f"out{k}": o.detach().clone() for k, o in enumerate(outputs)}
    return results | {f"d_{name}": d for name, d in zip(inputs, found, strict=True)}


def check_call(stock: nn.Module, fast: nn.Module, x: Any, hx: Any) -> None:
    """fp32 outputs and every gradient of `fast` against `stock` in float64; stock's own fp32 errors are the budget."""
    low, truth = [], []
    for k in range(4):  # one problem's errors may be small by luck: the budget is the worst of a few nearby ones
        near = _scaled(x, 1 + k / 1024)
        low.append(outcome(stock, near, hx, torch.float32))
        truth.append(outcome(stock, near, hx, torch.float64))
    compare(outcome(fast, x, hx, torch.float32), low, truth)


def compare(got: Results, low: list[Results], truth: list[Results]) -> None:
    """Fail unless `got` differs from truth[0] by at most twice what low[k] differ from truth[k], and a rounding.

    Errors are relative to a tensor's largest value and taken together for all outputs and for all gradients: a tensor
    of few elements may be right by luck.
    """
    assert got.keys() == low[0].keys() == truth[0].keys()
    for kind in ("out", "d_"):
        names = [n for n in got if n.startswith(kind) and got[n].numel()]
        if not names:
            continue
        worst = max(_error(near[n], exact[n]) for near, exact in zip(low, truth, strict=True) for n in names)
        for n in names:
            assert (got[n].shape, got[n].dtype) == (low[0][n].shape, low[0][n].dtype), n
            error, allowed = _error(got[n], truth[0][n]), 2 * worst + torch.finfo(got[n].dtype).eps
            assert error <= allowed, f"{n} errs by {error:.3g}, allowed {allowed:.3g}"  # NaN fails


def _scaled(x: Any, by: float) -> Any:
    """x * by, rounded to what fp32 holds."""
    if isinstance(x, PackedSequence):
        return PackedSequence(_scaled(x.data, by), *x[1:])
    return (x * by).float().double()


def _error(value: Tensor, truth: Tensor) -> float:
    scale = truth.double().abs().max()
    return ((value.double() - truth).abs().max() / torch.where(scale > 0, scale, 1.0)).item()


def _leaf(value: Any, dtype: torch.dtype) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(_leaf(v, dtype) for v in value)
    if isinstance(value, PackedSequence):
        return PackedSequence(_leaf(value.data, dtype), *value[1:])
    return value.detach().to(dtype, copy=True).requires_grad_()
