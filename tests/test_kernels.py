"""The fused CPU layer against the float64 oracle: every option, every corner, forward and every gradient."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import _native
from tests.oracle import (
    CELLS,
    SMOOTH,
    Case,
    Problem,
    Results,
    cell_kinds,
    check_backward_changes_nothing,
    check_layer,
    differentiate,
    run,
)

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.ops.rnn import rnn_layer

DTYPES = (torch.float32, torch.bfloat16)
ROWS = ("full", "lengths", "packed")
KINDS = [(*kind, rows, two) for kind in cell_kinds(DTYPES) for rows in ROWS for two in (False, True)]
FLAGS = list(itertools.product((False, True), repeat=3))  # hx, bias, batch_first
RESETS = [(*kind, resets) for kind in KINDS for resets in (False, True) if not (resets and kind[2] == "packed")]
SHAPES = [  # T, B, I, H
    (1, 1, 1, 1),
    (1, 3, 5, 16),  # one step
    (4, 0, 3, 5),  # no rows
    (9, 2, 3, 15),  # odd H and I: half a bf16 pair
    (3, 17, 13, 17),
    (4, 33, 31, 63),
    (2, 65, 64, 65),
    (9, 30, 2, 3),  # more tokens than a block of them
    (2, 9, 70, 140),  # more units, and more gate rows, than a block of them
    (2, 40, 258, 260),  # weights larger than a core's share of the cache: two threads split the units
    (9, 1, 33, 260),  # they do, in one chunk: no panel of W_ih outlives its use
    (70, 1, 5, 130),  # one row, two chunks
    (5, 1, 200, 201),  # one row reads both weights where they stand
    (5, 3, 201, 20),  # a few rows, the input's alone
    (1, 70, 200, 33),  # too many rows for that
]


def options() -> list[Case]:
    """Everything crossed but the threads, which take turns, at one odd shape."""
    cases = []
    for (cell, dtype, rows, two, resets), (hx, bias, batch_first) in itertools.product(RESETS, FLAGS):
        if not (batch_first and rows == "packed"):
            threads = 1 + len(cases) % 2
            cases.append(Case(cell, dtype, 6, 5, 7, 20, two, rows, hx, bias, batch_first, None, threads, resets))
    return cases


def corners() -> list[Case]:
    """Each shape with each cell, dtype, kind of rows and direction, with resets or not; other options take turns."""
    turns = itertools.cycle(itertools.product(FLAGS, (2, 1)))
    cases = []
    for shape, (cell, dtype, rows, two, resets) in itertools.product(SHAPES, RESETS):
        (hx, bias, batch_first), threads = next(turns)
        if not (rows == "packed" and shape[1] == 0):  # torch packs no empty batch
            batch_first = batch_first and rows != "packed"
            cases.append(Case(cell, dtype, *shape, two, rows, hx, bias, batch_first, None, threads, resets))
    return cases


@pytest.mark.parametrize("case", options(), ids=str)
def test_every_option(case: Case) -> None:
    """All options crossed, at one odd shape."""
    check_layer(rnn_layer, Problem.draw(case))


@pytest.mark.parametrize("case", corners(), ids=str)
def test_corner_shapes(case: Case) -> None:
    """Shapes at and beside the edges of vectors, tiles and blocks."""
    check_layer(rnn_layer, Problem.draw(case))


ANY = [
    Case(cell, dtype, bidirectional=True, rows=rows, resets=resets)
    for (cell, dtype), (rows, resets) in itertools.product(
        cell_kinds(DTYPES), [*((rows, False) for rows in ROWS), ("lengths", True)]
    )
]
any_case = pytest.mark.parametrize("case", ANY, ids=str)


@any_case
@pytest.mark.parametrize("used", [("out",), ("h_n",), ("c_n",), ("h_n", "c_n")], ids="+".join)
def test_gradients_of_some_outputs_only(case: Case, used: tuple[str, ...]) -> None:
    """The gradient of an unused output is None, which stands for 0."""
    problem = Problem.draw(case)
    grads = {name: g for name, g in problem.grads.items() if name in used}
    if grads:  # a GRU has no c_n
        check_layer(rnn_layer, replace(problem, grads=grads))


@any_case
def test_gradients_of_some_inputs_only(case: Case) -> None:
    """What needs no gradient is not computed, and the rest keeps its bits."""
    problem = Problem.draw(case)
    everything = run(rnn_layer, problem)
    for wanted in (["x"], ["h0"], [n for n in problem.tensors if n.startswith("w_")]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        outputs = problem.call(rnn_layer, leaves)
        for name, d in differentiate(outputs, problem.grads, {n: leaves[n] for n in wanted}).items():
            assert torch.equal(d, everything[name]), (wanted, name)


@any_case
def test_no_gradient_recorded_gives_the_same_outputs(case: Case) -> None:
    """Inference saves nothing for backward and takes another way through the operator."""
    problem = Problem.draw(case)
    trained = run(rnn_layer, problem)
    with torch.no_grad():
        for name, t in problem.call(rnn_layer, problem.tensors).items():
            assert torch.equal(t, trained[name]), name


@pytest.mark.parametrize("cell", SMOOTH)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("two", [False, True])
def test_fp32_state_beside_bf16(cell: str, rows: str, two: bool) -> None:
    """A streaming model keeps its state in fp32 from call to call."""
    case = Case(cell, torch.bfloat16, bidirectional=two, rows=rows, state=torch.float32)
    check_layer(rnn_layer, Problem.draw(case))


def results(problem: Problem, tensors: Results, grads: Results) -> Results:
    """As `run`, on exactly these tensors: their strides and offsets are what is under test."""
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    outputs = problem.call(rnn_layer, leaves)
    return outputs | differentiate(outputs, grads, leaves)


def sliced(t: Tensor) -> Tensor:
    """`t` as every second element of every dimension of a larger tensor of NaN."""
    large = t.new_full([2 * n for n in t.shape], torch.nan)
    view = large[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def padded(t: Tensor) -> Tensor:
    """`t` inside a larger tensor of NaN, last dimension dense, off every alignment."""
    large = t.new_full([n + 3 for n in t.shape], torch.nan)
    view = large[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


def misaligned(t: Tensor) -> Tensor:
    """`t`, contiguous, one element off an alignment."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def reordered(t: Tensor) -> Tensor:
    """`t` with its first two dimensions exchanged in memory."""
    return t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)


