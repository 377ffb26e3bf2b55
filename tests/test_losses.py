"""The loss of large vocabularies against torch's, in values, gradients and memory."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq import InputError, losses
from fastseq.functional import linear_cross_entropy

M, D, V = 11, 6, 9


def tensors(dtype: torch.dtype = torch.float32, ignored: bool = True) -> list[Any]:
    """x, weight, bias, target."""
    target = torch.randint(V, (M,))
    if ignored:
        target[[2, 7, 10]] = -100
    return [torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(V).to(dtype), target]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    flat = F.linear(x, weight, bias).flatten(0, -2)
    found = F.cross_entropy(flat, target.flatten(), **options)
    return found.view(target.shape) if options.get("reduction") == "none" else found


def gradients(function: Any, inputs: list[Any], **options: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs[:3]]
    loss = function(*leaves, inputs[3], **options)
    weights = torch.arange(1.0, loss.numel() + 1, dtype=torch.float64).view(loss.shape)
    (loss.double() * weights).sum().backward()
    return loss, [t.grad for t in leaves if t is not None]


@pytest.mark.parametrize("pieces", [1, 3, 100], ids=lambda n: f"{n}-a-piece")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("bias", "ignored"), [*itertools.product((True, False), repeat=2)])
def test_values_and_gradients(
    bias: bool, ignored: bool, smoothing: float, reduction: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "MOST_LOGITS", pieces * V)
    inputs = tensors(ignored=ignored)
    if not bias:
        inputs[2] = None
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    exact = [None if t is None else t.double() for t in inputs[:3]] + [inputs[3]]
    wanted, wanted_grads = gradients(plain, exact, **options)
    for given in (inputs, exact):
        found, grads = gradients(linear_cross_entropy, given, **options)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if given is inputs else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(found.double(), wanted, **tolerance)
        for a, b in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients_and_with_leading_dimensions(reduction: str) -> None:
    x, weight, bias, target = tensors()
    x, target = torch.stack((x, x + 1)), torch.stack((target, target.flip(0)))
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, bias, target, reduction=reduction)
    torch.testing.assert_close(found, plain(x, weight, bias, target, reduction=reduction))


def test_gradients_of_some() -> None:
    """What needs no gradient gets none, and the rest are right."""
    inputs = tensors()
    for needs in itertools.product((True, False), repeat=3):
        if not any(needs):
            continue
        leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, needs, strict=False)]
        linear_cross_entropy(*leaves, inputs[3]).backward()
        _, wanted = gradients(plain, inputs)
        for leaf, need, grad in zip(leaves, needs, wanted, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-6)


def test_no_target_at_all() -> None:
    x, weight, bias, target = tensors()
    target.fill_(-100)
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, bias, target)
    assert loss.item() == 0
    loss.backward()
    assert not x.grad.any()
    assert linear_cross_entropy(x, weight, bias, target, reduction="none").eq(0).all()


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MOST_LOGITS", 4 * V)
    x, weight, bias, target = tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for smoothing in (0.0, 0.2):
        assert torch.autograd.gradcheck(
            lambda *t, s=smoothing: linear_cross_entropy(*t, target, label_smoothing=s), leaves
        )
        assert torch.autograd.gradgradcheck(
            lambda *t, s=smoothing: linear_cross_entropy(*t, target, label_smoothing=s), leaves
        )


def test_backward_twice_and_scaled() -> None:
    x, weight, bias, target = tensors()
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, bias, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, x)
    torch.testing.assert_close(again, 3 * first)


def test_functorch() -> None:
    x, weight, bias, target = tensors()
    found = torch.func.grad(lambda w: linear_cross_entropy(x, w, bias, target))(weight)
    _, (_, wanted, _) = gradients(plain, [x, weight, bias, target])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_compiled() -> None:
    x, weight, bias, target = tensors()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    leaf = weight.clone().requires_grad_()
    loss = compiled(x, leaf, bias, target)
    loss.backward()
    value, (_, wanted, _) = gradients(plain, [x, weight, bias, target])
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16(autocast: bool) -> None:
    """Within twice what PyTorch's own bf16 is off, and one rounding."""
    inputs = tensors()
    exact = [t.bfloat16().double() for t in inputs[:3]] + [inputs[3]]
    wanted, wanted_grads = gradients(plain, exact)
    given = [t.double().float() for t in exact[:3]] if autocast else [t.bfloat16() for t in exact[:3]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, grads = gradients(linear_cross_entropy, [*given, inputs[3]])
        rough, rough_grads = gradients(lambda *t: plain(*t).float(), [*given, inputs[3]])
    assert found.dtype == torch.float32
    for a, b, c in zip([found, *grads], [rough, *rough_grads], [wanted, *wanted_grads], strict=True):
        budget = 2 * (b.double() - c).abs().max() + 2**-8 * c.abs().max()
        assert float((a.double() - c).abs().max()) <= float(budget)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operator makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, Tensor):
                self.most = max(self.most, t.numel())
        return made


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_of_all_tokens_never_exist(reduction: str) -> None:
    """V = 50,000 and 250 tokens: 12.5 million logits, of which no more than 2^22 are there at once."""
    torch.manual_seed(0)
    classes, tokens = 50_000, 250
    x, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(classes, 4, requires_grad=True)
    target = torch.randint(classes, (tokens,))
    with Peak() as peak:
        linear_cross_entropy(x, weight, None, target, label_smoothing=0.1, reduction=reduction).sum().backward()
    assert peak.most <= 2**22
    _, (dx, dw) = gradients(
        plain, [x, weight, None, target], label_smoothing=0.1, reduction="sum" if reduction == "none" else "mean"
    )
    torch.testing.assert_close(x.grad, dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, dw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(M, 5)}, InputError, r"x has shape \(11, 5\), weight \(9, 6\)"),
        ({"bias": torch.zeros(8)}, InputError, r"bias has shape \(8,\); expected \[V=9\]"),
        ({"target": torch.zeros(M + 1, dtype=torch.int64)}, InputError, r"target has shape \(12,\)"),
        ({"target": torch.zeros(M)}, TypeError, r"target must be int64, got torch.float32"),
        ({"target": None}, TypeError, "target must be a torch.Tensor"),
        ({"label_smoothing": 1.5}, InputError, r"label_smoothing=1.5; it is a share, 0 to 1"),
        ({"reduction": "max"}, InputError, r"reduction='max'; use one of"),
        ({"target": torch.full((M,), V)}, InputError, rf"target holds {V}; classes are 0 to {V - 1}"),
        ({"target": torch.full((M,), -1)}, InputError, "target holds -1"),
    ],
)
def test_faults(change: dict[str, Any], error: type[Exception], text: str) -> None:
    x, weight, bias, target = tensors()
    arguments = {"x": x, "weight": weight, "bias": bias, "target": target} | change
    with pytest.raises(error, match=text):
        fastseq.functional.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("off", ["no_grad", "frozen"])
