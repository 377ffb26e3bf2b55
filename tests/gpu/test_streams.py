"""What a GPU asks of a library beside numbers: streams, capture, autocast, no waiting, and life after a failure."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastseq
from tests.gpu.conftest import needs_gpu, not_of_cuda
from tests.gpu.place import BACKEND, DEVICE

T, B, S, I, H, D = 7, 5, 9, 12, 32, 24  # noqa: E741
LONG = 200_000_000  # clock cycles, about a tenth of a second


class Calls:
    """Modules of every kind with inputs that can be made anew in place."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.lstm = fastseq.LSTM(I, H, backend=BACKEND).to(DEVICE)
        self.gru = fastseq.GRU(I, H, bidirectional=True, backend=BACKEND).to(DEVICE)
        self.cell = fastseq.LSTMCell(I, H, backend=BACKEND).to(DEVICE)
        self.attention = fastseq.Attention(I, D, 16, backend=BACKEND).to(DEVICE)
        self.decoder = fastseq.Decoder.luong(I, H, memory_size=D, bridge="zero", backend=BACKEND).to(DEVICE)
        self.x, self.y = torch.randn(T, B, I, device=DEVICE), torch.randn(B, T, I, device=DEVICE)
        self.memory = torch.randn(B, S, D, device=DEVICE)
        self.mask = torch.rand(B, S, device=DEVICE) < 0.7
        self.lengths = torch.tensor([T, 0, 3, 5, 1]).to(DEVICE)

    def of(self, name: str) -> Callable[[], Tensor]:
        memory = fastseq.Memory(self.memory, self.mask)
        return {
            "lstm": lambda: self.lstm(self.x, lengths=self.lengths)[0],
            "gru": lambda: self.gru(self.x)[0],
            "cell": lambda: self.cell(self.x[0])[0],
            "attention": lambda: self.attention(self.y, self.attention.prepare(memory))[0],
            "decoder": lambda: self.decoder(self.y, memory).output,
        }[name]

    def module(self, name: str) -> nn.Module:
        found: nn.Module = getattr(self, name)
        return found

    def train(self, name: str) -> list[Tensor]:
        out = self.of(name)()
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(self.module(name).parameters()))]


tritons = pytest.param("attention", marks=not_of_cuda("attention of all queries at once is Triton's alone"))
kinds = pytest.mark.parametrize("name", ["lstm", "gru", "cell", tritons, "decoder"])


@pytest.fixture
def calls() -> Calls:
    return Calls()


@needs_gpu
@kinds
def test_a_second_stream(calls: Calls, name: str) -> None:
    """Kernels run in the caller's stream: they wait for what it does first, and for nothing else."""
    expected, stream = calls.train(name), torch.cuda.Stream()
    x, y, memory = calls.x, calls.y, calls.memory
    calls.x, calls.y, calls.memory = (torch.zeros_like(t) for t in (x, y, memory))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for t, of in zip((calls.x, calls.y, calls.memory), (x, y, memory), strict=True):
            t.copy_(of)
        got = calls.train(name)
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_gpu
@kinds
def test_capture_in_a_graph(calls: Calls, name: str) -> None:
    """By the user, of a call with gradients too; the replay reads what the inputs hold by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls.train(name)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = calls.train(name)
    for t in (calls.x, calls.y, calls.memory):
        t.normal_()
    graph.replay()
    for a, b in zip(held, calls.train(name), strict=True):
        torch.testing.assert_close(a, b)


@kinds
def test_the_host_never_waits(calls: Calls, name: str) -> None:
    """Forward and backward, lengths and masks on the device: no synchronisation that PyTorch knows of."""
    expected = calls.train(name)
    with waiting_is_an_error():
        got = calls.train(name)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_host_never_waits_for_a_model() -> None:
    encoder = fastseq.Encoder(I, H, bidirectional=True, embedding=nn.Embedding(11, I))
    for layer in encoder.layers:
        layer.backend = BACKEND
    decoder = fastseq.Decoder.luong(I, H, memory_size=2 * H, bridge="zero", backend=BACKEND)
    model = fastseq.Seq2Seq(
        encoder, decoder, 11, bos_id=1, eos_id=2, pad_id=0, embedding=nn.Embedding(11, I), output_bias=True
    ).to(DEVICE)
    src, tgt = (torch.randint(3, 11, (B, n)).to(DEVICE) for n in (S, T))
    tgt[:, 0] = 1
    lengths = torch.tensor([S, 1, 3, 5, 4]).to(DEVICE)
    model.loss(src, tgt, lengths).backward()
    with waiting_is_an_error():
        loss = model.loss(src, tgt, lengths)
        loss.backward()
    assert loss.isfinite()


class waiting_is_an_error:
    """torch's own check; nothing on a CPU."""

    def __enter__(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: Any) -> None:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@kinds
