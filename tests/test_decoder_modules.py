"""fastseq.Decoder as a module: parameters, copies, dropout, dtypes, compilation, and what it reads."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastseq
from fastseq import (
    Attention,
    Bridge,
    Decoder,
    DecoderOutput,
    DecoderState,
    Encoder,
    InputError,
    LocalP,
    Memory,
    _native,
)
from fastseq.spec import DropoutMasks
from tests.decoder_loops import LOOPS
from tests.oracle import compare
from tests.test_decoder_presets import B, H, I, S, T, budget, build, close, take

SOME = ("sutskever", "cho", "bahdanau", "luong", "gnmt", "conditional_gru")
some = pytest.mark.parametrize("name", SOME)
CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def inputs(decoder: Decoder, S: int = S, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Memory]:
    """A target and a memory that the decoder and its bridge can read; a row of it has nothing to attend to."""
    bridge = decoder.bridge.bridge
    size = decoder.memory_size if decoder.summary is not None else decoder.bridge.size * (1 + bridge.half)
    count = len(bridge.layers or range(decoder.num_layers))
    leaves = 2 if decoder.spec.cell == "lstm" else 1
    state = tuple(tuple(torch.randn(B, size).to(dtype) for _ in range(leaves)) for _ in range(count))
    mask = torch.rand(B, S) < 0.7
    mask[1] = False
    return torch.randn(B, T, I).to(dtype), Memory(torch.randn(B, S, decoder.memory_size or H).to(dtype), mask, state)


def leaves_of(tree: Any) -> list[Tensor]:
    return [t for part in tree for t in leaves_of(part)] if isinstance(tree, tuple) else [] if tree is None else [tree]


def test_the_names_of_the_parameters() -> None:
    """Those that the docstring promises, in the shapes of torch.nn's cells and Linear."""
    cells = {f"{name}_l{k}" for name in CELL for k in (0, 1)}
    luong = Decoder.luong(3, 4, 2, memory_size=5)
    assert luong.state_dict().keys() == cells | {"attention.weight_memory", "readout.weight"}
    stock = nn.LSTM(3 + 4, 4, 2)  # y and what is fed
    assert {n: p.shape for n, p in luong.named_parameters() if n in cells} == {
        n: p.shape for n, p in stock.named_parameters()
    }
    assert build("conditional_gru").state_dict().keys() == {
        *(f"{name}_{suffix}" for name in CELL for suffix in ("l0", "transition")),
        *(f"attention.{n}" for n in ("weight_memory", "weight_query", "bias", "v")),
        *("readout.weight", "readout.bias", "bridge.h.0.weight", "bridge.h.0.bias"),
    }
    cho = build("cho").state_dict()
    assert cho["weight_ch_l0"].shape == (3 * H, H)
    assert cho["summary.weight"].shape == (H, 9)
    assert cho["readout.weight"].shape == (2 * H, H + I + H)
    assert all(0.5 < p.abs().max() * 64**0.5 <= 1 for n, p in Decoder.luong(9, 64, memory_size=8).named_parameters()
               if n in cells)  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_copies_and_pickles(name: str) -> None:
    decoder = build(name)
    y, memory = inputs(decoder)
    expected = decoder(y, memory)
    fresh = build(name)
    fresh.load_state_dict(decoder.state_dict())
    for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), fresh):
        close(twin(y, memory), expected, 0)
        assert repr(twin) == repr(decoder)
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert not torch.equal(twin(y, memory).output, expected.output)
    close(decoder(y, memory), expected, 0)


@some
def test_parameters_are_read_at_every_call(name: str) -> None:
    """Parametrized and functionally given ones too."""
    decoder = build(name)
    y, memory = inputs(decoder)
    expected = decoder(y, memory)
    given = {n: p.detach().clone().requires_grad_() for n, p in decoder.named_parameters()}
    out = torch.func.functional_call(decoder, given, (y, memory))
    close(out, expected, 0)
    found = torch.autograd.grad(sum(t.sum() for t in leaves_of(out)), list(given.values()))
    assert all(g.isfinite().all() for g in found)
    for module, parameter in (
        (decoder, "weight_hh_l0"), (decoder, "weight_ih_l0"), (decoder.readout, "weight"),
        (decoder.attention, "weight_memory"), (decoder, "weight_ch_l0"),
    ):  # fmt: skip
        if module is not None and getattr(module, parameter) is not None:
            parametrizations.weight_norm(module, parameter)
    close(decoder(y, memory), expected)
    with torch.no_grad():
        decoder.parametrizations.weight_hh_l0.original0.mul_(2.0)
    assert not torch.allclose(decoder(y, memory).output, expected.output)