def test_without_gradients_no_product_is_made_for_them(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MOST_LOGITS", 4 * V)
    x, weight, bias, target = tensors()
    weight.requires_grad_(off == "no_grad")

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += "mm" in str(func) or "linear" in str(func)
            return func(*args, **(kwargs or {}))

    with torch.set_grad_enabled(off != "no_grad"), Products() as products:
        loss = linear_cross_entropy(x, weight, bias, target)
    assert products.count == 2  # pieces of the eight real tokens
    torch.testing.assert_close(loss, plain(x, weight, bias, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_transforms_of_every_reduction(reduction: str) -> None:
    x, weight, bias, target = tensors(torch.float64)

    def ours(w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, bias, target, reduction=reduction).square().sum()

    def theirs(w: Tensor) -> Tensor:
        return plain(x, w, bias, target, reduction=reduction).square().sum()

    torch.testing.assert_close(torch.func.grad(ours)(weight), torch.func.grad(theirs)(weight))
    torch.testing.assert_close(torch.func.hessian(ours)(weight), torch.func.hessian(theirs)(weight))
    rows = torch.func.vmap(lambda a, t: linear_cross_entropy(a[None], weight, bias, t[None], reduction=reduction))
    torch.testing.assert_close(
        rows(x[:2], target[:2]).flatten(), plain(x[:2], weight, bias, target[:2], reduction="none")
    )


def test_the_incoming_gradient_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 knows no 1/240, fp16 no scale of 2^16: gradients that were made in pieces are rounded once, at the end."""
    monkeypatch.setattr(losses, "MOST_LOGITS", 50 * V)
    given = [torch.randn(240, D).bfloat16(), torch.randn(V, D).bfloat16(), None, torch.randint(V, (240,))]
    grads = {reduction: gradients(linear_cross_entropy, given, reduction=reduction)[1] for reduction in ("mean", "sum")}
    for mean, total in zip(grads["mean"], grads["sum"], strict=True):
        mean, wanted = mean.double(), total.double() / 240
        share = float((mean * wanted).sum() / wanted.square().sum())
        assert abs(share - 1) < 2**-10  # a rounded 1/240 is off by 2^-8.2
    x, weight, target = given[0].half().requires_grad_(), given[1].half(), given[3]
    (2.0**16 * linear_cross_entropy(x, weight, None, target)).backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
