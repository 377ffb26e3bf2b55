"""The benchmark of searches: the loop finds what `generate` finds."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import equality, registry
from benchmarks.decoder_cases import WIDTHS
from benchmarks.generate_cases import GenerateCase
from benchmarks.generate_loop import EOS
from benchmarks.generate_problem import GenerateProblem
from benchmarks.kinds import draw
from benchmarks.registry import PEERS

CELLS = ("lstm", "gru")


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention", WIDTHS)
def test_searches_take_all_steps_and_agree(attention: str, cell: str, beams: int) -> None:
    case = GenerateCase(attention, cell, beams, 5, 12, 8, 16, 40)
    problem = draw(case)
    truth = equality.truth_of(problem)
    assert truth["out0"].shape == (case.B, case.T)
    assert not (truth["out0"] == EOS).any()
    for name in ("loop", *registry.OURS):
        equality.check(PEERS[name].build(problem), truth, case.dtype)


@pytest.mark.parametrize("eos", [2.0, 4.0, 8.0])  # its bias: rows end now and then, or most of them at once
@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention", WIDTHS)
def test_the_loop_ends_rows_as_fastseq_does(attention: str, cell: str, beams: int, eos: float) -> None:
    case = GenerateCase(attention, cell, beams, 5, 20, 16, 16, 12)
    problem = draw(case)
    assert isinstance(problem, GenerateProblem)
    problem.weights["output.bias"][EOS] = eos
    truth = equality.truth_of(problem)
    ended = (truth["out0"] == EOS).any(1)
    assert eos < 4 or ended.any()
    assert eos > 4 or not ended.all()
    for name in ("loop", *registry.OURS):
        equality.check(PEERS[name].build(problem), truth, case.dtype)


def test_another_token_is_unequal_however_large_its_number() -> None:
    problem = draw(GenerateCase("luong", "gru", 1, 4, 5, 3, 6, 20_000))
    truth, good = equality.truth_of(problem), PEERS["loop"].build(problem)
    tokens = truth["out0"]
    bad = replace(good, results=lambda: truth | {"out0": tokens - (tokens == tokens.max()).long()})
    equality.check(good, truth, "float32")
    with pytest.raises(equality.Unequal, match="out0 errs by 1, allowed 0"):
        equality.check(bad, truth, "float32")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention", WIDTHS)
def test_flops_are_those_that_torch_counts(attention: str, cell: str, beams: int) -> None:
    case = GenerateCase(attention, cell, beams, 7, 9, 3, 8, 11)
    program = PEERS["loop"].build(draw(case))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.step()
    assert counter.get_total_flops() == case.flops
