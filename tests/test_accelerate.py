"""accelerate changes the class of exact torch modules and nothing else, and says what it did."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastseq
from tests.twins import H, I, flatten


class Mine(nn.LSTM):
    pass


class Model(nn.Module):
    """Nested, shared, subclassed and parametrized recurrent modules."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"words": nn.LSTM(I, H, bidirectional=True), "characters": nn.GRU(I, H)})
        self.shared = self.encoder["characters"]
        self.steps = nn.ModuleList([nn.LSTMCell(I, H), nn.GRUCell(I, H)])
        self.mine = Mine(I, H)
        self.normed = parametrizations.weight_norm(nn.GRU(I, H), "weight_hh_l0")
        self.plain, self.linear = nn.RNN(I, H), nn.Linear(H, 2)
        self.fast = fastseq.GRU(I, H, backend="reference")

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        layers = (self.encoder["words"], self.shared, self.mine, self.normed, self.plain, self.fast)
        return flatten([layer(x) for layer in layers] + [cell(x[0]) for cell in self.steps])


X = torch.randn(4, 3, I)
EXPECTED = {
    "encoder.words": ("accelerated", fastseq.LSTM, "is now fastseq.LSTM"),
    "encoder.characters": ("accelerated", fastseq.GRU, "is now fastseq.GRU"),
    "steps.0": ("accelerated", fastseq.LSTMCell, "is now fastseq.LSTMCell"),
    "steps.1": ("accelerated", fastseq.GRUCell, "is now fastseq.GRUCell"),
    "mine": ("skipped", Mine, "Mine is a subclass; use fastseq.patch()"),
    "normed": ("accelerated", None, "is now fastseq.GRU"),
    "plain": ("accelerated", fastseq.RNN, "is now fastseq.RNN"),
    "fast": ("skipped", fastseq.GRU, "already"),
}
ACCELERATED = [name for name, (action, _, _) in EXPECTED.items() if action == "accelerated"]


def test_classes_change_and_results_do_not() -> None:
    model = Model()
    before, state = model(X), model.state_dict()
    parameters = [id(p) for p in model.parameters()]
    report = fastseq.accelerate(model)
    assert {c.name: c.action for c in report} == {name: action for name, (action, _, _) in EXPECTED.items()}
    for change in report:
        _, kind, reason = EXPECTED[change.name]
        assert reason in change.reason
        assert kind is None or type(model.get_submodule(change.name)) is kind
    assert model.shared is model.encoder["characters"]
    assert [id(p) for p in model.parameters()] == parameters
    assert state.keys() == model.state_dict().keys()
    for a, b in zip(model(X), before, strict=True):
        torch.testing.assert_close(a, b)
    assert "accelerated encoder.words" in str(report)


def test_undo_reverts_what_was_done_and_no_more() -> None:
    model = Model()
    before = kinds(model)
    fastseq.accelerate(model)
    assert all(c.action == "skipped" for c in fastseq.accelerate(model))  # a second time finds nothing to do
    report = fastseq.accelerate(model, undo=True)
    assert sorted(c.name for c in report if c.action == "reverted") == sorted(ACCELERATED)
    assert ["was built as fastseq.GRU" in c.reason for c in report if c.name == "fast"] == [True]
    assert kinds(model) == before


def kinds(model: nn.Module) -> dict[str, object]:
    """Classes and attributes; a parametrized module's class is its own, so its name and bases stand for it."""
    return {name: (type(m).__name__, type(m).__mro__[1:], set(m.__dict__)) for name, m in model.named_modules()}


class Through(nn.LSTM):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class Own(nn.LSTM):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_forwards_of_ones_own_are_told_apart() -> None:
    """patch() serves those that come to torch's forward, and no others."""
    model = nn.ModuleList([Mine(I, H), Through(I, H), Own(I, H)])
    inherits, through, own = (c.reason for c in fastseq.accelerate(model))
    assert inherits.endswith("Mine is a subclass; use fastseq.patch()")
    assert through.endswith("Through is a subclass whose forward calls super().forward(); use fastseq.patch()")
    assert own.endswith("with a forward of its own, which calls no super().forward(): nothing to replace")


