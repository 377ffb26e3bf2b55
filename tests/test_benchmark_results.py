"""What a run comes to: its file, whether it is to be trusted, its tables, the README."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, readme, registry, results, roofline, runner, summary, tables, targets, timing, trust
from benchmarks.__main__ import main
from benchmarks.cases import Case, LayerCase
from benchmarks.decoder_cases import DecoderCase
from benchmarks.registry import SETS, Entry
from fastseq import _native

SMALL = LayerCase("lstm", "train", 5, 3, 4, 6)
SHORT = timing.Effort(seconds=0.0, least=2, most=2)
ENTRIES = list(dict.fromkeys(itertools.chain.from_iterable(SETS.values())))


def stored(report: results.Report, tmp_path: Path) -> results.Report:
    report.save(tmp_path / "stored.jsonl")
    return results.Report.load(tmp_path / "stored.jsonl")


def test_rows_survive_their_file(tmp_path: Path) -> None:
    entry = Entry("grid", SMALL, (("auto", "torch.nn"), ("cpu", "torch.nn")))
    run = runner.Runner(SHORT, {"auto", "cpu", "torch.nn"})
    row = run.row(entry, 1)
    assert row is not None
    assert [(r.ours, r.peer) for r in row.ratios] == [("auto", "torch.nn"), ("cpu", "torch.nn")]
    report = results.Report({"cpu": "x"}, [ceilings.Ceiling("float32", 1, 100.0, "x")], {"y": "z"}, [row])
    assert stored(report, tmp_path) == report
    learner = results.Learner("torch", 9.5, None, None, [2.0, 1.5], [[1.0, 2.0, 0.5]])
    recipe = results.Recipe("g2p", 1, 2, "loss 1.2", 1.2, [learner], 1e-6, 1e-4)
    timed = results.Report({}, [], {}, [], runner.summarize([1.0, 2.0], "import"), [recipe])
    assert stored(timed, tmp_path) == timed


def test_files_are_validated(tmp_path: Path) -> None:
    """By line and field; but of a run that was killed the last line may be cut short."""
    file, top = tmp_path / "run.jsonl", ceilings.Ceiling("float32", 1, 100.0, "x")
    results.Report({"cpu": "x"}, [top], {}, [a_row(SMALL, 1, 2.0, "torch.nn")]).save(file)
    lines = file.read_text().splitlines()

    def refused(number: int, old: str, new: str, match: str) -> None:
        assert old in lines[number]
        file.write_text("\n".join([*lines[:number], lines[number].replace(old, new), *lines[number + 1 :]]))
        with pytest.raises(ValueError, match=match):
            results.Report.load(file)

    refused(0, '"schema": 2', '"schema": 0', r"line 1: schema 0 of the results; this version reads 1 and 2")
    refused(1, '"value": 100.0', '"value": "fast"', r"run.jsonl, line 2: ceiling.value: 'fast' is no float")
    refused(2, '"threads": 1', '"threads": 1.5', r"line 3: row.threads: 1.5 is no int")
    refused(
        2, '"op": "lstm"', '"op": "lstm", "size": 1', r"line 3: row.case: its fields: unknown fields \['size'\] of a"
    )
    refused(2, '"T": 5', '"T": "five"', r"line 3: row.case: its fields.T: 'five' is no int")
    refused(2, '"op": "lstm"', '"op": "lstn"', r"line 3: row.case: no call: .*KeyError: 'lstn'")
    refused(2, '"measure": "time"', '"measure": "tim"', r"line 3: row.measure: 'tim'; expected time, cold, memory")
    refused(2, '"low"', '"lower"', r"row.ratios\[0\]: unknown fields \['lower'\] of a Ratio")
    refused(2, '"row"', '"line"', r"line 3: no record of a run: \['line'\]")
    refused(1, "{", "[", r"line 2: no JSON")
    file.write_text("\n".join([*lines[:2], lines[2][:20]]))
    assert results.Report.load(file).rows == []
    file.write_text("")
    with pytest.raises(ValueError, match="empty"):
        results.Report.load(file)


def test_a_row_that_is_measured_again_counts_once(tmp_path: Path) -> None:
    first, again = a_row(SMALL, 1, 2.0, "torch.nn"), a_row(SMALL, 1, 3.0, "torch.nn")
    assert stored(results.Report({}, [], {}, [first, again]), tmp_path).rows == [again]


def test_a_run_in_doubt_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that others disturbed, and one in which a contender was not as fast as itself."""
    calm = [a_row(replace(SMALL, B=b), 1, 2.0, "torch.nn") for b in range(1, 8)]
    noisy = [replace(calm[0], calm=0.1), replace(calm[1], calm=0.3, mixed=True)]
    itself, other = (a_row(SMALL, 1, ratio, "auto.again", "self") for ratio in (1.004, 1.02))
    (any_ratio,) = itself.ratios
    wide = replace(itself, ratios=(replace(any_ratio, low=0.8, high=1.1),))
    assert "which says little" in trust.doubts(results.Report({}, [], {}, [*calm, wide]))[0]
    assert trust.doubts(results.Report({}, [], {}, [*calm, itself])) == []
    slow = ceilings.Ceiling("float32", 1, replace(SMALL, B=1).flops / 1.2, "")  # a row takes a second
    assert "7 of 7 rows were faster" in trust.doubts(results.Report({}, [slow], {}, calm))[0]
    fast = replace(slow, value=SMALL.flops * 8)
    assert trust.doubts(results.Report({}, [fast], {}, calm)) == []
    file, page = tmp_path / "run.jsonl", tmp_path / "README.md"
    for rows, doubt in (([*noisy, *calm[2:]], "2 of 7 rows were disturbed"), ([*calm, other], "came out as 1.020")):
        results.Report({}, [], {}, rows).save(file)
        assert main(["report", str(file)]) == 4
        said = capsys.readouterr().out
        assert doubt in said
        assert "LSTM training over torch.nn" not in said
        assert main(["report", str(file), "--noisy"]) == 0
        assert "LSTM training over torch.nn" in capsys.readouterr().out
        page.write_text(f"{readme.BEGIN}\n{readme.END}")
        assert main(["report", str(file), "--readme", str(page)]) == 2
        assert doubt in capsys.readouterr().err