DROPOUTS = {"dropout": 0.5, "input_dropout": 0.25, "readout_dropout": 0.5, "output_dropout": 0.4}


def test_dropout_is_drawn_outside_by_torchs_generator() -> None:
    """In the order of input, layers, readout, output, as nn.functional.dropout draws; then the function's bits."""
    decoder = Decoder.luong(I, H, 3, memory_size=H, **DROPOUTS)
    y, memory = inputs(decoder)
    torch.manual_seed(5)
    got = decoder(y, memory)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    shapes = {"input": (B, T, I), "layers": (2, B, T, H), "readout": (B, T, 2 * H), "output": (B, T, H)}
    masks = DropoutMasks(**{n: nn.functional.dropout(torch.ones(shape), p)
                            for (n, shape), p in zip(shapes.items(), (0.25, 0.5, 0.5, 0.4), strict=True)})  # fmt: skip
    assert torch.equal(torch.get_rng_state(), after)
    call = decoder.eval().as_call(y, memory)
    expected = fastseq.functional.attention_decoder(
        y, call.keys, call.state, call.params, call.spec, dropout_masks=masks
    )
    close(got, expected, 0)
    torch.manual_seed(5)
    assert not torch.equal(decoder(y, memory).output, got.output)  # eval: none
    close(decoder(y, memory), decoder(y, memory), 0)


@some
def test_dropout_by_seed(name: str) -> None:
    options = {n: p for n, p in DROPOUTS.items() if n != "dropout" or name == "gnmt"}
    decoder = build(name, **options)
    y, memory = inputs(decoder)
    torch.manual_seed(1)
    first, second = decoder(y, memory).output, decoder(y, memory).output
    torch.manual_seed(1)
    assert torch.equal(decoder(y, memory).output, first)
    assert not torch.equal(first, second)
    stepped = decoder.step(y[:, 0], decoder.prepare(memory), decoder.init_state(memory))
    assert (stepped.output == 0).float().mean() > 0.2
    state = torch.get_rng_state()
    fastseq.explain(decoder, y, memory)
    assert torch.equal(torch.get_rng_state(), state)
    decoder.output_dropout = 1.0
    assert not decoder(y, memory).output.any()


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("S", [0, 1, 3])
def test_empty_sources(name: str, S: int) -> None:
    """Rows without anything to attend to, or no source at all: zero context, no NaN, forward and backward."""
    decoder = build(name)
    y, memory = inputs(decoder, S)
    memory = memory._replace(mask=torch.zeros(B, S, dtype=torch.bool), out=memory.out * torch.nan)
    got = decoder(y, memory, need_weights=True)
    sum(t.square().sum() for t in leaves_of((got.output, got.state))).backward()
    assert all(t.isfinite().all() for t in leaves_of(tuple(got)))
    assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())
    empty = memory._replace(out=torch.zeros(B, S, memory.out.shape[2]), mask=None)
    if decoder.attention is not None:
        assert not got.weights.any()
        close(decoder(y, empty).output, got.output)


def test_empty_rows_of_an_encoder() -> None:
    """A length of 0 all the way: encoder, bridge, attention, decoder; and its row's neighbours do not notice."""
    encoder = Encoder(I, 6, 2, cell="gru", bidirectional=True)
    decoder = Decoder.bahdanau(I, H, memory_size=12, bridge=Bridge("backward", act="tanh", layers=(-1,)))
    x, y = torch.randn(B, S, I), torch.randn(B, T, I)
    got = decoder(y, encoder(x, [3, 0, S, 1])).output
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in [*encoder.parameters(), *decoder.parameters()])
    close(got[[0, 2, 3]], decoder(y[[0, 2, 3]], encoder(x[[0, 2, 3]], [3, S, 1])).output)


