"""benchmarks.toolkits: it measures what it says, and the committed table is that of the committed measurement."""

import json
from pathlib import Path

import pytest

from benchmarks import toolkits

RESULTS = Path(toolkits.__file__).parent / "results" / "toolkits"


def test_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every mode once, at sizes of a test; losses and tokens are compared in it."""
    for name, size in (("SIZE", 8), ("B", 4), ("S", 5), ("T", 6)):
        monkeypatch.setattr(toolkits, name, size)
    small = [toolkits.Case("train", "gru", 30, 0.2), toolkits.Case("search", "lstm", 30)]
    monkeypatch.setattr(toolkits, "CASES", [*small, toolkits.Case("generate", "gru", 30, attention="luong")])
    path = tmp_path / "toolkits.json"
    toolkits.main(["--rounds", "3", "--json", str(path)])
    rows = [toolkits.Row(**row) for row in json.loads(path.read_text())["rows"]]
    assert [row.case for row in rows] == [str(case) for case in toolkits.CASES]
    for row in rows:
        assert row.rounds == 3
        assert 0 < row.low <= row.ratio <= row.high
    assert capsys.readouterr().out.count("\n") == 5


def test_other_losses_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkits, "SIZE", 8)
    case = toolkits.Case("train", "gru", 30)
    stock, batch = toolkits.build(case), toolkits.draw(30)
    own, wrong = toolkits.losses, iter([0.0, 0.0, 1e-3])  # of float64, stock and accelerated
    monkeypatch.setattr(toolkits, "losses", lambda step: own(step) + next(wrong))
    with pytest.raises(AssertionError, match="losses"):
        toolkits.check(case, stock, batch)


def test_the_table_is_the_measurement() -> None:
    """`python -m benchmarks.toolkits --write-docs` of the newest file changes nothing."""
    newest = max(RESULTS.glob("*.json"))
    report, page = json.loads(newest.read_text()), toolkits.PAGE.read_text()
    assert {row["case"] for row in report["rows"]} == {str(case) for case in toolkits.CASES}
    assert toolkits.with_table(page, report) == page