@any_case
@pytest.mark.parametrize("layout", [sliced, padded, reordered])
@pytest.mark.parametrize("batch_first", [False, True])
def test_strides_do_not_matter(case: Case, layout: object, batch_first: bool) -> None:
    """Inputs, weights, states and incoming gradients of any strides give the bits of contiguous ones."""
    assert callable(layout)
    problem = Problem.draw(replace(case, batch_first=batch_first and case.rows != "packed"))
    expected = results(problem, problem.tensors, problem.grads)
    grads = {n: layout(g) for n, g in problem.grads.items()}
    got = results(problem, {n: layout(t) for n, t in problem.tensors.items()}, grads)
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_inputs_and_gradients(cell: str, dtype: torch.dtype) -> None:
    """Tensors of stride 0: one row or step for all, and the gradient that `out.sum()` sends back."""
    problem = Problem.draw(Case(cell, dtype, bidirectional=True))
    for dim in (0, 1):
        tensors = {n: t[:, :1].expand_as(t) if n[0] in "hc" else t for n, t in problem.tensors.items()}
        tensors["x"] = problem.tensors["x"].narrow(dim, 0, 1).expand_as(problem.tensors["x"])
        grads = {n: torch.ones((), dtype=dtype).expand_as(g) for n, g in problem.grads.items()}
        got = results(problem, tensors, grads)
        dense = {n: t.contiguous() for n, t in tensors.items()}
        for name, t in results(problem, dense, {n: g.contiguous() for n, g in grads.items()}).items():
            assert torch.equal(got[name], t), name


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in ANY for name in ("x", "h0", "c0") if name != "c0" or case.cell == "lstm"],
    ids=str,
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_row(case: Case, name: str, value: float) -> None:
    """NaN or infinity in one row: every other row keeps its bits, in outputs and input gradients."""
    problem = Problem.draw(replace(case, B=9, threads=2))
    clean = run(rnn_layer, problem)
    row = problem.case.B // 2  # of full length; in packed data the first, which is the longest
    row = 0 if problem.batch_sizes is not None else row
    bad = {n: t.clone() for n, t in problem.tensors.items()}
    bad[name][0 if name == "x" and problem.batch_sizes is not None else (0, row)] = value
    got = run(rnn_layer, replace(problem, tensors=bad))
    assert not got["h_n"][:, row].isfinite().all() or value == torch.inf or case.resets
    token_rows = torch.arange(problem.case.B).expand(problem.case.T, -1)
    if problem.batch_sizes is not None:
        token_rows = token_rows[torch.arange(problem.case.B) < problem.batch_sizes[:, None]]
    for key in ("out", "d_x"):
        others = token_rows != row
        assert torch.equal(got[key][others], clean[key][others]), key
    for key in {"h_n", "c_n", "d_h0", "d_c0"} & got.keys():
        others = torch.arange(problem.case.B) != row
        assert torch.equal(got[key][:, others], clean[key][:, others]), key


