"""The benchmarks' loops of cells, FlashRNN, options and named shapes: equality first; facts as their sources say."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import (
    cells_program,
    cited,
    cudnn,
    equality,
    estimate,
    flashrnn_program,
    option_programs,
    report,
    results,
    runner,
    shapes,
)
from benchmarks.__main__ import main
from benchmarks.cases import GATES, Case, LayerCase
from benchmarks.gpu.sets import GPU_SETS, HEADS
from benchmarks.kinds import case_from_dict, case_to_dict, draw
from benchmarks.option_cases import LACKS, OPTIONS, OptionCase
from benchmarks.peers import OPT_IN, PEERS, Peer
from benchmarks.programs import Program
from benchmarks.registry import LONG_S, SETS, Entry
from benchmarks.targets import TARGETS, group
from benchmarks.timing import Effort
from tests.conftest import NO_HALF_LSTM

SHORT = Effort(seconds=0.0, least=2, most=2)
FORMS: list[dict[str, Any]] = [
    {},
    {"hx": True},
    {"rows": "lengths"},
    {"layers": 2, "bidirectional": True, "hx": True, "rows": "lengths"},
    {"dtype": "bfloat16"},
    {"dtype": "autocast"},
]


def equal(name: str, case: Case) -> Program:
    """What the runner does before it times."""
    problem = draw(case)
    program = PEERS[name].build(problem)
    equality.check(program, equality.truth_of(problem), equality.precision(case))
    return program


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("op", GATES)
def test_a_loop_of_cells_is_the_layer(op: str, form: dict[str, Any], mode: str) -> None:
    case = replace(LayerCase(op, mode, 6, 4, 5, 7), **form)
    assert PEERS["cells"].obstacle(case) is None
    equal("cells", case)


@pytest.mark.parametrize("fault", ["weight_hh_l0", "bias_hh_l0_reverse"])
def test_a_loop_with_another_weight_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, built = LayerCase("gru", "forward", 6, 4, 5, 7, bidirectional=True), cells_program._loop

    def wrong(problem: Any) -> cells_program.Loop:
        return built(replace(problem, weights=problem.weights | {fault: problem.weights[fault].flip(0)}))

    monkeypatch.setattr(cells_program, "_loop", wrong)
    with pytest.raises(equality.Unequal):
        equal("cells", case)


def test_what_the_loop_of_cells_refuses() -> None:
    layer, obstacle = LayerCase("lstm", "forward", 6, 4, 5, 7), PEERS["cells"].obstacle
    assert obstacle(replace(layer, rows="packed")) == "padded rows only"
    assert obstacle(replace(layer, op="lstm_cell")) == "a single cell is torch.nn's"
    assert PEERS["cells.graph"].obstacle(layer) == "a CUDA graph needs a GPU"
    assert PEERS["cells.graph"].obstacle(replace(layer, device="cuda")) is None
    assert "cells.compile" in OPT_IN


def test_the_loop_of_cells_compiles() -> None:
    assert equal("cells.compile", LayerCase("lstm", "train", 3, 2, 4, 5)).first > 0


def stand_in(Wx: Tensor, R: Tensor, b: Tensor, states: Tensor | None, function: str, **_: Any) -> tuple[Tensor, Tensor]:
    """flashrnn.flashrnn by its README's equation, of one head: Wx [B, T, G, 1, H] -> states [S, B, T, 1, H].

    LSTM: gates i f z o. GRU: recurrent gates n r z, of the input r z n, biases n r z n.
    """
    wx, r, bias = Wx[:, :, :, 0], R[:, 0], b[:, 0]
    count = {"lstm": 2, "gru": 1, "elman": 1}[function]
    now = wx.new_zeros(count, len(wx), wx.shape[-1]) if states is None else states[:, :, 0, 0]
    all_states = []
    for x in wx.unbind(1):
        ry = torch.einsum("bp,gdp->bgd", now[0], r)
        if function == "gru":
            n, reset, keep = ry[:, 0] + bias[0], x[:, 0] + ry[:, 1] + bias[1], x[:, 1] + ry[:, 2] + bias[2]
            new = torch.tanh(x[:, 2] + bias[3] + reset.sigmoid() * n)
            now = (keep.sigmoid() * now[0] + (1 - keep.sigmoid()) * new)[None]
        elif function == "lstm":
            i, f, z, o = (x + ry + bias).unbind(1)
            c = f.sigmoid() * now[1] + i.sigmoid() * z.tanh()
            now = torch.stack([o.sigmoid() * c.tanh(), c])
        else:
            now = torch.tanh(x + ry + bias)[:, 0][None]
        all_states.append(now)
    return torch.stack(all_states, 2)[:, :, :, None], now[:, :, None, None]


@pytest.fixture
def flashrnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package where it is installed; otherwise something in its place."""
    if flashrnn_program.unavailable("triton_fused") is not None:
        package = ModuleType("flashrnn")
        package.flashrnn = stand_in  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flashrnn", package)


