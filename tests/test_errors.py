"""Every wrong input is refused before a backend sees it, with its value, the limit and the remedy."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fastseq
from tests.twins import BACKENDS

LSTM, GRU = fastseq.LSTM(5, 6, 2), fastseq.GRU(5, 6, 2, batch_first=True)
CELL, GRU_CELL = fastseq.LSTMCell(5, 6), fastseq.GRUCell(5, 6)
X = torch.zeros(4, 3, 5)  # T=4, B=3; for GRU, which is batch_first, B=4, T=3
H = torch.zeros(2, 3, 6)
R = torch.zeros(4, 3).bool()
PACKED = pack_sequence([torch.zeros(2, 5), torch.zeros(1, 5)])

VALUES: dict[str, tuple[Callable[[], Any], str]] = {  # name: (call, what the message must say)
    "rank 1": (lambda: LSTM(X[0, 0]), r"shape \(5,\), 1-D; expected \[T, B, I\]"),
    "rank 4": (lambda: GRU(X[None]), r"shape \(1, 4, 3, 5\), 4-D; expected \[B, T, I\]"),
    "rank of a cell": (lambda: CELL(X), r"shape \(4, 3, 5\), 3-D; expected \[B, I\]"),
    "features": (lambda: LSTM(X[..., :4]), r"4 features, .* input_size=5"),
    "features of a cell": (lambda: GRU_CELL(X[0, :, :4]), r"4 features, .* input_size=5"),
    "no steps": (lambda: LSTM(X[:0]), r"T=0 .* lengths="),
    "no steps, batch first": (lambda: GRU(X[:, :0]), r"T=0"),
    "no steps, unbatched": (lambda: LSTM(X[:0, 0]), r"T=0"),
    "integer input": (lambda: LSTM(X.long()), r"torch.int64; .*input.float\(\)"),
    "complex input": (lambda: LSTM(X.to(torch.complex64)), r"torch.complex64"),
    "boolean input": (lambda: CELL(X[0].bool()), r"torch.bool"),
    "input dtype": (
        lambda: LSTM(X.double()),
        r"weight_ih_l0 \(weights\[0\]\) is torch.float32, input is torch.float64; convert input.to\(torch.float32\),",
    ),
    "input dtype of a cell": (
        lambda: CELL(X[0].bfloat16()),
        r"weight_ih \(weights\[0\]\) .*input is torch.bfloat16.*autocast",
    ),
    "state dtype": (lambda: LSTM(X, (H.double(), H.double())), r"h0 is torch.float64, input is torch.float32"),
    "state dtypes differ": (lambda: fastseq.LSTM(5, 6, 2).bfloat16()(X.bfloat16(), (H, H.bfloat16())), r"c0 is"),
    "integer state": (lambda: GRU_CELL(X[0], H[0].long()), r"h0 is torch.int64"),
    "device": (
        lambda: LSTM(X.to("meta")),
        r"weight_ih_l0 .* is on cpu, input on meta; move input.to\('cpu'\), or the module",
    ),
    "state device": (lambda: LSTM(X, (H.to("meta"), H)), r"h0 is on meta, input on cpu"),
    "batch of hx": (lambda: LSTM(X, (H[:, :2], H)), r"h0 has shape \(2, 2, 6\), expected \(2, 3, 6\)"),
    "layers of hx": (lambda: LSTM(X, (H, H[:1])), r"c0 has shape \(1, 3, 6\), expected \(2, 3, 6\)"),
    "units of hx": (lambda: GRU(X.mT.mT, torch.zeros(2, 4, 5)), r"h0 has shape \(2, 4, 5\), expected \(2, 4, 6\)"),
    "rank of hx": (lambda: LSTM(X, (H[:, 0], H[:, 0])), r"h0 has shape \(2, 6\), expected \(2, 3, 6\)"),
    "rank of hx, unbatched": (lambda: LSTM(X[:, 0], (H, H)), r"3-D, with an unbatched input; expected 2-D"),
    "rank of hx, one row": (lambda: CELL(X[0, 0], (H[0], H[0])), r"2-D, with an unbatched input; expected 1-D"),
    "hx of a cell": (lambda: GRU_CELL(X[0], H[0, :2]), r"h0 has shape \(2, 6\), expected \(3, 6\)"),
    "hx of packed rows": (lambda: LSTM(PACKED, (H, H)), r"expected \(2, 2, 6\)"),
    "negative length": (lambda: LSTM(X, lengths=[4, -1, 2]), r"lengths\[1\]=-1 is outside \[0, T=4\]"),
    "long length": (lambda: LSTM(X, lengths=torch.tensor([4, 2, 5])), r"lengths\[2\]=5 is outside \[0, T=4\]; .*pad"),
    "long length, batch first": (lambda: GRU(X, lengths=[4, 1, 1, 1]), r"lengths\[0\]=4 is outside \[0, T=3\]"),
    "number of lengths": (lambda: LSTM(X, lengths=[1, 2]), r"shape \(2,\), expected \(3,\)"),
    "rank of lengths": (lambda: LSTM(X, lengths=torch.ones(3, 1).long()), r"shape \(3, 1\), expected \(3,\)"),
    "lengths, packed": (lambda: LSTM(PACKED, lengths=[2, 1]), r"PackedSequence, which has its own"),
    "lengths, unbatched": (lambda: LSTM(X[:, 0], lengths=[2]), r"unbatched input; .*input\[:length\]"),
    "dtype of resets": (lambda: LSTM(X, resets=torch.zeros(4, 3)), r"resets is torch.float32, .*resets.bool\(\)"),
    "shape of resets": (lambda: LSTM(X, resets=R[:, :2]), r"resets has shape \(4, 2\), expected \(4, 3\)"),
    "layout of resets": (lambda: GRU(X, resets=R.mT), r"resets has shape \(3, 4\), expected \(4, 3\)"),
    "resets, unbatched": (lambda: LSTM(X[:, 0], resets=R), r"resets has shape \(4, 3\), expected \(4,\)"),
    "device of resets": (lambda: GRU(X, resets=R.to("meta")), r"resets is on meta, input on cpu; .*\.to\('cpu'\)"),
    "resets, packed": (lambda: GRU(PACKED, resets=R), r"resets with a PackedSequence; pad it .*lengths="),
    "resets on torch": (
        lambda: fastseq.LSTM(5, 6, backend="torch")(X, resets=R),
        r"backend='torch' cannot run this call: torch's operators have no resets .*'reference'",
    ),
    "unknown backend": (
        lambda: fastseq.LSTM(5, 6, backend="gpu"),
        r"unknown backend='gpu'; use one of \['auto', 'cpu'",
    ),
    "unknown backend later": (lambda: _with(fastseq.GRU(5, 6), backend="fast")(X), r"unknown backend='fast'"),
    "weight shape": (lambda: _with(fastseq.LSTM(5, 6), weight_hh_l0=nn.Parameter(torch.zeros(24, 5)))(X), r"weight_hh"),
    "layer_norm set later": (lambda: _with(fastseq.GRU(5, 6), layer_norm=True)(X), r"parameters of its own.*build"),
    "learn_state set later": (lambda: _with(fastseq.LSTM(5, 6), learn_state=True)(X), r"parameters of its own.*build"),
    "mask of integers for lengths": (lambda: GRU(X, lengths=(~R).int()), r"of a mask, .*pass mask.sum\(1\)"),
    "dtype of one weight": (
        lambda: _with(
            fastseq.GRU(5, 6, 2, bidirectional=True), bias_ih_l1_reverse=nn.Parameter(torch.zeros(18).half())
        )(X),
        r"bias_ih_l1_reverse \(weights\[14\]\) is torch.float16, .*; convert bias_ih_l1_reverse.to\(torch.float32\)",
    ),
    "weight dtype": (lambda: _with(fastseq.GRU(5, 6), bias_hh_l0=nn.Parameter(torch.zeros(18).half()))(X), r"float16"),
}
TYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "list for input": (lambda: LSTM([[0.0] * 5]), r"input must be a torch.Tensor, got list"),
    "array for input": (lambda: CELL(X[0].numpy()), r"input must be a torch.Tensor, got ndarray"),
    "None for input": (lambda: GRU(None), r"got NoneType; or a PackedSequence"),
    "tensor for a pair": (lambda: LSTM(X, H), r"pair \(h0, c0\), got Tensor"),
    "three states": (lambda: LSTM(X, (H, H, H)), r"pair \(h0, c0\), got tuple of length 3"),
    "half a pair": (lambda: LSTM(X, (H, None)), r"has c0=None; pass both states"),
    "pair for a GRU": (lambda: GRU(X, (H, H)), r"h0 must be a torch.Tensor, got tuple"),
    "pair for a GRU, packed": (lambda: GRU(PACKED, (H, H)), r"h0 must be a torch.Tensor, got tuple"),
    "array for hx": (lambda: GRU_CELL(X[0], H[0].numpy()), r"h0 must be a torch.Tensor, got ndarray"),
    "float lengths": (lambda: LSTM(X, lengths=torch.ones(3)), r"integers, got torch.float32; .*long\(\)"),
    "boolean lengths": (lambda: LSTM(X, lengths=torch.ones(3).bool()), r"integers, got torch.bool"),
    "mask for lengths": (lambda: GRU(X, lengths=~R), r"got torch.bool; of a mask, .*pass mask.sum\(1\)"),
    "mask for lengths, time first": (lambda: LSTM(X, lengths=~R), r"of a mask, .*pass mask.sum\(0\)"),
    "float list": (lambda: LSTM(X, lengths=[1, 2.5, 3]), r"integers, got lengths\[1\]=2.5; convert by int"),
    "boolean list": (lambda: LSTM(X, lengths=[True, False, 3]), r"got lengths\[0\]=True; give each row's number"),
    "number for lengths": (lambda: LSTM(X, lengths=3), r"lengths must be a torch.Tensor, got int; pass a list"),
    "lengths of a cell": (lambda: CELL(X[0], lengths=[1]), r"lengths"),
    "backend is no string": (lambda: fastseq.LSTM(5, 6, backend=None), r"backend must be a str, got NoneType"),
    "list for resets": (lambda: LSTM(X, resets=[True] * 4), r"resets must be a torch.Tensor, got list; pass a bool"),
    "resets of a cell": (lambda: CELL(X[0], resets=R), r"resets"),
    "resets of a cell, explained": (lambda: fastseq.explain(CELL, X[0], resets=R), r"a cell takes no resets"),
    "no module": (lambda: fastseq.accelerate(torch.relu), r"torch.nn.Module"),
    "explained without input": (lambda: fastseq.explain(LSTM), r"of the kind LSTM needs input"),
    "explained without input, Encoder": (lambda: fastseq.explain(fastseq.Encoder(5, 6)), r"Encoder needs x"),
    "explained lengths of no such module": (
        lambda: fastseq.explain(fastseq.Attention(4, 5, 6), X, X, lengths=[1]),
        r"Attention takes no lengths",
    ),
    "nothing to explain": (lambda: fastseq.explain(nn.Linear(2, 2), X), r"got Linear"),
}


def _with(module: nn.Module, **changes: Any) -> nn.Module:
    for name, value in changes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values(name: str) -> None:
    call, message = VALUES[name]
    for kind in (ValueError, RuntimeError):  # torch.nn raises now one, now the other
        with pytest.raises(kind, match=message) as caught:
            call()
        assert type(caught.value) is fastseq.InputError


@pytest.mark.parametrize("name", TYPES)
def test_wrong_types(name: str) -> None:
    call, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_good_call_of_the_same_kind_does_not_let_a_bad_one_through(backend: str) -> None:
    """Plans are kept by kind of call: whatever can make a call wrong must be part of the kind."""
    module = fastseq.LSTM(5, 6, 2, backend=backend)
    resets = {} if backend == "torch" else {"resets": R}
    module(X, (H, H), lengths=[4, 1, 0], **resets)
    for bad in (
        lambda: module(X, (H, H), lengths=[4, 1, 0], resets=R[:2]),
        lambda: module(X, (H, H), lengths=[4, 1, 0], resets=R.int()),
        lambda: module(X, (H, H), lengths=[4, 1, 5]),
        lambda: module(X, (H, H[:1]), lengths=[4, 1, 0]),
        lambda: module(X, (H.double(), H.double())),
        lambda: module(X[..., :4], (H, H)),
        lambda: _with(module, weight_hh_l1=nn.Parameter(torch.zeros(24, 7)))(X, (H, H)),
    ):
        with pytest.raises(fastseq.InputError):
            bad()


NEVER: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "zoneout": (fastseq.LSTM, {"zoneout": 0.1, "backend": "torch"}, "torch's operators have neither zoneout nor"),
    "zoneout of a GRU": (fastseq.GRU, {"zoneout": 0.1, "backend": "torch"}, "torch's operators have neither zoneout"),
    "norms": (fastseq.GRU, {"layer_norm": True, "backend": "torch"}, "torch's operators have no layer normalisation"),
    "projection": (fastseq.LSTM, {"proj_size": 3, "backend": "cpu"}, "proj_size=3 is not fused"),
    "projection, Triton": (fastseq.LSTM, {"proj_size": 3, "backend": "triton"}, "proj_size=3 is not fused"),
    "norms, CUDA": (fastseq.LSTM, {"layer_norm": True, "backend": "cuda"}, "layer normalisation is not in these"),
    "Cho's reset": (fastseq.Encoder, {"cell": "gru_reset_before", "backend": "cpu"}, "gru_reset_before has no fused"),
    "an encoder's layers": (fastseq.Encoder, {"zoneout": 0.1, "backend": "torch"}, "torch's operators have neither"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_a_backend_never_runs_is_refused_when_built(name: str) -> None:
    """With what the call says; by any other way to such a layer it is the call that says it."""
    cls, options, message = NEVER[name]
    with pytest.raises(fastseq.InputError, match=rf"cannot run this call: {message}.*use 'auto' or .*'reference'\]"):
        cls(5, 6, **options)
    with torch.device("meta"), pytest.raises(fastseq.InputError, match=message):
        cls(5, 6, **options)
    if cls is not fastseq.Encoder:
        late = cls(5, 6, **(options | {"backend": "auto"}))
        late.backend = options["backend"]
        assert copy.deepcopy(late).backend == pickle.loads(pickle.dumps(late)).backend == options["backend"]
        with fastseq.use_backend(options["backend"]):
            cls(5, 6, **(options | {"backend": "auto"}))
        with pytest.raises(fastseq.InputError) as built:
            cls(5, 6, **options)
        with pytest.raises(fastseq.InputError, match="cannot run this call") as called:
            late(X)
        if options["backend"] in ("torch", "cpu"):  # of others it may be their absence
            assert str(called.value) == str(built.value)


def test_what_a_backend_runs_at_times_is_built() -> None:
    assert fastseq.LSTM(5, 6, recurrent_dropout=0.1, backend="torch").eval()(X)[0].shape == (4, 3, 6)
    fastseq.GRU(5, 6, zoneout=0.1, layer_norm=True, backend="triton")
    fastseq.LSTM(5, 6, zoneout=0.1, learn_state=True, backend="cuda")


def test_constructor_faults_are_torchs() -> None:
    for bad, kind in (({"dropout": 2.0}, ValueError), ({"proj_size": 9}, ValueError), ({"bias": 1}, TypeError)):
        with pytest.raises(kind):
            fastseq.LSTM(5, 6, **bad)
    with pytest.raises(ValueError, match="proj_size"):
        fastseq.GRU(5, 6, proj_size=3)