@any_case
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_every_time(case: Case, threads: int) -> None:
    """No sum depends on which thread comes first."""
    problem = Problem.draw(replace(case, B=33, H=70, threads=threads))
    torch.set_num_threads(threads)
    first = run(rnn_layer, problem)
    for _ in range(5):
        for name, t in run(rnn_layer, problem).items():
            assert torch.equal(t, first[name]), name


@any_case
def test_backward_changes_nothing(case: Case) -> None:
    """Backward leaves inputs, outputs and what was saved as they were: a second one gives the same."""
    check_backward_changes_nothing(rnn_layer, Problem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
def test_changed_data_is_seen(cell: str) -> None:
    """No packed weights outlive a call: `.data` updates, as optimizers make them, change no version counter."""
    problem = Problem.draw(Case(cell))
    weight = problem.tensors["w_hh.0"]
    before = run(rnn_layer, problem)["out"]
    weight.data.mul_(2)
    doubled = run(rnn_layer, problem)["out"]
    assert not torch.equal(before, doubled)
    check_layer(rnn_layer, problem)


@pytest.mark.parametrize("bad", [-1, 7])
def test_a_length_outside_the_input_is_refused(bad: int) -> None:
    """Where Python cannot look (torch.compile), the kernel itself reads no step that is not there."""
    problem = Problem.draw(Case(rows="lengths"))
    assert problem.lengths is not None
    problem.lengths[1] = bad
    with pytest.raises(IndexError, match=rf"lengths\[1\] is {bad}, outside 0 .. 6"):
        problem.call(rnn_layer, problem.tensors)


def test_batch_sizes_never_grow() -> None:
    """A PackedSequence made by hand may hold anything."""
    problem = Problem.draw(Case(rows="packed"))
    assert problem.batch_sizes is not None
    problem.batch_sizes[-1] = 9
    with pytest.raises(IndexError, match=r"batch_sizes\[5\] is 9"):
        problem.call(rnn_layer, problem.tensors)


def poisoned(*args: Any) -> tuple[Tensor | None, ...]:
    """rnn_layer with NaN in the scratch memory that its forward and then its backward find."""
    _native.C.poison_scratch()
    results = rnn_layer(*args)
    _native.C.poison_scratch()
    return results


@pytest.mark.parametrize(("case", "threads"), [(case, 1 + (k + k // 4) % 2) for k, case in enumerate(ANY)], ids=str)
def test_scratch_memory_is_written_before_it_is_read(case: Case, threads: int) -> None:
    """The native core keeps its scratch memory between calls: what the last one left there must not matter."""
    torch.set_num_threads(threads)
    sizes = [dict(zip("TBIH", shape, strict=True)) for shape in SHAPES]
    largest = {letter: max(size[letter] for size in sizes) for letter in "TBIH"}
    run(rnn_layer, Problem.draw(replace(case, **largest)))  # all the calls below fit into its block
    for size, (two, hx) in itertools.product(sizes, ((False, threads == 1), (True, threads == 2))):
        if size["B"] or case.rows != "packed":  # torch packs no empty batch
            problem = Problem.draw(replace(case, **size, bidirectional=two, hx=hx))
            expected = run(rnn_layer, problem)
            with torch.no_grad():
                inference = problem.call(poisoned, problem.tensors)
            for name, t in [*run(poisoned, problem).items(), *inference.items()]:
                assert torch.equal(t, expected[name]), (name, problem.case)
