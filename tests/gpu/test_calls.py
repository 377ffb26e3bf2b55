"""One step on a GPU: cells and layers of T = 1, at the shapes that programs were seen to call."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import dispatch
from fastseq.backends.call import RnnCall
from tests.gpu.place import BACKEND, DTYPES, layer, there
from tests.oracle import Case, Problem, check_layer

SHAPES = [
    (0, 3, 5),
    (1, 1, 1),
    (1, 4, 256),
    (3, 5, 15),
    (8, 17, 16),
    (17, 33, 31),
    (40, 30, 140),
    (65, 64, 65),
]  # B, I, H


def cell(kind: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
    """As `oracle.plain`, by a cell, whose h is also the output."""
    x = x[:, 0] if rest[3] else x[0]
    state = there(tuple(None if s is None else s[0] for s in (h0, c0)))
    call = RnnCall(kind, there((x,))[0], *state, list(there(tuple(weights))), has_bias=len(weights) == 4)
    assert dispatch.obstacle(BACKEND, call) is None
    h, *c = (s.cpu() for s in dispatch.load(BACKEND).rnn_cell(call))
    out = h.to(x.dtype)
    return out[:, None] if rest[3] else out[None], h[None], c[0][None] if c else None


def cases() -> list[Case]:
    turns = itertools.cycle(itertools.product((True, False), repeat=3))
    every = itertools.product(SHAPES, DTYPES, ("lstm", "gru"))
    return [
        Case(kind, dtype, 1, *shape, hx=hx, bias=bias, batch_first=first)
        for (shape, dtype, kind), (hx, bias, first) in zip(every, turns, strict=False)
    ]


@pytest.mark.parametrize("way", [cell, layer], ids=["cell", "layer"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_one_step(case: Case, way: Any) -> None:
    check_layer(way, Problem.draw(case))


@pytest.mark.parametrize("way", [cell, layer], ids=["cell", "layer"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_fp32_state_beside_bf16(kind: str, way: Any) -> None:
    check_layer(way, Problem.draw(Case(kind, torch.bfloat16, 1, 8, 17, 40, state=torch.float32)))