def test_autocast(calls: Calls, name: str) -> None:
    """Results as of the same call in bf16; gradients arrive in the parameters' own dtype."""
    with torch.autocast(DEVICE, torch.bfloat16):
        out, *grads = calls.train(name)
    assert all(g.dtype == torch.float32 for g in grads)
    full = calls.train(name)
    assert (out.float() - full[0]).abs().max() <= 2**-4 * full[0].abs().max()
    for g, exact in zip(grads, full[1:], strict=True):
        assert (g - exact).abs().max() <= 2**-3 * exact.abs().max() + 1e-6


@needs_gpu
@pytest.mark.parametrize("backend", [BACKEND, "torch"])
def test_autocast_answers_in_the_dtype_of_torch_nn(backend: str) -> None:
    """Layers, packed and padded, and cells, with hx and without."""
    x = torch.randn(4, 3, 8, device=DEVICE)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1])
    for name in ("LSTM", "GRU", "LSTMCell", "GRUCell"):
        stock = getattr(torch.nn, name)(8, 8).to(DEVICE)
        ours = getattr(fastseq, name)(8, 8, backend=backend).to(DEVICE)
        for given in (x, packed) if name in ("LSTM", "GRU") else (x[0],):
            with torch.autocast(DEVICE, torch.bfloat16):
                found = [
                    [t.dtype for t in tree_leaves(module(given)) if t.is_floating_point()] for module in (ours, stock)
                ]
            assert found[0] == found[1], name


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No allocation of a new block succeeds."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
@kinds
def test_out_of_memory_leaves_later_calls_working(calls: Calls, name: str, request: pytest.FixtureRequest) -> None:
    expected = calls.train(name)
    x, y, memory, mask, lengths = calls.x, calls.y, calls.memory, calls.mask, calls.lengths
    calls.x = x.repeat(1, 4000, 1)
    calls.y, calls.memory, calls.mask = y.repeat(4000, 1, 1), memory.repeat(4000, 1, 1), mask.repeat(4000, 1)
    calls.lengths = lengths.repeat(4000)
    request.getfixturevalue("little_memory")
    with pytest.raises(torch.OutOfMemoryError):
        calls.train(name)
    torch.cuda.set_per_process_memory_fraction(1.0)
    calls.x, calls.y, calls.memory, calls.mask, calls.lengths = x, y, memory, mask, lengths
    for a, b in zip(calls.train(name), expected, strict=True):
        assert torch.equal(a, b)


@needs_gpu
@not_of_cuda("it is Triton's JIT that fails in this test")
def test_a_failing_launch_raises_and_leaves_later_calls_working(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a kernel needs more than the GPU has: the error is raised, not swallowed."""
    expected = calls.train("lstm")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of resources")

    with monkeypatch.context() as patch:
        patch.setattr("triton.runtime.jit.JITFunction.run", broken)
        with pytest.raises(RuntimeError, match="out of resources"):
            calls.train("lstm")
    for a, b in zip(calls.train("lstm"), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="needs two GPUs")
@kinds
def test_a_second_device(calls: Calls, name: str) -> None:
    """Which is not the current one."""
    expected = [t.cpu() for t in calls.train(name)]
    for part in (calls.lstm, calls.gru, calls.cell, calls.attention, calls.decoder):
        part.to("cuda:1")
    for field in ("x", "y", "memory", "mask", "lengths"):
        setattr(calls, field, getattr(calls, field).to("cuda:1"))
    for a, b in zip(calls.train(name), expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b)
