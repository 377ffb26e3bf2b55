"""fastseq.warmup: everything runs once, and nothing can be told from before."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from tests.test_import import python


class Watched(nn.Module):
    """Notes the modes that it was called in; drops out, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm, self.drop = fastseq.LSTM(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("absent", None)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, fault: bool = False) -> dict[str, Any]:
        self.calls += 1
        self.seen.append((self.training, torch.is_grad_enabled()))
        out, state = self.lstm(x)
        if fault:
            raise KeyError("a fault of its own")
        return {"out": self.norm(self.drop(out[-1])), "state": state, "name": "x"}


@pytest.mark.parametrize("fault", [False, True])
def test_nothing_can_be_told_from_before(fault: bool) -> None:
    module, x = Watched(), torch.randn(3, 5, 4, requires_grad=True)
    module.drop.eval()  # one part in another mode
    module.lstm.weight_ih_l0.grad = given = torch.ones_like(module.lstm.weight_ih_l0)
    before, buffers = copy.deepcopy(module.state_dict()), dict(module.named_buffers())
    random, modes = torch.get_rng_state(), [part.training for part in module.modules()]
    if fault:
        with pytest.raises(KeyError, match="a fault of its own"):
            fastseq.warmup(module, x, fault=True)
    else:
        assert fastseq.warmup(module, x) > 0
    assert module.seen == [(False, False), (True, True)][: 1 if fault else 2]
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(module.get_buffer(name) is t for name, t in buffers.items())
    assert module.absent is None
    assert x.grad is None
    assert module.lstm.weight_ih_l0.grad is given
    assert torch.equal(given, torch.ones_like(given))
    assert all(p.grad is None for n, p in module.named_parameters() if n != "lstm.weight_ih_l0")


@pytest.mark.parametrize(
    ("backward", "frozen", "modes"),
    [(None, False, 2), (None, True, 1), (False, False, 1), (True, False, 2)],
)
def test_modes(backward: bool | None, frozen: bool, modes: int) -> None:
    module = Watched().requires_grad_(not frozen)
    fastseq.warmup(module, torch.randn(3, 5, 4), backward=backward)
    assert len(module.seen) == modes


def test_gradients_of_inputs_when_asked_for() -> None:
    module, x = Watched().requires_grad_(False), torch.randn(3, 5, 4, requires_grad=True)
    fastseq.warmup(module, x, backward=True)
    assert module.seen == [(False, False), (True, True)]
    assert x.grad is None
    with pytest.raises(TypeError, match="backward=True, but no result of forward has a gradient"):
        fastseq.warmup(module, x.detach(), backward=True)


def model() -> fastseq.Seq2Seq:
    encoder = fastseq.Encoder(4, 6, embedding=nn.Embedding(9, 4))
    decoder = fastseq.Decoder.luong(4, 6, memory_size=6, bridge="zero", dropout=0.0)
    return fastseq.Seq2Seq(encoder, decoder, 9, bos_id=1, eos_id=2, pad_id=0, embedding=nn.Embedding(9, 4))


CALLS: list[tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = [
    (lambda: fastseq.GRU(4, 6), (nn.utils.rnn.pack_sequence([torch.zeros(3, 4), torch.zeros(2, 4)]),), {}),
    (lambda: fastseq.LSTM(4, 6), (torch.zeros(3, 2, 4),), {"lengths": [3, 1]}),
    (lambda: fastseq.LSTMCell(4, 6), (torch.zeros(2, 4), (torch.zeros(2, 6), torch.zeros(2, 6))), {}),
    (model, (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)), {}),
    (model, (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)), {"method": "loss"}),
    (model, (torch.ones(2, 5, dtype=torch.int64),), {"method": "generate", "max_new_tokens": 3}),
]


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_every_module_and_method(index: int) -> None:
    build, inputs, options = CALLS[index]
    module = build()
    assert fastseq.warmup(module, *inputs, **options) > 0
    assert all(p.grad is None for p in module.parameters())


def test_faults_are_named() -> None:
    with pytest.raises(TypeError, match=r"warmup takes an nn\.Module, got function"):
        fastseq.warmup(lambda x: x, 1)  # type: ignore[arg-type]
    with pytest.raises(fastseq.InputError, match="method='search': GRU has no such method"):
        fastseq.warmup(fastseq.GRU(4, 6), torch.zeros(3, 2, 4), method="search")
    with pytest.raises(fastseq.InputError, match="input has 3 features"):
        fastseq.warmup(fastseq.GRU(4, 6), torch.zeros(3, 2, 3))


def test_it_starts_no_driver() -> None:
    code = "import torch, fastseq; fastseq.warmup(fastseq.GRU(2, 3), torch.zeros(1, 1, 2))"
    assert python(f"{code}; print(torch.cuda.is_initialized())").splitlines()[-1] == "False"
