"""The products of linear layers, and the operator on them, against float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastseq import _native
from tests.isa import VARIANTS, choose
from tests.oracle import EPS, largest, nan_in_empty
from tests.test_autograd import CHECKS

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.ops import linear as ops

DTYPES = (torch.float32, torch.bfloat16)
SIZES = [  # tokens, K, O
    ((2, 3), 5, 7),
    ((1, 1), 1, 1),
    ((3, 1), 33, 31),
    ((5, 11), 64, 96),
    ((13,), 130, 67),  # few: read in place
    ((2, 30), 35, 129),  # beyond dot products
    ((20, 33), 31, 50),  # more tokens than are summed at a time
    ((3, 7), 1100, 70),  # deeper than a block of a sum
    ((40, 5), 70, 1100),
    ((0, 4), 5, 6),
    ((4, 0), 5, 6),
    ((2, 3), 0, 6),
    ((2, 3), 5, 0),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
Draw = Callable[..., Tensor]


def dense(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def sliced(*shape: int, dtype: torch.dtype) -> Tensor:
    """Inside a larger tensor of NaN, off every alignment, rows before the last dimension exchanged in memory."""
    large = torch.full([n + 3 for n in shape], torch.nan, dtype=dtype)
    if len(shape) == 3:
        large = large.transpose(0, 1).contiguous().transpose(0, 1)
    view = large[tuple(slice(1, n + 1) for n in shape)]
    return view.copy_(torch.randn(shape))


def expanded(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same row throughout."""
    return torch.randn(shape[-1]).to(dtype).expand(shape)


def near(got: Tensor, factors: tuple[Tensor, Tensor], beside: Tensor | None = None) -> None:
    """`got` is the matrix product of the factors plus `beside`, within the bound of a sum in fp32 and one rounding.

    Adding n products in fp32 in any order errs by at most n units in the last place, halved, of the sum of magnitudes;
    a statistical bound takes sqrt(n) of them. Four of those are never met by chance here.
    """
    a, b = (t.double() for t in factors)
    exact, magnitude = a @ b, a.abs() @ b.abs()
    if beside is not None:
        exact, magnitude = exact + beside.double(), magnitude + beside.double().abs()
    allowed = 2 * EPS * (a.shape[-1] + 2) ** 0.5 * magnitude + torch.finfo(got.dtype).eps * exact.abs()
    assert got.shape == exact.shape
    assert not got.numel() or bool(((got.double() - exact).abs() <= allowed).all()), largest(got.double() - exact)


