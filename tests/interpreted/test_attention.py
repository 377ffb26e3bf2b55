"""The attention kernels against the suite's oracle: tiles of the interpreter are so small that every loop has turns."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastseq.kernels import attention as kernels
from fastseq.kernels import attention_backward, attention_scores
from fastseq.kernels.scores import additive_backward
from torch import Tensor

import fastseq
from fastseq import Attention, Memory
from fastseq.backends import decoder_reference, decoder_triton
from fastseq.backends.decoder_call import AttentionCall
from fastseq.ops.attention import attention
from fastseq.spec import AttentionParams, Keys
from tests.decoder_oracle import AttentionCase, Problem, check, check_second, fast, plain, run
from tests.oracle import Mismatch, Terms, allow, compare
from tests.test_attention_module import plain as plain_module
from tests.test_kernels import padded, reordered, sliced

triton_step = fast("triton")
scores = pytest.mark.parametrize("score", ["additive", "dot"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES: list[dict[str, Any]] = [
    {},  # k = 2
    {"N": 3, "B": 3, "S": 35, "T": 3, "A": 5, "D": 70, "mask": "prefix"},  # few queries a row; a last block of padding
    {"N": 6, "B": 2, "S": 16, "T": 2, "A": 37, "D": 16, "Q": 37, "mask": "none"},  # k = 3, whole blocks
]


@scores
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(score: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    """NaN behind the mask, a row without anything to attend to, sizes that no block divides."""
    check(triton_step, AttentionCase(score, dtype=dtype, **shape))


@pytest.mark.parametrize("score", ["bare", "projected"])
def test_with_and_without_w_q(score: str) -> None:
    check(triton_step, AttentionCase(score, N=2, B=2, weights=False))


@scores
@pytest.mark.parametrize("T", [2, 5])
def test_large_sizes(score: str, T: int) -> None:
    """Of units and features: many blocks of both."""
    check(triton_step, AttentionCase(score, N=1, B=1, T=T, S=3, A=260, Q=260, D=300))


@scores
def test_second_derivatives(score: str) -> None:
    check_second(triton_step, AttentionCase(score, N=2, B=1, T=2, S=5, A=6, D=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "opposite"), [(8.0, False), (30.0, True), (1e4, True)])
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
    compare(run(triton_step, problem), truth, allow(truth, pairs, dtype, terms))


@scores
def test_strides_and_the_same_bits(score: str) -> None:
    """Twice, and from tensors that lie otherwise, or at an odd address."""
    problem = Problem.draw(AttentionCase(score, N=2, B=1, A=6, D=18))
    expected = run(triton_step, problem)
    for layout in (Tensor.clone, sliced, padded, reordered):
        other = replace(problem, tensors={n: layout(t) for n, t in problem.tensors.items()},
                        grads={n: layout(g) for n, g in problem.grads.items()})  # fmt: skip
        for name, t in run(triton_step, other).items():
            assert torch.equal(t, expected[name]), name


@scores
@pytest.mark.parametrize(("where", "T"), [("query", 5), ("query", 3), ("keys", 5), ("keys", 3), ("memory", 5)])
def test_nan_stays_with_its_row(score: str, where: str, T: int) -> None:
    """Of one query: the results of all others keep their bits. Of attended keys or memory: those of other rows."""
    problem = Problem.draw(AttentionCase(score, N=3, B=3, T=T, A=6, D=9, mask="none"))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 3] = False
    problem = replace(problem, mask=mask)
    clean = run(triton_step, problem)
    bad = {n: t.clone() for n, t in problem.tensors.items()}
    bad[where][(2, 1) if where == "query" else 2] = torch.nan
    got = run(triton_step, replace(problem, tensors=bad))
    others = torch.ones(3, T, dtype=torch.bool)
    others[(2, 1) if where == "query" else 2] = False
    for name in ("out", "weights", "d_query"):
        assert got[name][~others].isnan().any() or name == "weights"
        assert torch.equal(got[name][others], clean[name][others]), name
    for name in ("d_keys", "d_memory"):
        assert not got[name][:, 3].any(), name
    assert not got["weights"][..., 3].any()


@scores
@pytest.mark.parametrize("wanted", ["out", "weights"])
def test_gradient_of_one_output(score: str, wanted: str) -> None:
    """The other one has none, which stands for 0."""
    problem = Problem.draw(AttentionCase(score, N=2, B=1, A=6, D=18))
    zero = {n: g * (n == wanted) for n, g in problem.grads.items()}
    full = run(triton_step, replace(problem, grads=zero))
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    out = triton_step(problem, leaves)[wanted]
    found = torch.autograd.grad(out, list(leaves.values()), problem.grads[wanted], allow_unused=True)
    for name, d in zip(leaves, found, strict=True):
        assert torch.equal(torch.zeros_like(leaves[name]) if d is None else d, full[f"d_{name}"]), name


@scores
@pytest.mark.parametrize("empty", ["rows", "steps", "source"])
def test_nothing_to_do(score: str, empty: str) -> None:
    """As the CPU's kernels: empty results, or 0 where the sums have no terms."""
    sizes = {"rows": 2, "steps": 3, "source": 4} | {empty: 0}
    rows, steps, source = sizes.values()
    inputs = [torch.randn(rows, steps, 5), torch.randn(rows, source, 5), torch.randn(rows, source, 6)]
    v = torch.randn(5) if score == "additive" else None
    mask = torch.ones(rows, source, dtype=torch.bool)
    found = {}
    for on in ("cpu", "triton"):
        leaves = [t.clone().requires_grad_() for t in (*inputs, *([] if v is None else [v]))]
        context, weights = attention(*leaves[:3], mask, None if v is None else leaves[3], True, on)
        assert weights is not None
        found[on] = [context, weights, *torch.autograd.grad((context.sum() + weights.sum()), leaves)]
    for got, expected in zip(found["triton"], found["cpu"], strict=True):
        assert torch.equal(got, expected)


