"""The benchmarks' own arithmetic, and that no contender is timed before it was found equal."""

import gzip
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    calm,
    corpus,
    equality,
    peers,
    processes,
    programs,
    results,
    runner,
    stats,
    summary,
    timing,
)
from benchmarks.cases import GATES, Case, LayerCase
from benchmarks.decoder_cases import WIDTHS, AttentionCase, CorpusCase, DecoderCase, Lengths
from benchmarks.decoder_problem import DecoderProblem, loop_of
from benchmarks.kinds import draw
from benchmarks.peers import OPT_IN, PEERS
from benchmarks.problem import LayerProblem, Problem
from benchmarks.registry import SETS, Entry

SMALL = LayerCase("lstm", "train", 5, 3, 4, 6)
SHORT = timing.Effort(seconds=0.0, least=2, most=2)
ENTRIES = list(dict.fromkeys(itertools.chain.from_iterable(SETS.values())))
RUNNABLE = [name for name, peer in PEERS.items() if name not in OPT_IN and peer.unavailable() is None]


KINDS = sorted({e.case.small() for e in ENTRIES}, key=str)
DECODER = DecoderCase("luong", "gru", "train", 4, 5, 3, 6)


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
    case = LayerCase("lstm", "forward", 10, 3, 5, 7)
    assert case.flops == 2 * 10 * 3 * 4 * 7 * (5 + 7)
    assert replace(case, mode="train").flops == 3 * case.flops
    assert replace(case, op="gru", bidirectional=True, layers=2).flops == 2 * 30 * 3 * 2 * 7 * ((5 + 7) + (14 + 7))
    ragged = replace(case, rows="lengths")
    assert ragged.lengths is not None
    assert ragged.flops * 30 == case.flops * sum(ragged.lengths)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("attention", WIDTHS)
def test_flops_of_decoders_are_those_that_torch_counts(attention: str, cell: str) -> None:
    case = DecoderCase(attention, cell, "train", 7, 9, 3, 8)
    problem = draw(case)
    assert isinstance(problem, DecoderProblem)
    loop, batch = loop_of(case), problem.batches[0]
    with FlopCounterMode(display=False) as forward:
        out = loop(batch.y.requires_grad_(), batch.memory.requires_grad_(), batch.mask)
    with FlopCounterMode(display=False) as backward:
        out.backward(batch.grad)
    assert forward.get_total_flops() == case.flops / 3 == replace(case, mode="forward").flops
    products = GATES[cell] + (attention == "bahdanau")  # of the first state, zeros, which needs no gradient
    assert backward.get_total_flops() == case.flops * 2 / 3 - 2 * products * case.H**2 * case.B


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_flops_of_attentions_are_those_that_torch_counts(score: str) -> None:
    for mode in ("forward", "train"):
        case = AttentionCase(score, mode, 7, 9, 3, 8)
        program = PEERS["plain"].build(draw(case))
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(program.grad):
            program.step()
        assert counter.get_total_flops() == case.flops


def test_flops_count_real_steps_and_positions_only() -> None:
    full, padded = Lengths((4, 4), (3, 3)), Lengths((4, 2), (3, 1))
    assert (full.pairs, padded.pairs) == (24, 14)
    case = CorpusCase("bahdanau", "lstm", "forward", "multi30k", 16)
    positions, steps = (sum(sum(lengths) for lengths in side) for side in zip(*case.batches, strict=True))
    pairs = sum(batch.pairs for batch in case.batches)
    assert case.flops == 2 * 16 * 16 * (positions + steps * (4 * 3 + 1)) + 4 * 16 * pairs


@pytest.mark.parametrize("batch", [1, 2, 8, 64])
def test_lengths_go_from_a_quarter_to_all(batch: int) -> None:
    lengths = LayerCase("gru", "forward", 50, batch, 4, 4, rows="packed").lengths
    assert lengths is not None
    assert max(lengths) == 50
    assert batch == 1 or min(lengths) == 12