def flat(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


@sizes
@dtypes
@pytest.mark.parametrize("draw", [dense, sliced])
@pytest.mark.parametrize("threads", [1, 2])
def test_products(size: tuple[tuple[int, ...], int, int], dtype: torch.dtype, draw: Draw, threads: int) -> None:
    """Forward and both gradients, set and added, of tensors and of slices of larger ones, which keep the rest."""
    lead, k, o = size
    torch.set_num_threads(threads)
    x, dy, w = (draw(*shape, dtype=dtype) for shape in ((*lead, k), (*lead, o), (o, k)))
    b = dense(o, dtype=dtype)
    with nan_in_empty():
        near(flat(ops.product(x, w, b)), (flat(x), w.T), b)
        near(flat(ops.product(x, w)), (flat(x), w.T))
        near(flat(ops.input_gradient(dy, w)), (flat(dy), w))
    for run, a, right, width in ((ops.product, x, w.T, o), (ops.input_gradient, dy, w, k)):
        out = draw(*lead, width, dtype=dtype)
        before, rest = out.clone(), outside(out)
        assert run(a, w, out=out, add=True) is out
        near(flat(out), (flat(a), right), flat(before))
        run(a, w, out=out)
        near(flat(out), (flat(a), right))
        assert torch.equal(outside(out), rest)
    dw, db = draw(o, k, dtype=dtype), dense(o, dtype=dtype)
    rest = outside(dw)
    ops.weight_gradient(dy, x, dw, db)
    near(dw, (flat(dy).T, flat(x)))
    near(db[None], (torch.ones(1, flat(dy).shape[0]), flat(dy)))
    assert torch.equal(outside(dw), rest)
    again = torch.empty_like(db)
    ops.weight_gradient(dy, x, None, again)
    assert torch.equal(again, db)


def outside(view: Tensor) -> Tensor:
    """The bits around a view in its storage, zero within."""
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).clone()
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return whole.view(torch.int16 if view.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("isa", VARIANTS)
@dtypes
@pytest.mark.parametrize("size", [SIZES[3], SIZES[4], SIZES[6], SIZES[7]], ids=str)
def test_variant_is_right(isa: str, dtype: torch.dtype, size: tuple[tuple[int, ...], int, int]) -> None:
    choose(isa)
    for threads in (1, 2):
        test_products(size, dtype, sliced, threads)


@dtypes
def test_one_row_of_memory_for_all(dtype: torch.dtype) -> None:
    """Operands of stride 0, as expanded inputs and the gradient of a sum are."""
    x, dy, w = expanded(4, 5, 33, dtype=dtype), expanded(4, 5, 18, dtype=dtype), dense(18, 33, dtype=dtype)
    near(flat(ops.product(x, w)), (flat(x), w.T))
    near(flat(ops.input_gradient(dy, w)), (flat(dy), w))
    dw = torch.empty_like(w)
    ops.weight_gradient(dy, x, dw)
    near(dw, (flat(dy).T, flat(x)))


@dtypes
@sizes
def test_a_bad_value_stays_in_its_row(dtype: torch.dtype, size: tuple[tuple[int, ...], int, int]) -> None:
    """NaN in one token: every other token keeps its bits."""
    lead, k, o = size
    x, dy, w = (dense(*shape, dtype=dtype) for shape in ((*lead, k), (*lead, o), (o, k)))
    for run, a in ((ops.product, x), (ops.input_gradient, dy)):
        clean, tokens = flat(run(a, w)), flat(a).shape[0]
        if not clean.numel() or not a.numel():
            continue
        bad = a.clone()
        flat(bad)[tokens // 2] = torch.nan
        got, others = flat(run(bad, w)), torch.arange(tokens) != tokens // 2
        assert got[tokens // 2].isnan().all()
        assert torch.equal(got[others], clean[others])


@dtypes
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_every_time(dtype: torch.dtype, threads: int) -> None:
    """And from scratch memory that holds NaN."""
    torch.set_num_threads(threads)
    x, dy, w = (dense(*shape, dtype=dtype) for shape in ((10, 31, 130), (10, 31, 200), (200, 130)))

    def results() -> list[Tensor]:
        dw, db = torch.empty_like(w), torch.empty_like(w[:, 0])
        found = [ops.product(x, w)]
        _native.C.poison_scratch()
        found.append(ops.input_gradient(dy, w))
        _native.C.poison_scratch()
        ops.weight_gradient(dy, x, dw, db)
        return [*found, dw, db]

    first = results()
    for _ in range(4):
        assert all(map(torch.equal, results(), first))


@dtypes
def test_gradients(dtype: torch.dtype) -> None:
    """Of the operator: any subset of inputs, any strides of the incoming gradient; no gradient of what needs none."""
    leaves = [dense(*shape, dtype=dtype) for shape in ((4, 5, 33), (18, 33), (18,))]
    dy = dense(18, 4, 5, dtype=dtype).permute(1, 2, 0)
    for needs in itertools.product((False, True), repeat=3):
        x, w, b = (t.clone().requires_grad_(need) for t, need in zip(leaves, needs, strict=True))
        y = ops.linear(x, w, b)
        near(flat(y.detach()), (flat(x.detach()), w.detach().T), b.detach())
        assert y.requires_grad == any(needs)
        if any(needs):
            y.backward(dy)
        for t, factors in ((x, (flat(dy), w)), (w, (flat(dy).T, flat(x))), (b, (flat(dy).T, torch.ones(20, 1)))):
            assert (t.grad is None) == (not t.requires_grad)
            if t.grad is not None:
                near(t.grad.view(factors[0].shape[0], -1), (factors[0].detach(), factors[1].detach()))
    weight = leaves[1].T.contiguous().T.requires_grad_()  # a transposed parameter
    ops.linear(leaves[0], weight).backward(dy)
    assert weight.grad is not None
    near(weight.grad, (flat(dy).T, flat(leaves[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_tensors_go_to_pytorch(dtype: torch.dtype) -> None:
    """Dtypes, numbers of dimensions, torch.jit.trace and torch.func: the results of torch.nn.functional.linear."""
    w = torch.randn(3, 4).to(dtype)
    for shape in ((4,), (2, 4), (5, 2, 4), (2, 1, 3, 4)):
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(ops.linear(x, w), torch.nn.functional.linear(x, w))
    traced = torch.jit.trace(ops.linear, (x, w))
    torch.testing.assert_close(traced(x, w), torch.nn.functional.linear(x, w))


def test_transforms() -> None:
    x, w = torch.randn(5, 2, 4), torch.randn(3, 4)
    expected = torch.autograd.functional.jacobian(lambda w: torch.nn.functional.linear(x, w).sin().sum(0), w)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(lambda w: ops.linear(x, w).sin().sum(0))(w), expected)


def test_second_derivatives() -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((4, 5, 3), (6, 3), (6,))]

    def second(linear: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(linear(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((d * d).sum() for d in first), leaves)

    for got, expected in zip(second(ops.linear), second(torch.nn.functional.linear), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@dtypes
def test_operator_contract(dtype: torch.dtype) -> None:
    x, w, b = (dense(*shape, dtype=dtype) for shape in ((4, 5, 3), (6, 3), (6,)))
    dy = dense(4, 5, 6, dtype=dtype)
    torch.library.opcheck(torch.ops.fastseq.linear.default, (x, w, b), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.fastseq.linear.default, (x[0], w, None), test_utils=CHECKS)
    for needs in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(torch.ops.fastseq.linear_backward.default, (dy, x, w, needs), test_utils=CHECKS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 7):
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((4, tokens, 3), (6, 3), (6,))]
        got, expected = (
            [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)] for y in (compiled(*leaves), ops.linear(*leaves))
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
