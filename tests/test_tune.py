"""`python -m benchmarks tune` with a clock of its own: what it searches, chooses and writes; nothing without a GPU."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastseq.kernels import configs as table
from fastseq.kernels.devices import DEVICES

import fastseq
from benchmarks import tune
from benchmarks.__main__ import main
from benchmarks.cases import Case, LayerCase
from benchmarks.decoder_cases import AttentionCase
from benchmarks.tune import configs, crossovers
from benchmarks.tune.crossovers import BATCHES, HIDDEN, Kind
from benchmarks.tune.timer import Timer
from fastseq import _gpus, crossover, dispatch
from fastseq.crossover import MOST, Rule

H200 = next(d for d in DEVICES if d.name == "H200")
OURS = Path(table.__file__).parent / "configs.json"
BASE = {
    "kernel": "rnn_steps_forward", "bits": [16, 32], "hidden": [1, None], "devices": ["any"], "shared": 0,
    "blocks": {"rows": 16, "units": 16, "k": 64}, "warps": 4, "stages": 2, "because": "unmeasured: a guess of a test",
}  # fmt: skip
OTHER = BASE | {"kernel": "rnn_cell_forward"}
CASE = LayerCase("lstm", "forward", 64, 64, 256, 256, dtype="bfloat16", device="cuda")
STEPS = configs.Class("rnn_steps_forward", 16, (1, 256), (CASE,))
WHERE = "some GPU, 2026-01-02"


def test_nothing_changes_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_gpus, "no_gpu", lambda: "none was found")
    before = [file.read_text() for file in (OURS, crossover.FILE)]
    assert main(["tune"]) == tune.NO_GPU
    assert "there is no GPU: none was found\nNothing was measured" in capsys.readouterr().out
    assert [file.read_text() for file in (OURS, crossover.FILE)] == before


def cost(row: dict[str, Any]) -> float:
    """Least at 32 rows, 64 units, 8 warps; without memory for more than 64 units."""
    if row["blocks"]["units"] > 64:
        raise RuntimeError("out of resource: shared memory")
    distance = {"rows": 32, "units": 64, "k": 64}
    off = sum(abs(size.bit_length() - distance[name].bit_length()) for name, size in row["blocks"].items())
    return 1.0 + off + abs(row["warps"].bit_length() - 4) + 0.001 * row["stages"]


def test_the_search_goes_down_and_passes_over_what_cannot_run() -> None:
    best, took, first, tried = configs.search(BASE, cost, lambda: False)
    assert (best["blocks"], best["warps"]) == ({"rows": 32, "units": 64, "k": 64}, 8)
    assert took == pytest.approx(1.002)
    assert first == cost(BASE)
    assert tried < 60
    assert best["stages"] == 2  # 0.1 % is noise


def test_the_search_ends_when_the_time_is_over() -> None:
    left = iter([False, False, True])
    asked = []
    best, *_ = configs.search(BASE, lambda row: asked.append(row) or 1.0, lambda: next(left, True))  # type: ignore[func-returns-value]
    assert best == BASE
    assert len(asked) == 3
    with pytest.raises(RuntimeError, match="of the base"):
        configs.search(BASE, lambda row: (_ for _ in ()).throw(RuntimeError("of the base")), lambda: False)


def test_neighbours_keep_what_must_hold_a_whole_size() -> None:
    whole = BASE | {"kernel": "rnn_sequence_forward", "blocks": {"rows": 16, "units": 64}, "stages": 1}
    assert {row["blocks"]["units"] for row in configs.neighbours(whole)} == {64}
    text = json.dumps([*configs.neighbours(whole), *configs.neighbours(BASE)])
    assert len(table.load(text)) == len([*configs.neighbours(whole), *configs.neighbours(BASE)])


def measured(rows: list[dict[str, Any]], **options: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """The table after a search whose clock looks at the row that is first in it."""
    tried: list[Any] = []

    def timer(case: Case, backends: Sequence[str]) -> dict[str, float]:
        assert (case, [*backends]) == (CASE, ["triton"])
        return {"triton": cost(tried[-1][0]) * 1e-3}

    found = configs.measure(rows, H200, timer, tried.append, WHERE, 60.0, (STEPS,), **options)
    return found, tried


def test_what_was_measured_stands_before_the_guess() -> None:
    found, tried = measured([OTHER, BASE])
    assert [row["kernel"] for row in found] == ["rnn_cell_forward", "rnn_steps_forward", "rnn_steps_forward"]
    new = found[1]
    assert found[2] == BASE
    assert (new["bits"], new["hidden"], new["devices"], new["blocks"]["units"]) == ([16], [1, 256], ["sm90"], 64)
    assert new["because"] == (
        "1.002 ms, 4.99 times as fast as rows 16, units 16, k 64, 4 warps, 2 stages; "
        "lstm-forward-T64-B64-I256-H256-bfloat16-cuda; some GPU, 2026-01-02"
    )
    assert tried[-1] == found
    known = table.load(json.dumps(found))
    assert next(r for r in known if r.fits("rnn_steps_forward", 16, 256, H200)).config.blocks["units"] == 64
    assert next(r for r in known if r.fits("rnn_steps_forward", 16, 257, H200)).config.blocks["units"] == 16
    assert next(r for r in known if r.fits("rnn_steps_forward", 32, 256, H200)).config.blocks["units"] == 16


def test_measuring_again_replaces() -> None:
    once, _ = measured([OTHER, BASE])
    again, _ = measured(once)
    assert len(again) == len(once)
    assert "none of" in again[1]["because"]
    assert again[1]["blocks"] == once[1]["blocks"]


def test_a_row_that_does_not_run_stays(capsys: pytest.CaptureFixture[str]) -> None:
    wide = BASE | {"blocks": {"rows": 16, "units": 128, "k": 64}}
    found, _ = measured([wide])
    assert found == [wide]
    assert "left as it is: RuntimeError: out of resource" in capsys.readouterr().out


def test_every_class_can_be_asked_of_the_real_table() -> None:
    rows = json.loads(OURS.read_text())
    kernels = {row["kernel"] for row in rows}
    assert {of.kernel for of in configs.CLASSES} == kernels - {*configs.UNTUNED}
    for of in configs.CLASSES:
        base = configs.base_of(rows, of, H200)
        assert base is None or base["kernel"] == of.kernel
        assert {case.device for case in of.cases} == {"cuda"}
    assert len({(of.kernel, of.bits, of.hidden) for of in configs.CLASSES}) == len(configs.CLASSES)


def test_the_kernels_see_the_table_that_is_tried_and_then_their_own() -> None:
    kept = table.TABLE
    with configs.replaced() as put:
        put([BASE | {"warps": 8}])
        found = table.find("rnn_steps_forward", torch.bfloat16, 64, H200)
        assert found is not None
        assert found.warps == 8
    assert table.TABLE is kept
    assert table.find.cache_info().currsize == 0


GPU = crossovers.Machine("cuda", "some GPU", WHERE)
TRAIN = Kind(128, "bfloat16", True, "lstm")


def ratios(faster: dict[int, tuple[int, ...]]) -> dict[tuple[int, int], float]:
    """1.5 at the batches named by size, 0.5 elsewhere."""
    return {(h, b): 1.5 if b in faster.get(h, ()) else 0.5 for h in HIDDEN for b in BATCHES}


def bounds(found: Sequence[Rule]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return [(rule.hidden, rule.batch) for rule in found]


def test_a_rule_speaks_only_of_what_was_faster_on_every_side() -> None:
    def of(faster: dict[int, tuple[int, ...]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        return bounds([*crossovers.rules_of(TRAIN, ratios(faster), GPU, "triton")])

    assert of({}) == []
    assert of({64: (1, 8, 64)}) == [((1, 65), (1, 65))]
    assert of({64: (1, 8, 64), 128: (1, 8, 64)}) == [((1, 129), (1, 65))]
    assert of({64: (1, 64)}) == [((1, 65), (1, 2))]  # from 9 to 64 rows: 8 were slower
    assert of({128: (1, 8, 64)}) == []  # from 65 on: 64 was slower
    assert of({64: (1, 8), 128: (1, 8, 64)}) == [((1, 129), (1, 9))]
    assert of(dict.fromkeys(HIDDEN, BATCHES)) == [((1, 513), (1, 65))]


def test_the_fastest_of_ours_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Size by size; one that cannot run a case leaves the others in the race."""

    def timer(case: Case, backends: Sequence[str]) -> dict[str, float]:
        assert isinstance(case, LayerCase)
        if "cuda" in backends and case.H == 512:
            raise RuntimeError("no room")
        took = {"triton": 1.0, "cuda": 0.5 if case.H >= 256 else 2.0, "torch": 1.5}
        return {name: took[name] for name in backends}

    rules = crossovers.measure(timer, GPU, 60.0, (TRAIN,))
    assert {(r.backend, r.hidden) for r in rules} == {("triton", (1, 129))}  # of 129 to 256, 128 was faster on triton
    assert "cuda: RuntimeError: no room" in capsys.readouterr().out

    def larger(case: Case, backends: Sequence[str]) -> dict[str, float]:
        assert isinstance(case, LayerCase)
        took = {"triton": 1.0, "cuda": 0.5 if case.H >= 128 else 2.0, "torch": 1.5}
        return {name: took[name] for name in backends}

    rules = crossovers.measure(larger, GPU, 60.0, (TRAIN,))
    assert {(r.backend, r.hidden) for r in rules} == {("triton", (1, 65)), ("cuda", (129, 513))}


