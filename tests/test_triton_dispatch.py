"""What would run on a GPU, without one: fake CUDA tensors take the way of real ones up to the operators' fake kernels.

PyTorch built for the CPU alone records no gradients for such tensors; what backward gives is asked of its operators.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fastseq
from fastseq import _triton, crossover, dispatch, engine
from fastseq.backends.call import RnnCall
from fastseq.backends.decoder_call import DecoderCall, mapped
from fastseq.checks import checked_lengths
from fastseq.crossover import Rule
from tests.decoder_oracle import preset as preset_case
from tests.test_decoder_plan import REFUSED, decoder_call

pytest.importorskip("triton")

T, B, S, I, H, D = 6, 4, 9, 5, 8, 7  # noqa: E741
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRESETS = (
    "sutskever", "cho", "bahdanau", "luong", "opennmt", "fairseq", "joeynmt", "tf_nmt", "gnmt", "conditional_gru",
    "bentrevett",
)  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
presets = pytest.mark.parametrize("preset", PRESETS)
backends = pytest.mark.parametrize("backend", ["auto", "triton"])


class Indexing(TorchFunctionMode):
    """`t[...]` by views: PyTorch's own indexing asks for a driver even of a fake tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__getitem__ or not isinstance(args[0], FakeTensor):
            return function(*args, **(kwargs or {}))
        t, index = args
        index, dim = index if isinstance(index, tuple) else (index,), 0
        taken = sum(i is not None and i is not Ellipsis for i in index)
        for i in index:
            if i is None:
                t, dim = t.unsqueeze(dim), dim + 1
            elif i is Ellipsis:
                dim = t.dim() - (taken - sum(j is not None for j in index[: index.index(...)]))
            elif isinstance(i, slice):
                t, dim = torch.ops.aten.slice(t, dim, i.start, i.stop, i.step or 1), dim + 1
            else:
                t = t.select(dim, i)
        return t


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU, as far as the Triton backend can tell, and no plan kept from or for a machine without one."""
    found = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(_triton, "torch", found)
    monkeypatch.setattr(_triton, "interprets", lambda: False)
    monkeypatch.setattr(dispatch, "gpu_name", lambda index: "some GPU")
    monkeypatch.setattr(engine, "_plans", {})
    with FakeTensorMode(), torch.no_grad(), Indexing():
        yield


def faked(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    """The module, built on the CPU, with fake CUDA parameters and buffers."""
    with unset_fake_temporarily():
        module = build()
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, t in tensors.items():
                if t is not None:
                    kind = dtype if t.is_floating_point() else t.dtype
                    tensors[name] = nn.Parameter(fake(*t.shape, dtype=kind), requires_grad=False)
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    return module


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def same(t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert t is not None
    assert (tuple(t.shape), t.dtype, t.device.type) == (shape, dtype, "cuda")


def chosen(module: Any, *args: Any, **kwargs: Any) -> str | None:
    return fastseq.explain(module, *args, **kwargs).chosen


@dtypes
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("backend", "rows"),
    [("auto", "lengths"), ("triton", "lengths"), ("triton", "full"), ("auto", "resets"), ("triton", "resets")],
)
def test_layers(kind: str, dtype: torch.dtype, batch_first: bool, backend: str, rows: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    module = faked(lambda: getattr(fastseq, kind)(I, H, backend=backend, **options), dtype)
    lead = (B, T) if batch_first else (T, B)
    lengths = fake(B, dtype=torch.int32) if rows == "lengths" else None
    resets = fake(*lead, dtype=torch.bool) if rows == "resets" else None
    assert chosen(module, fake(*lead, I, dtype=dtype), lengths=lengths, resets=resets) == "triton"
    out, state = module(fake(*lead, I, dtype=dtype), lengths=lengths, resets=resets)
    same(out, (*lead, 2 * H), dtype)
    for s in state if kind == "LSTM" else (state,):
        same(s, (4, B, H), dtype)


NOISE: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"zoneout": (0.1, 0.5), "recurrent_dropout": 0.3}),
    ("GRU", {"recurrent_dropout": 0.3, "recurrent_dropout_on": "update"}),
    ("RNN", {"zoneout": 0.1}),
]


@backends
@pytest.mark.parametrize("steps", [T, 1])
@pytest.mark.parametrize(("kind", "options"), NOISE, ids=str)
def test_layers_that_draw_masks(kind: str, options: dict[str, Any], steps: int, backend: str) -> None:
    """cuDNN has none, so `auto` does not stop there; one step goes the layer's way."""
    module = faked(lambda: getattr(fastseq, kind)(I, H, 2, bidirectional=True, backend=backend, **options))
    x = fake(steps, B, I)
    told = {verdict.backend: verdict.reason for verdict in fastseq.explain(module, x)}
    assert chosen(module, x) == "triton"
    assert "neither zoneout nor dropout within the recurrence" in told["torch"]
    out, state = module(x)
    same(out, (steps, B, 2 * H), torch.float32)
    for s in state if kind == "LSTM" else (state,):
        same(s, (4, B, H), torch.float32)


