"""auto, backend=, use_backend, explain: what runs is what was asked for, or what the table says."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fastseq
from fastseq import crossover, dispatch
from fastseq.backends.call import RnnCall
from tests.conftest import needs_native
from tests.twins import BACKENDS, H, I

X = torch.randn(3, 2, I)


def chosen(module: nn.Module, x: torch.Tensor = X, **kwargs: object) -> str | None:
    return fastseq.explain(module, x, **kwargs).chosen


def test_backends_are_named_with_their_reasons() -> None:
    assert list(fastseq.backends()) == ["cpu", "triton", "cuda", "torch", "reference"]
    assert fastseq.backends()["torch"] is None
    assert fastseq.backends()["reference"] is None
    assert fastseq.backends is not sys.modules["fastseq.backends"]


@needs_native
def test_auto_takes_the_kernels_where_they_can_run() -> None:
    assert chosen(fastseq.LSTM(I, H)) == "cpu"
    assert chosen(fastseq.GRUCell(I, H), X[0]) == "cpu"
    assert chosen(nn.GRU(I, H)) == "cpu"


def test_auto_takes_torch_for_what_only_torch_has() -> None:
    assert chosen(fastseq.LSTM(I, H, dtype=torch.float64), X.double()) == "torch"
    assert chosen(fastseq.GRUCell(I, H, dtype=torch.float64), X[0].double()) == "torch"
    assert chosen(fastseq.LSTM(I, H, proj_size=2)) == "torch"
    assert chosen(fastseq.GRU(I, H, dtype=torch.float16), X.half()) == "torch"


def test_float64_under_auto_is_torch_to_the_bit() -> None:
    torch.manual_seed(1)
    stock = nn.LSTM(I, H, 2, dtype=torch.float64)
    fast = fastseq.LSTM(I, H, 2, dtype=torch.float64)
    fast.load_state_dict(stock.state_dict())
    assert torch.equal(stock(X.double())[0], fast(X.double())[0])


@needs_native
def test_an_explicit_backend_runs_or_raises() -> None:
    projected = fastseq.LSTM(I, H, proj_size=2)
    projected.backend = "cpu"
    for module, x, reason in (
        (projected, X, "proj_size=2"),
        (fastseq.GRU(I, H, dtype=torch.float64, backend="cpu"), X.double(), "float64"),
        (fastseq.LSTM(I, H, dtype=torch.float16, backend="cpu"), X.half(), "float16"),
    ):
        with pytest.raises(
            fastseq.InputError, match=rf"backend='cpu' cannot run .*{reason}.*use 'auto' or one of \['to"
        ):
            module(x)


def test_use_backend_stands_for_auto_only() -> None:
    module, named = fastseq.LSTM(I, H), fastseq.LSTM(I, H, backend="torch")
    before = chosen(module)
    with fastseq.use_backend("reference"):
        assert chosen(module) == "reference"
        assert chosen(named) == "torch"
        with fastseq.use_backend("torch"):
            assert chosen(module) == "torch"
            with fastseq.use_backend("auto"):
                assert chosen(module) == before
        assert chosen(module) == "reference"
    assert chosen(module) == before
    with pytest.raises(KeyError), fastseq.use_backend("reference"):
        raise KeyError
    assert chosen(module) == before
    with pytest.raises(fastseq.InputError, match="unknown backend='gpu'"):
        fastseq.use_backend("gpu")


def test_use_backend_changes_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only what is said to run; a plan kept from before does not stand in the way."""
    ran = []
    for name in BACKENDS:
        backend = dispatch.load(name)
        monkeypatch.setattr(backend, "rnn", lambda call, name=name, run=backend.rnn: (ran.append(name), run(call))[1])
    monkeypatch.setattr("fastseq.engine._plans", {})
    module = fastseq.GRU(I, H)
    module(X)
    for name in BACKENDS:
        with fastseq.use_backend(name):
            module(X)
    module(X)
    assert ran == [BACKENDS[0], *BACKENDS, BACKENDS[0]]


def test_use_backend_is_of_its_thread() -> None:
    seen = []
    with fastseq.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        thread.start()
        thread.join()
        assert (dispatch.forced(), seen) == ("reference", [None])
    block = fastseq.use_backend("reference")
    with block, block:
        assert dispatch.forced() == "reference"
    assert dispatch.forced() is None


def test_use_backend_raises_where_it_cannot() -> None:
    with fastseq.use_backend("torch"), pytest.raises(fastseq.InputError, match="backend='torch' cannot run"):
        fastseq.functional.gru(X, None, list(nn.GRU(I, H).parameters()), reset_after=False)


def test_rules_name_backends_and_measurements() -> None:
    for rule in crossover.RULES:
        assert rule.backend in dispatch.BACKENDS
        assert rule.because
        assert all(low < high for low, high in (rule.hidden, rule.batch, rule.steps, rule.threads))
    assert set(crossover.DEFAULT) == set(dispatch.BACKENDS)


