"""The Triton layer against the float64 oracle: each of its kernels, every option, forward and every gradient."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastseq.kernels import cells, configs, devices, rnn_sequence, rnn_steps
from fastseq.kernels.rnn_batch import token
from torch import Tensor

from fastseq.ops import rnn as ops
from tests.oracle import (
    CELLS,
    SMOOTH,
    Case,
    Mismatch,
    Problem,
    Results,
    cell_kinds,
    check_backward_changes_nothing,
    check_layer,
    check_second,
    differentiate,
    run,
)

layer = partial(ops.rnn_layer, on="triton")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = ("full", "lengths", "packed")
KINDS = [(*kind, rows, two) for kind in cell_kinds((FP32, BF16, FP16)) for rows in ROWS for two in (False, True)]
FLAGS = list(itertools.product((False, True), repeat=3))  # hx, bias, batch_first
HIDDEN = {"sequence": 13, "steps": 19, "barrier": 19}  # of `way`: one block of units, or two
SHAPES = [  # T, B, I, H
    (1, 1, 1, 1),
    (1, 3, 5, 16),  # one step
    (3, 0, 3, 5),  # no rows
    (5, 17, 3, 15),  # more rows than a block
    (3, 33, 4, 16),
    (2, 2, 13, 33),  # three blocks of units, one unit in the last
    (2, 1, 5, 32),  # one row, whole blocks
]


def options(kinds: list[Any]) -> list[Case]:
    """Every kind at one odd shape; the other options take turns."""
    turns, cases = itertools.cycle((*FLAGS, FLAGS[-1])), []  # 9 and the 2 directions share no factor
    for resets, (cell, dtype, rows, two) in itertools.product((False, True), kinds):
        hx, bias, batch_first = next(turns)
        if rows != "packed":
            cases.append(Case(cell, dtype, 3, 5, 7, 0, two, rows, hx, bias, batch_first, resets=resets))
        elif not resets:
            cases.append(Case(cell, dtype, 3, 5, 7, 0, two, rows, hx, bias))
    return cases


def corners() -> list[Case]:
    """Each shape with each cell and kind of rows; dtypes, directions and the other options take turns."""
    turns, cases = itertools.cycle(itertools.product((FP32, BF16, FP16), (True, False), FLAGS)), []
    resets = itertools.cycle((True, False, True, False, False))  # all kinds meet both
    for shape, cell, rows in itertools.product(SHAPES, CELLS, ROWS):
        dtype, two, (hx, bias, batch_first) = next(turns)
        for _ in range(4):  # 5 and 48 share no factor: all meet all
            next(turns)
        dtype = dtype if cell in SMOOTH else FP32
        if shape[1] or rows != "packed":  # torch packs no empty batch
            batch_first, some = batch_first and rows != "packed", next(resets) and rows != "packed"
            cases.append(Case(cell, dtype, *shape, two, rows, hx, bias, batch_first, resets=some))
    return cases


def kinds() -> list[tuple[str, Case]]:
    """All of them on one kernel; on the others, whose steps take longer here, those that differ in what they do."""
    every = options(KINDS)
    steps = [case for case in every if case.dtype == FP32 or (case.rows == "lengths" and case.bidirectional)]
    barrier = [case for case in every if case.rows == "lengths" and case.bidirectional and case.dtype != FP16]
    return [*(("sequence", c) for c in every), *(("steps", c) for c in steps), *(("barrier", c) for c in barrier)]


@pytest.mark.parametrize(("way", "case"), kinds(), indirect=["way"], ids=str)
def test_every_kind(way: str, case: Case) -> None:
    """Cells, dtypes, rows and directions crossed."""
    check_layer(layer, Problem.draw(replace(case, H=HIDDEN[way])))


@pytest.mark.parametrize("case", corners(), ids=str)
def test_corner_shapes(case: Case) -> None:
    """Shapes at and beside the edges of blocks."""
    check_layer(layer, Problem.draw(case))


ANY = [
    Case(cell, FP32, 3, 5, 4, 13, True, rows, resets=resets)
    for cell, (rows, resets) in itertools.product(CELLS, [*((rows, False) for rows in ROWS), ("lengths", True)])
]
any_case = pytest.mark.parametrize("case", ANY, ids=str)
PAIRS = [*(("sequence", c) for c in ANY), *(("steps", replace(c, H=19)) for c in ANY if c.rows == "lengths")]
any_pair = pytest.mark.parametrize(("way", "case"), PAIRS, indirect=["way"], ids=str)
both = pytest.mark.parametrize("way", ["sequence", "steps"], indirect=True)


@any_pair
@pytest.mark.parametrize("used", [("out",), ("h_n",), ("c_n",)], ids="+".join)
def test_gradients_of_some_outputs_only(way: str, case: Case, used: tuple[str, ...]) -> None:
    """The gradient of an unused output is None, which stands for 0."""
    problem = Problem.draw(case)
    grads = {name: g for name, g in problem.grads.items() if name in used}
    check_layer(layer, replace(problem, grads=grads or problem.grads))  # a GRU has no c_n


@pytest.mark.parametrize(
    ("way", "cell"), [("sequence", "lstm"), ("sequence", "gru"), ("steps", "gru")], indirect=["way"]
)
def test_gradients_of_some_inputs_only(way: str, cell: str) -> None:
    """What needs no gradient is not computed, and the rest keeps its bits; so do outputs without any gradient."""
    problem = Problem.draw(Case(cell, BF16, 3, 5, 4, HIDDEN[way], True, "lengths"))
    everything = run(layer, problem)
    for wanted in (["x"], ["h0"], ["w_hh.0", "b_ih.1"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        outputs = problem.call(layer, leaves)
        for name, d in differentiate(outputs, problem.grads, {n: leaves[n] for n in wanted}).items():
            assert torch.equal(d, everything[name]), (wanted, name)
    with torch.no_grad():
        for name, t in problem.call(layer, problem.tensors).items():
            assert torch.equal(t, everything[name]), name


@any_pair
def test_fp32_state(way: str, case: Case) -> None:
    """A streaming model keeps its state in fp32 from call to call."""
    check_layer(layer, Problem.draw(replace(case, dtype=BF16, T=2, B=3, state=FP32)))


@both
def test_fp32_state_keeps_its_precision(way: str) -> None:
    """It is not rounded to the input's dtype on its way through a row of length 0, nor to its end."""
    problem = Problem.draw(Case("lstm", BF16, 3, 5, 4, HIDDEN[way], True, "lengths", state=FP32))
    assert problem.lengths is not None
    assert problem.lengths[0] == 0
    with torch.no_grad():
        outputs = problem.call(layer, problem.tensors)
    for name in ("h", "c"):
        assert torch.equal(outputs[f"{name}_n"][:, 0], problem.tensors[f"{name}0"][:, 0])
        assert not torch.equal(outputs[f"{name}_n"], outputs[f"{name}_n"].bfloat16().float())