def test_bounds_by_hand() -> None:
    """Of 12 FLOP/s, 4 bytes/s from a cache of 100 bytes, 1 byte/s from memory; 8 bytes stay in registers."""
    sizes = ((8, 9.0), (100, 4.0), (ceilings.MEMORY, 1.0))
    loads = [ceilings.Ceiling("load", 1, rate, "", size=size) for size, rate in sizes]
    tops = [ceilings.Ceiling("float32", 1, 12.0, ""), ceilings.Ceiling("call", 1, 3.0, ""), *loads]
    case = LayerCase("gru", "forward", 2, 1, 1, 1)
    weights, recurrent = 3 * (1 + 1 + 2), 3
    assert case.forward_traffic == (4 * (weights + 2 * 2), 4 * recurrent, 1)
    assert roofline.bound(case, 1, tops) == ((64 - 8) / 4 + (12 - 8) / 4, "loads")
    assert roofline.bound(case, 1, tops, cold=True) == (64 + (12 - 8) / 4, "loads")
    assert roofline.bound(case, 1, [tops[0], replace(tops[1], value=30.0)]) == (30, "waiting")
    assert roofline.bound(case, 1, tops[:1]) == (case.flops / 12, "products")
    assert roofline.bound(case, 2, tops) is None
    assert roofline.bound(replace(case, mode="train"), 1, tops) == (2 * (56 / 4 + 4 / 4), "loads")
    assert roofline.bound(replace(case, T=1, hx=True), 1, tops) == ((4 * (weights + 2) - 8) / 4, "loads")
    assert roofline.bound(replace(case, T=1), 1, tops) == ((4 * (weights - recurrent + 2) - 8) / 4, "loads")
    stacked = replace(case, T=8, layers=3)  # 208 bytes once: 8 free, 100 from the cache, 100 from memory
    assert roofline.bound(stacked, 1, tops) == (100 / 4 + 100 + 3 * 7 * (12 - 8) / 4, "loads")
    assert roofline.intensity(case) == case.flops / (64 + 12)
    half = [ceilings.Ceiling("bfloat16", 1, 6.0, ""), *tops[:1]]
    assert roofline.bound(replace(case, dtype="bfloat16"), 1, half) == (case.flops / 12, "products")


def test_ceilings_are_measured() -> None:
    found = ceilings.measure(["float32"], 1)
    assert [c.what for c in found if c.what != "load"] == ["float32", "copy", "call"]
    assert [c.size for c in found if c.what == "load"] == ([*ceilings.caches(), ceilings.MEMORY] if _native.C else [])
    assert all(math.isfinite(c.value) and c.value > 0 for c in found)


