"""Recurrent layers on a GPU against the fp64 oracle: options, corners, both kinds of kernels, TF32."""

import itertools

import pytest
import torch

import fastseq
from tests.gpu.place import BACKEND, DEVICE, DTYPES, layer, noisy_layer, there
from tests.oracle import CELLS, Case, Problem, cell_kinds, check_layer, check_second, plain, run

ROWS = ("full", "lengths", "packed")
KINDS = [*((rows, False) for rows in ROWS), ("full", True), ("lengths", True)]  # the second: resets
SHAPES = [  # T, B, I, H
    (6, 5, 7, 20),
    (1, 3, 5, 16),
    (4, 0, 3, 5),  # no rows
    (9, 2, 3, 15),  # odd H and I
    (3, 17, 13, 17),
    (4, 33, 31, 64),  # the largest fp32 layer of one program
    (2, 65, 64, 65),
    (3, 9, 70, 128),  # the largest half-precision one
    (2, 9, 70, 140),
    (70, 1, 5, 130),
    (2, 40, 258, 260),
]
TURNS = itertools.cycle(itertools.product((True, False), repeat=3))


def cases() -> list[Case]:
    """Each shape with each cell, dtype and kind of rows; the other options take turns."""
    found = []
    for shape, (cell, dtype), (rows, resets) in itertools.product(SHAPES, cell_kinds(DTYPES), KINDS):
        two, hx, bias = next(TURNS)
        if not (rows == "packed" and shape[1] == 0):  # torch packs no empty batch
            batch_first = hx and rows == "full"
            found.append(Case(cell, dtype, *shape, two, rows, hx, bias, batch_first, resets=resets))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_corner_shapes(case: Case) -> None:
    check_layer(layer, Problem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_state_beside_half_precision(cell: str, rows: str, dtype: torch.dtype) -> None:
    check_layer(layer, Problem.draw(Case(cell, dtype, bidirectional=True, rows=rows, state=torch.float32)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rows", ROWS)
def test_second_derivatives(cell: str, rows: str) -> None:
    check_second(layer, Problem.draw(Case(cell, T=3, B=2, I=3, H=4, rows=rows)))


def noisy_cases() -> list[Case]:
    """Each shape with each cell and dtype; kinds of noise, of rows and the other options take turns."""
    kinds, found = itertools.cycle(("both", "", "zoneout", "update", "mean", "state", "zoneout")), []  # 7: all meet all
    rows = itertools.cycle(KINDS)
    for shape, (cell, dtype), _ in itertools.product(SHAPES, cell_kinds(DTYPES), range(3)):
        (two, hx, bias), (kind, resets), noise = next(TURNS), next(rows), next(kinds)
        states = bias or not noise
        packs_none = kind == "packed" and shape[1] == 0
        has_it = cell == "lstm" or (noise and not (noise == "update" and cell.startswith("rnn")))
        if has_it and not packs_none:
            found.append(Case(cell, dtype, *shape, two, kind, hx, bias, resets=resets, noise=noise, states=states))
    return found


@pytest.mark.parametrize("case", noisy_cases(), ids=str)
def test_zoneout_dropout_and_every_cell_state(case: Case) -> None:
    check_layer(noisy_layer, Problem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [20, 200])
def test_the_same_bits_every_time(cell: str, H: int) -> None:
    problem = Problem.draw(Case(cell, B=33, H=H, bidirectional=True, rows="lengths"))
    first = run(layer, problem)
    for _ in range(3):
        for name, t in run(layer, problem).items():
            assert torch.equal(t, first[name]), name


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_stacks_with_dropout_and_states(kind: str) -> None:
    """Several layers, in both directions: what the reference gives with the same draws of dropout."""
    torch.manual_seed(1)
    module = getattr(fastseq, kind)(5, 12, 3, bidirectional=True, batch_first=True, dropout=0.4).to(DEVICE)
    x = torch.randn(4, 7, 5, device=DEVICE)
    results = []
    for backend in (BACKEND, "reference"):
        module.backend = backend
        torch.manual_seed(2)
        out, state = module(x, lengths=there(torch.tensor([7, 0, 3, 5])))
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        results.append([out, *(state if kind == "LSTM" else (state,)), *grads])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_lengths_may_come_from_the_host() -> None:
    """As a list or a CPU tensor, which are checked; the results are those of lengths on the device."""
    module, x = fastseq.GRU(5, 12, backend=BACKEND).to(DEVICE), torch.randn(6, 3, 5, device=DEVICE)
    expected = module(x, lengths=there(torch.tensor([2, 0, 6])))[0]
    for lengths in ([2, 0, 6], torch.tensor([2, 0, 6], dtype=torch.int32)):
        assert torch.equal(module(x, lengths=lengths)[0], expected)
    with pytest.raises(fastseq.InputError, match="outside"):
        module(x, lengths=[2, 0, 7])


@pytest.mark.parametrize("bad", [-3, 99])
def test_lengths_on_the_device_are_clamped(bad: int) -> None:
    """Nobody looked at them: what lies outside [0, T] counts as 0 or T, and nothing outside the input is read."""
    module = fastseq.LSTM(5, 12, backend=BACKEND).to(DEVICE)
    x = torch.randn(6, 3, 5, device=DEVICE)
    if DEVICE == "cpu":  # there they are looked at
        with pytest.raises(fastseq.InputError, match="outside"):
            module(x, lengths=torch.tensor([2, bad, 6]))
        return
    got = module(x, lengths=torch.tensor([2, bad, 6], device=DEVICE))[0]
    assert torch.equal(got, module(x, lengths=torch.tensor([2, min(max(bad, 0), 6), 6], device=DEVICE))[0])


def test_tf32_follows_torchs_flag() -> None:
    """Off, products of fp32 are fp32's; on, they may round to 10 bits, and no more."""
    problem = Problem.draw(Case("lstm", T=9, B=33, I=64, H=64))
    exact, full = run(plain, problem, torch.float64), run(layer, problem)
    torch.backends.cudnn.allow_tf32 = True
    rounded = run(layer, problem)
    for name, t in exact.items():
        scale = t.abs().max()
        assert (full[name] - t).abs().max() <= 1e-5 * scale, name
        assert (rounded[name] - t).abs().max() <= 2**-6 * scale, name