def results(problem: Problem, tensors: Results, grads: Results) -> Results:
    """As `run`, on exactly these tensors."""
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    outputs = problem.call(layer, leaves)
    return outputs | differentiate(outputs, grads, leaves)


@any_case
def test_strides_do_not_matter(case: Case) -> None:
    """Tensors out of larger ones, expanded and transposed give the bits of contiguous ones."""
    problem = Problem.draw(case)
    expected = results(problem, problem.tensors, problem.grads)

    def inside(t: Tensor) -> Tensor:
        large = t.new_full([2 * n + 1 for n in t.shape], torch.nan)
        return large[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)

    def reordered(t: Tensor) -> Tensor:
        return t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)

    for layout in (inside, reordered):
        grads = {n: layout(g) for n, g in problem.grads.items()}
        for name, t in results(problem, {n: layout(t) for n, t in problem.tensors.items()}, grads).items():
            assert torch.equal(t, expected[name]), name
    ones = {n: torch.ones(()).expand_as(g) for n, g in problem.grads.items()}
    dense = results(problem, problem.tensors, {n: g.contiguous() for n, g in ones.items()})
    for name, t in results(problem, problem.tensors, ones).items():
        assert torch.equal(t, dense[name]), name


@any_pair
@pytest.mark.parametrize("name", ["x", "h0"])
def test_a_bad_value_stays_in_its_row(way: str, case: Case, name: str) -> None:
    """NaN in one row: every other row keeps its bits, in outputs and input gradients."""
    problem = Problem.draw(case)
    clean = run(layer, problem)
    row = 0 if problem.batch_sizes is not None else case.B // 2
    bad = {n: t.clone() for n, t in problem.tensors.items()}
    bad[name][0 if name == "x" and problem.batch_sizes is not None else (0, row)] = torch.nan
    got = run(layer, replace(problem, tensors=bad))
    assert not got["h_n"][:, row].isfinite().all() or case.resets
    token_rows = torch.arange(case.B).expand(case.T, -1)
    if problem.batch_sizes is not None:
        token_rows = token_rows[torch.arange(case.B) < problem.batch_sizes[:, None]]
    for key in {"out", "d_x", "h_n", "c_n", "d_h0", "d_c0"} & got.keys():
        others = token_rows != row if key in ("out", "d_x") else (slice(None), torch.arange(case.B) != row)
        assert torch.equal(got[key][others], clean[key][others]), key