def test_a_forward_set_on_the_instance_stays() -> None:
    layer = nn.LSTM(I, H)
    layer.forward = lambda x: (x, None)
    mine = Mine(I, H)
    mine.forward = layer.forward
    report = fastseq.accelerate(nn.ModuleList([layer, mine]))
    assert [c.action for c in report] == ["skipped", "skipped"]
    assert all("forward set on the instance" in c.reason for c in report)
    assert type(layer) is nn.LSTM
    assert layer(X)[0] is X
    del layer.forward
    assert fastseq.accelerate(layer)[0].action == "accelerated"


def test_a_report_of_nothing_says_so() -> None:
    for undo, told in ((False, "nothing here that fastseq replaces"), (True, "nothing here to revert")):
        report = fastseq.accelerate(nn.Linear(I, H), undo=undo)
        assert report == []
        assert not report
        assert str(report).startswith(told)


def test_undo_all_makes_torchs_of_what_was_built_too() -> None:
    model = Model()
    expected = model(X)
    fastseq.accelerate(model)
    report = fastseq.accelerate(model, undo="all")
    assert {c.name: c.action for c in report} == dict.fromkeys([*ACCELERATED, "fast"], "reverted")
    assert [c.reason for c in report if c.name == "fast"] == ["fastseq.GRU is torch.nn.GRU"]
    assert type(model.fast) is nn.GRU
    for a, b in zip(model(X), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert "fast" in {c.name for c in fastseq.accelerate(model) if c.action == "accelerated"}
    assert model.fast.backend == "reference"  # what it was built with stayed in the instance


def test_undo_all_leaves_what_torchs_class_would_compute_otherwise() -> None:
    model = nn.ModuleList([fastseq.LSTM(I, H, zoneout=0.1, learn_state=True), fastseq.GRU(I, H, recurrent_dropout=0.3)])
    reasons = [(c.action, c.reason) for c in fastseq.accelerate(model, undo="all")]
    assert reasons == [
        ("skipped", "torch.nn.LSTM has no zoneout=0.1, learn_state=True"),
        ("skipped", "torch.nn.GRU has no recurrent_dropout=0.3"),
    ]
    assert type(model[0]) is fastseq.LSTM


def test_undo_all_leaves_the_layers_of_an_encoder() -> None:
    """It calls them with lengths, of which torch's know nothing."""
    encoder = fastseq.Encoder(I, H, 2)
    report = fastseq.accelerate(encoder, undo="all")
    reason = "belongs to a fastseq.Encoder, which calls it with lengths="
    assert report == [("layers.0", "skipped", reason), ("layers.1", "skipped", reason)]
    assert encoder(torch.randn(2, 5, I), [5, 0]).out.shape == (2, 5, H)


def test_other_values_of_undo_are_refused() -> None:
    with pytest.raises(fastseq.InputError, match="undo='both'; use True"):
        fastseq.accelerate(nn.GRU(I, H), undo="both")


def test_a_bare_module() -> None:
    lstm = nn.LSTM(I, H)
    assert [tuple(c)[:2] for c in fastseq.accelerate(lstm)] == [("", "accelerated")]
    assert type(lstm) is fastseq.LSTM
    assert lstm.backend == "auto"
    lstm.backend = "reference"
    assert fastseq.explain(lstm, X).chosen == "reference"


def test_hooks_training_and_copies_live_on() -> None:
    model, seen = nn.Sequential(nn.GRU(I, H)).eval(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    fastseq.accelerate(model)
    assert not model[0].training
    model(X)
    assert seen == [fastseq.GRU]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(nn.Sequential(model[0].__class__(I, H))))):
        assert type(twin[0]) is fastseq.GRU
    assert fastseq.accelerate(copy.deepcopy(model), undo=True)[0].action == "reverted"


def test_an_optimizer_made_before_still_trains() -> None:
    model = nn.LSTM(I, H)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastseq.accelerate(model)
    before = model.weight_hh_l0.detach().clone()
    model(X)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight_hh_l0, before)


def test_module_moves_and_casts() -> None:
    model = nn.LSTM(I, H)
    fastseq.accelerate(model)
    assert model.double()(X.double())[0].dtype == torch.float64
    assert model.bfloat16()(X.bfloat16())[0].dtype == torch.bfloat16