def test_rules_name_their_measurement_and_survive_json(tmp_path: Path) -> None:
    asked = []

    def timer(case: Case, backends: Sequence[str]) -> dict[str, float]:
        assert isinstance(case, LayerCase)
        asked.append(case)
        if case.H == 512:
            raise RuntimeError("no such kernel")
        return {"triton": 1.0, "torch": 1.2 if case.H <= 128 else 1.01}

    kinds = (TRAIN, Kind(1, "float32", False, "gru"))
    rules = crossovers.measure(timer, GPU, 60.0, kinds, ("triton",))
    assert len(asked) == 2 * len(HIDDEN) * len(BATCHES)
    assert [case.op for case in asked[:: len(HIDDEN) * len(BATCHES)]] == ["lstm", "gru_cell"]
    assert [(r.hidden, r.batch, r.steps, r.grad, r.cells, r.dtypes) for r in rules] == [
        ((1, 129), (1, 65), (2, MOST), True, ("lstm",), ("bfloat16",)),
        ((1, 129), (1, 65), (1, 2), False, ("gru",), ("float32",)),
    ]
    assert rules[0].because == "1.20 to 1.20 times as fast as torch at 6 sizes, T=128; some GPU, 2026-01-02"
    file = tmp_path / "crossovers.json"
    other = rules[0]._replace(machine="another GPU")
    tune.write_crossovers(file, GPU._replace(name="another GPU"), [other])
    tune.write_crossovers(file, GPU, rules)
    assert crossover.measured(file) == (other, *rules)
    tune.write_crossovers(file, GPU, [])
    assert crossover.measured(file) == (other,)
    assert crossovers.measure(timer, GPU, -1.0, kinds) == []


