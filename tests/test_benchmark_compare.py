"""`python -m benchmarks compare`: what became slower is told, and nothing else."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare, programs, results, timing
from benchmarks.__main__ import main
from benchmarks.results import Report, Row
from tests.benchmark_reports import DECODER, LAYER, TOPS, WHERE, noisy, row_of

SLOWER = 1.2


def report(*rows: Row) -> Report:
    return Report(WHERE, TOPS, {}, list(rows))


def a_run(seed: int, slower: float = 1.0) -> Row:
    """On a machine whose speed drifts by 20 % from run to run, and each contender's by 1 % more."""
    rng = random.Random(seed)
    machine = math.exp(rng.gauss(0, 0.2))
    own, peers = (machine * math.exp(rng.gauss(0, 0.01)) for _ in range(2))
    return row_of("grid", LAYER, {"auto": noisy(rng, 1e-3 * own * slower), "torch.nn": noisy(rng, 2e-3 * peers)})


def said(tmp_path: Path, before: Report, after: Report, *options: str) -> int:
    """The exit status for two files of these."""
    files = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    before.save(files[0])
    after.save(files[1])
    return main(["compare", *map(str, files), *options])


def test_a_slowdown_is_told_from_noise() -> None:
    """One by 20 % in all of 200 pairs of runs, and in none without. Of 2,500: in all, and in one; by 10 % in 58 %."""
    pairs = [(report(a_run(2 * seed)), a_run(2 * seed + 1), a_run(2 * seed + 1, SLOWER)) for seed in range(200)]
    false = sum(bool(compare.compare(before, report(same)).worse) for before, same, _ in pairs)
    found = sum(bool(compare.compare(before, report(worse)).worse) for before, _, worse in pairs)
    assert (false, found) == (0, 200)


def clocked(slower: float) -> Report:
    """Two contenders under a clock of their own, which each unit of work moves on; ours wrapped to do more of it."""
    now, rng = [0], random.Random(int(slower * 100))

    def program(name: str, units: int) -> timing.Runnable:
        return timing.Runnable(programs.Program(lambda: work(units), dict, False, name), 1)

    def work(units: float) -> None:
        now[0] += round(units * 20_000 * math.exp(rng.gauss(0, 0.02)))

    def wrapped(step: Callable[[], object], units: float) -> Callable[[], object]:
        return lambda: (step(), work(units * (slower - 1)))

    mine = program("cpu", 100)
    mine = replace(mine, program=replace(mine.program, step=wrapped(mine.program.step, 100)))
    runnables = {"auto": mine, "torch.nn": program("torch.nn", 150)}
    taken = timing.interleave(runnables, timing.Effort(), lambda threads: True, lambda: now[0])
    return report(row_of("grid", LAYER, taken.values, calm=taken.calm))


def test_a_contender_that_does_a_fifth_more_is_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(tmp_path, clocked(1.0), clocked(1.0)) == 0
    assert "1 ratios compared: by more than 5% 0 are worse and 0 better; 0 vary" in capsys.readouterr().out
    assert said(tmp_path, clocked(1.0), clocked(SLOWER)) == 1
    out = capsys.readouterr().out
    assert "worse: the ratio's whole interval" in out
    (line,) = (line for line in out.splitlines() if line.startswith(" grid lstm-train-T50-B8-I64-H64 1t"))
    assert "-16." in line
    assert "x 1.20" in line
    assert "x 1.00" in line
    assert said(tmp_path, clocked(SLOWER), clocked(1.0)) == 0
    assert "better: the ratio's whole interval" in capsys.readouterr().out
    assert said(tmp_path, clocked(1.0), clocked(SLOWER), "--tolerance", "0.25") == 0


def change(before: tuple[float, float, float], after: tuple[float, float, float]) -> compare.Change:
    pair = compare.Pair(*[row_of("grid", LAYER, {"auto": [1.0], "torch.nn": [1.0]})] * 2)
    return compare.Change("auto", pair, *(results.Ratio("auto", "torch.nn", *r) for r in (before, after)))


def test_intervals_decide() -> None:
    nan = math.nan
    assert change((2.0, 1.9, 2.1), (1.7, 1.6, 1.8)).worse(0.05)  # 1.8 < 0.95 * 1.9
    assert not change((2.0, 1.9, 2.1), (1.7, 1.6, 1.81)).worse(0.05)
    assert not change((2.0, 1.9, 2.1), (1.0, 0.5, 2.0)).worse(0.05)  # who knows
    assert change((2.0, 1.9, 2.1), (2.3, 2.22, 2.4)).better(0.05)
    assert not change((2.0, 1.9, 2.1), (2.3, 2.2, 2.4)).better(0.05)
    assert change((2.0, 1.9, 2.1), (nan, nan, nan)).worse(0.05)
    assert change((nan, nan, nan), (2.0, 1.9, 2.1)).worse(0.05)
    assert not change((2.0, 1.99, 2.01), (2.0, 1.9, 2.1)).blind(0.05)
    assert change((2.0, 1.7, 2.1), (2.0, 1.9, 2.1)).blind(0.05)


