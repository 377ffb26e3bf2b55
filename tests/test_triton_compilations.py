"""How often the kernels of a module are compiled while data of ever new sizes pass through it: counted, not compiled.

The modules are whole, on CPU tensors that stand for an H200's; what they launch there is only noted.
"""

import importlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from fastseq.kernels import launch
from fastseq.kernels.devices import DEVICES
from fastseq.kernels.launch import Launch

import fastseq
from tests.compiled import compile_key

H200 = next(device for device in DEVICES if device.name == "H200")
MOST, SHAPES = 4, 200
I, H, D = 16, 32, 24  # noqa: E741

Call = Callable[[int, int, int], Tensor]  # (B, T, S)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What calls would start on the GPU."""
    for name in ("triton", "decoder_triton"):
        backend = importlib.import_module(f"fastseq.backends.{name}")
        monkeypatch.setattr(backend, "obstacle_on", lambda name, t: None)
        monkeypatch.setattr(backend, "unavailable", lambda: None)
    with launch.recording(H200) as launches:
        yield launches


def layer(kind: str, hidden: int, lengths: bool = False, **options: Any) -> tuple[nn.Module, Call]:
    module = getattr(fastseq, kind)(I, hidden, backend="triton", **options)

    def call(B: int, T: int, S: int) -> Tensor:
        out: Tensor = module(torch.zeros(T, B, I), lengths=torch.randint(0, T + 1, (B,)) if lengths else None)[0]
        return out

    return module, call


def cell(kind: str, hidden: int) -> tuple[nn.Module, Call]:
    module = getattr(fastseq, kind)(I, hidden, backend="triton")
    return module, lambda B, T, S: tree_leaves(module(torch.zeros(B, I)))[0]


def memory(B: int, S: int) -> fastseq.Memory:
    return fastseq.Memory(torch.zeros(B, S, D), torch.ones(B, S, dtype=torch.bool))


def attention(score: str, units: int | None = None) -> tuple[nn.Module, Call]:
    module = fastseq.Attention(D, D, units, score=score, backend="triton")

    def call(B: int, T: int, S: int) -> Tensor:
        query = torch.zeros(B, T, D, requires_grad=True)  # a module without parameters, too, passes gradients on
        return module(query, module.prepare(memory(B, S)))[0]

    return module, call


def decoder(preset: str, **options: Any) -> tuple[nn.Module, Call]:
    module = getattr(fastseq.Decoder, preset)(I, H, memory_size=D, bridge="zero", backend="triton", **options)
    return module, lambda B, T, S: module(torch.zeros(B, T, I), memory(B, S)).output


MODULES: dict[str, Callable[[], tuple[nn.Module, Call]]] = {
    "LSTM, one program": lambda: layer("LSTM", H, bidirectional=True),
    "LSTM, one program, lengths": lambda: layer("LSTM", H, lengths=True),
    "LSTM, a grid": lambda: layer("LSTM", 300, lengths=True),
    "GRU, one program": lambda: layer("GRU", H),
    "GRU, a grid, two layers": lambda: layer("GRU", 300, num_layers=2),
    "LSTM, zoneout": lambda: layer("LSTM", H, zoneout=0.1, recurrent_dropout=0.2),
    "LSTM, normalised, one program": lambda: layer("LSTM", H, layer_norm=True),
    "GRU, normalised, a grid": lambda: layer("GRU", 300, layer_norm=True, bidirectional=True),
    "LSTMCell": lambda: cell("LSTMCell", H),
    "GRUCell": lambda: cell("GRUCell", 300),
    "additive attention": lambda: attention("additive", 20),
    "dot attention": lambda: attention("dot"),
    "general attention": lambda: attention("general"),
    "concat attention": lambda: attention("concat", 20),
    "Bahdanau's decoder": lambda: decoder("bahdanau"),
    "Luong's decoder": lambda: decoder("luong"),
    "Luong's decoder, two layers": lambda: decoder("luong", num_layers=2),
    "JoeyNMT's decoder": lambda: decoder("joeynmt"),
    "GNMT's decoder": lambda: decoder("gnmt", num_layers=3),
}
LAYERS_ABOVE = {"GNMT's decoder": 1}  # of its 5 in training two are those of the layers above the loop


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", MODULES)
def test_at_most_four(name: str, training: bool, noted: list[Launch]) -> None:
    """A module, over 200 shapes of B, T and S, those of 1 and of multiples of 16 among them."""
    module, call = MODULES[name]()
    module.train(training)
    draw, keys = random.Random(0), set()
    for _ in range(SHAPES):
        with torch.set_grad_enabled(training):
            out = call(*(draw.choice((1, 2, 16, draw.randint(1, 70))) for _ in range(3)))
        if training:
            out.sum().backward()
        keys |= {(f"{one.kernel.__module__}.{one.kernel.__name__}", compile_key(one, H200)) for one in noted}
        noted.clear()
    assert 0 < len(keys) <= MOST + (LAYERS_ABOVE.get(name, 0) if training else 0), Counter(kernel for kernel, _ in keys)


@pytest.mark.parametrize("name", ["additive attention", "dot attention"])
def test_attention_in_inference_is_that_of_training(name: str, noted: list[Launch]) -> None:
    """Its forward kernels, compiled once for both."""
    _, call = MODULES[name]()
    forward = []
    for training in (True, False):
        with torch.set_grad_enabled(training):
            call(3, 7, 9)
        forward.append({(one.kernel, compile_key(one, H200)) for one in noted})
        noted.clear()
    assert forward[0] == forward[1]
    assert len(forward[0]) == 2


def test_a_size_that_is_a_constant_is_counted(noted: list[Launch]) -> None:
    """The count itself: layers of five widths are five compilations."""
    for hidden in range(20, 25):
        layer("LSTM", hidden)[1](2, 3, 0)
    assert len({compile_key(one, H200) for one in noted}) == 5
