"""The layer-normalised Triton layer against its float64 oracle: every option, forward and every gradient.

Options share cases wherever they can: each launch of a grid takes the interpreter a tenth of a second.
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastseq.kernels import devices, rnn_noise, rnn_norm_sequence, rnn_norm_steps, rnn_norm_steps_backward
from fastseq.kernels.blocks import zeros
from fastseq.kernels.rnn_norm_blocks import EPS
from fastseq.kernels.rnn_norm_steps import load_parts

import fastseq
from fastseq.ops.rnn_norm import rnn_norm_layer
from tests.interpreted.test_rnn import MUTANTS
from tests.interpreted.test_rnn_noise import nothing_dropped, what_h_keeps_c_keeps
from tests.norm_oracle import CELLS, NormProblem, check_norm, check_norm_second, norm_budget, norm_plain
from tests.oracle import Case, Mismatch, check_backward_changes_nothing, compare, differentiate, largest, run

layer = partial(rnn_norm_layer, on="triton")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = ("full", "lengths", "packed")
HIDDEN = {"sequence": 13, "steps": 35, "barrier": 35}  # of `way`: one block of units, or three


def plain() -> list[Case]:
    """Cells, dtypes and rows crossed; the other options take turns."""
    turns, found = itertools.cycle(itertools.product((True, False), repeat=5)), []
    kinds = [*itertools.product((FP32, BF16), ROWS), (FP16, "lengths")]
    for cell, (dtype, rows) in itertools.product(CELLS, kinds):
        two, hx, bias, batch_first, more = next(turns)
        for _ in range(6):  # 7 and 32 share no factor
            next(turns)
        batch_first, resets = batch_first and rows != "packed", more and rows != "packed"
        state = FP32 if hx and more else None
        found.append(Case(cell, dtype, 3, 5, 7, 0, two, rows, hx, bias, batch_first, state, resets=resets))
    return found


NOISE = ("both", "", "mean", "zoneout", "update", "state", "")  # of each cell's cases in a row


def noisy(shift: int) -> list[Case]:
    """The same with noise, or of an LSTM every cell state alone; of a cell each kind once, "" twice."""
    found = []
    for k, case in enumerate(plain()):
        noise = NOISE[(k + shift) % len(NOISE)]
        states = case.cell == "lstm" and (not noise or k % 2 == 0)
        found.append(replace(case, noise=noise, states=states))
    return found


def cases() -> list[tuple[str, Case]]:
    """Both in one program; on a grid, whose steps take longer here, the noisy ones, with a barrier or without."""
    grid = [(("steps", "barrier")[k % 2], replace(case, T=2 + k % 2)) for k, case in enumerate(noisy(3))]
    return [*(("sequence", case) for case in (*plain(), *noisy(0))), *grid]


@pytest.mark.parametrize(("way", "case"), cases(), indirect=["way"], ids=str)
def test_layer(way: str, case: Case) -> None:
    check_norm(layer, NormProblem.draw(replace(case, H=HIDDEN[way])))


CORNERS = [  # T, B, I, H; on a grid the last: whole blocks, one step
    *((1, 3, 5, 16), (2, 17, 2, 32), (3, 1, 3, 17), (2, 2, 3, 2), (1, 2, 3, 48)),
]


@pytest.mark.parametrize(("shape", "cell"), [*zip(CORNERS, (*CELLS, *CELLS, "lstm"), strict=True)], ids=str)
def test_corner_shapes(cell: str, shape: tuple[int, int, int, int]) -> None:
    check_norm(
        layer, NormProblem.draw(Case(cell, FP32, *shape, rows="lengths" if shape[0] > 1 else "full", resets=True))
    )


ANY = [Case(cell, FP32, 2, 4, 3, 9, True, "lengths", noise="both", states=True) for cell in CELLS]
any_case = pytest.mark.parametrize("case", ANY, ids=str)
# on a grid, slow here, an LSTM alone: it has the most phases
PAIRS = [*(("sequence", case) for case in ANY), ("steps", replace(ANY[0], H=33, bidirectional=False))]
any_pair = pytest.mark.parametrize(("way", "case"), PAIRS, indirect=["way"], ids=str)
SOME = (("out", "c_n"), ("h_n", "c_out"))  # a GRU has the first of each


@any_case
def test_second_derivatives(case: Case) -> None:
    check_norm_second(layer, NormProblem.draw(replace(case, H=4)))


@any_pair
def test_backward_changes_nothing(way: str, case: Case) -> None:
    check_backward_changes_nothing(layer, NormProblem.draw(case))


@any_pair
@pytest.mark.parametrize("used", SOME, ids="+".join)
def test_gradients_of_some_outputs(way: str, case: Case, used: tuple[str, ...]) -> None:
    problem = NormProblem.draw(case)
    check_norm(layer, replace(problem, grads={name: g for name, g in problem.grads.items() if name in used}))


@any_pair
def test_gradients_of_some_inputs(way: str, case: Case) -> None:
    problem = NormProblem.draw(case)
    everything = run(layer, problem)
    for wanted in (["h0"], ["w_hh.0", f"w_n_ih.{int(case.bidirectional)}"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        outputs = problem.call(layer, leaves)
        for name, d in differentiate(outputs, problem.grads, {n: leaves[n] for n in wanted}).items():
            assert torch.equal(d, everything[name]), name
    with torch.no_grad():
        for name, t in problem.call(layer, problem.tensors).items():
            assert torch.equal(t, everything[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_grids_give_the_same_bits(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share the tiles, of two blocks of rows and three of units, with a barrier or without: a
    row's parts are joined in one order.
    """
    case = Case(cell, FP32, 2, 17, 3, 33, rows="lengths", noise="both", states=True)
    problem, found = NormProblem.draw(case), []
    for units in (1, 2):
        monkeypatch.setattr(devices, "INTERPRETER", replace(devices.INTERPRETER, units=units))
        found.append(run(layer, problem))
    for name, t in found[1].items():
        assert torch.equal(t, found[0][name]), name
    compare(found[0], *norm_budget(problem))


