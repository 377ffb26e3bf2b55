"""Cross-entropy of a linear layer's outputs, for vocabularies whose logits nobody should keep."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .checks import need_tensor
from .engine import autocast_dtype
from .errors import InputError
from .ops.common import through_reference
from .ops.linear import linear
from .spec import one_of

__all__ = ["cross_entropy", "linear_cross_entropy", "need_smoothing"]

MOST_LOGITS = 2**22  # at once on a CPU: at V = 8,000 and 50,000 as fast as four times as many, or faster (Zen 4)
MOST_ELSEWHERE = 2**25  # a GPU wants larger products; not measured


def linear_cross_entropy(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [...] int64, each in [0, V) or ignore_index
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """torch.nn.functional.cross_entropy(x weight^T + bias, target, ...), with at most 2^22 logits in memory at a time
    (2^25 on other devices than the CPU).

    Where there are more, those of some tokens are computed at a time, and with "mean" and "sum" turned into gradients
    of x, weight and bias at once, so that training costs the same three products as with logits kept; "none" computes
    them once more in backward. Losses are fp32 (fp64 of fp64). "mean" is over targets that are not ignored; over none
    it is 0.

    label_smoothing: e of Szegedy et al. 2016, section 7: (1 - e) of the target's loss, e of the mean of all classes'.

    Raises InputError or TypeError, naming the argument.
    """
    one_of("reduction", reduction, ("mean", "sum", "none"))
    need_smoothing(label_smoothing)
    _check(x, weight, bias, target)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    shape, x, target = target.shape, x.flatten(0, -2), target.flatten()
    real = target != ignore_index
    eager = not torch.compiler.is_compiling() and not _transformed()
    if x.device.type == "cpu" and eager:  # elsewhere the host would wait for the number
        rows = real.nonzero()[:, 0]
        _check_classes(target[rows], len(weight))
        if len(rows) < len(real):
            losses = _losses(x.index_select(0, rows), weight, bias, target[rows], None, label_smoothing, reduction)
            if reduction != "none":
                return losses
            return losses.new_zeros(len(real)).index_copy(0, rows, losses).view(shape)
        real = None  # type: ignore[assignment]
    losses = _losses(x, weight, bias, target, real, label_smoothing, reduction)
    return losses.view(shape) if reduction == "none" else losses


def cross_entropy(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...] int64, each in [0, V) or -100: ignored
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """torch's, in fp32 at least; [...] with "none"; the mean over no target is 0."""
    flat, wanted = _wide(logits.flatten(0, -2)), target.flatten()
    if reduction == "none":
        return F.cross_entropy(flat, wanted, label_smoothing=label_smoothing, reduction="none").view(target.shape)
    total = F.cross_entropy(flat, wanted, label_smoothing=label_smoothing, reduction="sum")
    return total if reduction == "sum" else total / (wanted != -100).sum().clamp(min=1)


