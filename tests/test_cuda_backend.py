"""The cuda backend as users meet it, its kernels emulated: modules, searches, torch.compile, and without a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastseq
from fastseq.cuda import native
from fastseq.ops import chunked_search
from fastseq.ops import rnn as ops
from fastseq.ops.chunked_beams import Beams
from tests.emulated import emulated
from tests.nvcc import NO_NVCC
from tests.oracle import Case, Problem
from tests.seq2seq_models import B, in_float64, model, same

__all__ = ["emulated"]

ALL = torch.arange(B)[:, None]
PRESETS = ("luong", "bahdanau", "gnmt", "sutskever", "cho", "conditional_gru", "joeynmt", "bentrevett")


@pytest.fixture
def full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers follow cuDNN's flag, whose default is TF32."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


@pytest.mark.usefixtures("emulated", "full_fp32")
@pytest.mark.parametrize("name", PRESETS)
def test_decoders(name: str) -> None:
    """By `backend="cuda"`: what the reference gives, every gradient too."""
    torch.manual_seed(1)
    options = {} if name == "sutskever" else {"memory_size": 11}
    decoder = getattr(fastseq.Decoder, name)(7, 9, bridge="zero", **options)
    memory, y = fastseq.Memory(torch.randn(5, 6, 11), torch.rand(5, 6) < 0.7), torch.randn(5, 3, 7)
    results = []
    for backend in ("cuda", "reference"):
        decoder.backend = backend
        output = decoder(y, memory).output
        grads = torch.autograd.grad(output.square().sum(), list(decoder.parameters()), allow_unused=True)
        results.append([output, *grads])
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("emulated")
def test_explain_tells_of_the_layout() -> None:
    decoder = fastseq.Decoder.luong(7, 9, memory_size=11, bridge="zero", backend="cuda")
    told = fastseq.explain(decoder, torch.randn(5, 3, 7), fastseq.Memory(torch.randn(5, 6, 11)))
    assert told.chosen == "cuda"
    for part in ("forward: one block", "backward: one block", "keys and memory in shared memory", "us a step"):
        assert part in str(told)


@pytest.mark.usefixtures("emulated", "full_fp32")
@pytest.mark.parametrize("name", ["luong", "bahdanau", "gnmt"])
def test_greedy_search(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch; of gnmt, which has a residual, in some steps at a time."""
    monkeypatch.setattr(chunked_search, "CHUNK", 3)
    of = model(name)
    of.decoder.backend = "cuda"
    assert of.why_stepwise(ALL) is None
    assert "do_sample" in str(of.why_stepwise(ALL, do_sample=True))
    found = of.generate(ALL, max_new_tokens=7)
    of.decoder.backend = "auto"
    same(found, in_float64(of, ALL, max_new_tokens=7))