@some
def test_low_precision_and_autocast(name: str) -> None:
    """bf16 parameters, or bf16 by autocast: outputs in bf16, the state in fp32, as near the truth as the plain loop."""
    problem, truth, allowed = budget(name, torch.bfloat16)
    decoder = build(name)
    decoder.load_state_dict(problem.parameters)
    y, memory = problem.inputs["y"], problem.memory()
    with torch.autocast("cpu", torch.bfloat16):
        cast = decoder(y, memory, need_weights=True)
        keys, state = decoder.prepare(memory), decoder.init_state(memory)
        step = decoder.step(y[:, 0], keys, state)
    low = decoder.bfloat16()(y.bfloat16(), take_dtype(memory, torch.bfloat16), need_weights=True)
    for got in (cast, low):
        assert got.output.dtype == torch.bfloat16
        assert got.weights is None or got.weights.dtype == torch.bfloat16
        assert all(t.dtype == torch.float32 for t in leaves_of(got.state))
        compare({"out": got.output.detach()}, {"out": truth["out"]}, allowed)
    compare({"out": step.output.detach()}, {"out": truth["out"][:, 0]}, allowed)


def take_dtype(memory: Memory, dtype: torch.dtype) -> Memory:
    state = tuple(tuple(t.to(dtype) for t in layer) for layer in memory.state)
    return Memory(memory.out.to(dtype), memory.mask, state)


@pytest.mark.parametrize("name", ["cho", "bahdanau", "luong"])
def test_compiled(name: str) -> None:
    """torch.compile takes a forward, its dropout and its backward into one graph; and a step."""
    torch.compiler.reset()  # every decoder, and each of its modes, is a compilation of the same code
    decoder = build(name, output_dropout=0.5).eval()
    y, memory = inputs(decoder)
    y, parameters = y[:, :2], list(decoder.parameters())
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    got, expected = compiled(y, memory), decoder(y, memory)
    close(got, expected)
    close(*(torch.autograd.grad(o.output.square().sum(), parameters) for o in (got, expected)))
    dropped = compiled.train()(y, memory).output
    assert 0.2 < (dropped == 0).float().mean() < 0.8
    keys, state = decoder.eval().prepare(memory), decoder.init_state(memory)
    step = torch.compile(decoder.step, backend="aot_eager", fullgraph=True)
    close(step(y[:, 0], keys, state), decoder.step(y[:, 0], keys, state))


@some
def test_explain_says_what_runs(name: str) -> None:
    decoder = build(name)
    y, memory = inputs(decoder)
    told = fastseq.explain(decoder, y, memory)
    assert told.chosen in fastseq.backends()
    assert [v.backend for v in told] == list(fastseq.backends())
    named = build(name, backend="reference")
    assert fastseq.explain(named, y, memory).chosen == "reference"
    assert "backend='reference'" in repr(named)
    with fastseq.use_backend("reference"):
        close(decoder(y, memory).output, decoder.train(False)(y, memory).output)
    with pytest.raises(fastseq.InputError, match="torch has no attention decoder"):
        build(name, backend="torch")(y, memory)


def test_second_derivatives() -> None:
    """Through bridge, keys and loop: by finite differences."""
    decoder = Decoder(2, 2, attention=Attention(2, 2, normalize=True), context_to="first", feed="context").double()
    decoder.bridge = Bridge("mean", act="tanh").build(2, 1, "lstm", 2).double()
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def output(y: Tensor, out: Tensor) -> Tensor:
        return decoder(y, Memory(out, mask)).output

    values = [torch.randn(2, 2, 2).double().requires_grad_(), torch.randn(2, 3, 2).double().requires_grad_()]
    assert torch.autograd.gradcheck(output, values)
    assert torch.autograd.gradgradcheck(output, values)


def test_vector_to_sequence() -> None:
    """A state alone; features of an image; a vector as the fixed context of every step."""
    y, vector = torch.randn(B, T, I), torch.randn(B, H)
    plain = Decoder.sutskever(I, H, cell="gru")
    stock = nn.GRU(I, H, batch_first=True)
    stock.load_state_dict(plain.state_dict())
    close(plain(y, Memory(state=((vector,),))).output, stock(y, vector[None])[0])
    features = torch.randn(B, 9, 5)
    caption = Decoder.luong(I, H, memory_size=5, bridge=Bridge("mean", act="tanh"))
    assert caption(y, Memory(out=features), need_weights=True).weights.shape == (B, T, 9)
    assert caption(y, Memory(out=features)).output.shape == (B, T, H)
    fixed = Decoder(I, H, memory_size=5, context_to="first", readout=("state",), combine=None, bridge=Bridge("zero"))
    lstm = nn.LSTM(I + 5, H, batch_first=True)
    lstm.load_state_dict(fixed.state_dict())
    expected = lstm(torch.cat((y, features[:, :1].expand(B, T, 5)), 2))[0]
    close(fixed(y, Memory(out=features[:, :1])).output, expected)
    top = Memory(features, state=((features[:, 3], features[:, 4]),))  # with a state it is the top layer's h
    close(fixed(y, top).output, lstm(torch.cat((y, features[:, 3:4].expand(B, T, 5)), 2))[0])
    close(fixed.prepare(top).context, features[:, 3])