def need_smoothing(value: float) -> None:
    """InputError unless `value` can be a label_smoothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"label_smoothing must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise InputError(f"label_smoothing={value}; it is a share, 0 to 1")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if need_tensor("weight", weight).dim() != 2 or need_tensor("x", x).dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; expected [..., D] and [V, D]")
    if bias is not None and need_tensor("bias", bias).shape != weight.shape[:1]:
        raise InputError(f"bias has shape {tuple(bias.shape)}; expected [V={weight.shape[0]}]")
    cast = autocast_dtype(x.device.type) is not None
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype and not cast:
            raise InputError(f"{name} is {t.dtype}, x is {x.dtype}; convert one: .to({x.dtype}), or use torch.autocast")
    if need_tensor("target", target).shape != x.shape[:-1]:
        raise InputError(f"target has shape {tuple(target.shape)}; expected {tuple(x.shape[:-1])}, as x but for D")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; convert with .long()")


def _check_classes(target: Tensor, classes: int) -> None:
    if not len(target):
        return
    least, most = (int(t) for t in target.aminmax())
    if least < 0 or most >= classes:
        raise InputError(
            f"target holds {least if least < 0 else most}; classes are 0 to {classes - 1}, or ignore_index"
        )


def _losses(
    x: Tensor,  # [M, D]
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,  # [M]; any value where not real
    real: Tensor | None,  # [M] bool; None: all are
    smoothing: float,
    reduction: str,
) -> Tensor:
    """[M] with "none", else a scalar."""
    if reduction == "none":
        pieces = [_piece(smoothing, *piece) for piece in _pieces(x, weight, bias, target, real)]
        return torch.cat(pieces) if pieces else _piece(smoothing, x, weight, bias, target, real)
    count: Tensor | int = len(x) if real is None else real.sum()
    learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if len(x) <= _piece_size(x, weight):  # all at once: torch's own gradient of the softmax takes less time
        total = _plain(smoothing, x, weight, bias, target, real).sum()
    elif learned and not _transformed():
        total = _Total.apply(smoothing, x, weight, bias, target, real)
    else:
        total = _total(smoothing, x, weight, bias, target, real)
    if reduction == "sum":
        return total
    return total / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))


def _transformed() -> bool:
    """Whether torch.func or forward-mode gradients see this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _pieces(x: Tensor, weight: Tensor, bias: Any, target: Tensor, real: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Arguments of `_piece`, of so many tokens each that their logits are few enough."""
    size = _piece_size(x, weight)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield x[part], weight, bias, target[part], None if real is None else real[part]


def _piece_size(x: Tensor, weight: Tensor) -> int:
    """Tokens."""
    most = MOST_LOGITS if x.device.type == "cpu" else MOST_ELSEWHERE
    return max(1, most // max(1, len(weight)))


def _piece(smoothing: float, x: Tensor, weight: Tensor, bias: Any, target: Tensor, real: Tensor | None) -> Tensor:
    """Losses [M']; their logits are computed again in backward."""
    arguments = (smoothing, x, weight, bias, target, real)
    if not torch.is_grad_enabled() or _transformed():  # torch.func knows no checkpoints
        return _plain(*arguments)
    losses: Tensor = checkpoint(_plain, *arguments, use_reentrant=False, preserve_rng_state=False)
    return losses


def _plain(smoothing: float, x: Tensor, weight: Tensor, bias: Any, target: Tensor, real: Tensor | None) -> Tensor:
    target = target if real is None else torch.where(real, target, -100)
    logits = _wide(linear(x, weight, bias))
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)


def _total(smoothing: float, x: Tensor, weight: Tensor, bias: Any, target: Tensor, real: Tensor | None) -> Tensor:
    """The sum of all losses, of a piece after another."""
    losses = [_piece(smoothing, *piece).sum() for piece in _pieces(x, weight, bias, target, real)]
    return torch.stack(losses).sum() if losses else _piece(smoothing, x, weight, bias, target, real).sum()


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


class _Total(torch.autograd.Function):
    """The sum of all losses; forward computes the gradients too, of each piece while its logits are there."""

    @staticmethod
    def forward(ctx: Any, smoothing: float, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, real: Any):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad[1:4]
        found = _Gradients(x, weight, bias, needs)
        total = _wide(x.new_zeros(()))
        start = 0
        for part in _pieces(x, weight, bias, target, real):
            total = total + found.add(smoothing, start, *part)
            start += len(part[0])
        ctx.save_for_backward(x, weight, bias, target, real, found.x, found.weight, found.bias)
        ctx.needs, ctx.smoothing = needs, smoothing
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        *inputs, target, real, d_x, d_weight, d_bias = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again = through_reference(lambda x, w, b: (_total(ctx.smoothing, x, w, b, target, real),), inputs, (grad,))
            return None, *again, None, None
        # Rounded once: grad may be a mean's small share, or a scale that fp16 does not hold.
        pairs = zip((d_x, d_weight, d_bias), inputs, strict=True)
        return None, *(None if d is None else (_wide(d) * grad).to(t.dtype) for d, t in pairs), None, None


class _Gradients:
    """Of the sum of losses: that of x in its dtype, those of weight and bias in fp32 (fp64 of fp64)."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x = torch.empty_like(x) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None

    def add(
        self, smoothing: float, start: int, x: Tensor, weight: Tensor, bias: Any, target: Tensor, real: Tensor | None
    ) -> Tensor:
        """The piece's loss, whose gradients join; its x stands at `start`."""
        logits, classes = _wide(linear(x, weight, bias)), len(weight)
        at = (target if real is None else torch.where(real, target, 0))[:, None]
        norm = logits.logsumexp(-1, keepdim=True)
        losses = (1 - smoothing) * (norm - logits.gather(1, at))
        if smoothing:
            losses = losses + smoothing * (norm - logits.mean(-1, keepdim=True))
        if real is not None:
            losses = torch.where(real[:, None], losses, 0)
        d = logits.sub_(norm).exp_()  # softmax, then its difference to the smoothed target
        d.scatter_add_(1, at, d.new_full(at.shape, smoothing - 1))
        if smoothing:
            d.sub_(smoothing / classes)
        if real is not None:
            d.mul_(real[:, None])
        if self.bias is not None:
            self.bias += d.sum(0)
        d = d.to(x.dtype)
        if self.x is not None:
            torch.mm(d, weight, out=self.x[start : start + len(x)])
        if self.weight is None:
            return losses.sum()
        if self.weight.dtype == x.dtype:
            self.weight.addmm_(d.T, x)
        else:
            self.weight += d.T @ x
        return losses.sum()
