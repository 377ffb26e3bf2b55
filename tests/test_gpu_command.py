"""`make gpu` without a GPU: that its stages say so, and what they do with faults, limits and lost processes."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cudnn, equality, graphs, peers, programs, runner, timing
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.cases import LayerCase
from benchmarks.decoder_cases import AttentionCase, CorpusCase, DecoderCase
from benchmarks.generate_cases import GenerateCase
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bench, build, rows, sets, tables, test
from benchmarks.gpu.commands import Deadline, Record
from benchmarks.option_cases import OptionCase
from benchmarks.problem import LayerProblem
from benchmarks.registry import Entry
from benchmarks.results import Ratio, Row, Timing, row_from_dict
from fastseq import _gpus
from fastseq.cuda import native
from fastseq.cuda.plan import DESIGNS
from tests.emulated import emulated
from tests.gpu import sanitized

__all__ = ["emulated"]

ROOT = Path(__file__).parents[1]
STAGES = ("build", "test", "bench")
LAYER = LayerCase("lstm", "train", 5, 3, 4, 6)


def outcome(out: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{stage}.json").read_text())
    return found


def archived(out: Path, stage: str) -> list[str]:
    with tarfile.open(out / f"{stage}.tar.gz") as tar:
        return tar.getnames()


def test_every_stage_says_that_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "no_gpu", lambda: "there is no GPU: none was found")
    assert command.main(["all", str(tmp_path)]) == 0
    for stage in STAGES:
        assert outcome(tmp_path, stage)["status"] == "no GPU"
        assert archived(tmp_path, stage) == [stage, f"{stage}/no-gpu.log"]
        assert command.main([stage, str(tmp_path)]) == command.NO_GPU
    said = capsys.readouterr().out
    assert all(said.count(f"gpu-{stage}: no GPU: there is no GPU: none was found") == 2 for stage in STAGES)
    assert {p.name for p in tmp_path.iterdir()} == {f"{s}.{end}" for s in STAGES for end in ("json", "tar.gz")}


@pytest.mark.skipif(_gpus.no_gpu() is None, reason="there is a GPU, and this would measure on it")
def test_make_gpu(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    done = subprocess.run(
        [make, "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there is no GPU:") == 3
    assert {outcome(tmp_path, stage)["status"] for stage in STAGES} == {"no GPU"}


def test_a_python_without_pytorch_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastseq", None)
    assert "make PYTHON=... names another Python" in str(command.no_gpu())


def test_a_failing_stage_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def stage(name: str, record: Record, rehearse: bool) -> None:
        ran.append(name)
        if name == "build":
            raise OSError("no space left")

    monkeypatch.setattr(command, "no_gpu", lambda: None)
    monkeypatch.setattr(command, "_stage", stage)
    assert command.main(["all", str(tmp_path)]) == command.FAILED
    assert ran == [*STAGES]
    assert outcome(tmp_path, "build")["reason"] == "OSError: no space left"
    assert outcome(tmp_path, "bench")["status"] == "ok"
    assert command.main(["bench", str(tmp_path)]) == 0


def test_a_command_has_a_limit_and_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record("bench", tmp_path / "out", tmp_path / "logs")
    said = record.run("said", [sys.executable, "-c", "print('a word')"], 20, tmp_path, shown=True)
    assert (said.rc, said.tail) == (0, "a word")
    assert "a word" in capsys.readouterr().out
    begin = time.monotonic()
    child = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    assert record.run("hung", [sys.executable, "-c", child], 1.0, tmp_path).rc is None
    assert time.monotonic() - begin < 20
    assert not record.run("absent", ["no-such-tool"], 1.0, tmp_path).ok
    saved = outcome(tmp_path / "out", "bench")["steps"]
    assert [(s["name"], s["rc"]) for s in saved] == [("said", 0), ("hung", None), ("absent", 127)]
    record.archive()
    assert "bench/said.log" in archived(tmp_path / "out", "bench")


def test_rows_are_measured_in_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of row of the real bench, small and on the CPU, by the real processes."""
    monkeypatch.setattr(bench, "built", lambda *_: True)
    monkeypatch.setattr(bench, "TREE", ROOT)
    monkeypatch.setattr(bench, "environment", lambda _: {"PYTHONPATH": str(ROOT)})
    record = Record("bench", tmp_path, tmp_path / "logs")
    bench.bench(record, Deadline(69.0), rehearse=True)
    assert record.found["errors"] == {}
    found = [row_from_dict(row) for row in record.found["rows"]]
    assert {row.set for row in found} == {*sets.HEADS} - {"gpu-compiled"}
    assert set(record.found["left_out"]) >= {str(e.case) for e in rows.rows_of(True) if e.set == "gpu-compiled"}
    assert record.environment["torch"] == torch.__version__
    assert "bahdanau-lstm-train" in capsys.readouterr().out
    assert command.main(["show", str(tmp_path / "bench.jsonl")]) == 0
    assert "peer's time over ours" in capsys.readouterr().out
    assert command.main(["show", str(tmp_path / "none.jsonl")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_a_lost_process_costs_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started again behind the row that it died of, whether it could tell of that or not."""
    line = json.dumps({"name": "x", "set": "y", "error": "told"})

    def process(file: Path, skip: int, seconds: float, rehearse: bool) -> list[str]:
        code = {
            0: f"print({line!r}, file=open({str(file)!r}, 'a'), flush=True); sys.exit(3)",
            1: "sys.exit(139)",
            2: f"open({str(file)!r}, 'a').write('{{\"cut sho')",
        }[skip]
        return [sys.executable, "-c", f"import sys; {code}"]

    monkeypatch.setattr(bench, "built", lambda *_: True)
    monkeypatch.setattr(bench, "TREE", ROOT)
    monkeypatch.setattr(bench, "rows_command", process)
    record = Record("bench", tmp_path, tmp_path / "logs")
    bench.bench(record, Deadline(60.0), rehearse=True)
    second = rows.rows_of(True)[1]
    assert record.found["errors"] == {"x": "told", str(second.case): "the process ended with 139, see rows.log"}
    assert record.found["processes_lost"] == 2
    assert record.status == "failed"


def test_a_fault_of_a_row_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: LayerProblem) -> programs.Program:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(peers.PEERS, "triton", peers.Peer(broken, "broken"))
    measurer = runner.Runner(timing.Effort(0.0, 2, 2), {"triton", "torch.nn"}, lenient=True)
    line = rows.measure(measurer, Entry("gpu-small", LAYER, (("triton", "torch.nn"),), (1,)))
    assert line["error"] == "RuntimeError: an illegal memory access"
    absent = rows.measure(measurer, Entry("gpu-small", replace(LAYER, device="cuda"), (("triton", "torch.nn"),), (1,)))
    assert ("left_out" in absent) == (_gpus.no_gpu() is not None)


def test_a_peers_own_rounding_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """What errs too much of ours ends the row; a peer's is a note beside its time."""

    def wrong(backend: str) -> Any:
        def build(problem: LayerProblem) -> programs.Program:
            good = programs.torch_program(problem)
            results = lambda: {n: t * 1.01 for n, t in good.results().items()}  # noqa: E731
            return replace(good, results=results, backend=backend)

        return build

    monkeypatch.setitem(peers.PEERS, "sloppy", peers.Peer(wrong("sloppy"), "sloppy"))
    monkeypatch.setitem(peers.PEERS, "kernels", peers.Peer(wrong("triton"), "kernels"))
    measurer = runner.Runner(timing.Effort(0.0, 2, 2), {"auto", "torch.nn", "sloppy", "kernels"}, lenient=True)
    row = measurer.row(Entry("grid", LAYER, (("auto", "sloppy"),)), 1)
    assert row is not None
    assert "errs by" in row.timings["sloppy"].note
    with pytest.raises(equality.Unequal, match="triton"):
        measurer.row(Entry("grid", LAYER, (("kernels", "torch.nn"),)), 1)


def test_every_file_of_gpu_tests_is_run() -> None:
    assert set(test.FILES) == {p.stem for p in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert set(test.OF_CUDA).isdisjoint(test.TRITONS)
    assert set(test.OF_CUDA) | set(test.TRITONS) == set(test.FILES)


REHEARSED = ("test_streams.py", "test_generate.py", "test_large.py", "test_attention.py")


def test_gpu_tests_rehearse_on_the_cpu(tmp_path: Path) -> None:
    """On the reference: the tests are right, whatever the kernels are. And every file can be collected."""
    env = os.environ | {"FASTSEQ_REHEARSE": "1", "FASTSEQ_GPU_TESTS": str(tmp_path / "lines.jsonl")}
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider"]
    files = [f"tests/gpu/{name}" for name in REHEARSED]
    done = subprocess.run([*pytest_of, *files], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert {line["outcome"] for line in lines} == {"passed", "skipped"}
    assert sum(line["outcome"] == "passed" for line in lines) > 50
    over = env | {"FASTSEQ_GPU_SECONDS": "0"}
    done = subprocess.run([*pytest_of, "tests/gpu"], cwd=ROOT, env=over, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "the time that gpu-test has for this file is over" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_tests_that_are_named_without_a_gpu() -> None:
    """Are skipped, and say what would run them."""
    env = {name: value for name, value in os.environ.items() if name != "FASTSEQ_REHEARSE"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu/test_first_call.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "needs a GPU; FASTSEQ_REHEARSE=1 has it run on the CPU" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_set_that_cannot_run_is_refused() -> None:
    """Nothing else is measured in its place."""
    with pytest.raises(SystemExit, match="no row of --set gpu-small can run here: "):
        benchmarks_main(["run", "--set", "gpu-small"])


def test_gpu_tests_rehearse_on_the_cuda_kernels() -> None:
    """Emulated: those of streams are collected and run, and what is Triton's alone is left out by name."""
    env = os.environ | {"FASTSEQ_REHEARSE": "1", "TRITON_INTERPRET": "1", "FASTSEQ_GPU_BACKEND": "cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu/test_streams.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout.splitlines()[-1]
    assert "attention of all queries at once is Triton's alone" in done.stdout


@pytest.mark.usefixtures("emulated")
def test_the_sanitized_case_has_every_design(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers of one block, of a cluster and of a grid, with masks and without; by default in TF32."""
    ran, native_launch = [], native.launch

    def launch(function: str, x: torch.Tensor, *args: Any) -> None:
        if function in ("rnn_forward", "rnn_backward"):
            ran.append((function, DESIGNS[args[3][0]], args[-1][0]))  # of its shape, and whether there are masks
        native_launch(function, x, *args)

    monkeypatch.setattr(native, "launch", launch)
    monkeypatch.setattr(sanitized, "BACKEND", "cuda")
    monkeypatch.setattr(sanitized, "DEVICE", "cpu")
    sanitized.main()
    assert "every kernel ran" in capsys.readouterr().out
    for way in ("rnn_forward", "rnn_backward"):
        assert {design for name, design, _ in ran if name == way} == {*DESIGNS}
        assert {design for name, design, noisy in ran if noisy and name == way} == {"block", "cluster"}


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_gpu_tests_rehearse_on_the_kernels() -> None:
    """In Triton's interpreter: the smallest cases of layers and calls, by the kernels that a GPU would run."""
    env = os.environ | {"FASTSEQ_REHEARSE": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_layers.py"]
    command += ["tests/gpu/test_calls.py", "-k", "come_from_the_host or (T1-B3 and lstm-float32)"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout.splitlines()[-1]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_gpu_tests_are_left_out_by_name_without_a_gpu() -> None:
    env = {k: v for k, v in os.environ.items() if k != "FASTSEQ_REHEARSE"} | {"CUDA_VISIBLE_DEVICES": ""}
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/test_gpu_command.py"]
    done = subprocess.run(collect, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "tests/gpu: left out, for want of a GPU:" in done.stdout


def test_outcomes_of_tests_are_counted(tmp_path: Path) -> None:
    record, lines = Record("test", tmp_path, tmp_path / "logs"), tmp_path / "test.jsonl"
    test.count(record, lines)
    assert record.found["outcomes"] == {}
    lines.write_text("".join(json.dumps({"test": t, "outcome": o}) + "\n" for t, o in
                             (("a", "passed"), ("b", "failed"), ("c", "passed"))))  # fmt: skip
    test.count(record, lines)
    assert outcome(tmp_path, "test")["found"] == {"outcomes": {"passed": 2, "failed": 1}, "failed": ["b"]}


def test_the_tree_is_built_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "PARTS", ("setup.py", "fastseq"))
    monkeypatch.setattr(build, "STAMP", tmp_path / "built")
    (tmp_path / "fastseq" / "__pycache__").mkdir(parents=True)
    (tmp_path / "setup.py").write_text("")
    made = []
    monkeypatch.setattr(build, "build", lambda *_, **__: made.append(build.STAMP.write_text(build.fingerprint())))
    record = Record("test", tmp_path / "out", tmp_path / "logs")
    for file, times in ((None, 1), (None, 1), ("fastseq/__pycache__/x.pyc", 1), ("fastseq/x.py", 2), ("setup.py", 3)):
        if file is not None:
            (tmp_path / file).write_text("changed")
        assert build.built(record, Deadline(1.0))
        assert len(made) == times


def test_rows_stand_in_the_order_of_importance() -> None:
    assert len(set(sets.IN_ORDER)) == len(sets.IN_ORDER) == sum(len(sets.GPU_SETS[name]) for name in sets.HEADS)
    first = sets.IN_ORDER[0].case
    assert first == DecoderCase("bahdanau", "lstm", "train", 64, 64, 64, 512, "bfloat16", device="cuda")
    seen = [e.set for e in sets.IN_ORDER]
    assert seen.index("gpu-corpus") < len(seen) - seen[::-1].index("gpu-calls")  # every kind before the tails
    held = [(name, mode, None, peer) for name, mode, peer in sets.AIMS]
    for name, mode, ours, peer in (*held, *sets.OURS_AIMS):
        of = [e for e in sets.GPU_SETS[name.split()[0]] if e.case.mode == mode]
        pairs = [pair for e in of for pair in e.pairs]
        assert any(ours in (None, mine) and peer == theirs for mine, theirs in pairs), (name, mode, ours, peer)
    assert all(e.case.device == "cuda" for e in sets.IN_ORDER)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"H": 128}, "PERSIST_STATIC_SMALL_H"),
        ({"H": 192}, "STANDARD"),
        ({"H": 192, "mode": "forward"}, "PERSIST_STATIC_SMALL_H"),
        ({"H": 193, "mode": "forward"}, "STANDARD"),
        ({"H": 128, "rows": "lengths"}, "STANDARD"),
        ({"H": 512, "I": 512, "B": 64, "dtype": "float16"}, "PERSIST_STATIC"),
        ({"H": 512, "I": 512, "B": 64, "dtype": "float16", "op": "gru"}, "STANDARD"),
        ({"H": 512, "I": 512, "B": 1, "dtype": "float16"}, "STANDARD"),
        ({"H": 512, "I": 512, "B": 64, "dtype": "bfloat16"}, "STANDARD"),
    ],
)
def test_the_algorithm_that_pytorch_asks_for(changes: dict[str, Any], expected: str) -> None:
    case = replace(LAYER, device="cuda", **changes)
    assert cudnn.algorithm(case) == f"cuDNN {expected}"
    assert cudnn.algorithm(replace(case, device="cpu")) is None
    assert cudnn.algorithm(replace(case, op="lstm_cell")) is None


def test_tf32_has_a_tolerance_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LAYER, device="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert equality.precision(case) == "tf32"
    assert equality.precision(replace(case, op="lstm_cell")) == "float32"
    assert equality.precision(replace(case, dtype="bfloat16")) == "bfloat16"
    assert equality.precision(LAYER) == "float32"


def test_graphs_need_a_gpu_and_one_shape() -> None:
    case = DecoderCase("luong", "gru", "train", 4, 5, 3, 6)
    assert graphs.refuses(case) == "a CUDA graph needs a GPU"
    assert graphs.refuses(replace(case, device="cuda")) is None
    corpus = CorpusCase("luong", "lstm", "train", "multi30k", 6, device="cuda")
    assert "for each shape" in str(graphs.refuses(corpus))


def test_gpu_programs_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def step() -> None:
        nonlocal now
        now += 0.25  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    runnable = timing.Runnable(programs.Program(step, dict, False, "x"), 1, "cuda")
    taken = timing.interleave({"x": runnable}, timing.Effort(0.0, 3, 3), lambda threads: True)
    assert taken.values == {"x": pytest.approx([2.5e-4] * 3)}


def test_aims_of_one_of_ours() -> None:
    """Of the CUDA kernels more is asked than of Triton's, of parts of a set other things, and us a step beside."""
    layer = LayerCase("lstm", "train", 1024, 16, 512, 512, dtype="bfloat16", device="cuda")
    forward, both = replace(layer, mode="forward"), replace(layer, bidirectional=True, T=512)

    def told(case: Any, name: str, ours: str, peer: str, us: float = 1.0, on: str = "") -> str:
        of = a_row(case, name, 3.5)
        timing = replace(of.timings["triton"], median=us * 1e-6 * getattr(case, "T", 1), backend=on or ours)
        ratio = Ratio(ours, peer, 3.5, 3.5, 3.5)
        return tables.aim(replace(of, timings={ours: timing, peer: timing}), ratio)

    assert told(forward, "gpu-recurrence", "cuda", "torch.nn") == "1.2; 1.3 us a step (1.00)"
    assert told(layer, "gpu-recurrence", "cuda", "torch.nn", 4.0) == "1.2; 3.9 us a step (missed: 4.00)"
    assert told(replace(layer, dtype="float16"), "gpu-recurrence", "cuda", "torch.nn") == "1.2"
    assert told(layer, "gpu-recurrence", "triton", "torch.nn") == "1.2"
    assert told(both, "gpu-recurrence", "cuda", "torch.nn") == "3"
    assert told(replace(layer, layers=4), "gpu-recurrence", "cuda", "torch.nn") == "2"
    assert told(replace(layer, layers=4), "gpu-recurrence", "triton", "torch.nn") == "1.2"
    assert told(layer, "gpu-varlen", "cuda", "torch.nn") == "10 (missed)"
    assert told(layer, "gpu-varlen", "triton", "torch.nn") == "5 (missed)"
    assert told(layer, "gpu-large", "auto", "torch.nn") == "0.98"
    assert told(layer, "gpu-large", "cuda", "torch.nn") == ""
    assert told(forward, "gpu-recurrence", "auto", "torch.nn", on="cuda") == "1.2; 1.3 us a step (1.00)"
    assert told(layer, "gpu-varlen", "auto", "torch.nn", on="cuda") == "10 (missed)"
    decoder = DecoderCase("bahdanau", "lstm", "train", 64, 64, 64, 512, "bfloat16", device="cuda")
    found = [told(decoder, "gpu-decoder", ours, p) for ours in ("cuda", "triton") for p in ("loop", "loop.graph")]
    assert found == ["15 (missed)", "4 (missed)", "8 (missed)", "2"]


def a_row(case: Any, name: str, ratio: float, first: float = 0.0) -> Row:
    peer = "loop" if name != "gpu-attention" else "plain"
    timings = {"triton": Timing("triton", 1.0, 1.0, 1.0, 9, "", first), peer: Timing(peer, ratio, ratio, ratio, 9)}
    return Row(name, case, 1, "time", timings, (Ratio("triton", peer, ratio, ratio, ratio),), 1.0)


def test_aims_stand_beside_their_rows() -> None:
    decoder = DecoderCase("bahdanau", "lstm", "train", 64, 64, 64, 512, "bfloat16", device="cuda")
    attention = AttentionCase("additive", "forward", 64, 64, 64, 512, "float32", device="cuda")
    corpus = CorpusCase("luong", "lstm", "train", "multi30k", 512, dtype="bfloat16", device="cuda")
    search = GenerateCase("luong", "lstm", 1, 20, 30, 1, 256, 1000, device="cuda")
    many = [
        a_row(decoder, "gpu-decoder", 7.9),
        a_row(replace(decoder, dtype="float32"), "gpu-decoder", 3.0),
        a_row(attention, "gpu-attention", 2.5),
        a_row(corpus, "gpu-corpus", 6.0, first=30.0),
        *(a_row(replace(search, beams=k), "gpu-generate", 7.0) for k in (1, 5)),
    ]
    lines = tables.rows_table(many).lines
    assert [line[-1] for line in lines] == ["8 (missed)", "", "2.5", "5 (missed)", "8 (missed)", ""]
    epoch = tables.EPOCH / 8
    assert tables.epoch_ratio(many[3], many[3].ratios[0]) == pytest.approx(6 * epoch / (epoch + 29))
    assert [line[-3:-1] for line in tables.sets_table(many).lines] == [
        ["4.87", "3.00"], ["2.50", "2.50"], ["6.00", "6.00"], ["7.00", "7.00"], ["7.00", "7.00"],
    ]  # fmt: skip
    normed = a_row(OptionCase(**asdict(LAYER), option="layer_norm"), "gpu-options", 0.6)
    plain = replace(normed, case=OptionCase(**asdict(LAYER), option="resets"))
    assert [tables.aim(row, Ratio("triton", "triton.plain", 0.6, 0.6, 0.6)) for row in (normed, plain)] == [
        "0.5", "0.8 (missed)",
    ]  # fmt: skip
    calls = [replace(a_row(LAYER, "gpu-calls", ratio), case=replace(LAYER, B=b)) for b, ratio in ((1, 1.0), (8, 1.6))]
    assert [line[-1] for line in tables.sets_table(calls).lines] == ["mean 1.3 (missed)"]