def test_names_are_unique() -> None:
    for name, entries in SETS.items():
        assert len({str(e.case) for e in entries}) == len(entries) or name == "full"


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_every_kind_of_case_builds_and_is_equal(case: Case) -> None:
    problem = draw(case)
    truth = equality.truth_of(problem)
    ran = set()
    for name in RUNNABLE:
        peer = PEERS[name]
        if peer.obstacle(case) is None and peer.form(case) == case:
            try:
                equality.check(peer.build(problem), truth, case.dtype)
            except programs.NotRunnable:
                continue  # a forced backend
            ran.add(name)
    assert ran & {"torch.nn", "loop", "plain"} or case.kind == "options"
    assert "auto" in ran


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rows", ["full", "lengths"])
@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_onnx_runtime_is_given_the_same_weights(op: str, rows: str, bidirectional: bool) -> None:
    if "onnxruntime" not in RUNNABLE:
        pytest.skip(str(PEERS["onnxruntime"].unavailable()))
    case = LayerCase(op, "forward", 5, 3, 4, 6, bidirectional=bidirectional, rows=rows, hx=True)
    problem = draw(case)
    equality.check(PEERS["onnxruntime"].build(problem), equality.truth_of(problem), case.dtype)


def test_torch_says_why_onnx_runtime_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install onnx onnxruntime" in str(PEERS["onnxruntime"].unavailable())


@pytest.mark.parametrize("name", ["out0", "out1", "d_x", "d_weight_hh_l0"])
@pytest.mark.parametrize("fault", [lambda t: t * 1.001, lambda t: t * math.nan, lambda t: t[..., :1]])
def test_planted_fault_is_caught(name: str, fault) -> None:  # type: ignore[no-untyped-def]
    problem = LayerProblem.draw(SMALL)
    truth, good = equality.truth_of(problem), programs.torch_program(problem)
    bad = replace(good, results=lambda: {n: fault(t) if n == name else t for n, t in good.results().items()})
    equality.check(good, truth, "float32")
    with pytest.raises(equality.Unequal, match=name):
        equality.check(bad, truth, "float32")
    with pytest.raises(equality.Unequal, match="gives"):
        equality.check(replace(good, results=dict), truth, "float32")


def test_nothing_unequal_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: LayerProblem) -> programs.Program:
        def step() -> None:
            raise AssertionError("timed")

        good = programs.torch_program(problem)
        return replace(good, step=step, results=lambda: {n: t * 1.001 for n, t in good.results().items()})

    monkeypatch.setitem(peers.PEERS, "wrong", peers.Peer(wrong, "wrong"))
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
        assert taken.mixed
        assert taken.values["x"] == pytest.approx([0.2] * 8)
    else:
        assert taken.values["x"] == pytest.approx([0.1] * len(taken.values["x"]))
        assert len(taken.values["x"]) >= 3


def test_watch_knows_a_slow_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    took = 20_000
    monkeypatch.setattr(calm, "_loop_ns", lambda: took)
    monkeypatch.setattr(calm, "_waited_ns", lambda: 0)
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


def test_watch_knows_that_others_have_our_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By how long our threads waited for one since the last question, and whether others ran meanwhile."""
    (tmp_path / "7").mkdir()
    queue, stat, now, ours, jiffies = tmp_path / "7" / "schedstat", tmp_path / "stat", 0, 0, 0
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

    def later(waited: float, others: float) -> bool:
        """A second later, of which our threads waited for a share, and others had that of a CPU, we a half."""
        nonlocal now, ours, jiffies
        now, ours = now + 1_000_000_000, ours + 500_000_000
        jiffies += round((0.5 + others) * 1e9 / tick)
        before = int(queue.read_text().split()[1]) if queue.exists() else 0
        queue.write_text(f"123 {before + round(waited * 1e9)} 4\n")
        stat.write_text(f"cpu  {jiffies} 0 0 99999 0 0 0 0 0 0\ncpu0 1\n")
        return watch.calm(1)

    monkeypatch.setattr(calm, "TASKS", tmp_path)
    monkeypatch.setattr(calm, "STAT", stat)
    monkeypatch.setattr(calm, "_loop_ns", lambda: 20_000)
    monkeypatch.setattr(calm.time, "perf_counter_ns", lambda: now)
    monkeypatch.setattr(calm.time, "process_time_ns", lambda: ours)
    watch = calm.Watch()
    later(0.5, 0.5)
    assert later(0.0, 0.0)
    assert later(0.5, 0.0)  # for each other
    assert later(0.0, 0.9)  # on a CPU that we did not need
    assert not later(0.5, 0.5)
    assert not later(0.06, 0.06)
    assert later(0.01, 0.5)
    queue.unlink()
    stat.unlink()
    assert watch.calm(1)


def test_a_watch_trusts_its_own_memory_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of this machine and Python; a file that was cut counts for nothing."""
    monkeypatch.setattr(calm, "_loop_ns", lambda: 20_000)
    monkeypatch.setattr(calm, "_waited_ns", lambda: 0)
    memory = tmp_path / "calm.json"
    watch = calm.Watch(memory)
    assert watch.calm(1)
    watch.save()
    monkeypatch.setattr(calm, "_loop_ns", lambda: 40_000)
    assert not calm.Watch(memory).calm(1)
    monkeypatch.setattr(calm, "MACHINE", "another")
    assert calm.Watch(memory).calm(1)
    memory.write_text(memory.read_text()[:20])
    assert calm.Watch(memory).calm(1)


