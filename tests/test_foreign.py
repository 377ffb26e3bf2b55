"""benchmarks/foreign: how a program's sides are held to each other, and that the docs show what was measured.

The programs themselves run in a virtual environment of their own: make foreign.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.foreign import __main__ as command
from benchmarks.foreign import child, docs, measure, packages, results
from benchmarks.foreign.program import Convert, Learned, Program


@pytest.fixture(scope="module")
def report() -> results.Report:
    return results.Report.from_json(results.newest().read_text())


class Own(nn.GRU):
    """A package's subclass: accelerate leaves it alone, patch serves it."""


def _build(convert: Convert) -> nn.Module:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "gru": Own(4, 5)})
    convert(model)
    return model


def _run(model: nn.Module) -> Learned:
    """Two updates."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(2):
        loss = model["gru"](model["lstm"](torch.randn(6, 2, 3))[0])[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Learned(losses, [p.detach() for p in model.parameters()])


@pytest.mark.parametrize(("way", "served"), [("patch", 2), ("accelerate", 1)])
def test_a_side_runs_as_asked(way: str, served: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives both sides the same data and weights; what ran is counted, and only where it is asked for."""
    pytest.importorskip("numpy")
    program = Program("torch", "a toy", way, _build, _run)
    learned = {}
    for side in ("stock", "fastseq"):
        path = tmp_path / side
        calls, ran = child.Counter(), child.Counter()
        with child.counted(calls, ran):
            answer = child.once(program, side == "fastseq", str(path))
        learned[side] = torch.load(path)
        assert answer["losses"] == learned[side][0].tolist()
        assert ran.total() == (2 * served if side == "fastseq" else 0)
        assert calls == {"LSTM 3 -> 4, [6, 2, 3]": 2, "GRU 4 -> 5, [6, 2, 4]": 2}
    # 8 sums of at most 6 steps and 2 rows, each of numbers below 1
    for a, b in zip(learned["stock"], learned["fastseq"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2**-23)


def test_a_deviation_above_stocks_own_is_a_fault() -> None:
    """Twice stock's own deviation is allowed, and one rounding; NaN and another shape are not."""
    stock = [torch.tensor([2.0, 1.0], dtype=torch.float64), torch.ones(4)]
    older = [[stock[0] + 0.002, stock[1] * 1.01]]
    near = [stock[0] + 0.003, stock[1] * 1.015]
    found = measure.deviation("toy", stock, near, older)
    assert found.losses == pytest.approx(0.0015)
    assert found.losses_budget == pytest.approx(0.002, rel=1e-3)
    assert found.tensors_budget == pytest.approx(0.02, rel=1e-3)
    far = [stock[0] + 0.005, stock[1]], [stock[0], stock[1] * 1.03], [stock[0] * torch.nan, stock[1]]
    for learned in (*far, [stock[0], stock[1][:3]]):
        with pytest.raises(measure.Fault, match="toy: fastseq differs from stock by more than the budget"):
            measure.deviation("toy", stock, learned, older)


class Replayed:
    """A side that answers what it is told to."""

    def __init__(self, *answers: tuple[float, float]) -> None:
        self.answers = list(answers)

    def run(self) -> dict:
        seconds, loss = self.answers.pop(0)
        return {"seconds": seconds, "losses": [loss]}


def test_sides_take_turns_and_must_repeat_themselves() -> None:
    stock, ours = Replayed((2.0, 0.5), (4.0, 0.5)), Replayed((1.0, 0.5), (2.0, 0.5))
    assert measure.in_turns("toy", stock, ours, 2) == ([2.0, 4.0], [1.0, 2.0])
    with pytest.raises(measure.Fault, match=r"toy: the same seed gave other losses: \[0.5\], then \[0.25\]"):
        measure.in_turns("toy", Replayed((1.0, 0.5), (1.0, 0.5)), Replayed((1.0, 0.5), (1.0, 0.25)), 2)


def test_a_fault_ends_its_program_alone(
    report: results.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str, python: Path, rounds: int) -> results.Row:
        if name == "deepar":
            raise measure.Fault("deepar: the same seed gave other losses")
        return replace(report.rows[0], name=name, rounds=rounds)

    monkeypatch.setattr(command, "measure", measured)
    path = tmp_path / "out.json"
    arguments = ["--python", sys.executable, "--rounds", "7", "--json", str(path), "--only"]
    monkeypatch.setattr(sys, "argv", ["foreign", *arguments, "deepar", "--only", "tagging"])
    assert command.main() == 1
    (row,) = results.Report.from_json(path.read_text()).rows
    assert (row.name, row.rounds) == ("tagging", 7)
    assert "deepar: the same seed gave other losses" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["foreign", *arguments, "forecasting-gru"])
    assert command.main() == 0
    rows = results.Report.from_json(path.read_text()).rows
    assert [row.name for row in rows] == ["forecasting-gru", "tagging"]  # what was there stays


def test_the_kept_results_have_every_program(report: results.Report) -> None:
    assert [row.name for row in report.rows] == list(packages.PROGRAMS)
    for row in report.rows:
        assert row.deviation.within, row.name
        assert row.ran.keys() == {"cpu"}, row.name
        assert row.ratio.q20 <= row.ratio.median <= row.ratio.q80
        assert row.rounds >= 5
    assert results.Report.from_json(report.to_json()) == report


def test_the_requirements_are_those_measured(report: results.Report) -> None:
    lines = (Path(packages.__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {row.distribution: row.version for row in report.rows}.items() <= pinned.items()


def test_the_docs_show_the_newest_results(report: results.Report, tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(docs.PAGE.read_text())
    docs.write(report, copy)
    assert copy.read_text() == docs.PAGE.read_text(), "python -m benchmarks.foreign --write-docs"
    row = replace(report.rows[0], ratio=results.Spread(1.234, 1.1, 1.3))
    assert "**1.23** (1.10 to 1.30)" in docs.line(row)


def test_a_page_without_markers_is_refused(report: results.Report, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- foreign:end -->\n<!-- foreign:begin -->\n")
    with pytest.raises(ValueError, match=r"page.md needs one <!-- foreign:begin --> and, behind it, one"):
        docs.write(report, page)
    with pytest.raises(ValueError, match="schema 0 of the results; this version reads 1"):
        results.Report.from_json('{"schema": 0}')