@scores
def test_autocast_leaves_the_products_alone(score: str) -> None:
    """Those of a backward pass that runs within it."""
    inputs = [torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 6), torch.randn(5)]
    found = []
    for enabled in (False, True):
        q, keys, memory, v = (t.clone().requires_grad_() for t in inputs)
        context, _ = attention(q, keys, memory, None, v if score == "additive" else None, True, "triton")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(context.sum(), (q, keys, memory)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("score", ["additive", "concat", "general", "dot"])
def test_module(score: str) -> None:
    """fastseq.Attention against the papers' formulas; within twice the error of the plain one, and a rounding."""
    options: dict[str, Any] = {"score": score}
    options |= {"attn_size": 18} if score in ("additive", "concat") else {"scale": 0.3}
    size = 20 if score == "dot" else 7
    module = Attention(20, size, backend="triton", **options)
    exact = copy.deepcopy(module).double()
    exact.backend = "reference"
    mask = torch.rand(3, 6) < 0.6
    mask[0, 0], mask[1] = True, False
    out = torch.where(mask[..., None], torch.randn(3, 6, size), torch.nan)
    query, grads = torch.randn(3, 4, 20), [torch.randn(3, 4, size), torch.randn(3, 4, 6)]

    def results(of: Attention, dtype: torch.dtype, formula: Any) -> dict[str, Tensor]:
        leaves = [query.to(dtype, copy=True).requires_grad_(), out.to(dtype, copy=True).requires_grad_()]
        memory = Memory(leaves[1], mask)
        outputs = formula(of, leaves[0], memory)
        inputs = [*leaves, *of.parameters()]
        names = ["d_query", "d_memory", *(f"d_{name}" for name, _ in of.named_parameters())]
        found = torch.autograd.grad(outputs, inputs, [g.to(dtype) for g in grads])
        return dict(zip(["out", "weights", *names], [*(o.detach() for o in outputs), *found], strict=True))

    def asks(of: Attention, query: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        return of(query, of.prepare(memory), need_weights=True)

    def formula(of: Attention, query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        return plain_module(of, options, query, memory)

    truth = results(exact, torch.float64, formula)
    eager = copy.deepcopy(module)
    eager.backend = "reference"
    pairs = [(results(eager, torch.float32, asks), truth)]
    assert fastseq.explain(module, query, module.prepare(Memory(out, mask))).chosen == "triton"
    compare(
        results(module, torch.float32, asks), truth, allow(truth, pairs, torch.float32, Terms(20 + 18, 20 + 18 + 7, 12))
    )


def test_refusals() -> None:
    q, keys, memory = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 6)
    call = AttentionCall(q, Keys(keys, memory), AttentionParams())
    assert decoder_triton.refuses_attention(call) is None
    assert "float64" in str(decoder_triton.refuses_attention(replace(call, query=q.double())))
    assert "window=2" in str(decoder_triton.refuses_attention(replace(call, window=2)))
    context = fastseq.functional.attention(q, call.keys, call.params, backend="triton")[0]
    torch.testing.assert_close(context, decoder_reference.attention(call)[0])


def test_key_gradients() -> None:
    """As a decoder's loop asks for them: fp32 from any dtype, each row of keys from its k rows of queries."""
    for dtype, k in itertools.product((torch.float32, torch.bfloat16), (1, 2)):
        q, keys = torch.randn(2 * k, 3, 19).to(dtype), torch.randn(2, 9, 19).to(dtype)
        v, d_scores = torch.randn(19).to(dtype), torch.randn(2 * k, 3, 9)
        d_scores[..., 4] = 0
        exact = [t.double().requires_grad_() for t in (keys, v)]
        each = exact[0].repeat_interleave(k, 0)[:, None] + q.double()[:, :, None]
        truth = torch.autograd.grad((each.tanh() * exact[1]).sum(-1), exact, d_scores.double())
        keys[:, 4] = torch.nan  # behind a mask
        mask = (torch.arange(9) != 4).expand(2, 9)
        found = kernels.key_gradients(q, keys, v, d_scores)
        for one, other in zip(found, kernels.key_gradients(q, keys, v, d_scores, mask), strict=True):
            assert torch.equal(one, other)
        for got, expected, terms in zip(found, truth, (3 * k, 54 * k), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=terms * 4e-7 * float(expected.abs().max()))


@triton.jit
def reads_all(mask, b, positions, S):
    return positions < S


@triton.jit
def forgets_the_slope(key, query, d, FAST_TANH: tl.constexpr):
    d_sum, d_v = additive_backward(key, query, d, FAST_TANH)
    return d + 0 * d_sum, d_v


@triton.jit
def misses_a_block(mask, b, positions, S):
    return (positions < S) & (positions < 8)


def forgets_what_is_masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows


def wrong_row(t: Tensor, block: int) -> Tensor:
    return by_unit(t.roll(1, 0), block)


by_unit = attention_scores._by_unit
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "mask ignored by scores": (attention_scores, "attended_of", reads_all, "additive"),
    "mask ignored by contexts": (kernels, "attended_of", reads_all, "dot"),
    "mask ignored by the softmax's gradient": (attention_backward, "attended_of", reads_all, "dot"),
    "a block of positions missed": (attention_backward, "attended_of", misses_a_block, "dot"),
    "slope of tanh": (attention_backward, "additive_backward", forgets_the_slope, "additive"),
    "NaN behind the mask": (attention_backward, "_masked", forgets_what_is_masked, "dot"),
    "another row's keys": (attention_scores, "_by_unit", wrong_row, "additive"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong, score = FAULTS[fault]
    case = AttentionCase(score, N=2, B=2, T=5, S=12, A=3)
    check(triton_step, case)
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(Mismatch):
        check(triton_step, case)