def test_a_function_as_bridge() -> None:
    """Any callable; of a module the parameters are the decoder's."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(H, 2 * H)

        def forward(self, memory: Memory) -> tuple[tuple[Tensor, Tensor], ...]:
            return (tuple(self.map(memory.out.mean(1)).chunk(2, -1)),)

    decoder = Decoder.luong(I, H, memory_size=H, bridge=Halves())
    y, out = torch.randn(B, T, I), torch.randn(B, S, H)
    assert "bridge.map.weight" in decoder.state_dict()
    close(decoder.init_state(Memory(out)).layers, (tuple(decoder.bridge.map(out.mean(1)).chunk(2, -1)),))
    decoder(y, Memory(out)).output.sum().backward()
    assert decoder.bridge.map.weight.grad.any()


def test_a_state_may_be_given_and_is_handed_on() -> None:
    """Two halves of a target, the state between them, are the whole; the state is the caller's, never the module's."""
    decoder = build("gnmt")
    y, memory = inputs(decoder)
    whole = decoder(y, memory)
    first = decoder(y[:, :2], memory)
    second = decoder(y[:, 2:], memory, first.state)
    close(DecoderOutput(torch.cat((first.output, second.output), 1), second.state, None), whole)
    rows = take(first.state, torch.tensor([2, 2, 0, 1]))  # as a beam search reorders it
    assert isinstance(rows, DecoderState)
    assert all(leaf.shape[0] == B for leaf in leaves_of(first.state))


def test_local_attention_and_queries_of_what_is_fed() -> None:
    """Options beyond the presets reach the function: a window, query="feed", residuals, an Attention by function."""
    local = Decoder.luong(I, H, memory_size=H, attention=Attention(H, H, window=LocalP(2)))
    assert local.spec.window == 2
    y, memory = inputs(local)
    assert (local(y, memory, need_weights=True).weights > 0).sum(-1).max() <= 5
    fed = Decoder(I, H, 2, attention=Attention, memory_size=6, query="feed", feed="context", context_to="all",
                  residual=1)  # fmt: skip
    assert fed.attention.query_size == 6
    y, memory = inputs(fed)
    steps = fed(y, memory._replace(state=tuple(tuple(t[:, :H] for t in layer) for layer in memory.state)))
    assert steps.output.shape == (B, T, H)
    wide = Decoder(I, H, attention="dot", memory_size=H, context_to="first", combine="maxout", combine_size=3)
    assert wide(*inputs(wide)).output.shape == (B, T, 3)
    assert wide.output_size == 3


def _stacked(cell: type[torch.nn.LSTM] | type[torch.nn.GRU]) -> tuple[Tensor, Any]:
    """Output and hidden of two layers of torch's."""
    torch.manual_seed(0)
    return cell(5, 16, 2, batch_first=True)(torch.randn(3, 6, 5))  # type: ignore[no-any-return]