FLASH = LayerCase("lstm", "train", 6, 3, 4, 8)


@pytest.mark.usefixtures("flashrnn")
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("op", flashrnn_program.FUNCTIONS)
def test_flashrnn_is_given_the_same_weights(op: str, mode: str, hx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vanilla = Peer(flashrnn_program.flashrnn_program("vanilla"), "its loop in PyTorch, on a CPU")
    monkeypatch.setitem(PEERS, "vanilla", vanilla)
    equal("vanilla", replace(FLASH, op=op, mode=mode, hx=hx))


@pytest.mark.usefixtures("flashrnn")
@pytest.mark.parametrize("op", flashrnn_program.FUNCTIONS)
def test_a_wrong_mapping_ends_the_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = flashrnn_program.arguments

    def wrong(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        wx, r, b = right(*given)
        return wx, r.mT, b

    monkeypatch.setattr(flashrnn_program, "arguments", wrong)
    monkeypatch.setitem(PEERS, "vanilla", Peer(flashrnn_program.flashrnn_program("vanilla"), "wrong"))
    entry = Entry("loops", replace(FLASH, op=op), (("auto", "vanilla"),))
    with pytest.raises(equality.Unequal, match="flashrnn vanilla"):
        runner.Runner(SHORT, {"auto", "vanilla"}).row(entry, 1)


def test_why_flashrnn_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = runner.Runner(SHORT, {"auto", "torch.nn", "flashrnn"})
    assert run.absent == {"flashrnn": "not installed; run: pip install flashrnn"}
    row = run.row(Entry("gpu-flashrnn", FLASH, (("auto", "torch.nn"), ("auto", "flashrnn"))), 1)
    assert row is not None
    assert [ratio.peer for ratio in row.ratios] == ["torch.nn"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no nvcc" in str(PEERS["flashrnn"].unavailable())
    assert PEERS["flashrnn.triton"].unavailable() is None


@pytest.mark.parametrize(
    ("peer", "changes", "reason"),
    [
        ("flashrnn", {"device": "cpu"}, "GPUs"),
        ("flashrnn", {"op": "gru"}, "fused kernels have no GRU"),
        ("flashrnn.alternating", {"op": "gru"}, None),
        ("flashrnn", {"op": "rnn_relu"}, "no rnn_relu in float32"),
        ("flashrnn", {"op": "lstm_cell"}, "one layer"),
        ("flashrnn", {"rows": "lengths"}, "one length"),
        ("flashrnn", {"dtype": "autocast"}, "no lstm in autocast"),
        ("flashrnn", {"dtype": "bfloat16"}, None),
        ("flashrnn.triton", {"H": 128}, "at most 64 units"),
        ("flashrnn.triton", {}, None),
    ],
)
def test_what_flashrnn_refuses(peer: str, changes: dict[str, Any], reason: str | None) -> None:
    found = PEERS[peer].obstacle(replace(FLASH, **{"device": "cuda"} | changes))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize(
    ("op", "option"),
    [(op, o) for op in ("lstm", "gru", "rnn_tanh") for o in OPTIONS if o not in LACKS.get(op, ())],
)
def test_options_are_the_reference_mask_for_mask(op: str, option: str, mode: str) -> None:
    case = OptionCase(op, mode, 9, 4, 5, 20, option=option)
    for name in ("auto", "cpu"):
        assert "cpu" in equal(name, case).backend
    if option == "layer_norm":
        equal("cells", case)
    assert case_from_dict(case_to_dict(case)) == case


@pytest.mark.parametrize("option", [o for o in OPTIONS if o])
def test_an_option_that_computes_something_else_is_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other masks, weights, resets or results than the truth's."""
    case = OptionCase("lstm", "train", 9, 4, 5, 20, option=option)
    other: Any = draw(replace(case, option="") if option == "cell_states" else case)
    if other.resets is not None:
        other = replace(other, resets=~other.resets)
    ours = [name for name in other.weights if "norm" in name or "initial" in name]
    other = replace(other, weights=other.weights | {name: other.weights[name] * 1.01 for name in ours})
    bad, truth = PEERS["cpu"].build(other), equality.truth_of(draw(case))
    monkeypatch.setattr(option_programs, "SEED", option_programs.SEED + 1)
    with pytest.raises(equality.Unequal):
        equality.check(bad, truth, "float32")


def test_options_are_held_to_their_limits() -> None:
    assert TARGETS["zoneout over our plain layer"].least == pytest.approx(1 / 1.15)
    assert TARGETS["layer norm over our plain layer"].least == pytest.approx(1 / 1.5)
    groups = {
        group(results.Row(e.set, e.case, 1, e.measure, {}, (), 1.0), results.Ratio(*pair, 1.0, 1.0, 1.0))
        for e in SETS["options"]
        for pair in e.pairs
    }
    assert groups == {
        *(f"{o.replace('_', ' ')} over our plain layer" for o in OPTIONS if o),
        "layer norm forward over plain loop of cells",
        "layer norm training over plain loop of cells",
    }


def test_an_option_is_compared_with_the_plain_layer() -> None:
    entry = Entry(
        "options", OptionCase("gru", "train", 5, 3, 4, 6, option="layer_norm"), (("cpu", "cpu.plain"), ("cpu", "cells"))
    )
    row = runner.Runner(SHORT, {"cpu", "cpu.plain", "cells"}).row(entry, 1)
    assert row is not None
    assert {name: timing.backend for name, timing in row.timings.items()} == {
        "cpu": "cpu",
        "cpu.plain": "cpu",
        "cells": "cells",
    }
    assert [ratio.peer for ratio in row.ratios] == ["cpu.plain", "cells"]


def test_facts_of_the_named_shapes() -> None:
    """By hand, of the sources that shapes.py names."""
    found = shapes.deepbench()
    assert len(found) == len(set(found)) == 52 + 71
    assert sum(case.mode == "train" for case in found) == 52
    train = [(c.op, c.H, c.B, c.T) for c in found if c.mode == "train"]
    forward = [(c.op, c.H, c.B, c.T) for c in found if c.mode == "forward"]
    assert {("rnn_relu", 1760, 16, 50), ("lstm", 4096, 128, 25), ("lstm", 1536, 8, 50), ("gru", 2816, 32, 187)} < {
        *train
    }
    assert ("gru", 2816, 32, 1500) not in train
    assert {("lstm", 256, 1, 150), ("gru", 2560, 4, 750), ("rnn_relu", 32, 1, 672), ("gru", 512, 2, 1)} < {*forward}
    assert all(case.I == case.H for case in found)
    grid = {(c.H, c.B, c.T) for c in shapes.flashrnn()}
    assert len(grid) == 24
    assert {(16, 16, 1024), (768, 256, 1024), (64, 2, 1024), (768, 16, 2048)} < grid
    assert (128, 32, 1024) not in grid
    assert len(shapes.calls()) == len(SETS["calls"]) == 44


def test_every_shape_is_in_one_set() -> None:
    small, large = ({e.case for e in SETS[name]} for name in ("deepbench", "deepbench-large"))
    assert small | large == {*shapes.deepbench()}
    assert not small & large
    assert max(map(estimate.call_seconds, small)) < LONG_S <= min(map(estimate.call_seconds, large))
    assert not large & {e.case for e in SETS["full"]}
    assert {replace(e.case, device="cpu") for e in GPU_SETS["gpu-deepbench"]} == small | large
    assert {*GPU_SETS} - {*HEADS} == {"gpu-deepbench", "gpu-flashrnn"}


def test_estimates_by_hand() -> None:
    case = LayerCase("lstm", "forward", 50, 32, 512, 512)
    assert estimate.call_seconds(case) == pytest.approx(case.flops / 1e11)
    one_row = LayerCase("lstm", "forward", 25, 1, 2048, 2048)
    assert estimate.call_seconds(one_row) == pytest.approx(
        (4 * 4 * 2048 * (4098 + 24 * 2048) + 2 * 25 * 4 * 2048 - 25 * 2**20) / 2e10
    )
    assert estimate.row_seconds(Entry("x", replace(case, H=8, I=8), (("auto", "torch.nn"), ("cpu", "torch.nn"))), 1) < 2
    assert estimate.total(SETS["self"], (1, 2)) == "6 rows, about 0 minutes on a quiet machine"
    assert estimate.total(GPU_SETS["gpu-small"], (1,)).startswith(
        "0 rows" if not torch.cuda.is_available() else "24 rows"
    )


def test_list_says_how_long_a_run_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "--set", "self", "--threads", "1"])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert said.err == "3 rows, about 0 minutes on a quiet machine\n"


def test_what_is_cited_has_a_source() -> None:
    (table,) = cited.cited_tables()
    assert table.title == "cited, not measured"
    assert {line[0] for line in table.lines} == {"FlashRNN", "Haste"}
    assert len(table.head) == 6
    for line in table.lines:
        assert all(line), line
        assert any(place in line[4] for place in ("arXiv:", "github.com/", "pypi.org/"))


def test_reports_show_what_is_cited(capsys: pytest.CaptureFixture[str]) -> None:
    for rows in (True, False):
        report.print_report(results.Report({}, [], {}), rows)
        assert ("cited, not measured" in capsys.readouterr().out) is rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("rows", ["full", "packed"])
@pytest.mark.parametrize("op", ["lstm", "gru", "rnn_tanh", "lstm_cell"])
def test_onednn_is_named_where_it_runs(op: str, rows: str, dtype: str) -> None:
    if op == "lstm" and dtype != "float32" and not cudnn.has_half():
        pytest.skip(NO_HALF_LSTM)
    case = LayerCase(op, "forward", 5, 3, 4, 6, rows="full" if op.endswith("cell") else rows, dtype=dtype)
    program = PEERS["torch.nn"].build(draw(case))
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
        program.step()
    assert (cudnn.onednn(case) == "oneDNN") is any("mkldnn_rnn_layer" in event.key for event in seen.key_averages())
    assert program.note == (cudnn.onednn(case) or "")


def test_every_dtype_of_the_gpu_rows_is_drawn() -> None:
    for dtype in {e.case.dtype for entries in GPU_SETS.values() for e in entries}:
        equal("torch.nn", LayerCase("gru", "train", 5, 3, 4, 6, dtype=dtype))


def test_no_unit_of_a_relu_is_near_0() -> None:
    problem: Any = draw(LayerCase("rnn_relu", "train", 50, 8, 64, 64))
    out = torch.nn.RNN(64, 64, nonlinearity="relu")
    out.load_state_dict(problem.weights)
    h, _ = out(problem.x)
    assert ((h > 1) | (h == 0)).all()
    assert 0.4 < (h > 0).float().mean() < 0.6
