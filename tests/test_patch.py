"""patch gives torch's own classes fastseq's forward, whoever holds them, and takes it back."""

import pickle
import sys
from abc import ABC, abstractmethod

import pytest
import torch
from torch import nn

import fastseq
from tests.twins import H, I, flatten

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
SCRIPT = torch.jit.script
ORIGINALS = {kind: getattr(nn, kind).forward for kind in KINDS}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells of the calls that reach fastseq's engine."""
    seen: list[str] = []
    module = sys.modules["fastseq.patch"]  # the attribute of that name is the function
    for name in ("run", "run_cell"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda call, *args, run=run: (seen.append(call.cell), run(call, *args))[1])
    return seen


class RNN(ABC, nn.RNNBase):
    """As a forecasting package has it."""

    @abstractmethod
    def first_state(self, rows: int) -> object: ...


class LSTM(RNN, nn.LSTM):
    def first_state(self, rows: int) -> object:
        return (torch.zeros(self.num_layers, rows, self.hidden_size),) * 2


class Own(nn.GRU):
    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> str:
        return "own"


def inputs(kind: str) -> torch.Tensor:
    x = torch.randn(4, 3, I)
    return x[0] if kind.endswith("Cell") else x


@pytest.mark.parametrize("kind", KINDS)
def test_existing_instances_and_pickles_are_served(kind: str, ran: list[str]) -> None:
    module, x = getattr(nn, kind)(I, H), inputs(kind)
    stored = pickle.dumps(module)
    before = flatten(module(x))
    with fastseq.patch():
        for served in (module, pickle.loads(stored)):
            assert type(served) is getattr(nn, kind)
            for a, b in zip(flatten(served(x)), before, strict=True):
                torch.testing.assert_close(a, b)
        assert len(ran) == 2
    module(x)
    assert len(ran) == 2
    assert getattr(nn, kind).forward is ORIGINALS[kind]


def test_subclasses_are_served_unless_they_override(ran: list[str]) -> None:
    module = LSTM(I, H)
    with fastseq.patch():
        out, _ = module(torch.randn(4, 3, I), module.first_state(3))
        assert out.shape == (4, 3, H)
        assert ran == ["lstm"]
        assert Own(I, H)(torch.randn(4, 3, I)) == "own"
        assert ran == ["lstm"]


def test_parametrized_modules_are_served(ran: list[str]) -> None:
    module, x = nn.utils.parametrizations.weight_norm(nn.GRU(I, H), "weight_hh_l0"), torch.randn(4, 3, I)
    before = module(x)[0]
    with fastseq.patch():
        torch.testing.assert_close(module(x)[0], before)
    assert ran == ["gru"]


def test_all_inputs_of_torch() -> None:
    x = torch.randn(4, 3, I)
    h = torch.zeros(1, 3, H)
    packed = nn.utils.rnn.pack_padded_sequence(x, [1, 4, 2], enforce_sorted=False)
    module = nn.LSTM(I, H)
    for args in ((x,), (x, (h, h)), (packed,), (packed, (h, h)), (x[:, 0],)):
        before = flatten(module(*args))
        with fastseq.patch():
            for a, b in zip(flatten(module(*args)), before, strict=True):
                torch.testing.assert_close(a, b)


def test_patches_count() -> None:
    outer = fastseq.patch()
    patched = nn.LSTM.forward
    assert patched is not ORIGINALS["LSTM"]
    with fastseq.patch() as inner:
        assert nn.LSTM.forward is patched
        inner.undo()
        inner.undo()
        assert nn.LSTM.forward is patched
    assert nn.LSTM.forward is patched
    outer.undo()
    outer.undo()
    assert {kind: getattr(nn, kind).forward for kind in KINDS} == ORIGINALS


def test_an_error_takes_it_back() -> None:
    with pytest.raises(fastseq.InputError), fastseq.patch():
        nn.LSTM(I, H)(torch.zeros(3, 2, I + 1))
    assert nn.LSTM.forward is ORIGINALS["LSTM"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_script_compiles_torchs_own_forward(kind: str, ran: list[str]) -> None:
    model, x = nn.Sequential(nn.Linear(I, I), getattr(nn, kind)(I, H)), torch.randn(3, I)
    ours = nn.Sequential(getattr(fastseq, kind)(I, H))
    expected = flatten(model(x))
    with fastseq.patch():
        script = torch.jit.script(model)
        assert getattr(torch.jit.script(ours), "0").original_name == kind

        @torch.jit.script
        def twice(x: torch.Tensor) -> torch.Tensor:
            return _double(x)

        assert not ran
        torch.testing.assert_close(flatten(script(x)), expected)
        assert twice(x).equal(x + x)
        torch.testing.assert_close(flatten(model(x)), expected)
        assert len(ran) == 1  # the Python model is patched as before
        with pytest.raises(RuntimeError, match="forward"):
            torch.jit.script(Unscriptable())
        model(x)
        assert len(ran) == 2
    assert getattr(nn, kind).forward is ORIGINALS[kind]
    assert torch.jit.script is SCRIPT


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


class Unscriptable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + len(dir(x))


def test_the_torch_backend_does_not_come_back_to_the_patch() -> None:
    with fastseq.patch(), fastseq.use_backend("torch"):
        assert nn.GRU(I, H)(torch.zeros(3, 2, I))[0].shape == (3, 2, H)


def test_fastseqs_own_modules_are_not_touched(ran: list[str]) -> None:
    with fastseq.patch():
        fastseq.LSTM(I, H)(torch.zeros(3, 2, I), lengths=[1, 3])
    assert ran == []