@any_pair
def test_backward_changes_nothing(way: str, case: Case) -> None:
    """Backward leaves inputs, outputs and what was saved as they were: a second one gives the same."""
    check_backward_changes_nothing(layer, Problem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rows", ["full", "lengths"])
def test_second_derivatives(cell: str, rows: str) -> None:
    """Recorded gradients are differentiable: they are recomputed by the reference."""
    check_second(layer, Problem.draw(Case(cell, T=2, B=3, I=2, H=9, rows=rows)))


@pytest.mark.parametrize(
    ("way", "cell"), [("sequence", "lstm"), ("sequence", "gru"), ("steps", "lstm")], indirect=["way"]
)
def test_lengths_are_clamped(way: str, cell: str) -> None:
    """Of a GPU's lengths nobody knows the values: below 0 is 0, above T is T. int32 gives the bits of int64."""
    problem = Problem.draw(Case(cell, FP32, 3, 5, 4, HIDDEN[way], True, "lengths"))
    problem.tensors["x"].nan_to_num_()
    sound, outside = torch.tensor([0, 3, 2, 3, 0]), torch.tensor([-7, 9, 2, 1 << 30, -1])
    expected = run(layer, replace(problem, lengths=sound))
    for lengths in (outside, outside.int()):
        for name, t in run(layer, replace(problem, lengths=lengths)).items():
            assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize(("sizes", "fault"), [([3, 4], "never grow"), ([3, 0], "never grow"), ([3, 1], "add up to 4")])
def test_batch_sizes_are_those_of_the_data(sizes: list[int], fault: str) -> None:
    """A PackedSequence made by hand may hold anything."""
    problem = Problem.draw(Case(T=2, B=3, rows="packed"))
    problem.tensors["x"] = problem.tensors["x"].new_zeros(5, 7)
    made = replace(problem, batch_sizes=torch.tensor(sizes))
    with pytest.raises(IndexError, match=fault):
        made.call(layer, made.tensors)


@triton.jit
def no_lengths(lengths, rows, rows_in, T):
    """Every row has T steps."""
    return tl.where(rows_in, T, 0).to(tl.int32)


@triton.jit
def before_forwards(t, d, length):
    """The reverse direction takes its state from the wrong side."""
    return t - 1, t >= 1


@triton.jit
def never_anew(resets, t, d, length, there, rows, starts, step, row):
    """Resets are ignored."""
    return there & (t < 0)


@triton.jit
def anew_forwards(resets, t, d, length, there, rows, starts, step, row):
    """The reverse direction starts anew at a segment's beginning."""
    return tl.load(resets + token(t, rows, there, starts, step, row), there, 0) != 0


@triton.jit
def lstm_without_c(pre, h, c):
    """The cell forgets everything."""
    h, c, saved = cells.lstm(pre, h, c * 0)
    return h, c, saved


MUTANTS: dict[str, tuple[str, str, Any]] = {  # the function of rnn_batch.py, rows, what stands in its place
    "lengths": ("lengths_of", "lengths", no_lengths),
    "directions": ("before", "full", before_forwards),
    "resets": ("starts_anew", "lengths", never_anew),
    "reversed resets": ("starts_anew", "full", anew_forwards),
}


@both
@pytest.mark.parametrize("name", MUTANTS)
def test_fault_in_the_kernels_is_noticed(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails kernels that ignore lengths or resets, or confuse the directions."""
    function, rows, fault = MUTANTS[name]
    problem = Problem.draw(Case("lstm", FP32, 3, 5, 4, HIDDEN[way], True, rows, resets=function == "starts_anew"))
    check_layer(layer, problem)
    for module in (rnn_sequence, rnn_steps):
        for kernel in (module.forward_kernel, module.backward_kernel):
            monkeypatch.setitem(kernel.fn.__globals__, function, fault)
    with pytest.raises(Mismatch):
        check_layer(layer, problem)


@both
@pytest.mark.parametrize("field", ["forward", "backward", "PLACE"])
def test_fault_in_a_cell_is_noticed(way: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails a wrong formula, forward or backward, and gradients of gates that change places."""
    wrong = {"forward": lstm_without_c, "backward": cells.gru_backward}
    cell = cells.CELLS["lstm"]
    if field == "PLACE":
        monkeypatch.setattr(cells.Cell, "PLACE", (1, 0, 2, 3))
    else:
        monkeypatch.setitem(cells.CELLS, "lstm", cell._replace(**{field: wrong[field]}))
    with pytest.raises(Mismatch):
        check_layer(layer, Problem.draw(Case("lstm", FP32, 3, 5, 4, HIDDEN[way])))


def test_table_of_configs_is_sound() -> None:
    """Each kernel has a row for every call that asks for it, on every device; a wrong row is refused by name."""
    for device, dtype, hidden in itertools.product(devices.DEVICES, (FP32, BF16), (1, 64, 65, 4096)):
        for kernel, size in itertools.product(("rnn_steps", "rnn_cell"), ("forward", "backward")):
            assert configs.choose(f"{kernel}_{size}", dtype, hidden, device).blocks["rows"] >= 16
    assert configs.find("rnn_sequence_forward", BF16, 129, devices.DEVICES[0]) is None
    row = (
        '[{"kernel": "k", "bits": [16], "hidden": [1, null], "devices": ["any"], "shared": 0, "blocks": {"rows": 12}, '
    )
    with pytest.raises(ValueError, match=r"row 0 \(k\) has blocks"):
        configs.load(row + '"warps": 4, "stages": 1, "because": "unmeasured: a test"}]')
    with pytest.raises(ValueError, match="has fields"):
        configs.load(row + '"warps": 4}]')
    with pytest.raises(LookupError, match="no row of nothing"):
        configs.choose("nothing", FP32, 1, devices.DEVICES[0])