def test_of_two_measurements_the_better_counts() -> None:
    rates = [ceilings.Ceiling("copy", 1, value, "") for value in (1.0, 3.0, 2.0)]
    waits = [ceilings.Ceiling("barrier", 2, value, "") for value in (3.0, 1.0, 2.0)]
    assert [c.value for c in ceilings.best_of([*rates, *waits])] == [3.0, 1.0]


def test_a_run_goes_on_where_it_was_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.jsonl"
    command = ["run", "--rows", "gru-forward-T50-B1-I64-H64", "--fast", "--peers", "cpu,torch.nn", "--out", str(file)]
    main([*command, "--noisy", "--threads", "1"])
    lines = file.read_text().splitlines()
    whole = [line for line in lines if "absent" not in line]
    file.write_text("\n".join([*whole, lines[-1][:9]]))  # in the middle of a line
    assert "cut short" in trust.doubts(results.Report.load(file))[0]
    (before,) = results.Report.load(file).rows
    capsys.readouterr()
    main([*command, "--noisy", "--threads", "1,2", "--resume"])
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["1/1"]
    first, second = results.Report.load(file).rows
    assert first == before
    assert second.threads == 2
    assert results.Report.load(file).ended
    changed = file.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"')
    file.write_text(changed)
    capsys.readouterr()
    assert main([*command, "--threads", "1", "--resume"]) == 2
    assert f"another run, with torch 1.0, now {torch.__version__}" in capsys.readouterr().err
    assert file.read_text() == changed


def a_row(case: Case, threads: int, ratio: float, peer: str, of: str = "grid") -> results.Row:
    timings = {name: results.Timing(name, 1.0, 1.0, 1.0, 1) for name in ("auto", peer)}
    return results.Row(of, case, threads, "time", timings, (results.Ratio("auto", peer, ratio, ratio, ratio),), 1.0)


def test_summary_holds_groups_to_their_targets() -> None:
    def line(*ratios: tuple[int, int, float]) -> Sequence[str]:
        rows = [a_row(replace(SMALL, B=b), threads, ratio, "torch.nn") for b, threads, ratio in ratios]
        return summary.group_table(results.Report({}, [], {}, rows), "auto").lines[0]

    numbers = ["3", "2.00, min 1.00", "2.00, min 2.00", "2.00, min 1.00"]
    assert line((1, 1, 4.0), (8, 1, 1.0), (1, 2, 2.0)) == ["LSTM training over torch.nn", *numbers, "1.3, min 0.97"]
    missed = line((1, 1, 4.0), (8, 1, 0.96))
    assert missed[2:] == ["1.96, min 0.96", "1.3, min 0.97 (missed: lstm-train-T5-B8-I4-H6 1t)"]
    assert line((1, 1, 1.1))[-1] == "1.3 (missed), min 0.97"


def test_decoders_are_held_to_the_target_of_their_shape() -> None:
    def cells(ceiling: float, *ratios: float) -> Sequence[str]:
        rows = [
            a_row(DecoderCase("bahdanau", "gru", "forward", s, s, b, h), 1, ratio, "loop", "decoder")
            for (b, h, s), ratio in zip(registry.DECODER_SHAPES, ratios, strict=True)
        ]
        tops = [ceilings.Ceiling("float32", 1, ceiling, "x")]
        return summary.decoder_table(results.Report({}, tops, {}, rows), "auto").lines[0]

    head = ["Bahdanau, GRU, forward", "torch loop", "full", "1"]
    met = ["5.10 (target 5)", "3.00 (target 3)", "2.19 (target 2.2, missed)", "1.80 (target 1.8)"]
    assert cells(1e18, 5.1, 3.0, 2.19, 1.8) == head + met
    last = DecoderCase("bahdanau", "gru", "forward", 30, 30, 64, 512)  # the peer takes a second
    bound = cells(1.8 * last.flops / 0.96, 5.1, 3.0, 2.2, 1.7)[-1]
    assert bound == "1.70 (target 1.8, missed, needs 96 % of the bound)"
    assert cells(1.8 * last.flops / 0.94, 5.1, 3.0, 2.2, 1.7)[-1] == "1.70 (target 1.8, missed)"
    row = a_row(last, 2, 1.0, "loop", "decoder")  # promised of one thread
    assert targets.promised(row, row.ratios[0]) is None