def test_a_cpu_is_tuned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There our kernels are the usual choice, and each number of threads has rules of its own."""

    def timer(case: Case, backends: Sequence[str]) -> dict[str, float]:
        assert isinstance(case, LayerCase)
        assert (case.device, tuple(backends)) == ("cpu", ("torch", "cpu"))
        return {"torch": 1.0, "cpu": 1.1 if case.H == 512 and torch.get_num_threads() == 2 else 0.9}

    machine, before = crossovers.Machine("cpu", "some CPU", WHERE, (1, 2)), torch.get_num_threads()
    kinds = (Kind(50, "float32", True, "lstm"),)
    assert crossovers.measure(timer, machine, 60.0, kinds) == []  # 512 was slower, but of 256 to 511 nothing is known
    always = crossovers.measure(lambda case, _: {"torch": 1.0, "cpu": 1.2}, machine, 60.0, kinds)
    assert torch.get_num_threads() == before
    assert [(r.backend, r.device, r.threads, r.hidden, r.steps) for r in always] == [
        ("torch", "cpu", (1, 2), (1, 513), (2, MOST)),
        ("torch", "cpu", (2, 3), (1, 513), (2, MOST)),
    ]
    file = tmp_path / "crossovers.json"
    tune.write_crossovers(file, machine, always)
    assert crossover.measured(file) == tuple(always)
    tune.write_crossovers(file, machine._replace(threads=(2,)), [])
    assert crossover.measured(file) == tuple(always[:1])
    layer, x = fastseq.LSTM(8, 8), torch.zeros(4, 2, 8)
    for here, expected in (("some CPU", "torch"), ("another CPU", fastseq.explain(layer, x).chosen)):
        monkeypatch.setattr(dispatch, "RULES", always)
        monkeypatch.setattr(dispatch, "cpu_name", lambda here=here: here)
        assert fastseq.explain(layer, x).chosen == expected


def test_tables_are_written_one_row_a_line(tmp_path: Path) -> None:
    file = tmp_path / "configs.json"
    tune.write_configs(file, [BASE, OTHER])
    assert len(file.read_text().splitlines()) == 4
    assert len(table.load(file.read_text())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["configs.json"]


def test_the_timer_times_what_it_has_found_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.calm.Watch.calm", lambda self, threads: True)
    timer = Timer()
    took = timer(AttentionCase("additive", "train", 4, 5, 3, 6), ("cpu", "reference"))
    assert took.keys() == {"cpu", "reference"}
    assert min(took.values()) > 0
    from benchmarks import equality
    from benchmarks.tune import timer as module

    monkeypatch.setattr(module, "check", lambda *_: (_ for _ in ()).throw(equality.Unequal("wrong")))
    program = module.fastseq_program("reference")
    monkeypatch.setattr(module, "fastseq_program", lambda name: program)
    with pytest.raises(equality.Unequal):
        timer(LayerCase("lstm", "forward", 5, 3, 4, 6), ("triton",))
