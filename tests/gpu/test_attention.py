"""Attention of all queries at once on a GPU against the fp64 loops."""

from typing import Any

import pytest
import torch

from tests.decoder_oracle import AttentionCase, Problem, check, check_second, run
from tests.gpu.place import DTYPES, step
from tests.test_decoder import OPTIONS

scores = pytest.mark.parametrize("score", ["additive", "dot", "bare", "projected"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES: list[dict[str, Any]] = [
    {},
    {"N": 8, "B": 4, "S": 30, "T": 30, "A": 64, "D": 64},
    {"N": 3, "B": 3, "S": 70, "T": 3, "A": 5, "D": 130},
    {"N": 5, "B": 1, "S": 16, "T": 17, "A": 33, "D": 16},
    {"N": 2, "B": 2, "S": 130, "T": 2, "A": 100, "D": 300},
]


@scores
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_dtypes_and_shapes(score: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    if score in ("dot", "bare"):
        shape = shape | {"Q": 32}
    check(step, AttentionCase(score, dtype=dtype, **shape))


@pytest.mark.parametrize("score", ["additive", "dot"])
@pytest.mark.parametrize(
    "options", ["no mask", "lengths", "no weights", "one row", "five beams", "one step", "no source"]
)
def test_options(score: str, options: str) -> None:
    changes = {k: v for k, v in OPTIONS[options].items() if k in AttentionCase.__dataclass_fields__}
    check(step, AttentionCase(score, **changes))


def test_second_derivatives() -> None:
    check_second(step, AttentionCase())


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_the_same_bits_every_time(score: str) -> None:
    """Sums over rows, steps and units have one order."""
    problem = Problem.draw(AttentionCase(score, N=18, B=9, T=33, S=40))
    first = run(step, problem)
    for _ in range(3):
        for key, t in run(step, problem).items():
            assert torch.equal(t, first[key]), key