def test_memory_and_cold_rows_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(factor: float, measure: str) -> Report:
        values = {"auto": [factor * 2**20] * 2, "torch.nn": [2 * 2**20] * 2}
        return report(row_of("memory", LAYER, values, 2, measure))

    for measure, shown in (("memory", "1.00 MiB -> 1.20 MiB"), ("cold", "1t cold")):
        assert said(tmp_path, run(1.0, measure), run(SLOWER, measure)) == 1
        assert shown.replace("1t", "2t") in capsys.readouterr().out


def test_one_measurement_is_one_change() -> None:
    """Where `auto` ran the kernels it stands for `cpu`, too; where it did not, they are two."""
    rounds = {"auto": [1.0, 1.1], "cpu": [1.0, 1.1], "torch.nn": [2.0, 2.1]}
    same, other = (row_of("grid", LAYER, rounds | {"cpu": cpu}) for cpu in ([1.0, 1.1], [1.2, 1.3]))
    assert [c.ours for c in compare.compare(report(same), report(same)).changes] == ["auto, cpu"]
    assert [c.ours for c in compare.compare(report(same), report(other)).changes] == ["auto", "cpu"]


def test_what_stands_on_one_side_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both, rounds = a_run(1), {"auto": [1.0], "loop": [2.0]}
    before = report(both, *(row_of("decoder", replace(DECODER, B=b), rounds) for b in range(1, 11)))
    after = report(both, row_of("decoder", DECODER, {"auto": [1.0], "loop.compile": [2.0]}))
    assert said(tmp_path, before, after) == 0
    out = capsys.readouterr().out
    assert "only before, 10: decoder bahdanau-gru-forward-S20-T20-B1-H256 1t auto / loop;" in out
    assert "and 2 more" in out
    assert "only after, 1: decoder bahdanau-gru-forward-S20-T20-B1-H256 1t auto / loop.compile" in out


def test_other_machines_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tops = [replace(TOPS[0], value=2.5e11), *TOPS[1:]]
    after = Report(WHERE | {"cpu": "other CPU", "torch": "2.14"}, tops, {}, [a_run(2), replace(a_run(2), threads=2)])
    assert said(tmp_path, report(a_run(1)), after) == 0
    out = capsys.readouterr().out
    for words in ("cpu differs: some CPU -> other CPU", "torch differs: 2.13 -> 2.14", "threads differ: 1 -> 1, 2"):
        assert words in out
    assert "another clock: ceiling of float32 at 1 thread 1e+11 -> 2.5e+11 FLOP/s" in out
    assert "isa differs" not in out


def test_disturbed_rows_and_runs_in_doubt_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm = [replace(a_run(seed), case=replace(LAYER, B=seed)) for seed in range(1, 10)]
    noisy_row = replace(a_run(10, SLOWER), case=replace(LAYER, B=1), calm=0.1)
    assert said(tmp_path, report(*calm), report(noisy_row, *calm[1:])) == 0
    assert "disturbed, 1: grid lstm-train-T50-B1-I64-H64 1t" in capsys.readouterr().out
    assert said(tmp_path, report(*calm), report(noisy_row, *calm[1:]), "--noisy") == 1
    doubtful = report(*(replace(row, calm=0.1) for row in calm))
    for pair in ((doubtful, report(*calm)), (report(*calm), doubtful)):
        assert said(tmp_path, *pair) == 4
        assert "Not compared, since a run is in doubt" in capsys.readouterr().out
        assert said(tmp_path, *pair, "--noisy") == 0
        assert "In doubt:" in capsys.readouterr().out


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(tmp_path, report(a_run(1)), report()) == 2
    assert "nothing to compare: only before, 1: grid lstm" in capsys.readouterr().err
    assert said(tmp_path, report(a_run(1)), report(a_run(1)), "--tolerance", "5") == 2
    assert "tolerance 5.0; a share of the ratio" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "before.jsonl"), str(tmp_path / "none.jsonl")]) == 2
    itself = row_of("self", LAYER, {"auto": [1.0], "auto.again": [1.0]})  # no peer
    assert said(tmp_path, report(itself), report(itself)) == 2


def test_times_alone_are_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine half as fast: told of, in figures, and nothing else."""
    slow = row_of("grid", LAYER, {"auto": [2.0, 2.02, 2.01], "torch.nn": [4.0, 4.04, 4.02]})
    fast = row_of("grid", LAYER, {"auto": [1.0, 1.01, 1.005], "torch.nn": [2.0, 2.02, 2.01]})
    assert said(tmp_path, report(fast), report(slow)) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "auto 1 time 1 x 2.000 1 0" in lines
    assert "torch.nn 1 time 1 x 2.000 1 0" in lines