def wide_means(cell: str) -> tuple[NormProblem, float]:
    """One step whose W_hh h has a mean of 1000 times its deviation, and how far rounding may take N of it."""
    problem = NormProblem.draw(Case(cell, FP32, 1, 3, 3, 35))
    w_hh, h0 = problem.tensors["w_hh.0"], problem.tensors["h0"]
    shift = torch.linalg.lstsq(h0[0], torch.ones(h0.shape[1], 1)).solution.flatten()  # h0 shift = 1
    deviation = (h0[0] @ w_hh.T).std()
    w_hh = w_hh + 1000 * deviation * shift
    off = 35 * 2**-24 * (h0[0].abs() @ w_hh.abs().T).max() / deviation  # of a product of 35 terms, in deviations
    return replace(problem, tensors=problem.tensors | {"w_hh.0": w_hh}), off.item()


def check_wide(cell: str) -> None:
    """Results alone: their gradients are sums that nearly vanish beside such a mean."""
    problem, off = wide_means(cell)
    with torch.no_grad():
        got, truth = (problem.call(f, problem.tensors if f is layer else wide(problem)) for f in (layer, norm_plain))
    error = max(largest(got[name].double() - t) for name, t in truth.items())
    if not error <= off:
        raise Mismatch(f"errs by {error:.3g}, allowed {off:.3g}")


def wide(problem: NormProblem) -> dict[str, torch.Tensor]:
    return {name: t.double() for name, t in problem.tensors.items()}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("parts", [64, 2])
