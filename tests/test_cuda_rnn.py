"""The CUDA layer against the float64 oracle, its kernels emulated: designs, numbers, forward and every gradient."""

import itertools
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from fastseq.cuda import native
from fastseq.ops import rnn as ops
from tests.emulated import chosen, emulated
from tests.oracle import (
    CELLS,
    GATES,
    SMOOTH,
    Case,
    Mismatch,
    Problem,
    budget,
    cell_kinds,
    check_backward_changes_nothing,
    check_layer,
    check_second,
    compare,
    nan_in_empty,
    run,
)

__all__ = ["emulated"]
pytestmark = pytest.mark.usefixtures("emulated", "without_tf32")

layer = partial(ops.rnn_layer, on="cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = ("full", "lengths", "packed")
DESIGNS = {"block": 33, "cluster": 70, "grid": 70}  # and hidden units for it: no multiple of a tile
SCHEDULES = (0, 1, 2, 4, 6, 8)  # seeds: 0 in order, even ones starve somebody
every_design = pytest.mark.parametrize("design", DESIGNS)
SEGMENTS = [(rows, False) for rows in ROWS] + [("full", True), ("lengths", True)]  # rows, and whether with resets
KINDS = [(*kind, rows, two) for kind in cell_kinds((FP32, BF16, FP16)) for rows in SEGMENTS for two in (False, True)]
SHAPES = [  # T, B, I, H
    (1, 1, 1, 1),
    (1, 3, 5, 16),  # one step
    (3, 0, 3, 5),  # no rows
    (5, 17, 3, 15),  # more rows than two tiles
    (2, 2, 13, 64),  # whole tiles
    (2, 1, 5, 65),
]


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rounding the oracle of fp32 does not allow for."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


@every_design
@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda n: "-".join(map(str, KINDS[n])).replace("torch.", ""))
def test_every_kind(design: str, number: int, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells, dtypes, rows and directions crossed, each on another layout and schedule; the other options take turns."""
    cell, dtype, (rows, resets), two = KINDS[number]
    hx, bias, batch_first = ((number >> i) & 1 == 0 for i in range(3))
    case = Case(cell, dtype, 3, (1, 5, 9, 17)[number % 4], 7, DESIGNS[design], two, rows, hx, bias, resets=resets)
    case = replace(case, batch_first=batch_first and rows != "packed")
    emulated.seed_schedule(SCHEDULES[number % len(SCHEDULES)])
    with chosen(monkeypatch, design, number) as ran:
        check_layer(layer, Problem.draw(case))
    assert len(ran) == 2


@every_design
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_in_registers(design: str, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers large enough for it."""
    case = Case(cell, dtype, 3, 11, 7, 64 if design == "block" else 250, design == "grid", "lengths")
    with chosen(monkeypatch, design, 1) as ran:
        check_layer(layer, Problem.draw(case))
    with chosen(monkeypatch, "cluster", 1, kept=True) as ran:
        check_layer(layer, Problem.draw(replace(case, H=250)))
    assert all(p.shape.kept for p in ran)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("cell", "rows"), list(itertools.product(CELLS, ("full", "lengths"))))
def test_corner_shapes(shape: tuple[int, int, int, int], cell: str, rows: str) -> None:
    """Shapes at and beside the edges of tiles, as `plan` lays them out."""
    check_layer(layer, Problem.draw(Case(cell, FP32, *shape, True, rows)))


