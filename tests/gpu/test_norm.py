"""Layer-normalised layers on a GPU against the fp64 oracle, in one program and on a grid."""

import itertools

import pytest
import torch

from tests.gpu.place import DTYPES, REHEARSES, layer, noisy_layer
from tests.norm_oracle import CELLS, NormProblem, check_norm
from tests.oracle import Case, run

SHAPES = [  # T, B, I, H
    (6, 5, 7, 20),
    (1, 3, 5, 16),
    (3, 17, 13, 64),  # the largest fp32 layer of one program
    (2, 33, 64, 65),
    (3, 9, 70, 128),  # the largest half-precision one
    (40, 1, 5, 130),
    (2, 40, 70, 260),
    (3, 20, 40, 1030),  # statistics of more parts than are joined at once
]
KINDS = (("full", False), ("lengths", True), ("packed", False), ("lengths", False), ("full", True))  # rows, resets
TURNS = itertools.cycle(itertools.product((True, False), repeat=3))


def cases() -> list[Case]:
    """Each shape with each cell and dtype; kinds of rows, of noise and the other options take turns."""
    found, rows = [], itertools.cycle(KINDS)
    noise = itertools.cycle(("both", "", "zoneout", "", "update", "mean", "state"))  # 7: all meet all
    for shape, cell, dtype in itertools.product(SHAPES, CELLS, DTYPES):
        (two, hx, bias), (kind, resets) = next(TURNS), next(rows)
        batch_first = hx and kind == "full"
        two, kept = two and shape[3] < 1000, next(noise)
        found.append(Case(cell, dtype, *shape, two, kind, hx, bias, batch_first, None, 1, resets, kept, hx or not kept))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_layer(case: Case) -> None:
    check_norm(noisy_layer if case.noise or case.states else layer, NormProblem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [20, 200, 768])
def test_the_same_bits_every_time(cell: str, H: int) -> None:
    problem = NormProblem.draw(Case(cell, torch.float32, 4, 33, 7, 20 if REHEARSES else H, True, "lengths"))
    first = run(layer, problem)
    for _ in range(3 if REHEARSES else 100):
        for name, t in run(layer, problem).items():
            assert torch.equal(t, first[name]), name