def test_every_promised_shape_is_a_row() -> None:
    found = {
        (case.attention, case.cell, case.mode, (case.B, case.H, case.T), case.rows)
        for case in (e.case for e in SETS["decoder"])
        if isinstance(case, DecoderCase)
    }
    for (attention, mode), shape in itertools.product(targets.DECODER_TARGETS, registry.DECODER_SHAPES):
        masks = ("full",) if shape[0] == 1 else ("full", "lengths")
        for cell, rows in itertools.product(("lstm", "gru"), masks):
            assert (attention, cell, mode, shape, rows) in found


def test_every_target_is_a_group() -> None:
    groups = set()
    for entry in ENTRIES:
        row = results.Row(entry.set, entry.case, 1, entry.measure, {}, (), 1.0)
        groups |= {targets.group(row, results.Ratio(ours, peer, 1.0, 1.0, 1.0)) for ours, peer in entry.pairs}
    assert targets.TARGETS.keys() <= groups


def test_tables_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tables, "rich", None)
    tables.print_table(tables.Table("title", ("a", "b"), [["x", "1.00"], ["long", "2.0"]]))
    assert capsys.readouterr().out == "\ntitle\na        b\nx     1.00\nlong   2.0\n"


def test_peers_that_compare_nothing_end_the_run() -> None:
    """Rather than printing an empty table."""
    with pytest.raises(SystemExit, match="one of auto, cpu and one of loop"):
        main(["run", "--set", "decoder", "--peers", "loop"])
    with pytest.raises(SystemExit, match="of other sets: decoder"):
        main(["run", "--rows", "luong-gru-forward*B1-"])


def test_command_line_lists_and_reports(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    main(["list", "--set", "calls", "--rows", "gru_cell*B16"])
    assert capsys.readouterr().out.split() == [
        "calls", "gru_cell-forward-T1-B16-I80-H64-hx", "calls", "gru_cell-train-T1-B16-I80-H64-hx",
    ]  # fmt: skip
    file = tmp_path / "run.jsonl"
    results.Report({"cpu": "some CPU"}, [], {"peer": "not installed"}).save(file)
    main(["report", str(file)])
    out = capsys.readouterr().out
    assert "some CPU" in out
    assert "left out: peer: not installed" in out


def test_reports_of_earlier_versions_are_read(tmp_path: Path) -> None:
    folder = Path(registry.__file__).parent / "results"
    files = [*folder.glob("*.json"), *folder.glob("*.jsonl")]
    assert files
    for file in files:
        report = results.Report.load(file)
        assert report.rows
        if '"kind"' not in file.read_text():  # as long as there were layers alone
            assert all(isinstance(row.case, LayerCase) for row in report.rows)
        assert replace(stored(report, tmp_path), schema=report.schema) == report


def test_readme_is_written_between_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        a_row(SMALL, 1, 4.0, "torch.nn"),
        a_row(DecoderCase("luong", "lstm", "train", 20, 20, 1, 256), 1, 7.0, "loop", "decoder"),
    ]
    where = {
        "cpu": "some CPU",
        "isa": "avx2",
        "torch": "2",
        "onnxruntime": "1",
        "date": "2026-01-02T03",
        "command": "c",
    }
    file, page = tmp_path / "run.jsonl", tmp_path / "README.md"
    results.Report(where, [], {}, rows).save(file)
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    for _ in range(2):  # writing it again changes nothing
        main(["report", str(file), "--summary", "--readme", str(page)])
    written = page.read_text()
    assert written.startswith(f"before\n{readme.BEGIN}\nsome CPU, `avx2`")
    assert written.endswith(f"\n{readme.END}\nafter\n")
    assert "old" not in written
    assert "| LSTM training over torch.nn | 1 | 4.00, min 4.00 | 1.3, min 0.97 |\n" in written
    assert "| Luong, input feeding, LSTM, training | torch loop | full | 1 | 7.00 (target 6) |\n" in written
    capsys.readouterr()
    page.write_text(f"{readme.END} {readme.BEGIN}")
    assert main(["report", str(file), "--readme", str(page)]) == 2
    assert "in this order" in capsys.readouterr().err


def test_readme_of_the_project_has_the_markers() -> None:
    text = (Path(registry.__file__).parents[1] / "README.md").read_text()
    assert text.count(readme.BEGIN) == text.count(readme.END) == 1


def test_full_is_every_set() -> None:
    apart = {"quick", "readme", "import", "recipes", "full", *(name for name in SETS if name.endswith("-large"))}
    assert {e.set for e in SETS["full"]} == {"grid", *SETS.keys() - apart}