def test_rules_hold_within_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = crossover.Rule("reference", "a test", cells=("gru",), hidden=(4, 8), batch=(2, 3), steps=(3, 4), grad=True)
    monkeypatch.setattr(dispatch, "RULES", (rule,))
    assert chosen(fastseq.GRU(I, H)) == "reference"
    with torch.no_grad():
        assert chosen(fastseq.GRU(I, H)) == BACKENDS[0]
    for module, x in (
        (fastseq.LSTM(I, H), X),
        (fastseq.GRU(I, 8), X),
        (fastseq.GRU(I, H), X[:2]),
        (fastseq.GRU(I, H), X[:, :1]),
        (fastseq.GRU(I, H, dtype=torch.bfloat16), X.bfloat16()[:1]),
    ):
        assert chosen(module, x) == BACKENDS[0]
    packed = nn.utils.rnn.pack_sequence([X[:, 0], X[:2, 1]])
    assert chosen(fastseq.GRU(I, H), packed) == "reference"
    monkeypatch.setattr(dispatch, "RULES", (rule._replace(lengths=False), rule._replace(backend="torch", lengths=True)))
    assert chosen(fastseq.GRU(I, H), packed) == "torch"
    assert chosen(fastseq.GRU(I, H), X, lengths=[3, 1]) == "torch"
    assert chosen(fastseq.GRU(I, H)) == "reference"


def test_explain_tells_of_every_backend() -> None:
    told = fastseq.explain(fastseq.LSTM(I, H, proj_size=2), X)
    assert [v.backend for v in told] == list(dispatch.BACKENDS)
    assert sum(v.chosen for v in told) == 1
    assert "→ torch" in str(told)
    projected = fastseq.LSTM(I, H, proj_size=2)
    projected.backend = "cpu"
    told = fastseq.explain(projected, X)
    assert told.chosen is None
    assert "cannot run this call, which raises InputError: " in told[0].reason
    with fastseq.use_backend("torch"):
        told = fastseq.explain(fastseq.GRU(I, H, zoneout=0.1), X)
    assert told.chosen is None
    assert [v.backend for v in told if "which raises InputError" in v.reason] == ["torch"]
    call = RnnCall("gru_reset_before", X, None, None, list(nn.GRU(I, H).parameters()))
    assert {v.backend: v.reason for v in fastseq.explain(call)}[
        "torch"
    ] == "torch has no GRU with the reset gate before the product"
    with pytest.raises(fastseq.InputError, match="4 features"):
        fastseq.explain(fastseq.LSTM(I, H), X[..., :4])


def test_explain_says_which_forwards_reach_nothing() -> None:
    class Own(nn.LSTM):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Through(nn.LSTM):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]

    class Named(nn.LSTM):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.LSTM.forward(self, x)[0]

    class Above(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class Ours(fastseq.LSTM):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for kind in (Own, Above, Ours):
        told = fastseq.explain(kind(I, H), X)
        assert told.chosen is None
        assert all("forward of its own, which calls no super().forward()" in v.reason for v in told)
    for kind in (Through, Named):
        assert fastseq.explain(kind(I, H), X).chosen == BACKENDS[0]
    layer = nn.GRU(I, H)
    layer.forward = lambda x: x
    assert "forward is set on the instance" in str(fastseq.explain(layer, X))


def test_explain_takes_every_input() -> None:
    lstm, cell = fastseq.LSTM(I, H), nn.LSTMCell(I, H)
    for module, x, hx in (
        (lstm, X[:, 0], None),
        (lstm, nn.utils.rnn.pack_sequence([X[:, 0], X[:2, 1]]), None),
        (lstm, X, (torch.zeros(1, 2, H),) * 2),
        (cell, X[0, 0], (torch.zeros(H),) * 2),
    ):
        assert fastseq.explain(module, x, hx).chosen == BACKENDS[0]
    with torch.autocast("cpu", torch.float16):
        assert chosen(lstm) == "torch"


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_traced_models_keep_torchs_operators() -> None:
    module = fastseq.GRU(I, H)
    traced = torch.jit.trace(module, X)
    other = torch.randn(4, 2, I)
    torch.testing.assert_close(traced(other)[0], module(other)[0])
    assert "aten::gru" in str(traced.inlined_graph)
    module.backend = "cpu"
    with pytest.raises(fastseq.InputError, match="cannot run this call"):
        torch.jit.trace(module, X)


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.engine._MOST_PLANS", 3)
    monkeypatch.setattr("fastseq.engine._plans", {})
    module = fastseq.GRU(I, H)
    for steps in range(1, 9):
        module(torch.zeros(steps, 2, I))
        assert len(fastseq.engine._plans) <= 3


def test_a_distribution_called_fastseq_is_warned_of(tmp_path: Path) -> None:
    info = tmp_path / "fastseq-0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseq\nVersion: 0.2\n")
    for path, warned in ((tmp_path, True), (info, False)):
        code = f"import sys; sys.path.append({str(path)!r}); import fastseq"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ("pip uninstall fastseq" in done.stderr) is warned
