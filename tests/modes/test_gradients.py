"""Autograd beyond one backward, transforms of torch.func, and calls without gradients, on every backend."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fastseq
from tests.modes.cases import Case, Holder, assert_same, flatten, loss_of, results
from tests.modes.modes import (
    ACCUMULATION,
    BATCHED,
    CHECKPOINT,
    DOUBLE_BACKWARD,
    ENSEMBLE,
    EVAL,
    FUNC_GRAD,
    HESSIAN,
    INFERENCE,
    JACREV,
    JVP,
    PER_SAMPLE,
    RETAIN,
    THREADS,
)
from tests.twins import BACKENDS, H, I

Named = dict[str, Tensor]


def parameters(module: torch.nn.Module) -> Named:
    return {name: p.detach() for name, p in module.named_parameters()}


@DOUBLE_BACKWARD
def test_double_backward(case: Case) -> None:
    """The gradient of a gradient's norm, with every parameter: that of torch.nn in float64."""
    stock, fast = case.twins(bidirectional=True)
    found = []
    for module, x in ((stock.double(), case.input().double()), (fast, case.input())):
        leaves = [x.requires_grad_(), *module.parameters()]
        first = torch.autograd.grad(loss_of(module(x)), leaves, create_graph=True)
        found.append(torch.autograd.grad(loss_of(first), leaves))
    assert_same([g.double().float() for g in found[1]], [g.float() for g in found[0]], 64)  # two passes of such sums


@EVAL
def test_backward_in_eval_mode(case: Case) -> None:
    """Dropout is off, and gradients are the same as without it."""
    stock, fast = case.twins(num_layers=2, dropout=0.5)
    assert_same(results(fast.eval(), case.input()), results(stock.eval(), case.input()))


@RETAIN
def test_retain_graph(case: Case) -> None:
    """Backward twice over one graph gives the same bits twice, and after the last one the graph is gone."""
    _, fast = case.twins(num_layers=2, bidirectional=True)
    leaves = [case.input().requires_grad_(), *fast.parameters()]
    loss = loss_of(fast(leaves[0]))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same(torch.autograd.grad(loss, leaves), first, 0)


@ACCUMULATION
def test_gradient_accumulation(case: Case) -> None:
    """Two halves of a batch into .grad: the gradient of the batch."""
    stock, fast = case.twins()
    x = case.input(rows=6)
    weights = [torch.linspace(-1, 1, o.numel()).view(o.shape) for o in flatten(fast(x))]
    for module, parts in ((stock, (slice(None),)), (fast, (slice(0, 2), slice(2, 6)))):
        for part in parts:
            outputs = flatten(module(x[..., part, :]))
            torch.autograd.backward(outputs, [w[..., part, :].contiguous() for w in weights])
    assert_same([p.grad for p in fast.parameters()], [p.grad for p in stock.parameters()])


@CHECKPOINT
def test_checkpointing(case: Case) -> None:
    """Recomputed in backward, by both of torch's ways, dropout included: the bits of the plain call (not by oneDNN)."""
    units = 32 if case.backend == "torch" else 0
    _, fast = case.twins(num_layers=2, dropout=0.5)
    x = case.input()
    torch.manual_seed(5)
    expected = results(fast, x)
    for reentrant in (False, True):
        module = copy.deepcopy(fast)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        outputs = checkpoint(lambda t, m=module: tuple(flatten(m(t))), leaf, use_reentrant=reentrant)
        loss_of(outputs).backward()
        assert_same([*outputs, leaf.grad, *(p.grad for p in module.parameters())], expected, units)


@FUNC_GRAD
def test_func_grad(case: Case) -> None:
    stock, fast = case.twins(bidirectional=True)
    x = case.input()
    got = torch.func.grad(lambda p: loss_of(functional_call(fast, p, x)))(parameters(fast))
    assert_same(list(got.values()), results(stock, x)[-len(got) :])


@PER_SAMPLE
def test_per_sample_gradients(case: Case) -> None:
    """Of each row by itself: those of torch.nn called with that row alone."""
    stock, fast = case.twins(bidirectional=True)
    x = case.input()

    def loss(given: Named, row: Tensor) -> Tensor:
        return loss_of(functional_call(fast, given, row.unsqueeze(-2)))

    got = torch.func.vmap(torch.func.grad(loss), (None, -2))(parameters(fast), x)
    for k in range(x.shape[-2]):
        alone = results(stock, x[..., k : k + 1, :])[-len(got) :]
        assert_same([g[k] for g in got.values()], alone)


