"""The attention decoder on a GPU against the fp64 loops: one preset of each order, and what a call may have."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.decoder_oracle import Case, Problem, check, check_second, preset, run
from tests.gpu.place import BACKEND, DEVICE, DTYPES, REHEARSES, step, there
from tests.test_decoder import EVEN, OPTIONS, decode, decoder_call

SOME = ("bahdanau", "luong", "gnmt", "conditional_gru")
some = pytest.mark.parametrize("name", SOME)
FEW = ("one row", "five beams", "one step", "no source", "odd", "more rows than a tile", "no mask", "lengths")


@some
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_and_dtype(name: str, dtype: torch.dtype) -> None:
    changes: dict[str, Any] = {} if dtype == torch.float32 else {**EVEN, "state": torch.float32}
    check(step, preset(name, "lstm", dtype=dtype, **changes))


@some
def test_gru_and_dot(name: str) -> None:
    check(step, preset(name, "gru", score="dot"))


@pytest.mark.parametrize("name", SOME[:2])
@pytest.mark.parametrize("options", FEW)
def test_options(name: str, options: str) -> None:
    check(step, preset(name, "lstm", **OPTIONS[options]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", SOME[:2])
def test_sizes_of_real_models(name: str, dtype: torch.dtype) -> None:
    """Too large for the loops: held to the reference in float64 on the same device."""
    sizes = {"N": 33, "B": 33, "T": 20, "S": 50, "A": 256, "D": 256, "I": 128, "H": 256, "R": 256}
    small = {"N": 3, "B": 3, "T": 3, "S": 5, "A": 34, "D": 34, "I": 8, "H": 34, "R": 34}
    problem = large(preset(name, "lstm", dropout=False, mask="prefix", **(small if REHEARSES else sizes)))
    truth = run(lambda p, t: by("reference", p, t), problem, torch.float64)
    rounded = run(lambda p, t: by("reference", p, t), problem, dtype)
    got = run(lambda p, t: by(BACKEND, p, t), problem, dtype)
    for key, exact in truth.items():
        scale = exact.abs().max().clamp(min=1e-30)
        budget = 4 * (rounded[key].double() - exact).abs().max() / scale + 8 * torch.finfo(dtype).eps
        error = (got[key].double() - exact).abs().max() / scale
        assert error <= budget, (key, float(error), float(budget))


def large(case: Case) -> Problem:
    """A problem without the search for windows that stay put, and without NaN, on the device under test."""
    problem = Problem.draw(replace(case, T=1))
    g = torch.Generator().manual_seed(1)
    tensors = {n: t.nan_to_num() for n, t in problem.tensors.items()}
    tensors["y"] = torch.randn(case.N, case.T, case.I, generator=g)
    grads = {n: torch.randn(case.N, case.T, *t.shape[2:], generator=g) if n in ("out", "weights") else t
             for n, t in problem.grads.items()}  # fmt: skip
    return Problem(
        case, {n: t.to(DEVICE) for n, t in tensors.items()}, {n: t.to(DEVICE) for n, t in grads.items()},
        there(problem.mask), problem.masks,
    )  # fmt: skip


def by(backend: str, problem: Problem, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from tests.decoder_oracle import fast

    return fast(backend)(problem, tensors)


@some
def test_second_derivatives(name: str) -> None:
    check_second(step, preset(name, "gru", T=2, dropout=False))


@some
def test_strides_alignment_and_expansion(name: str) -> None:
    """Tensors of any strides, at odd addresses, and of stride 0 give what contiguous ones give."""
    call = there_call(decoder_call(preset(name, dropout=False)))
    expected = decode(call, BACKEND)
    for layout in (odd_address, every_second, swapped):
        keys = type(call.keys)(*(None if t is None else layout(t) for t in call.keys))
        layers = tuple(tuple(map(layout, cell)) for cell in call.params.layers)
        other = replace(call, y=layout(call.y), keys=keys, params=call.params._replace(layers=layers))
        torch.testing.assert_close(tuple(decode(other, BACKEND)), tuple(expected), rtol=1e-5, atol=1e-5)
    flat = call.y[:, :1].expand_as(call.y)
    dense = decode(replace(call, y=flat.contiguous()), BACKEND)
    torch.testing.assert_close(tuple(decode(replace(call, y=flat), BACKEND)), tuple(dense), rtol=1e-5, atol=1e-5)


def there_call(call: Any) -> Any:
    moved = {name: there(getattr(call, name)) for name in ("y", "keys", "state", "params", "masks")}
    return replace(call, **moved)


def odd_address(t: torch.Tensor) -> torch.Tensor:
    """`t`, one element behind an aligned address."""
    return torch.cat((t.new_ones(1), t.flatten()))[1:].view(t.shape)


def every_second(t: torch.Tensor) -> torch.Tensor:
    wide = t.repeat_interleave(2, -1)
    return wide[..., ::2]


def swapped(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)


@some
def test_the_same_bits_every_time(name: str) -> None:
    problem = Problem.draw(preset(name, N=18, B=9, H=35))
    first = run(step, problem)
    for _ in range(3):
        for key, t in run(step, problem).items():
            assert torch.equal(t, first[key]), key


@some
def test_a_second_backward_gives_the_same(name: str) -> None:
    """Nothing that was saved is written over, while the graph may be used again."""
    problem = Problem.draw(preset(name))
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    outputs = step(problem, leaves)
    grads = [problem.grads[n] for n in outputs]
    first, again = (
        torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@some
def test_nan_stays_in_its_row(name: str) -> None:
    problem = Problem.draw(preset(name, N=6, B=6, mask="none", dropout=False))
    clean = run(step, problem)
    for bad in ("y", "h0.0", "memory", "keys"):
        tensors = {n: t.clone() for n, t in problem.tensors.items()}
        tensors[bad][2] = torch.nan
        got = run(step, replace(problem, tensors=tensors))
        others = torch.arange(6) != 2
        assert got["out"][2].isnan().any()
        for key in ("out", "weights", "h_n.0", "d_y", "d_h0.0", "d_memory", "d_keys"):
            assert torch.equal(got[key][others], clean[key][others]), (bad, key)
