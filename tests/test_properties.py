"""fastseq.functional on shapes, strides, lengths and layouts that hypothesis thinks of."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastseq
from fastseq import _native
from tests.oracle import CELLS, GATES, Case, Problem, Terms, allow, compare, plain, run

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

bounded = settings(max_examples=60, deadline=None, derandomize=True)  # a suite that fails fails again
steps, rows, features, units = st.integers(1, 9), st.integers(0, 9), st.integers(1, 19), st.integers(1, 35)
cells = st.sampled_from(CELLS)


def functional(
    cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], lengths: Any, resets: Any, _: None, *layout: bool
) -> Any:
    """fastseq.functional on the cpu backend, as a layer."""
    options: dict[str, Any] = dict(zip(("batch_first", "bidirectional"), layout, strict=True))
    options |= {"lengths": lengths, "resets": resets, "backend": "cpu"}
    if cell == "gru":
        return *fastseq.functional.gru(x, h0, weights, **options), None
    if cell != "lstm":
        return *fastseq.functional.rnn(x, h0, weights, nonlinearity=cell.removeprefix("rnn_"), **options), None
    out, (h, c) = fastseq.functional.lstm(x, None if h0 is None else (h0, c0), weights, **options)
    return out, h, c


@bounded
@given(
    cell=cells, T=steps, B=rows, I=features, H=units, two=st.booleans(), padded=st.booleans(), hx=st.booleans(),
    bias=st.booleans(), batch_first=st.booleans(), resets=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(cell: str, T: int, B: int, two: bool, padded: bool, seed: int, **rest: Any) -> None:
    """Outputs and every gradient, through checks, dispatch and kernel, against the oracle."""
    case = Case(cell, T=T, B=B, bidirectional=two, rows="lengths" if padded else "full", **rest)
    problem = Problem.draw(case, seed)
    truth = run(plain, problem, torch.float64)
    near = [problem, *(problem.near(k) for k in (1, 2, 3))]
    pairs = [(run(plain, p), run(plain, p, torch.float64)) for p in near]
    compare(
        run(functional, problem),
        truth,
        allow(truth, pairs, torch.float32, Terms(case.I + case.H, GATES[cell] * case.H, T * B)),
    )


def strided(t: Tensor, draw: st.DrawFn) -> Tensor:
    """The values of `t` under another order of its dimensions in memory, other strides and another offset."""
    order = draw(st.permutations(range(t.dim())))
    step = [draw(st.integers(1, 3)) for _ in order]
    offset = draw(st.integers(0, 2))
    large = t.new_full([offset + n * s for n, s in zip(t.permute(order).shape, step, strict=True)], torch.nan)
    view = large[tuple(slice(offset, offset + n * s, s) for n, s in zip(t.permute(order).shape, step, strict=True))]
    back = sorted(range(t.dim()), key=order.__getitem__)
    return view.copy_(t.permute(order)).permute(back)


@bounded
@given(data=st.data(), cell=cells, T=steps, B=st.integers(1, 5), H=units, batch_first=st.booleans())
def test_any_strides(data: st.DataObject, cell: str, T: int, B: int, H: int, batch_first: bool) -> None:
    """However its tensors lie in memory, a call gives the bits of the contiguous one."""
    problem = Problem.draw(Case(cell, T=T, B=B, H=H, bidirectional=True, batch_first=batch_first, resets=True))
    expected = run(functional, problem)
    assert problem.resets is not None
    problem.resets = strided(problem.resets, data.draw)
    leaves = {n: data.draw(st.composite(lambda draw, t=t: strided(t, draw))()) for n, t in problem.tensors.items()}
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    outputs = problem.call(functional, leaves)
    grads = [data.draw(st.composite(lambda draw, t=t: strided(t, draw))()) for t in problem.grads.values()]
    found = torch.autograd.grad([outputs[n] for n in problem.grads], list(leaves.values()), grads)
    for name, t in outputs.items():
        assert torch.equal(t, expected[name]), name
    for name, d in zip(leaves, found, strict=True):
        assert torch.equal(d, expected[f"d_{name}"]), name


@bounded
@given(data=st.data(), cell=cells, lengths=st.lists(st.integers(0, 8), min_size=1, max_size=7))
def test_every_row_is_as_if_alone(data: st.DataObject, cell: str, lengths: list[int]) -> None:
    """Lengths as a list or a tensor of any integer dtype: each row as a batch of its own, cut to its length."""
    H, I, T = data.draw(units), data.draw(features), 8  # noqa: E741
    gates = GATES[cell]
    weights = [torch.randn(gates * H, I) / I**0.5, torch.randn(gates * H, H) / H**0.5]
    x, h = torch.randn(T, len(lengths), I), torch.randn(1, len(lengths), H)
    dtype = data.draw(st.sampled_from([None, torch.uint8, torch.int16, torch.int32, torch.int64]))
    given = lengths if dtype is None else torch.tensor(lengths, dtype=dtype)
    out, h_n, _ = functional(cell, x, h, h, weights, given, None, None, False, False)
    for row, n in enumerate(lengths):
        one = h[:, row : row + 1]
        assert not out[n:, row].count_nonzero()
        if n == 0:
            assert torch.equal(h_n[:, row : row + 1], one)
            continue
        alone, last, _ = functional(cell, x[:n, row : row + 1], one, one, weights, None, None, None, False, False)
        tolerance = 8 * torch.finfo(torch.float32).eps  # another row count, another tile, another order of sums
        assert (out[:n, row] - alone[:, 0]).abs().max() <= tolerance
        assert (h_n[:, row] - last[:, 0]).abs().max() <= tolerance * max(1.0, one.abs().max().item())


@pytest.mark.parametrize("missing", [0, 1])
def test_half_a_state_is_refused(missing: int) -> None:
    """One state decides the dtype of both: beside a bf16 input, half an fp32 pair would be read as bf16."""
    weights, hx = [torch.zeros(8, 3), torch.zeros(8, 2)], [torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)]
    hx[missing] = None  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="pass both states"):
        fastseq.functional.lstm(torch.zeros(4, 1, 3), (hx[0], hx[1]), weights, backend="cpu")
