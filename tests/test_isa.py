"""Every ISA variant of the kernels that this CPU can run, chosen in this process, against the same oracle."""

import pytest
import torch

from fastseq import _native
from tests.isa import VARIANTS, choose
from tests.oracle import Case, Problem, cell_kinds, check_layer, run

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.ops.rnn import rnn_layer

CASES = [
    Case(cell, dtype, *shape, bidirectional=True, rows=rows, threads=threads, resets=resets)
    for cell, dtype in cell_kinds((torch.float32, torch.bfloat16))
    for shape, rows, threads, resets in (
        ((5, 9, 13, 17), "lengths", 1, False),
        ((3, 20, 33, 65), "packed", 2, False),
        ((1, 3, 5, 31), "full", 1, False),
        ((5, 1, 200, 201), "full", 2, False),  # weights read where they stand
        ((5, 3, 201, 20), "lengths", 1, False),
        ((5, 9, 13, 35), "lengths", 2, True),
        ((5, 1, 200, 201), "full", 1, True),
        ((5, 56, 13, 516), "full", 1, False),  # tile registers by pairs, more than one large chunk
    )
]


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_variant_is_right(isa: str, case: Case) -> None:
    """What a slower CPU would run is tested on a faster one."""
    choose(isa)
    check_layer(rnn_layer, Problem.draw(case))


@pytest.mark.parametrize("isa", VARIANTS)
def test_variant_is_deterministic(isa: str) -> None:
    """The same bits twice, by two threads."""
    choose(isa)
    torch.set_num_threads(2)
    problem = Problem.draw(Case("gru", torch.bfloat16, 7, 33, 20, 70, bidirectional=True))
    first, again = run(rnn_layer, problem), run(rnn_layer, problem)
    for name, t in first.items():
        assert torch.equal(again[name], t), name


def test_unknown_variant_is_refused() -> None:
    """With the names of those that would do, and without losing the present one. FASTSEQ_ISA itself: test_import."""
    before = _native.C.isa()
    with pytest.raises(ValueError, match=rf"sse9 is not available here; choose one of: .*{before}"):
        _native.C.choose_isa("sse9")
    assert _native.C.isa() == before