def test_parts_are_joined_soundly(cell: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of a row at once, or two and then one, beside a mean that squares of it would drown."""
    for module in (rnn_norm_steps, rnn_norm_steps_backward):
        monkeypatch.setattr(module, "PARTS", tl.constexpr(parts))
    check_wide(cell)


@triton.jit
def squares_less_mean(columns, FIRST: tl.constexpr, END: tl.constexpr, units_in, count):
    """E[x^2] - E[x]^2."""
    total = tl.sum(columns[FIRST], 1)
    squares = tl.sum(columns[FIRST] * columns[FIRST], 1)
    for g in tl.static_range(FIRST + 1, END):
        total += tl.sum(columns[g], 1)
        squares += tl.sum(columns[g] * columns[g], 1)
    return total / count, tl.maximum(squares - total * (total / count), 0.0)


@triton.jit
def parts_alone(parts, BLOCK: tl.constexpr, GATES: tl.constexpr, rows, rows_in, B, Z: tl.constexpr):
    """What lies between the parts' means is no deviation."""
    means, own, units = load_parts(parts, BLOCK, 0, rows, rows_in, B, Z)
    counts = GATES * units
    return tl.sum(means * counts[None, :], 1) / (GATES * Z.H), 1 / tl.sqrt(tl.sum(own, 1) / (GATES * Z.H) + EPS)


@triton.jit
def no_sums(parts, BLOCK: tl.constexpr, rows, rows_in, B, Z: tl.constexpr):
    """Statistics have no gradient."""
    return zeros(Z.rows), zeros(Z.rows)


def check_plain(cell: str) -> None:
    check_norm(layer, NormProblem.draw(Case(cell, FP32, 2, 3, 3, 33)))


FAULTS: dict[str, tuple[Any, str, Any, Any]] = {  # where, which function, what stands in its place, who notices
    "squares": (rnn_norm_steps, "spread", squares_less_mean, check_wide),
    "parts": (rnn_norm_steps, "_statistics", parts_alone, check_plain),
    "sums": (rnn_norm_steps_backward, "_sums", no_sums, check_plain),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_in_the_statistics_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails sums of squares, parts that are not joined, and statistics taken for constants."""
    module, function, fault, check = FAULTS[name]
    monkeypatch.setattr(module, function, fault)
    with pytest.raises(Mismatch):
        check("gru")


@pytest.mark.parametrize("way", ["sequence", "steps"], indirect=True)
@pytest.mark.parametrize("name", MUTANTS)
def test_fault_in_the_kernels_is_noticed(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails kernels that ignore lengths or resets, or confuse the directions."""
    function, rows, fault = MUTANTS[name]
    two, resets = name in ("directions", "reversed resets"), function == "starts_anew"
    problem = NormProblem.draw(Case("lstm", FP32, 2, 5, 4, HIDDEN[way], two, rows, resets=resets))
    for module in (rnn_norm_sequence, rnn_norm_steps, rnn_norm_steps_backward):
        monkeypatch.setattr(module, function, fault, raising=False)
    with pytest.raises(Mismatch):
        check_norm(layer, problem)


@triton.jit
def nothing_kept(old, new, masks, at, there):
    """No mask holds h, nor its gradient."""
    return new


@pytest.mark.parametrize("way", ["sequence", "steps"], indirect=True)
@pytest.mark.parametrize("fault", [what_h_keeps_c_keeps, nothing_dropped, nothing_kept], ids=lambda f: f.__name__)
def test_fault_in_the_masks_is_noticed(way: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails kernels that mistake one mask for another, or lose a path of the gradient."""
    problem = NormProblem.draw(Case("lstm", FP32, 2, 3, 3, HIDDEN[way], noise="both", states=True))
    if fault is nothing_kept:
        module = rnn_norm_sequence if way == "sequence" else rnn_norm_steps_backward
        monkeypatch.setattr(module, "held_h", fault)
    else:
        of = rnn_noise.Masks.of
        monkeypatch.setattr(rnn_noise.Masks, "of", lambda extras: fault(of(extras)))
    with pytest.raises(Mismatch):
        check_norm(layer, problem)


@pytest.mark.parametrize(("kind", "hidden", "on"), [("LSTM", 8, "state"), ("GRU", 8, "update"), ("GRU", 33, "")])
def test_module(kind: str, hidden: int, on: str) -> None:
    """Layers upon layers, mask for mask as the reference draws them; NaN stays in its row; no rows."""
    noise: dict[str, Any] = {"zoneout": 0.3, "recurrent_dropout": 0.4, "recurrent_dropout_on": on} if on else {}

    def build(**options: Any) -> Any:
        torch.manual_seed(0)
        return getattr(fastseq, kind)(5, hidden, 2, layer_norm=True, bidirectional=True, **noise, **options)

    def out_of(module: Any) -> torch.Tensor:
        torch.manual_seed(1)
        return module(x)[0]

    x = torch.randn(2, 3, 5)
    module = build(backend="triton")
    before = out_of(module)
    torch.testing.assert_close(before, out_of(build(backend="reference")), rtol=1e-4, atol=1e-5)
    x[1, 1] = torch.nan
    after = out_of(module)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert after[:, 1].isnan().any()
    out, _ = module(x[:, :0])
    out.sum().backward()
    assert all(p.grad.eq(0).all() for p in module.parameters())
