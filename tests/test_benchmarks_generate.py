"""The benchmark of searches: the loop finds what `generate` finds, and each shape is held to its promise."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import equality, peers, registry, results, summary, targets
from benchmarks.cases import GATES, Case, LayerCase
from benchmarks.decoder_cases import WIDTHS, CorpusCase, DecoderCase
from benchmarks.generate_cases import GenerateCase
from benchmarks.generate_loop import EOS
from benchmarks.generate_problem import GenerateProblem
from benchmarks.kinds import KINDS, draw
from benchmarks.option_cases import OptionCase
from benchmarks.peers import PEERS
from benchmarks.registry import SETS
from fastseq.cuda import devices
from tests.emulated import emulated

__all__ = ["emulated"]

CELLS = ("lstm", "gru")
SHAPES = ((1, 256, 20), (32, 128, 20), (32, 256, 30))  # B, H, S of the promises


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention", WIDTHS)
def test_searches_take_all_steps_and_agree(attention: str, cell: str, beams: int) -> None:
    case = GenerateCase(attention, cell, beams, 5, 12, 8, 16, 40)
    problem = draw(case)
    truth = equality.truth_of(problem)
    assert truth["out0"].shape == (case.B, case.T)
    assert not (truth["out0"] == EOS).any()
    for name in ("loop", *peers.OURS):
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
    for name in ("loop", *peers.OURS):
        equality.check(PEERS[name].build(problem), truth, case.dtype)


@pytest.mark.usefixtures("emulated")
def test_a_search_on_cuda_says_which_way_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, with the cost model's prediction, or a step at a time and why."""
    case = GenerateCase("luong", "lstm", 1, 5, 4, 3, 16, 40)
    program = KINDS["generate"].fastseq(draw(case), "cuda")
    assert re.fullmatch(r"one launch, predicted \d+\.\d\d us a step \((block|cluster|grid)\)", program.note)
    equality.check(program, equality.truth_of(draw(case)), case.dtype)
    assert KINDS["generate"].fastseq(draw(replace(case, beams=2)), "cuda").note == ""
    monkeypatch.setattr(devices, "EMULATED", replace(devices.EMULATED, units=2, clusters=()))
    large = KINDS["generate"].fastseq(draw(replace(case, V=20_000)), "cuda")
    assert large.note.startswith("step by step: the output's weights of 20000 tokens x 16 features")


CALLS: tuple[tuple[Case, str], ...] = (
    (LayerCase("lstm", "train", 3, 2, 4, 6), "(block) and NUMBER (block)"),
    (LayerCase("lstm", "forward", 1, 2, 4, 6, hx=True), "(one launch)"),
    (LayerCase("gru_cell", "train", 1, 2, 6, 6, hx=True), "(one launch) and NUMBER (block)"),
    (OptionCase("lstm", "train", 3, 2, 4, 6, option="zoneout"), "(block) and NUMBER (block)"),
    (DecoderCase("luong", "lstm", "forward", 4, 3, 2, 6), "(block)"),
    (DecoderCase("bahdanau", "lstm", "train", 4, 3, 2, 6), "(block) and NUMBER (block)"),
    (CorpusCase("luong", "lstm", "train", "multi30k", 6, 2, 3), "(block) and NUMBER (block), of the first batch"),
)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("case", "told"), CALLS, ids=lambda of: str(of) if isinstance(of, Case) else "")
def test_what_the_cost_model_predicts_stands_beside(case: Case, told: str) -> None:
    """Of every kind of call that runs on the CUDA kernels."""
    note = KINDS[case.kind].fastseq(draw(case), "cuda").note
    assert re.sub(r"\d+\.\d\d us a step", "NUMBER", note) == f"predicted NUMBER {told}"


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
    case = GenerateCase(attention, cell, beams, 7, 9, 3, 8, 100)
    program = PEERS["loop"].build(draw(case))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.step()
    assert counter.get_total_flops() == case.flops
    few, steps = replace(case, V=11), 3 * 9 * beams  # what each of 11 tokens is to the cell may be made beforehand
    fewer = (100 - 11) * steps * 2 * 8 + (steps - 11) * GATES[cell] * 2 * 8**2
    assert few.flops == case.flops - fewer


def test_every_promised_search_is_a_row() -> None:
    found = {e.case for e in SETS["generate"]}
    for beams, attention, cell, (b, h, s) in itertools.product((1, 5), WIDTHS, CELLS, SHAPES):
        case = GenerateCase(attention, cell, beams, s, 30, b, h, 1000)
        assert case in found
        assert targets.promised(a_row(case, 1, 1.0), results.Ratio("auto", "loop", 1.0, 1.0, 1.0)) is not None
    assert len(targets.SEARCH_TARGETS) == len(registry.BEAMS)


def test_searches_are_held_to_the_target_of_their_shape() -> None:
    def lines(vocabulary: int, threads: int, *ratios: float) -> Sequence[Sequence[str]]:
        rows = [
            a_row(GenerateCase("luong", "lstm", beams, s, 30, b, h, vocabulary), threads, ratio)
            for beams in (1, 5)
            for (b, h, s), ratio in zip(SHAPES, ratios, strict=True)
        ]
        table = summary.generate_table(results.Report({}, [], {}, rows), "auto")
        assert list(table.head[-3:]) == ["B=1 H=256 S=20 T=30", "B=32 H=128 S=20 T=30", "B=32 H=256 S=30 T=30"]
        return table.lines

    greedy, beam = lines(1000, 1, 6.1, 2.6, 1.9)
    assert greedy[:4] == ["Luong, input feeding, LSTM, greedy", "torch loop", "1000", "1"]
    assert greedy[4:] == ["6.10 (target 6)", "2.60 (target 3, missed)", "1.90 (target 2, missed)"]
    assert beam[0] == "Luong, input feeding, LSTM, beam 5"
    assert beam[4:] == ["6.10 (target 4)", "2.60 (target 2.5)", "1.90 (target 2, missed)"]
    for other in (lines(8000, 1, 1.0, 1.0, 1.0), lines(1000, 2, 1.0, 1.0, 1.0)):
        assert [line[4:] for line in other] == [["1.00"] * 3] * 2


def a_row(case: GenerateCase, threads: int, ratio: float) -> results.Row:
    timings = {name: results.Timing(name, 1.0, 1.0, 1.0, 1) for name in ("auto", "loop")}
    ratios = (results.Ratio("auto", "loop", ratio, ratio, ratio),)
    return results.Row("generate", case, threads, "time", timings, ratios, 1.0)
