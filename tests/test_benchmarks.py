"""The benchmarks' own arithmetic, and that no contender is timed before it was found equal."""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    calm,
    ceilings,
    equality,
    processes,
    programs,
    registry,
    results,
    runner,
    stats,
    tables,
    targets,
    timing,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.problem import Problem
from benchmarks.registry import OPT_IN, PEERS, SETS, Entry
from benchmarks.report import summary_table

SMALL = Case("lstm", "train", 5, 3, 4, 6)
SHORT = timing.Effort(seconds=0.0, least=2, most=2)
ENTRIES = list(dict.fromkeys(itertools.chain.from_iterable(SETS.values())))
RUNNABLE = [name for name, peer in PEERS.items() if name not in OPT_IN and peer.unavailable() is None]


def small(case: Case) -> Case:
    """The same kind of call, of few numbers."""
    return replace(case, T=min(case.T, 5), B=min(case.B, 3), I=min(case.I, 4), H=6)


KINDS = sorted({small(e.case) for e in ENTRIES}, key=str)


def test_quantiles() -> None:
    values = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert stats.median(values) == 3
    assert stats.quantile(values, 0.2) == pytest.approx(1.8)
    assert stats.quantile(values, 1) == 5
    assert stats.quantile([7.0], 0.2) == 7
    assert stats.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4)


def test_bootstrap_covers_the_median() -> None:
    g = torch.Generator().manual_seed(1)
    hits = 0
    for seed in range(200):
        low, high = stats.bootstrap(torch.randn(31, generator=g).tolist(), seed=seed)
        hits += low <= 0 <= high
    assert 0.9 <= hits / 200 <= 0.99  # 95 % promised
    assert stats.bootstrap([2.0, 2.0, 2.0]) == (2, 2)


def test_flops_by_hand() -> None:
    case = Case("lstm", "forward", 10, 3, 5, 7)
    assert case.flops == 2 * 10 * 3 * 4 * 7 * (5 + 7)
    assert replace(case, mode="train").flops == 3 * case.flops
    assert replace(case, op="gru", bidirectional=True, layers=2).flops == 2 * 30 * 3 * 2 * 7 * ((5 + 7) + (14 + 7))
    ragged = replace(case, rows="lengths")
    assert ragged.lengths is not None
    assert ragged.flops * 30 == case.flops * sum(ragged.lengths)


@pytest.mark.parametrize("batch", [1, 2, 8, 64])
def test_lengths_go_from_a_quarter_to_all(batch: int) -> None:
    lengths = Case("gru", "forward", 50, batch, 4, 4, rows="packed").lengths
    assert lengths is not None
    assert max(lengths) == 50
    assert batch == 1 or min(lengths) == 12


def test_names_are_unique() -> None:
    for name, entries in SETS.items():
        assert len({str(e.case) for e in entries}) == len(entries) or name == "full"


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_every_kind_of_case_builds_and_is_equal(case: Case) -> None:
    problem = Problem.draw(case)
    truth = equality.truth_of(problem)
    for name in RUNNABLE:
        peer = PEERS[name]
        if peer.refuses(case) is None and peer.form(case) == case:
            equality.check(peer.build(problem), truth, case.dtype)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rows", ["full", "lengths"])
@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_onnx_runtime_is_given_the_same_weights(op: str, rows: str, bidirectional: bool) -> None:
    if "onnxruntime" not in RUNNABLE:
        pytest.skip(str(PEERS["onnxruntime"].unavailable()))
    case = Case(op, "forward", 5, 3, 4, 6, bidirectional=bidirectional, rows=rows, hx=True)
    problem = Problem.draw(case)
    equality.check(PEERS["onnxruntime"].build(problem), equality.truth_of(problem), case.dtype)


def test_torch_says_why_onnx_runtime_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install onnx onnxruntime" in str(PEERS["onnxruntime"].unavailable())


@pytest.mark.parametrize("name", ["out0", "out1", "d_x", "d_weight_hh_l0"])
@pytest.mark.parametrize("fault", [lambda t: t * 1.001, lambda t: t * math.nan, lambda t: t[..., :1]])
def test_planted_fault_is_caught(name: str, fault) -> None:  # type: ignore[no-untyped-def]
    problem = Problem.draw(SMALL)
    truth, good = equality.truth_of(problem), programs.torch_program(problem)
    bad = replace(good, results=lambda: {n: fault(t) if n == name else t for n, t in good.results().items()})
    equality.check(good, truth, "float32")
    with pytest.raises(equality.Unequal, match=name):
        equality.check(bad, truth, "float32")
    with pytest.raises(equality.Unequal, match="gives"):
        equality.check(replace(good, results=dict), truth, "float32")


def test_nothing_unequal_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Problem) -> programs.Program:
        def step() -> None:
            raise AssertionError("timed")

        good = programs.torch_program(problem)
        return replace(good, step=step, results=lambda: {n: t * 1.001 for n, t in good.results().items()})

    monkeypatch.setitem(registry.PEERS, "wrong", registry.Peer(wrong, "wrong"))
    entry = Entry("grid", SMALL, (("auto", "wrong"),))
    with pytest.raises(equality.Unequal):
        runner.Runner(SHORT, {"auto", "wrong"}).row(entry, 1)


def test_interleave_takes_turns_and_counts_calls() -> None:
    now, log = 0, []

    def program(name: str, cost_ns: int) -> programs.Program:
        def step() -> None:
            nonlocal now
            now += cost_ns
            log.append(name)

        return programs.Program(step, dict, False, name)

    runnables = {
        "quick": timing.Runnable(program("quick", 10_000), 1),
        "slow": timing.Runnable(program("slow", 30_000_000), 1),
    }
    taken = timing.interleave(runnables, timing.Effort(1.0, 3, 4), lambda threads: True, lambda: now)
    assert taken.calm == 1
    assert taken.values == {"quick": pytest.approx([1e-5] * 4), "slow": pytest.approx([0.03] * 4)}
    turns = [name for name, _ in itertools.groupby(log)]
    assert turns == ["quick", "slow", "quick", "slow", "quick", "slow", "quick"]  # the order turns round each time
    assert log.count("quick") > 400  # 100 calls last a millisecond