def test_time_of_a_peer_is_scaled_where_the_registry_says_so() -> None:
    case = replace(SMALL, rows="lengths")
    assert PEERS["auto.full"].scale(case) == case.tokens / (case.T * case.B)
    assert PEERS["auto.full"].form(case) == SMALL


def test_peak_memory_counts_what_a_call_keeps() -> None:
    if processes.memory_unavailable():
        pytest.skip(str(processes.memory_unavailable()))
    case = LayerCase("lstm", "train", 50, 32, 64, 256)
    least = 4 * case.T * case.B * case.H * 4  # the gates of every step
    assert processes.peak_bytes(case, "torch.nn", 1) > least


def test_why_a_contender_is_left_out_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(problem: Problem) -> programs.Program:
        raise programs.NotRunnable("it has no kernel")

    monkeypatch.setitem(peers.PEERS, "never", peers.Peer(never, "never", ("decoder",)))
    run = runner.Runner(SHORT, {"auto", "never", "loop"})
    entry = Entry("decoder", DECODER, (("auto", "loop"), ("never", "loop")))
    rows = [row for row in (run.row(entry, threads) for threads in (1, 2)) if row is not None]
    assert [[(r.ours, r.peer) for r in row.ratios] for row in rows] == [[("auto", "loop")]] * 2
    assert run.absent == {"never, from some rows": "it has no kernel"}
    assert PEERS["torch.nn"].obstacle(DECODER) == "it runs layers only"


def text(folder: Path, lines: int) -> None:
    for end, word in (("de", "Wort"), ("en", "word, ")):
        with gzip.open(folder / f"train.{end}.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{word * (1 + k % 5)}!\n".replace("Wort", "Wort ") for k in range(lines))


def test_lengths_of_text(tmp_path: Path) -> None:
    text(tmp_path, 150)
    batches = corpus.derive(tmp_path)
    assert [len(source) for source, _ in batches] == [64, 64]  # the last 22 are dropped
    for source, target in batches:
        assert target == [2 * (s - 1) + 2 for s in source]  # words; words, commas, "!" and the end
        assert source == sorted(source)


def test_speeds_of_a_corpus_count_target_steps() -> None:
    case = CorpusCase("luong", "lstm", "train", "multi30k", 6, 2, 3)
    row = runner.Runner(SHORT, {"auto", "loop"}).row(Entry("corpus", case, (("auto", "loop"),)), 1)
    assert row is not None
    line = summary.corpus_table(results.Report({}, [], {}, [row]), "auto").lines[0]
    assert line[2] == f"{case.tokens / row.timings['auto'].median:,.0f}"


def test_evenly_spaced() -> None:
    assert corpus.evenly(range(8), 8) == list(range(8))
    assert corpus.evenly(range(100), 4) == [12, 37, 62, 87]


def test_batches_of_a_corpus_are_padded_and_send_no_gradient_from_padding() -> None:
    case = CorpusCase("bahdanau", "lstm", "train", "multi30k", 6)
    problem = draw(case)
    assert isinstance(problem, DecoderProblem)
    assert len(problem.batches) == 8
    assert sum(int(b.mask.sum()) for b in problem.batches) == sum(sum(lengths.source) for lengths in case.batches)
    for batch, lengths in zip(problem.batches, case.batches, strict=True):
        assert batch.y.shape == (64, max(lengths.target), 6)
        sent = batch.grad.ne(0).all(-1).sum(1)
        assert sent.tolist() == list(lengths.target)


@pytest.mark.parametrize("attention", WIDTHS)
def test_gradients_of_batches_add_up(attention: str) -> None:
    case = CorpusCase(attention, "gru", "train", "multi30k", 6, 2, 3)
    problem = draw(case)
    assert isinstance(problem, DecoderProblem)
    both = PEERS["loop"].build(problem).results()
    parts = [PEERS["loop"].build(replace(problem, batches=(batch,))).results() for batch in problem.batches]
    for name in problem.weights:
        torch.testing.assert_close(both[f"d_{name}"], parts[0][f"d_{name}"] + parts[1][f"d_{name}"])
    for k, part in enumerate(parts):
        torch.testing.assert_close(both[f"out0 of batch {k}"], part["out0"])