@ENSEMBLE
def test_vmap_over_weights(case: Case) -> None:
    """Models stacked, one input: each gives what it gives alone."""
    _, fast = case.twins()
    x, each = case.input(), [{n: p * s for n, p in parameters(fast).items()} for s in (1.0, 2.0, -1.0)]
    stacked = {n: torch.stack([p[n] for p in each]) for n in each[0]}
    got = flatten(torch.func.vmap(lambda p: functional_call(fast, p, x))(stacked))
    for k, given in enumerate(each):
        assert_same([g[k] for g in got], flatten(functional_call(fast, given, x)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_vmap_over_lengths(kind: str, backend: str) -> None:
    """A length for each sample: what all rows give in one call, and the gradients; their values are checked."""
    module = getattr(fastseq, kind)(I, H, 2, batch_first=True, bidirectional=True, backend=backend)
    x, lengths = torch.randn(4, 5, I, requires_grad=True), torch.tensor([5, 0, 1, 3])

    def each(row: Tensor, length: Tensor) -> Tensor:
        return module(row[None], lengths=length[None])[0][0]

    def loss(row: Tensor, length: Tensor) -> Tensor:
        return each(row, length).square().sum()

    if backend == "torch":
        with pytest.raises(fastseq.InputError, match=r"lengths, which torch.func.vmap hides; use backend='auto'"):
            torch.func.vmap(each)(x, lengths)
        return
    expected = module(x, lengths=lengths)[0]
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert_same([torch.func.vmap(each)(x, lengths)], [expected])
    assert_same([torch.func.vmap(torch.func.grad(loss))(x, lengths)], [grad])
    with pytest.raises(fastseq.InputError, match=r"lengths\[2\]=6 is outside \[0, T=5\]"):
        torch.func.vmap(each)(x, torch.tensor([1, 2, 6, 0]))


def of_the_input(module: torch.nn.Module, x: Tensor, outputs: int = 1) -> Tensor:
    return torch.cat([o.flatten() for o in flatten(module(x))[:outputs]])


@JACREV
def test_jacobian(case: Case) -> None:
    """Of the first output by the input: the rows that torch.nn's backward gives one by one."""
    stock, fast = case.twins()
    x = case.input(steps=2, rows=2)
    assert_same(torch.func.jacrev(lambda t: of_the_input(fast, t))(x), jacobian(stock, x))


def jacobian(module: torch.nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = of_the_input(module, x)
    return torch.stack([torch.autograd.grad(o, x, retain_graph=True)[0] for o in out])


@BATCHED
def test_batched_gradients(case: Case) -> None:
    """All rows of the Jacobian in one backward."""
    stock, fast = case.twins(bidirectional=True)
    x = case.input(steps=2, rows=2).requires_grad_()
    out = of_the_input(fast, x)
    (got,) = torch.autograd.grad(out, x, torch.eye(len(out)), is_grads_batched=True)
    assert_same(got, jacobian(stock, x.detach()))


@JVP
def test_forward_mode(case: Case) -> None:
    """J v against backward: u (J v) = (u J) v, with sums of at most 96 products."""
    stock, fast = case.twins(bidirectional=True)
    x, v = case.input(), case.input(seed=2)
    out, tangent = torch.func.jvp(lambda t: of_the_input(fast, t, 3), (x,), (v,))
    assert_same(out, of_the_input(stock, x, 3))
    leaf = x.double().requires_grad_()
    (d_x,) = torch.autograd.grad(loss_of(of_the_input(stock.double(), leaf, 3)), leaf)
    exact, found = (d_x * v).sum(), loss_of(tangent)
    assert (found - exact).abs() <= 96 * torch.finfo(torch.float32).eps * (d_x.abs() * v.abs()).sum()


@HESSIAN
def test_hessian(case: Case) -> None:
    """Forward over reverse: that of torch.nn in float64, by backward twice."""
    stock, fast = case.twins()
    x = case.input(steps=2, rows=1)
    got = torch.func.hessian(lambda t: loss_of(fast(t)))(x)
    stock.double()
    exact = torch.autograd.functional.hessian(lambda t: loss_of(stock(t)), x.double())
    assert_same(got, exact.float(), 64)


@INFERENCE
def test_inference_mode(case: Case) -> None:
    """The bits of a call without gradients; of weights made in inference mode too."""
    stock, fast = case.twins(num_layers=2, bidirectional=True)
    x = case.input()
    with torch.inference_mode():
        got = flatten(fast(x))
        inner = case.fast(num_layers=2, bidirectional=True)
        again = flatten(inner(x))
    assert all(o.is_inference() for o in got)
    with torch.no_grad():
        assert_same(got, flatten(fast(x)), 0)
        assert_same(got, flatten(stock(x)))
        assert_same(again, got, 0)


@THREADS
def test_calls_from_several_threads(case: Case) -> None:
    """One module, many inputs at once, with gradients and without: the bits of one call after another."""
    module = Holder(case.fast())
    inputs = [case.input(rows=1 + k % 5, seed=k) for k in range(24)]

    def forward(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return flatten(module(x))

    def both(x: Tensor) -> list[Tensor]:
        return results(module, x)

    for call in (forward, both):
        expected = [call(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            for got, alone in zip(pool.map(call, inputs), expected, strict=True):
                assert_same(got, alone, 0)