@pytest.mark.usefixtures("emulated", "full_fp32")
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 5, "early_stopping": True, "min_new_tokens": 4},
        {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 2},
        {"num_beams": 2, "decoder_input_ids": [[5, 6], [7, 8], [8, 3], [4, 4]], "length_norm": "wu"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "changes"),
    [("luong", {"num_layers": 2}), ("bahdanau", {"cell": "gru"}), ("gnmt", {}), ("cho", {}), ("conditional_gru", {})],
)
def test_beam_search(
    name: str, changes: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some steps at a time, of every decoder: never in one launch."""
    monkeypatch.setattr(chunked_search, "CHUNK", 3)
    steps, step = [], Beams.step
    monkeypatch.setattr(Beams, "step", lambda *args: steps.append(step(*args)))
    of = model(name, **changes)
    options = options | {"max_new_tokens": 7, "return_weights": of.decoder.attention is not None}
    of.decoder.backend = "cuda"
    assert of.why_stepwise(ALL, **options) is None
    found = of.generate(ALL, **options)
    assert len(steps) in (3, 6, 7)
    of.decoder.backend = "auto"
    same(found, in_float64(of, ALL, **options))


@pytest.mark.usefixtures("emulated")
def test_an_attention_is_not_its_own() -> None:
    """All queries at once are Triton's; the decoders' own such attentions go there, or to the formula."""
    attention = fastseq.Attention(7, 11, 13, backend="cuda")
    memory = fastseq.Memory(torch.randn(5, 6, 11))
    with pytest.raises(fastseq.InputError, match="cuda has no attention of several queries"):
        attention(torch.randn(5, 3, 7), attention.prepare(memory))


@pytest.mark.usefixtures("emulated", "full_fp32")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "luong"])
def test_compiled_without_breaks(kind: str) -> None:
    """torch.compile(fullgraph=True) keeps the backend that was named: the bits of eager calls, gradients too."""
    torch.compiler.reset()
    torch.manual_seed(1)
    arguments: tuple[Any, ...] = (torch.randn(4, 3, 5),)
    if kind == "luong":
        module: torch.nn.Module = fastseq.Decoder.luong(5, 9, memory_size=11, bridge="zero", backend="cuda")
        arguments = torch.randn(3, 4, 5), fastseq.Memory(torch.randn(3, 6, 11))
    else:
        module = getattr(fastseq, kind)(5, 9, backend="cuda")
        arguments = (arguments[0][0],) if kind == "LSTMCell" else arguments
    results = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        out = run(*arguments)
        out = out.output if kind == "luong" else out[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_compiled_code_calls_these_kernels(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that the tensors' device stands for."""
    called = []
    monkeypatch.setattr(emulated, "rnn_forward", lambda *args: called.append(args))
    torch.compiler.reset()
    layer = torch.compile(fastseq.GRU(5, 9, backend="cuda"), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        layer(torch.randn(4, 3, 5))
    torch.compiler.reset()
    assert len(called) == 1


@pytest.mark.usefixtures("emulated", "full_fp32")
@pytest.mark.parametrize(("cell", "rows"), [("lstm", "full"), ("gru", "lengths")])
def test_operators_agree_with_their_schemas(cell: str, rows: str) -> None:
    """Schema and fake kernel, told by `on` whose kernels run."""
    problem = Problem.draw(Case(cell, rows=rows, bidirectional=True, resets=True))
    t = problem.tensors
    weights = [w for n, w in t.items() if n[:2] in ("w_", "b_")]
    call = (
        cell,
        t["x"].nan_to_num(),
        t["h0"],
        t.get("c0"),
        weights,
        problem.lengths,
        problem.resets,
        None,
        False,
        True,
    )
    checks = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.fastseq.rnn_forward.default, torch.ops.fastseq.rnn_backward.default
    torch.library.opcheck(forward, (*call, True, [], [], False), {"on": "cuda"}, test_utils=checks)
    out, _, _, _, gates, cells = forward(*call, True, [], [], False, on="cuda")
    assert torch.equal(out, ops.rnn_layer(*call, on="cuda")[0])
    grads = (problem.grads["out"], problem.grads["h_n"], problem.grads.get("c_n"), None)
    inputs = (cell, *grads, *call[1:], out, gates, cells, [True] * 4, [], [])
    torch.library.opcheck(backward, inputs, {"on": "cuda"}, test_utils=checks)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is missing and how to get it; a call that names it raises with that."""
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "reason", "the CUDA extension is not built (test); reinstall with FASTSEQ_CUDA=1")
    assert "FASTSEQ_CUDA=1" in str(fastseq.backends()["cuda"])
    with pytest.raises(fastseq.InputError, match="FASTSEQ_CUDA=1"):
        fastseq.LSTM(3, 4, backend="cuda")(torch.zeros(2, 1, 3))


def test_the_extension_imports_without_a_driver() -> None:
    """Where nvcc built it: it loads, and says that there is no driver; a launch is an error with CUDA's words."""
    found = sorted((Path(fastseq.__file__).parent).glob("_cuda.*"))
    if not found or torch.cuda.is_available():
        pytest.skip(f"no CUDA module was built; {NO_NVCC}" if not found else "there is a driver here")
    code = (
        "import fastseq; from fastseq.cuda import native; print(fastseq.backends()['cuda'])\n"
        "try:\n    native.C.rnn_clusters(0, 2, 0, True, (1, 16, 32, 8, 1, 8), 512, 100000)\n"
        "except RuntimeError as error:\n    print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "no NVIDIA driver is loaded, or one too old for CUDA" in told
    assert "was not started" in told


def test_a_cuda_call_without_a_gpu_is_refused() -> None:
    with pytest.raises(fastseq.InputError, match=r"not built|driver|reaches no GPU"):
        fastseq.LSTM(3, 4, backend="cuda")(torch.zeros(2, 1, 3))


@pytest.mark.parametrize(
    ("major", "minor", "taken"), [(6, 1, False), (7, 0, False), (7, 5, False), (8, 0, True), (12, 0, True)]
)
def test_gpus_before_sm_80_are_refused(major: int, minor: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what they are called and what is needed."""
    gpu = SimpleNamespace(name="Some GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
    told = native.obstacle_on("x", x)
    assert told == (None if taken else f"Some GPU is sm_{major}{minor}; these kernels need sm_80 or newer")


@pytest.fixture
def read_anew() -> Iterator[None]:
    """FASTSEQ_PATIENCE, which is read once."""
    native.patience.cache_clear()
    yield
    native.patience.cache_clear()


@pytest.mark.usefixtures("read_anew")
@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, 20 * 10**9), ("0", 0), ("0.0", 0), ("1", 10**9), ("0.5", 5 * 10**8), (" 3e-1 ", 3 * 10**8), ("1e-12", 1)],
)
def test_patience_is_given_in_seconds(given: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ns for the kernels, to which 0 means no limit: nothing else becomes 0."""
    if given is None:
        monkeypatch.delenv("FASTSEQ_PATIENCE", raising=False)
    else:
        monkeypatch.setenv("FASTSEQ_PATIENCE", given)
    assert native.patience() == expected


@pytest.mark.usefixtures("read_anew")
@pytest.mark.parametrize("given", ["", "long", "20s", "-1", "nan", "inf", "1e30"])
def test_a_wrong_patience_is_refused_by_name(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_PATIENCE", given)
    with pytest.raises(ValueError, match=f"FASTSEQ_PATIENCE='{given}'; expected seconds, 0 for no limit"):
        native.patience()