@every_design
@pytest.mark.parametrize("cell", SMOOTH)
def test_tf32(design: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget of fp16, which has as many bits of mantissa and rounds more."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    problem = Problem.draw(Case(cell, FP16, 3, 9, 7, 250 if design == "cluster" else DESIGNS[design], True, "lengths"))
    truth, allowed = budget(problem)
    wide = replace(
        problem, case=replace(problem.case, dtype=FP32), tensors={n: t.float() for n, t in problem.tensors.items()},
        grads={n: g.float() for n, g in problem.grads.items()},
    )  # fmt: skip
    with chosen(monkeypatch, design, 3, kept=design == "cluster" and GATES[cell] > 1) as ran, nan_in_empty():
        compare(run(layer, wide), truth, allowed)
    assert {p.kind for p in ran} == {"tensor32"}


@pytest.mark.parametrize("design", ["cluster", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_schedules_do_not_matter(design: str, cell: str, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread runs first, the bits are the same: every sum has one order."""
    problem = Problem.draw(Case(cell, BF16, 4, 9, 3, 40, True, "lengths", state=FP32, resets=True))
    every = []
    for seed in SCHEDULES:
        emulated.seed_schedule(seed)
        with chosen(monkeypatch, design, 5):
            every.append(run(layer, problem))
    for other in every[1:]:
        for name, t in other.items():
            assert torch.equal(t, every[0][name]), name


ANY = [
    Case(cell, FP32, 3, 5, 4, 33, True, rows, resets=resets)
    for cell, (rows, resets) in itertools.product(CELLS, [*((rows, False) for rows in ROWS), ("lengths", True)])
]
any_case = pytest.mark.parametrize("case", ANY, ids=str)


@any_case
@pytest.mark.parametrize("used", [("out",), ("h_n",), ("c_n",)], ids="+".join)
def test_gradients_of_some_outputs_only(case: Case, used: tuple[str, ...]) -> None:
    """The gradient of an unused output is None, which stands for 0."""
    problem = Problem.draw(case)
    grads = {name: g for name, g in problem.grads.items() if name in used}
    check_layer(layer, replace(problem, grads=grads or problem.grads))  # a GRU has no c_n


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_some_inputs_only(cell: str) -> None:
    """What needs no gradient is not computed, and the rest keeps its bits; so do outputs without any gradient."""
    problem = Problem.draw(Case(cell, BF16, 3, 5, 4, 20, True, "lengths"))
    everything = run(layer, problem)
    for wanted in (["x"], ["h0"], ["w_hh.0", "b_ih.1"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        outputs = problem.call(layer, leaves)
        grads = [problem.grads[n] for n in outputs]
        found = torch.autograd.grad(list(outputs.values()), [leaves[n] for n in wanted], grads)
        for name, d in zip(wanted, found, strict=True):
            assert torch.equal(d, everything[f"d_{name}"]), (wanted, name)
    with torch.no_grad():
        for name, t in problem.call(layer, problem.tensors).items():
            assert torch.equal(t, everything[name]), name


@every_design
@pytest.mark.parametrize("case", [case for case in ANY if case.cell in SMOOTH], ids=str)
def test_fp32_state(design: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streaming model keeps its state in fp32 from call to call."""
    with chosen(monkeypatch, design, 2):
        check_layer(layer, Problem.draw(replace(case, dtype=BF16, B=3, H=DESIGNS[design], state=FP32)))


@any_case
def test_backward_changes_nothing(case: Case) -> None:
    """Backward leaves inputs, outputs and what was saved as they were: a second one gives the same."""
    check_backward_changes_nothing(layer, Problem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell: str) -> None:
    """Recorded gradients are differentiable: they are recomputed by the reference."""
    check_second(layer, Problem.draw(Case(cell, T=2, B=3, I=2, H=9, rows="lengths")))


@every_design
@any_case
@pytest.mark.parametrize("name", ["x", "h0"])
def test_a_bad_value_stays_in_its_row(design: str, case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in one row: every other row keeps its bits, in outputs and input gradients."""
    problem = Problem.draw(replace(case, H=DESIGNS[design]))
    row = 0 if problem.batch_sizes is not None else case.B // 2
    bad = {n: t.clone() for n, t in problem.tensors.items()}
    bad[name][0 if name == "x" and problem.batch_sizes is not None else (0, row)] = torch.nan
    with chosen(monkeypatch, design, 4):
        clean = run(layer, problem)
    with chosen(monkeypatch, design, 4):
        got = run(layer, replace(problem, tensors=bad))
    assert not got["h_n"][:, row].isfinite().all() or case.resets
    token_rows = torch.arange(case.B).expand(case.T, -1)
    if problem.batch_sizes is not None:
        token_rows = token_rows[torch.arange(case.B) < problem.batch_sizes[:, None]]
    for key in {"out", "d_x", "h_n", "c_n", "d_h0", "d_c0"} & got.keys():
        others = token_rows != row if key in ("out", "d_x") else (slice(None), torch.arange(case.B) != row)
        assert torch.equal(got[key][others], clean[key][others]), key


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_are_clamped(cell: str) -> None:
    """Of a GPU's lengths nobody knows the values: below 0 is 0, above T is T. int32 gives the bits of int64."""
    problem = Problem.draw(Case(cell, FP32, 3, 5, 4, 20, True, "lengths"))
    problem.tensors["x"].nan_to_num_()
    sound, outside = torch.tensor([0, 3, 2, 3, 0]), torch.tensor([-7, 9, 2, 1 << 30, -1])
    expected = run(layer, replace(problem, lengths=sound))
    for lengths in (outside, outside.int()):
        for name, t in run(layer, replace(problem, lengths=lengths)).items():
            assert torch.equal(t, expected[name]), name


def test_a_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks whose others never come leave the kernel; the next call says so, and the one after it runs."""
    problem = Problem.draw(Case(B=3, H=40))
    late = torch.full((4,), -1000, dtype=torch.int32)  # as if a thousand arrivals were missing
    native.stop_flag(problem.tensors["x"])  # made before torch.zeros is another
    with monkeypatch.context() as patch, chosen(monkeypatch, "grid"):
        patch.setattr(native, "patience", lambda: 1000)
        patch.setattr(torch, "zeros", lambda *args, **kwargs: late)
        with torch.no_grad():
            problem.call(layer, problem.tensors)
    assert (
        native.stop_flag(problem.tensors["x"].double().to("meta")) is not None
    )  # of another device: nothing stopped there
    with pytest.raises(RuntimeError, match="gave up after 20 s of waiting for its other blocks"):
        problem.call(layer, problem.tensors)
    check_layer(layer, problem)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_message_that_never_comes(way: str, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that waits for it leaves the kernel as a whole; the next call says so, and the one after it runs."""
    problem = Problem.draw(Case(T=4, B=19, H=40))
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    with chosen(monkeypatch, "cluster"):
        emulated.lose_message(5 if way == "forward" else 0)
        outputs = problem.call(layer, leaves)
        emulated.lose_message(5 if way == "backward" else 0)
        if way == "backward":
            torch.autograd.grad(list(outputs.values()), list(leaves.values()), [problem.grads[n] for n in outputs])
        emulated.lose_message(0)
        with pytest.raises(RuntimeError, match="gave up after 20 s of waiting for its other blocks"):
            problem.call(layer, problem.tensors)
        check_layer(layer, problem)


@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_several_blocks_of_rows(T: int, cell: str, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a cluster runs one after the other: its barriers' phases go on where the last block of rows left them."""
    for seed in range(4):
        emulated.seed_schedule(SCHEDULES[(T + seed) % len(SCHEDULES)])
        with chosen(monkeypatch, "cluster", seed) as ran:
            check_layer(layer, Problem.draw(Case(cell, FP32, T, 50, 3, 37, False, "lengths")))
        assert any(p.shape.groups * p.shape.rows * 2 < 50 for p in ran), ran


def test_a_launch_that_cannot_be_is_refused(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape without a kernel raises, and so does one that the device does not hold; later calls work."""
    problem = Problem.draw(Case(B=3, H=40))
    with chosen(monkeypatch, "cluster") as ran:
        check_layer(layer, problem)
    wrong = replace(ran[0].shape, kept=5)
    with monkeypatch.context() as patch:
        patch.setattr("fastseq.cuda.rnn._plan", lambda *_: replace(ran[0], shape=wrong))
        with pytest.raises(RuntimeError, match="rnn_forward was not started: there is no kernel of this shape"):
            problem.call(layer, problem.tensors)
        patch.setattr("fastseq.cuda.rnn._plan", lambda *_: replace(ran[0], shape=replace(ran[0].shape, blocks=32)))
        with pytest.raises(RuntimeError, match="rnn_forward was not started: invalid launch"):
            problem.call(layer, problem.tensors)
    check_layer(layer, problem)


@every_design
@pytest.mark.parametrize("fault", ["lengths", "resets", "hx", "direction"])
def test_a_fault_is_noticed(design: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails a layer that ignores lengths, resets or states, or confuses the directions."""
    problem = Problem.draw(Case("lstm", FP32, 3, 5, 4, DESIGNS[design], True, "lengths", resets=True))
    problem.tensors["x"].nan_to_num_()

    def faulty(cell, x, h0, c0, weights, lengths, resets, *rest):  # type: ignore[no-untyped-def]
        if fault == "lengths":
            lengths = torch.full_like(lengths, x.shape[0])
        if fault == "resets":
            resets = None
        if fault == "hx":
            h0 = h0 * 0
        if fault == "direction":
            weights = [*weights[len(weights) // 2 :], *weights[: len(weights) // 2]]
        return layer(cell, x, h0, c0, weights, lengths, resets, *rest)

    with chosen(monkeypatch, design), pytest.raises(Mismatch):
        check_layer(faulty, problem)