@pytest.mark.parametrize("disturbed", [0, 4, 1000])  # of the first samples
def test_disturbed_rounds_do_not_count(disturbed: int) -> None:
    now, done = 0, 0

    def step() -> None:
        nonlocal now, done
        done += 1
        now += 200_000_000 if done <= disturbed else 100_000_000

    runnable = timing.Runnable(programs.Program(step, dict, False, "x"), 1)
    effort = timing.Effort(seconds=0.5, least=3, most=10, patience=3.0)
    taken = timing.interleave({"x": runnable}, effort, lambda threads: done >= disturbed, lambda: now)
    if disturbed == 1000:  # never calm: it waits, then takes what there is
        assert taken.calm == 0
        assert taken.values["x"] == pytest.approx([0.2] * 8)
    else:
        assert taken.values["x"] == pytest.approx([0.1] * len(taken.values["x"]))
        assert len(taken.values["x"]) >= 3


def test_watch_knows_a_slow_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    took = 20_000
    monkeypatch.setattr(calm, "_loop_ns", lambda: took)
    watch = calm.Watch(tmp_path / "made" / "calm.json")
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    for threads in (1, os.cpu_count() or 1):
        took = 20_000
        assert watch.calm(threads)
        took = 33_000
        assert not watch.calm(threads)
    assert before is None or os.sched_getaffinity(0) == before
    watch.save()
    assert not calm.Watch(tmp_path / "made" / "calm.json").calm(1)
    assert calm.Watch().calm(1)


def test_rows_survive_json_and_make_a_summary() -> None:
    entry = Entry("grid", SMALL, (("auto", "torch.nn"), ("cpu", "torch.nn")))
    run = runner.Runner(SHORT, {"auto", "cpu", "torch.nn"})
    row = run.row(entry, 1)
    assert row is not None
    assert [(r.ours, r.peer) for r in row.ratios] == [("auto", "torch.nn"), ("cpu", "torch.nn")]
    report = results.Report({"cpu": "x"}, [ceilings.Ceiling("float32", 1, 100.0, "x")], {"y": "z"}, [row])
    assert results.Report.from_json(report.to_json()) == report
    timed = results.Report({}, [], {}, [], runner.summarize([1.0, 2.0], "import"))
    assert results.Report.from_json(timed.to_json()) == timed
    with pytest.raises(ValueError, match="schema 0"):
        results.Report.from_json(json.dumps(json.loads(report.to_json()) | {"schema": 0}))


def test_summary_holds_groups_to_their_targets() -> None:
    def row(batch: int, threads: int, ratio: float) -> results.Row:
        timings = {"auto": results.Timing("cpu", 1.0, 1.0, 1.0, 1)}
        ratios = (results.Ratio("auto", "torch.nn", ratio, ratio, ratio),)
        return results.Row("grid", replace(SMALL, B=batch), threads, "time", timings, ratios, 1.0)

    line = summary_table([row(1, 1, 4.0), row(8, 1, 1.0), row(1, 2, 2.0)], "auto").lines[0]
    numbers = ["3", "2.00", "1.00", "2.00", "2.00", "2.00", "1.00"]
    assert line == ["LSTM training over torch.nn", *numbers, "mean 1.30, min 0.97", "kept"]
    line = summary_table([row(1, 1, 4.0), row(8, 1, 0.96)], "auto").lines[0]
    assert line[-1] == "MISSED"


def test_every_target_is_a_group() -> None:
    groups = set()
    for entry in ENTRIES:
        row = results.Row(entry.set, entry.case, 1, entry.measure, {}, (), 1.0)
        groups |= {targets.group(row, results.Ratio(ours, peer, 1.0, 1.0, 1.0)) for ours, peer in entry.pairs}
    assert targets.TARGETS.keys() <= groups


def test_time_of_a_peer_is_scaled_where_the_registry_says_so() -> None:
    case = replace(SMALL, rows="lengths")
    assert PEERS["auto.full"].scale(case) == case.tokens / (case.T * case.B)
    assert PEERS["auto.full"].form(case) == SMALL


def test_tables_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tables, "rich", None)
    tables.print_table(tables.Table("title", ("a", "b"), [["x", "1.00"], ["long", "2.0"]]))
    assert capsys.readouterr().out == "\ntitle\na        b\nx     1.00\nlong   2.0\n"


def test_peak_memory_counts_what_a_call_keeps() -> None:
    if processes.memory_unavailable():
        pytest.skip(str(processes.memory_unavailable()))
    case = Case("lstm", "train", 50, 32, 64, 256)
    least = 4 * case.T * case.B * case.H * 4  # the gates of every step
    assert processes.peak_bytes(case, "torch.nn", 1) > least


def test_command_line_lists_and_reports(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    main(["list", "--set", "calls", "--rows", "gru_cell*B16"])
    assert capsys.readouterr().out.split() == [
        "calls", "gru_cell-forward-T1-B16-I80-H64-hx", "calls", "gru_cell-train-T1-B16-I80-H64-hx",
    ]  # fmt: skip
    file = tmp_path / "run.json"
    file.write_text(results.Report({"cpu": "some CPU"}, [], {"peer": "not installed"}).to_json())
    main(["report", str(file)])
    out = capsys.readouterr().out
    assert "some CPU" in out
    assert "left out: peer: not installed" in out
