"""torch.compile(fullgraph=True) of modules and cells: the eager results, forward and backward, static and dynamic."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import fastseq
from fastseq import _native, functional
from fastseq.spec import AttentionParams, Keys

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

MODULES = {
    "LSTM": lambda: fastseq.LSTM(5, 9, num_layers=2, bidirectional=True, backend="cpu"),
    "GRU": lambda: fastseq.GRU(5, 9, batch_first=True, backend="cpu"),
    "RNN": lambda: fastseq.RNN(5, 9, nonlinearity="relu", backend="cpu"),
    "LSTMCell": lambda: fastseq.LSTMCell(5, 9, backend="cpu"),
    "GRUCell": lambda: fastseq.GRUCell(5, 9, backend="cpu"),
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Compiled code of one test is not met by the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(name: str, batch: int) -> tuple[Tensor, Any]:
    """Input and state for a batch of this size."""
    g = torch.Generator().manual_seed(batch)
    lead = {"LSTM": (7, batch), "GRU": (batch, 7), "RNN": (7, batch)}.get(name, (batch,))
    rows = {"LSTM": (4, batch), "GRU": (1, batch), "RNN": (1, batch)}.get(name, (batch,))
    h, c = (torch.randn(*rows, 9, generator=g) for _ in range(2))
    return torch.randn(*lead, 5, generator=g), (h, c) if name.startswith("LSTM") else h


def results(module: Any, parameters: list[Tensor], x: Tensor, hx: Any) -> list[Tensor]:
    """Outputs, and the gradients of the input, the state and the parameters."""
    leaves, spec = torch.utils._pytree.tree_flatten((x, hx))
    leaves = [t.clone().requires_grad_() for t in leaves]
    outputs = torch.utils._pytree.tree_leaves(module(*torch.utils._pytree.tree_unflatten(leaves, spec)))
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(loss, [*leaves, *parameters])]


def assert_same(got: list[Tensor], expected: list[Tensor], units: int) -> None:
    """Within so many units in the last place of each tensor's largest value; 0: the same bits."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        error = (a - b).abs().max().item()
        assert error <= units * torch.finfo(b.dtype).eps * b.abs().max().item()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_module(name: str, dynamic: bool) -> None:
    """One graph without breaks; batches of several sizes through one dynamic graph."""
    module = MODULES[name]()
    parameters = list(module.parameters())
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=graphs)
    made = []
    for batch in (3, 4, 6) if dynamic else (3,):
        expected = results(module, parameters, *inputs(name, batch))
        assert_same(results(compiled, parameters, *inputs(name, batch)), expected, 2)  # sums of gradients, reordered
        made.append(graphs.frame_count)
    assert made[0] == made[-1]


def test_compiled_without_gradients() -> None:
    """Inference compiles to the operator that saves nothing."""
    module, (x, hx) = MODULES["LSTM"](), inputs("LSTM", 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(*(torch.utils._pytree.tree_leaves(m(x, hx)) for m in (compiled, module)), strict=True):
            assert torch.equal(a, b)


def test_compiled_lengths() -> None:
    """Lengths as a tensor: their values are not part of the graph."""
    module = fastseq.GRU(5, 9, bidirectional=True, backend="cpu")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 5)
    for lengths in ([6, 2, 0], [1, 6, 3]):
        n = torch.tensor(lengths)
        assert torch.equal(compiled(x, lengths=n)[0], module(x, lengths=n)[0])


class Tagger(nn.Module):
    """A layer among others, as in a program."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 5), nn.Linear(18, 3)
        self.rnn = fastseq.LSTM(5, 9, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(tokens))[0].relu())


def test_inductor() -> None:
    """The default compiler, and `auto`: outputs and the gradients of a whole model."""
    model, tokens = Tagger(), torch.randint(11, (6, 3))
    compiled = torch.compile(model, fullgraph=True)
    parameters = list(model.parameters())
    got, expected = (
        [out.detach(), *torch.autograd.grad(out.pow(2).sum(), parameters)] for out in (compiled(tokens), model(tokens))
    )
    assert_same(got, expected, 16)


def test_one_tensor_given_twice() -> None:
    """(z, z) as h0 and c0, a memory that is its own keys: torch.compile gives a Function no tensor twice."""
    layer, decoder = fastseq.LSTM(5, 6), fastseq.Decoder.luong(5, 6, memory_size=6, bridge="zero")
    memory = fastseq.Memory(torch.randn(3, 4, 6))

    def each(x: Tensor, z: Tensor, q: Tensor) -> list[Tensor]:
        attended, _ = functional.attention(q, Keys(memory.out, memory.out), AttentionParams())
        return [layer(x.transpose(0, 1), (z, z))[0], decoder(x, memory).output, attended]

    inputs = torch.randn(3, 4, 5), torch.randn(1, 3, 6), torch.randn(3, 2, 6, requires_grad=True)
    parameters = [*layer.parameters(), *decoder.parameters(), inputs[2]]
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
    found = [
        (*outputs, *torch.autograd.grad(sum(t.sum() for t in outputs), parameters))
        for outputs in (compiled(*inputs), each(*inputs))
    ]
    torch.testing.assert_close(*found)