@backends
def test_every_cell_state(backend: str) -> None:
    module = faked(lambda: fastseq.LSTM(I, H, 2, bidirectional=True, backend=backend))
    out, (h, c), cells = module.forward_states(fake(T, B, I))
    for t in (out, cells):
        same(t, (T, B, 2 * H), torch.float32)
    for s in (h, c):
        same(s, (4, B, H), torch.float32)


@dtypes
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_cells(kind: str, dtype: torch.dtype) -> None:
    module = faked(lambda: getattr(fastseq, kind)(I, H, backend="triton"), dtype)
    x = fake(B, I, dtype=dtype)
    assert chosen(module, x) == "triton"
    state = module(x)
    for s in state if kind == "LSTMCell" else (state,):
        same(s, (B, H), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_autocast_answers_in_the_dtype_of_torch_nn(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a state of any dtype and without. torch.nn's GRU asks for a driver even of fake tensors."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    ours, stock = (faked(lambda of=of: of(I, H)) for of in (getattr(fastseq, name), getattr(nn, name)))
    ours.backend, lead = "triton", (1,) if name == "LSTM" else ()
    x = fake(*((T,) if name == "LSTM" else ()), B, I)
    for state in (None, torch.float32, dtype):
        hx = None if state is None else (fake(*lead, B, H, dtype=state), fake(*lead, B, H, dtype=state))
        with torch.autocast("cuda", dtype):
            found = [[t.dtype for t in tree_leaves(module(x, hx))] for module in (ours, stock)]
        assert found[0] == found[1] == [dtype] * len(found[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_auto_leaves_to_torch_what_was_not_measured(kind: str) -> None:
    """Whole sequences and packed data to cuDNN, one step to PyTorch's own kernels, float64 to either."""
    layer = faked(lambda: getattr(fastseq, kind)(I, H))
    assert chosen(layer, fake(T, B, I)) == "torch"
    assert chosen(layer, fake(1, B, I)) == "torch"
    assert chosen(faked(lambda: getattr(fastseq, f"{kind}Cell")(I, H)), fake(B, I)) == "torch"
    assert (
        chosen(faked(lambda: getattr(fastseq, kind)(I, H), torch.float64), fake(T, B, I, dtype=torch.float64))
        == "torch"
    )
    weights = list(layer.parameters())
    packed = RnnCall(kind.lower(), fake(3, I), None, None, weights, batch_sizes=torch.tensor([2, 1]))
    assert next(dispatch.candidates(packed))[0] == "torch"


def test_auto_goes_on_where_triton_refuses() -> None:
    projecting = faked(lambda: fastseq.LSTM(I, H, proj_size=3))
    assert chosen(projecting, fake(T, B, I), lengths=fake(B, dtype=torch.int64)) == "torch"
    windowed = faked(lambda: fastseq.Attention(H, D, 6, window=fastseq.LocalP(2)))
    assert chosen(windowed, fake(B, H), windowed.prepare(memory())) == "reference"
    with pytest.raises(fastseq.InputError, match="backend='triton' cannot run this call: proj_size=3 is not fused"):
        faked(lambda: fastseq.LSTM(I, H, proj_size=3, backend="triton"))(fake(T, B, I))


LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.dtype, str]] = {
    "a projection": (lambda: fastseq.LSTM(I, H, proj_size=3), torch.float32, "proj_size=3 is not fused"),
    "float64": (lambda: fastseq.GRU(I, H), torch.float64, "the input is torch.float64; these kernels take float32, b"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refused_with_a_reason(name: str) -> None:
    """By name it raises, and `auto` goes elsewhere."""
    build, dtype, message = LAYERS[name]
    module, x = faked(build, dtype), fake(T, B, I, dtype=dtype)
    explained = fastseq.explain(module, x, lengths=fake(B, dtype=torch.int64))
    assert explained.chosen in ("torch", "reference")
    assert message in next(verdict.reason for verdict in explained if verdict.backend == "triton")
    module.backend = "triton"
    with pytest.raises(fastseq.InputError, match=f"backend='triton' cannot run this call: {message}"):
        module(x)


def test_the_reset_before_the_product_is_refused() -> None:
    weights = list(faked(lambda: nn.GRU(I, H)).parameters())
    with pytest.raises(fastseq.InputError, match="cannot run this call: gru_reset_before has no fused sequence kernel"):
        fastseq.functional.gru(fake(T, B, I), None, weights, reset_after=False, backend="triton")
    call = RnnCall("gru_reset_before", fake(T, B, I), None, None, weights)
    assert dispatch.choose(call, "auto").NAME == "reference"


def test_a_cpu_tensor_is_refused() -> None:
    with unset_fake_temporarily():
        module, x = fastseq.GRU(I, H, backend="triton"), torch.randn(T, B, I)
        with pytest.raises(fastseq.InputError, match="the input is on cpu; these kernels run on a GPU"):
            module(x)


def test_attention_refused_with_a_reason() -> None:
    for window, dtype, message in (
        (fastseq.LocalP(2), torch.float32, "window=2: local-p attention is not fused"),
        (None, torch.float64, "the query is torch.float64; these kernels take"),
    ):
        module = faked(lambda window=window: fastseq.Attention(H, D, 6, window=window, backend="triton"), dtype)
        keys, query = module.prepare(memory(dtype)), fake(B, T, H, dtype=dtype)
        with pytest.raises(fastseq.InputError, match=f"backend='triton' cannot run this call: {message}"):
            module(query, keys)
        module.backend = "auto"
        assert chosen(module, query, keys) == "reference"


DECODERS = {name: REFUSED[name] for name in REFUSED if name not in ("fp16", "odd bf16")} | {
    "fp64": (REFUSED["fp64"][0], r"y is torch.float64; these kernels take float32, bfloat16 and float16"),
    "many layers": (
        lambda: decoder_call(preset_case("luong", num_layers=9)), "num_layers=9 .* at most 8 layers loop",
    ),
    "rnn cells": (lambda: decoder_call(preset_case("luong", "rnn_tanh")), "cell='rnn_tanh' within a decoder's loop"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_refused_with_a_reason(name: str) -> None:
    build, message = DECODERS[name]
    with unset_fake_temporarily():
        call = build()
    given = mapped(lambda t: fake(*t.shape, dtype=t.dtype), (call.y, call.keys, call.state, call.params, call.masks))
    moved = DecoderCall(call.spec, *given)
    explained = fastseq.explain(moved)
    assert explained.chosen in ("cuda", "reference")
    assert re.search(message, next(verdict.reason for verdict in explained if verdict.backend == "triton"))
    with pytest.raises(fastseq.InputError, match=rf"backend='triton' cannot run this call: .*{message}"):
        fastseq.functional.attention_decoder(
            moved.y, moved.keys, moved.state, moved.params, moved.spec, dropout_masks=moved.masks, backend="triton"
        )


def test_machines_that_cannot_run_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = faked(lambda: fastseq.GRU(I, H, backend="triton")), fake(T, B, I)
    absent = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    for name, stand_in, message in (
        ("_installed", lambda: False, "triton is not installed; pip install triton"),
        ("torch", absent, "PyTorch reaches no GPU here"),
        ("shutil.which", lambda name: None, "Triton needs a C compiler at run time and found none"),
        ("sysconfig.get_paths", lambda: {"include": "nowhere"}, "Triton needs Python's headers at run time"),
    ):
        _triton._no_compiler.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"fastseq._triton.{name}", stand_in)
            with pytest.raises(fastseq.InputError, match=f"backend='triton' cannot run this call: {message}"):
                module(x)
        _triton._no_compiler.cache_clear()


def test_every_backend_says_why() -> None:
    told = {v.backend: v.reason for v in fastseq.explain(faked(lambda: fastseq.GRU(I, H)), fake(T, B, I))}
    assert told["cpu"] == "the input is on cuda:0; these kernels run on the CPU"
    assert "runs this call: unmeasured" in told["torch"]
    assert "could; torch goes first" in told["triton"]


def memory(dtype: torch.dtype = torch.float32) -> fastseq.Memory:
    return fastseq.Memory(fake(B, S, D, dtype=dtype), fake(B, S, dtype=torch.bool))


@dtypes
@backends
@pytest.mark.parametrize("score", ["additive", "dot", "general", "concat"])
@pytest.mark.parametrize("steps", [None, T])
def test_attention(score: str, backend: str, dtype: torch.dtype, steps: int | None) -> None:
    size = D if score == "dot" else H
    units = 6 if score in ("additive", "concat") else None
    module = faked(lambda: fastseq.Attention(size, D, units, score=score, backend=backend), dtype)
    keys, lead = module.prepare(memory(dtype)), (B,) if steps is None else (B, steps)
    assert chosen(module, fake(*lead, size, dtype=dtype), keys) == "triton"
    context, weights = module(fake(*lead, size, dtype=dtype), keys, need_weights=True)
    same(context, (*lead, D), dtype)
    same(weights, (*lead, S), dtype)


def decoder(preset: str, **options: Any) -> fastseq.Decoder:
    layers = {} if preset == "conditional_gru" else {"num_layers": 3 if preset == "gnmt" else 1}
    reads = {} if preset == "sutskever" else {"memory_size": D}
    made = getattr(fastseq.Decoder, preset)(I, H, bridge="zero", **layers, **reads, **options)
    assert isinstance(made, fastseq.Decoder)
    return made


def read_by(preset: str, dtype: torch.dtype) -> fastseq.Memory:
    return fastseq.Memory(None, None, state=((fake(B, D, dtype=dtype),),)) if preset == "sutskever" else memory(dtype)


@presets
@backends
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_decoders(preset: str, backend: str, dtype: torch.dtype) -> None:
    module = faked(lambda: decoder(preset, backend=backend), dtype)
    y, of = fake(B, T, I, dtype=dtype), read_by(preset, dtype)
    assert chosen(module, y, of) == "triton"
    found = module(y, of, need_weights=True)
    same(found.output, (B, T, module.output_size), dtype)
    if found.weights is not None:
        same(found.weights, (B, T, S), dtype)
    for layer in found.state.layers:
        for leaf in layer:
            same(leaf, (B, H), leaf.dtype)


@presets
def test_one_step_of_a_decoder(preset: str) -> None:
    """As generation makes it: beams read the keys of their row."""
    module = faked(lambda: decoder(preset))
    of = read_by(preset, torch.float32)
    found = module.step(fake(B, I), module.prepare(of), module.init_state(of))
    same(found.output, (B, module.output_size), torch.float32)


@backends
def test_the_loss_of_a_whole_model(backend: str) -> None:
    def build() -> nn.Module:
        encoder = fastseq.Encoder(I, H, bidirectional=True, embedding=nn.Embedding(11, I))
        made = fastseq.Decoder.luong(I, H, memory_size=2 * H, bridge="zero", backend=backend)
        return fastseq.Seq2Seq(encoder, made, 11, bos_id=1, eos_id=2, pad_id=0, embedding=nn.Embedding(11, I))

    model = faked(build)
    src, tgt = fake(B, S, dtype=torch.int64), fake(B, T, dtype=torch.int64)
    same(model.loss(src, tgt, fake(B, dtype=torch.int64)), (), torch.float32)
    assert chosen(model, src, tgt) == "triton"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@dtypes
def test_what_backward_gives_for_a_layer(cell: str, dtype: torch.dtype) -> None:
    gates = {"lstm": 4, "gru": 3}[cell]
    x, h0 = fake(T, B, I, dtype=dtype), fake(1, B, H, dtype=dtype)
    c0 = h0 if cell == "lstm" else None
    weights = [fake(gates * H, n, dtype=dtype) for n in (I, H)] + [fake(gates * H, dtype=dtype)] * 2
    options = (weights, None, None, None, False, False)
    out, h_n, _, _, kept, cells = torch.ops.fastseq.rnn_forward(cell, x, h0, c0, *options, True, [], [], False)
    results = (out, kept, cells, [True] * 4, [], [])
    d = torch.ops.fastseq.rnn_backward(cell, out, h_n, None, None, x, h0, c0, *options, *results)
    for found, of in zip(d, [x, h0, c0, *weights], strict=True):
        if of is not None:
            same(found, tuple(of.shape), dtype)


@dtypes
def test_what_backward_gives_for_an_attention(dtype: torch.dtype) -> None:
    q, keys, values, v = (fake(*s, dtype=dtype) for s in ((B, T, 6), (B, S, 6), (B, S, D), (6,)))
    context, weights = torch.ops.fastseq.attention_forward(q, keys, values, None, v, True)
    d = torch.ops.fastseq.attention_backward(context, None, q, keys, values, None, v, weights)
    for found, of in zip(d, (q, keys, values, v), strict=True):
        same(found, tuple(of.shape), dtype)


def test_a_measured_rule_goes_first_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Rule("triton", "1.4 times as fast", device="cuda", machine="some GPU", hidden=(0, 64), dtypes=("bfloat16",))
    monkeypatch.setattr(dispatch, "RULES", (small, *crossover.RULES))
    x = fake(T, B, I, dtype=torch.bfloat16)
    assert chosen(faked(lambda: fastseq.LSTM(I, H), torch.bfloat16), x) == "triton"
    assert chosen(faked(lambda: fastseq.LSTM(I, 64), torch.bfloat16), x) == "torch"
    assert chosen(faked(lambda: fastseq.LSTM(I, H)), fake(T, B, I)) == "torch"
    monkeypatch.setattr(dispatch, "gpu_name", lambda index: "another GPU")
    assert chosen(faked(lambda: fastseq.LSTM(I, H), torch.bfloat16), x) == "torch"


ROW = {"operator": "rnn", "device": "cuda", "machine": "some GPU", "backend": "triton", "because": "1.4 times as fast"}


def test_measured_rules_are_read_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "crossovers.json"
    assert crossover.measured(file) == ()
    rows = [ROW, ROW | {"cells": ["lstm"], "dtypes": ["float32"], "hidden": [0, 64], "batch": [8, None], "grad": True}]
    file.write_text(json.dumps(rows))
    plain, bounded = crossover.measured(file)
    assert bounded.batch == (8, crossover.MOST)
    assert bounded.cells == ("lstm",)
    assert [crossover.to_row(rule) for rule in (plain, bounded)] == rows
    assert crossover.measured() == tuple(rule for rule in crossover.RULES if rule.machine is not None)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("text", "a row is str"),
        ({"backend": "triton"}, "fields .* are missing"),
        (ROW | {"hiden": [0, 1]}, r"fields \['hiden'\] are unknown"),
        (ROW | {"backend": "gpu"}, "backend='gpu'; expected cpu, triton, cuda, torch"),
        (ROW | {"cells": "lstm"}, "cells='lstm'; expected a list of lstm"),
        (ROW | {"dtypes": []}, "dtypes=.*; expected a list of"),
        (ROW | {"hidden": [64, 64]}, "low below high"),
        (ROW | {"steps": [1]}, r"steps=\[1\]; expected \[low, high\]"),
        (ROW | {"batch": [0, 1.5]}, "expected whole numbers"),
        (ROW | {"grad": 1}, "grad=1; expected true, false or null"),
        (ROW | {"because": ""}, "because=''; expected text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, fault: str) -> None:
    file = tmp_path / "crossovers.json"
    file.write_text(json.dumps([ROW, row]))
    with pytest.raises(ValueError, match=rf"crossovers.json: row 1: .*{fault}.*python -m benchmarks tune"):
        crossover.measured(file)
    for text in ("{}", "["):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"crossovers.json: .*python -m benchmarks tune"):
            crossover.measured(file)


def test_lengths_on_a_gpu_are_asked_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host would wait for them. A fake tensor has no values: to ask raises."""
    lengths, x = fake(B, dtype=torch.int32), fake(T, B, I)
    assert checked_lengths(lengths, x, B, T).device.type == "cuda"
    monkeypatch.setenv("FASTSEQ_CHECK", "1")
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        checked_lengths(lengths, x, B, T)
