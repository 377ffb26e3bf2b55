"""The attention operator, beyond what test_decoder.py asks of every backend."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import _native
from fastseq.backends.decoder_call import AttentionCall
from fastseq.spec import AttentionParams, Keys
from tests.decoder_oracle import AttentionCase, Problem, check, fast, plain, run
from tests.isa import VARIANTS, choose
from tests.oracle import Terms, allow, compare
from tests.test_autograd import CHECKS
from tests.test_kernels import padded, reordered, sliced

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.backends import decoder_cpu, decoder_reference
from fastseq.ops.attention import attention

SCORES = ("additive", "dot")
scores = pytest.mark.parametrize("score", SCORES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES: list[dict[str, Any]] = [
    {"N": 8, "B": 4, "S": 30, "T": 30, "A": 64, "D": 64},
    {"N": 3, "B": 3, "S": 70, "T": 3, "A": 5, "D": 130},
    {"N": 5, "B": 1, "S": 16, "T": 7, "A": 33, "D": 16},
]


@pytest.mark.parametrize("isa", VARIANTS)
@scores
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variant_is_right(isa: str, score: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    choose(isa)
    check(fast("cpu"), AttentionCase(score, dtype=dtype, threads=2, **shape))


@dtypes
@pytest.mark.parametrize("scale", [8.0, 30.0, 1e4])
@pytest.mark.parametrize("opposite", [False, True])
def test_large_arguments_of_tanh(dtype: torch.dtype, scale: float, opposite: bool) -> None:
    """Whose exponentials would overflow: keys and queries that cancel give what their small sum does."""
    problem = Problem.draw(AttentionCase("bare", dtype=dtype, N=3, Q=19))
    tensors = dict(problem.tensors)
    shift = scale * torch.linspace(-1, 1, 19).to(dtype)
    tensors["keys"] = tensors["keys"] + shift
    tensors["query"] = tensors["query"] + (-shift if opposite else shift)
    problem = replace(problem, tensors=tensors)
    problems = [problem, *(problem.near(seed) for seed in range(4))]
    pairs = [(run(plain, p), run(plain, p, torch.float64)) for p in problems]
    truth, terms = pairs[0][1], Terms(19 + 9, 19 + 13 + 9, 3 * 4)
    compare(run(fast("cpu"), problem), truth, allow(truth, pairs, dtype, terms))


@scores
@pytest.mark.parametrize("layout", [sliced, padded, reordered])
def test_strides_do_not_matter(score: str, layout: Any) -> None:
    problem = Problem.draw(AttentionCase(score))
    expected = run(fast("cpu"), problem)
    other = replace(problem, tensors={n: layout(t) for n, t in problem.tensors.items()},
                    grads={n: layout(g) for n, g in problem.grads.items()})  # fmt: skip
    for name, t in run(fast("cpu"), other).items():
        assert torch.equal(t, expected[name]), name


@scores
@pytest.mark.parametrize("where", ["query", "keys", "memory"])
def test_nan_stays_with_its_row(score: str, where: str) -> None:
    """Of one query: the results of all others keep their bits. Of attended keys or memory: those of other rows."""
    problem = Problem.draw(AttentionCase(score, N=4, B=4, T=5, mask="none"))
    clean = run(fast("cpu"), problem)
    bad = {n: t.clone() for n, t in problem.tensors.items()}
    bad[where][(2, 1) if where == "query" else 2] = torch.nan
    got = run(fast("cpu"), replace(problem, tensors=bad))
    others = torch.ones(4, 5, dtype=torch.bool)
    others[(2, 1) if where == "query" else 2] = False
    for name in ("out", "weights", "d_query"):
        assert got[name][~others].isnan().any() or name == "weights"
        assert torch.equal(got[name][others], clean[name][others]), name


@scores
@dtypes
@pytest.mark.parametrize("wanted", [("out",), ("weights",)])
def test_gradient_of_one_output(score: str, dtype: torch.dtype, wanted: tuple[str]) -> None:
    """The other one has none, which stands for 0."""
    problem = Problem.draw(AttentionCase(score, dtype=dtype))
    zero = {n: g * (n in wanted) for n, g in problem.grads.items()}
    full = run(fast("cpu"), replace(problem, grads=zero))
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    out = fast("cpu")(problem, leaves)[wanted[0]]
    found = torch.autograd.grad(out, list(leaves.values()), problem.grads[wanted[0]], allow_unused=True)
    for name, d in zip(leaves, found, strict=True):
        torch.testing.assert_close(torch.zeros_like(leaves[name]) if d is None else d, full[f"d_{name}"])


@scores
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_every_time(score: str, threads: int) -> None:
    """Also from scratch memory that holds NaN."""
    problem = Problem.draw(AttentionCase(score, N=9, B=9, T=5, S=20))
    torch.set_num_threads(threads)
    first = run(fast("cpu"), problem)
    for _ in range(3):
        _native.C.poison_scratch()
        for name, t in run(fast("cpu"), problem).items():
            assert torch.equal(t, first[name]), name


def operands(score: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """q, keys, memory, mask, v."""
    t = [torch.randn(shape).to(dtype) for shape in ((6, 4, 5), (3, 7, 5), (3, 7, 8), (5,))]
    return *t[:3], torch.rand(3, 7) < 0.7, t[3] if score == "additive" else None


@scores
@dtypes
def test_operator_contract(score: str, dtype: torch.dtype) -> None:
    args = operands(score, dtype)
    for save in (False, True):
        torch.library.opcheck(torch.ops.fastseq.attention_forward.default, (*args, save), test_utils=CHECKS)
    context, weights = torch.ops.fastseq.attention_forward(*args, True)
    for d_context, d_weights in itertools.product((None, context), (None, weights)):
        torch.library.opcheck(
            torch.ops.fastseq.attention_backward.default, (d_context, d_weights, *args, weights), test_utils=CHECKS
        )


@scores
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(score: str, dynamic: bool) -> None:
    torch.compiler.reset()

    def step(q: Tensor, keys: Tensor, memory: Tensor, mask: Tensor, v: Tensor | None) -> Tensor:
        context, weights = attention(q, keys, memory, mask, v, True)
        assert weights is not None
        return context.sin().sum() + weights.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    args = operands(score)
    leaves = [t for t in args if t is not None and t.is_floating_point()]
    for t in leaves:
        t.requires_grad_()
    for got, expected in zip(
        *(torch.autograd.grad(function(*args), leaves) for function in (compiled, step)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@scores
def test_transforms(score: str) -> None:
    """torch.func and forward-mode gradients see the reference."""
    q, keys, memory, mask, v = operands(score)

    def context(q: Tensor) -> Tensor:
        return fastseq.functional.attention(q, Keys(keys, memory, mask), AttentionParams(v=v), backend="cpu")[0].sum(0)

    expected = torch.autograd.functional.jacobian(context, q)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(context)(q), expected)


def test_refusals() -> None:
    q, keys, memory, mask, v = operands("additive")
    call = AttentionCall(q, Keys(keys, memory, mask), AttentionParams(v=v))
    assert decoder_cpu.refuses_attention(call) is None
    assert "float64" in str(decoder_cpu.refuses_attention(replace(call, query=q.double())))
    assert "meta" in str(decoder_cpu.refuses_attention(replace(call, query=q.to("meta"))))
    assert "window=2" in str(decoder_cpu.refuses_attention(replace(call, window=2)))
    run_it = torch.jit.trace(lambda q: fastseq.functional.attention(q, call.keys, call.params)[0], q)
    torch.testing.assert_close(run_it(q), decoder_reference.attention(call)[0])