PAIR = (torch.zeros(3, 16),) * 2
STATES: dict[str, tuple[Callable[[], Memory], type[Exception], str]] = {
    "torch's h_n and c_n": (
        lambda: Memory(_stacked(torch.nn.LSTM)[0], None, _stacked(torch.nn.LSTM)[1]), TypeError, "Memory.from_rnn"),
    "torch's h_n": (
        lambda: Memory(_stacked(torch.nn.GRU)[0], None, (_stacked(torch.nn.GRU)[1],)), TypeError, "Memory.from_rnn"),
    "a layer of three dimensions": (
        lambda: Memory(torch.randn(3, 6, 16), None, ((torch.zeros(1, 3, 16),) * 2,) * 2), InputError, "from_rnn"),
    "another batch": (
        lambda: Memory(torch.randn(4, 6, 16), None, (PAIR, PAIR)), InputError, "B=4, that of memory.out"),
    "directions of three layers": (
        lambda: Memory(torch.randn(3, 6, 16), None, (PAIR, PAIR), (1, 1, 1)), InputError, "dirs="),
    "another dtype": (
        lambda: Memory(torch.randn(3, 6, 16).bfloat16(), None, (PAIR, PAIR)), InputError, "memory.out is torch.b"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_memories_that_are_misread_are_refused(name: str) -> None:
    make, error, says = STATES[name]
    memory = make()
    with pytest.raises(error, match=says):
        Decoder.luong(5, 16, 2, memory_size=16)(torch.randn(len(memory.out), 4, 5), memory)  # type: ignore[arg-type]


def test_a_half_of_one_direction_is_never_a_quarter_of_two() -> None:
    """An encoder of one direction has states as wide as one of two with half the units."""
    memory = fastseq.Encoder(5, 16)(torch.randn(3, 6, 5))
    assert memory.dirs == (1,)
    for decoder in (Decoder.bahdanau(5, 16, memory_size=16), Decoder.gnmt(5, 8, 2, memory_size=16)):
        with pytest.raises(InputError, match=r"memory\.state"):
            decoder.init_state(memory)
    whole = Decoder.bahdanau(5, 16, memory_size=16, bridge=Bridge("backward", act="tanh", size=16))
    linear = whole.bridge.h[0]  # type: ignore[union-attr]
    expected = torch.tanh(memory.state[0][0] @ linear.weight.T + linear.bias)  # type: ignore[index]
    torch.testing.assert_close(whole.init_state(memory).layers[0][0], expected)


def test_states_of_beams() -> None:
    """Copies of the first state fit N = B * k rows; `select` reorders whatever a state has."""
    decoder, k = Decoder.luong(5, 16, 2, memory_size=16), 3
    out, hidden = _stacked(torch.nn.LSTM)
    memory = Memory.from_rnn(out, hidden, batch_first=True)
    keys, state, y = decoder.prepare(memory), decoder.init_state(memory, copies=k), torch.randn(3 * k, 5)
    whole = decoder(y[:, None], memory)
    stepped = decoder.step(y, keys, state)
    torch.testing.assert_close(stepped.output, whole.output[:, 0])
    rows = torch.tensor([4, 0, 0, 8, 7, 1])
    chosen = stepped.state.select(rows)
    assert torch.equal(chosen.feed, stepped.state.feed[rows])  # type: ignore[arg-type, index]
    for layer, before in zip(chosen.layers, stepped.state.layers, strict=True):
        assert all(torch.equal(a, b[rows]) for a, b in zip(layer, before, strict=True))
    with pytest.raises(InputError, match="copies=k"):
        decoder.step(y, keys, decoder.init_state(memory))


@pytest.mark.parametrize("bridge", [None, Bridge, 3])
def test_a_bridge_that_is_none_is_refused_at_construction(bridge: Any) -> None:
    with pytest.raises(TypeError, match="bridge must be a Bridge"):
        Decoder.luong(5, 16, memory_size=16, bridge=bridge)


def test_a_bridge_by_the_name_of_its_source() -> None:
    memory = Memory(torch.randn(3, 6, 16))
    for leaf in Decoder.luong(5, 16, memory_size=16, bridge="zero").init_state(memory).layers[0]:
        assert not leaf.any()
    with pytest.raises(InputError, match="source='middle'"):
        Decoder.luong(5, 16, memory_size=16, bridge="middle")
    for wrong in ({"layers": "top"}, {"size": -3, "act": "tanh"}):
        with pytest.raises(InputError):
            Bridge(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cell", "runs"), [("lstm", "cpu"), ("gru", "cpu"), ("rnn_tanh", "cpu"), ("gru_reset_before", "reference")]
)
def test_explain_looks_at_an_encoders_first_layer(cell: str, runs: str) -> None:
    encoder = fastseq.Encoder(5, 16, 2, cell=cell)
    assert fastseq.explain(encoder, torch.randn(3, 6, 5)).chosen == (runs if _native.C is not None else "torch")


def test_plain_cells_loop_in_the_reference() -> None:
    """Explain says so; a decoder that feeds nothing back is a stack of layers, which the kernels have."""
    memory = fastseq.Encoder(5, 16, cell="rnn_relu")(torch.randn(3, 6, 5))
    for preset, runs in (("luong", "reference"), ("sutskever", "cpu" if _native.C is not None else "reference")):
        options = {} if preset == "sutskever" else {"memory_size": 16}
        decoder = getattr(Decoder, preset)(5, 16, cell="rnn_relu", **options)
        told = fastseq.explain(decoder, torch.randn(3, 4, 5), memory)
        assert told.chosen == runs
        if runs == "reference":
            reasons = {verdict.backend: verdict.reason for verdict in told}
            assert "cell='rnn_relu' within a decoder's loop is not fused" in reasons["cpu"] or _native.C is None
