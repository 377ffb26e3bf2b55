"""fastseq.Encoder, Memory.from_rnn and Bridge: what a decoder reads and starts from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import Bridge, Encoder, InputError, Memory

B, S, I, H = 4, 6, 5, 7  # noqa: E741
LENGTHS = {"full": None, "sorted": [6, 4, 4, 1], "unsorted": [2, 6, 1, 5]}


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("library", [nn, fastseq])
def test_memory_from_rnn(library: Any, bidirectional: bool, kind: str, rows: str) -> None:
    """Packed, time-major and batch-first outputs make the same memory, in the caller's order of rows."""
    rnn = getattr(library, kind)(I, H, 2, bidirectional=bidirectional)
    x, lengths = torch.randn(S, B, I), LENGTHS[rows]
    if lengths is None:
        output, hidden = rnn(x)
        memory = Memory.from_rnn(output, hidden, bidirectional=bidirectional)
        assert memory.mask is None
    else:
        packed, hidden = rnn(pack_padded_sequence(x, lengths, enforce_sorted=rows == "sorted"))
        memory = Memory.from_rnn(packed, hidden, bidirectional=bidirectional)
        output = pad_packed_sequence(packed)[0]
        for form in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
            other = Memory.from_rnn(output.mT.mT, hidden, form, bidirectional=bidirectional)
            torch.testing.assert_close(tuple(other), tuple(memory), rtol=0, atol=0)
        assert memory.mask.dtype == torch.bool
        assert memory.mask.sum(1).tolist() == lengths
    assert torch.equal(memory.out, output.transpose(0, 1))
    first = Memory.from_rnn(output.transpose(0, 1), hidden, batch_first=True, bidirectional=bidirectional)
    torch.testing.assert_close(first.state, memory.state, rtol=0, atol=0)
    last = [n - 1 for n in lengths or [S] * B]
    top = memory.state[-1][0]
    assert len(memory.state) == 2
    assert torch.equal(top[:, :H], output[last, range(B), :H])  # where the forward direction ended
    if bidirectional:
        assert torch.equal(top[:, H:], output[0, :, H:])  # and the backward one
    assert Memory.from_rnn(output).state is None


FROM_RNN: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: Memory.from_rnn(torch.zeros(S, I)), r"output has shape \(6, 5\), 2-D; expected \[S, B, D\]"),
    "rows of hidden": (
        lambda: Memory.from_rnn(torch.zeros(S, B, H), torch.zeros(1, S, H)),
        r"h_n has shape \(1, 6, 7\); expected \[L \* dirs, B, H\] with dirs=1, B=4",
    ),
    "directions": (
        lambda: Memory.from_rnn(torch.zeros(S, B, H), (torch.zeros(3, B, H),) * 2, bidirectional=True),
        r"h_n has shape \(3, 4, 7\); expected .* dirs=2",
    ),
    "directions forgotten": (
        lambda: Memory.from_rnn(
            *nn.LSTM(I, H, 2, bidirectional=True, batch_first=True)(torch.zeros(B, S, I)), batch_first=True
        ),
        r"output has 14 features, twice the 7 of hidden: .*pass bidirectional=True",
    ),
    "directions forgotten, packed": (
        lambda: Memory.from_rnn(
            *nn.GRU(I, H, bidirectional=True)(pack_padded_sequence(torch.zeros(S, B, I), [6, 5, 4, 3]))
        ),
        r"pass bidirectional=True",
    ),
    "lengths twice": (
        lambda: Memory.from_rnn(pack_padded_sequence(torch.zeros(S, B, I), [6, 5, 4, 3]), lengths=[1] * B),
        r"lengths with a PackedSequence, which has its own",
    ),
    "long length": (lambda: Memory.from_rnn(torch.zeros(S, B, I), lengths=[1, 2, 3, 7]), r"lengths\[3\]=7 is outside"),
}


@pytest.mark.parametrize("name", FROM_RNN)
def test_memory_from_rnn_refuses(name: str) -> None:
    call, message = FROM_RNN[name]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 6, 0, 1]])
def test_encoder_is_torchs_stack(cell: str, bidirectional: bool, lengths: list[int] | None) -> None:
    """Without its options: torch.nn's layers, forward and every gradient; rows of no length included."""
    encoder = Encoder(I, H, 2, cell=cell, bidirectional=bidirectional).double()
    kind, *nonlinearity = cell.split("_")
    options = {"nonlinearity": nonlinearity[0]} if nonlinearity else {}
    stock = getattr(nn, kind.upper())(I, H, 2, batch_first=True, bidirectional=bidirectional, **options).double()
    names = {f"{n[:-1]}{k}{r}": f"layers.{k}.{n}{r}" for k in (0, 1) for r in ("", "_reverse")
             for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")}  # fmt: skip
    stock.load_state_dict({n: encoder.state_dict()[names[n]] for n in stock.state_dict()})
    x = torch.randn(B, S, I, dtype=torch.float64, requires_grad=True)
    memory = encoder(x, lengths)
    outputs, states = [], []
    for b, n in enumerate(lengths or [S] * B):  # each row by itself
        out, hidden = stock(x[b : b + 1, :n]) if n else (x.new_zeros(1, 0, encoder.output_size), None)
        outputs.append(nn.functional.pad(out[0], (0, 0, 0, S - n)))
        state = None if hidden is None else Memory.from_rnn(out.mT.mT, hidden, batch_first=True,
                                                             bidirectional=bidirectional).state  # fmt: skip
        states.append(state or tuple(tuple(torch.zeros_like(t[:1]) for t in layer) for layer in memory.state))
    expected = (torch.stack(outputs), *(torch.cat([s[k][j] for s in states]) for k in (0, 1)
                                        for j in range(1 + (cell == "lstm"))))  # fmt: skip
    got = (memory.out, *(leaf for layer in memory.state for leaf in layer))
    assert (memory.mask is None) == (lengths is None)
    assert lengths is None or memory.mask.sum(1).tolist() == lengths
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    weights = [torch.randn_like(t) for t in got]
    ours, theirs = (
        [x, *(encoder.get_parameter(names[n]) for n, _ in stock.named_parameters())],
        [x, *stock.parameters()],
    )
    torch.testing.assert_close(
        torch.autograd.grad(got, ours, weights), torch.autograd.grad(expected, theirs, weights), rtol=1e-9, atol=1e-12
    )


def test_encoder_of_gnmt() -> None:
    """One bidirectional layer below, residuals from the third: Wu et al. 2016, section 3.2, eq. 5 and 6."""
    encoder = Encoder(I, H, 4, bidirectional=1, residual=True)
    x = torch.randn(B, S, I)
    memory, lengths = encoder(x, [6, 2, 3, 6]), [6, 2, 3, 6]
    out, (h, _) = encoder.layers[0](x, lengths=lengths)
    assert torch.equal(memory.state[0][0], torch.cat((h[0], h[1]), 1))
    out, _ = encoder.layers[1](out, lengths=lengths)
    for layer in encoder.layers[2:]:
        out = layer(out, lengths=lengths)[0] + out
    assert torch.equal(memory.out, out)
    assert [layer[0].shape[1] for layer in memory.state] == [2 * H, H, H, H]
    assert encoder.output_size == H
    assert not memory.out[~memory.mask].any()
    y = fastseq.Decoder.gnmt(3, H, 4, memory_size=encoder.output_size)(torch.randn(B, 2, 3), memory)
    assert y.output.shape == (B, 2, H)


def test_encoder_resets_before_the_product() -> None:
    """Cho et al. 2014, eq. 5 to 8."""
    encoder = Encoder(I, H, cell="gru_reset_before", bidirectional=True)
    x, weights = torch.randn(B, S, I), list(encoder.layers[0].parameters())
    out, h = fastseq.functional.gru(
        x, None, weights, lengths=[2, 6, 0, 3], bidirectional=True, batch_first=True, reset_after=False
    )
    memory = encoder(x, [2, 6, 0, 3])
    assert torch.equal(memory.out, out)
    assert torch.equal(memory.state[0][0], torch.cat(tuple(h), 1))


def test_encoder_embeds_and_drops() -> None:
    encoder = Encoder(I, H, 2, embedding=nn.Embedding(9, I), dropout=0.5)
    ids, out = torch.randint(9, (B, S)), encoder.embedding.weight
    torch.manual_seed(1)
    first = encoder(ids).out
    assert not torch.equal(encoder(ids).out, first)
    torch.manual_seed(1)
    assert torch.equal(encoder(ids).out, first)
    below, _ = encoder.layers[0](out[ids])
    torch.manual_seed(1)
    assert torch.equal(first, encoder.layers[1](nn.functional.dropout(below))[0])
    assert torch.equal(encoder.eval()(ids).out, encoder(ids).out)
    assert "embedding.weight" in encoder.state_dict()
    assert "dropout=0.5" in repr(encoder)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_encoder_has_the_options_of_its_layers(cell: str) -> None:
    """Each layer computes, draws and learns as a layer alone with the same options; in evaluation too."""
    options: dict[str, Any] = {
        "zoneout": (0.3, 0.2) if cell == "lstm" else 0.3,
        "recurrent_dropout": 0.4,
        "learn_state": True,
    }
    if cell != "rnn_tanh":
        options["recurrent_dropout_on"] = "update"
    if cell in ("lstm", "gru"):
        options["layer_norm"] = True
    encoder = Encoder(I, H, 2, cell=cell, bidirectional=1, **options)
    for p in encoder.parameters():
        nn.init.normal_(p)  # learned states and gains differ from those at the start
    x, lengths = torch.randn(B, S, I), [S, 2, 0, 5]
    for training in (True, False):
        encoder.train(training)
        torch.manual_seed(1)
        memory = encoder(x, lengths)
        torch.manual_seed(1)
        out = x
        for layer, state in zip(encoder.layers, memory.state, strict=True):
            assert all(getattr(layer, name) == value for name, value in options.items())
            out, hidden = layer(out, lengths=lengths)
            h = hidden[0] if cell == "lstm" else hidden
            assert torch.equal(state[0], torch.cat(tuple(h), 1))
            assert state[0][2].any()  # of no length: what is learned
        assert torch.equal(memory.out, out)
    encoder.train()
    encoder(x, lengths).out.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert "zoneout=" in repr(encoder)


ENCODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "cell": (lambda: Encoder(I, H, cell="rnn"), r"cell='rnn'; use one of 'lstm', 'gru', 'gru_reset_before'"),
    "layers": (lambda: Encoder(I, H, 0), r"num_layers=0; an encoder has at least one"),
    "bidirectional": (lambda: Encoder(I, H, 2, bidirectional=3), r"bidirectional=3 of 2 layer\(s\); use 0 to"),
    "dropout": (lambda: Encoder(I, H, dropout=1.5), r"dropout=1.5; it is a probability"),
    "zoneout": (lambda: Encoder(I, H, zoneout=1.5), r"zoneout=1.5; it is a probability"),
    "zoneout of c": (lambda: Encoder(I, H, cell="gru", zoneout=(0.1, 0.1)), r"zoneout=\(0.1, 0.1\) of GRU"),
    "layer norm": (
        lambda: Encoder(I, H, cell="gru_reset_before", layer_norm=True),
        r"layer_norm=True .* use cell='gru'",
    ),
    "update": (
        lambda: Encoder(I, H, cell="rnn_relu", recurrent_dropout=0.1, recurrent_dropout_on="update"),
        r"recurrent_dropout_on='update' of RNN",
    ),
    "features": (lambda: Encoder(I, H)(torch.zeros(B, S, 4)), r"x has shape \(4, 6, 4\); expected .* I=5"),
    "ids": (lambda: Encoder(I, H)(torch.zeros(B, S)), r"x has shape \(4, 6\)"),
    "embedding's size": (
        lambda: Encoder(I, H, embedding=nn.Embedding(3, 4)),
        r"embedding makes 4 features of a token, but input_size=5; make them one",
    ),
    "what an embedding makes": (
        lambda: Encoder(I, H, embedding=nn.Sequential(nn.Embedding(3, 4)))(torch.zeros(B, S).long()),
        r"embedding\(x\) has shape \(4, 6, 4\)",
    ),
    "length": (lambda: Encoder(I, H)(torch.zeros(B, S, I), [1, 2, 7, 0]), r"lengths\[2\]=7 is outside \[0, T=6\]"),
    "number of lengths": (lambda: Encoder(I, H)(torch.zeros(B, S, I), [1, 2]), r"shape \(2,\), expected \(4,\)"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_refuses(name: str) -> None:
    call, message = ENCODERS[name]
    with pytest.raises(InputError, match=message):
        call()


def memory_of(widths: list[int], lstm: bool = True) -> Memory:
    """A memory with one state for each width."""
    mask = torch.tensor([[True] * 6, [False] * 6, [True, False, True, True, False, False], [True] * 3 + [False] * 3])
    out = torch.where(mask[..., None], torch.randn(B, S, 2 * H), torch.nan)
    return Memory(out, mask, tuple(tuple(torch.randn(B, n) for _ in range(1 + lstm)) for n in widths))


Expected = Callable[[Memory, dict[str, Tensor], int], list[Tensor]]  # of h (0) or c (1), for each layer


def through(p: dict[str, Tensor], leaf: int, index: int, x: Tensor) -> Tensor:
    name = f"{'hc'[leaf]}.{index}"
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


BRIDGES: dict[str, tuple[Bridge, list[int], Expected]] = {
    "last": (Bridge(), [H, H], lambda m, p, k: [s[k] for s in m.state]),
    "layers": (Bridge(layers=(-1, 0)), [H, H, H], lambda m, p, k: [m.state[2][k], m.state[0][k]]),
    "backward": (Bridge("backward"), [2 * H, H], lambda m, p, k: [m.state[0][k][:, H:], m.state[1][k]]),
    "top": (Bridge("top"), [3, H], lambda m, p, k: [m.state[1][k]] * 2),
    "top_forward": (Bridge("top_forward"), [3, 2 * H], lambda m, p, k: [m.state[1][k][:, :H]] * 2),
    "per_layer": (
        Bridge("last", "per_layer", "relu"),
        [2 * H] * 2,
        lambda m, p, k: [through(p, k, j, m.state[j][k]).relu() for j in range(2)],
    ),
    "act alone": (
        Bridge("backward", act="tanh"),
        [2 * H] * 2,
        lambda m, p, k: [through(p, k, j, m.state[j][k][:, H:]).tanh() for j in range(2)],
    ),
    "shared": (
        Bridge("last", "shared", "tanh", size=3),
        [3, 3],
        lambda m, p, k: [through(p, k, 0, s[k]).tanh() for s in m.state],
    ),
    "shared top": (
        Bridge("top_forward", "shared", "tanh"),
        [3, 2 * H],
        lambda m, p, k: [through(p, k, 0, m.state[1][k][:, :H]).tanh()] * 2,
    ),
    "joint": (
        Bridge("last", "joint", "relu", layers=(0, 1, 2)),
        [2 * H] * 3,
        lambda m, p, k: list(through(p, k, 0, torch.cat([s[k] for s in m.state], 1)).relu().split(H, 1)),
    ),
    "mean": (
        Bridge("mean", "per_layer", "tanh"),
        [1],
        lambda m, p, k: [
            through(
                p, k, j, torch.stack([o[there].sum(0) / max(1, there.sum()) for o, there in zip(*m[:2], strict=True)])
            ).tanh()
            for j in range(2)
        ],
    ),
    "zero": (Bridge("zero"), [1], lambda m, p, k: [torch.zeros(B, H)] * 2),
}


@pytest.mark.parametrize("cell", ["own", "same", "zero"])
@pytest.mark.parametrize("name", BRIDGES)
def test_bridges(name: str, cell: str) -> None:
    """For an LSTM and a GRU decoder of two layers, from an LSTM encoder with two directions of H units."""
    bridge, widths, expected = BRIDGES[name]
    bridge, memory = Bridge(**{**vars(bridge), "cell": cell}), memory_of(widths)
    made = bridge.build(H, 2, "lstm", 2 * H)
    p = {n: t.detach() for n, t in made.named_parameters()}
    h = expected(memory, p, 0)
    c = h if cell == "same" else expected(memory, p, 1) if cell == "own" else [torch.zeros(B, H)] * 2
    torch.testing.assert_close(made(memory), tuple(zip(h, c, strict=True)))
    assert any(n.startswith("c.") for n in p) == (cell == "own" and bridge.map != "copy")
    alone = bridge.build(H, 2, "gru", 2 * H)
    alone.load_state_dict({n: t for n, t in p.items() if n.startswith("h.")})
    torch.testing.assert_close(alone(memory), tuple((h_l,) for h_l in h))


def fit(bridge: Bridge, memory: Memory, layers: int = 2, cell: str = "lstm") -> Any:
    return bridge.build(H, layers, cell, 2 * H)(memory)


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "width": (lambda: fit(Bridge(), memory_of([3, 3])), r"memory.state\[0\] gives \[B, 3\]; .*\[B, 7\].*per_layer"),
    "width of a map": (lambda: fit(Bridge(map="per_layer"), memory_of([3, 3])), r"reads \[B, 14\].*size=3\)$"),
    "width of a half": (lambda: fit(Bridge("backward"), memory_of([3, 3])), r"\[B, 7\], or twice as many of two"),
    "layers": (lambda: fit(Bridge(), memory_of([H])), r"has 1 layer\(s\), the decoder 2; .*Bridge\('top'"),
    "layer's number": (lambda: fit(Bridge(layers=(0, 2)), memory_of([H, H])), r"layers=\(0, 2\)\), but .* has 2"),
    "no state": (lambda: fit(Bridge("top"), Memory(torch.zeros(B, S, H))), r"state is None, but Bridge\(source='top'"),
    "no cell state": (lambda: fit(Bridge(), memory_of([H, H], False)), r"no cell state, .*use cell='same' or 'zero'"),
    "no out": (lambda: fit(Bridge("mean"), Memory()), r"memory.out is None, but its mean is read"),
    "nothing": (lambda: fit(Bridge("zero"), Memory()), r"memory has neither out nor state"),
    "source": (lambda: Bridge("first"), r"source='first'; use one of 'last', 'top'"),
    "map": (lambda: Bridge(map="linear"), r"map='linear'; use one of 'copy'"),
    "act": (lambda: Bridge(act="gelu"), r"act='gelu'; use one of None, 'tanh', 'relu'"),
    "cell": (lambda: Bridge(cell="none"), r"cell='none'; use one of 'own'"),
    "act of a copy": (lambda: Bridge(map="copy", act="tanh"), r"act='tanh' with map='copy'; use map='per_layer'"),
    "map of zero": (lambda: Bridge("zero", map="joint"), r"map='joint' with source='zero'"),
    "layers of the top": (lambda: Bridge("top", layers=(0,)), r"layers=\(0,\) with source='top'"),
    "size of a copy": (lambda: Bridge(size=4), r"size=4 with map='copy'"),
    "number of layers": (lambda: Bridge(layers=(0,)).build(H, 2, "lstm"), r"layers=\(0,\) of a Bridge to 2 layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_bridges_that_do_not_fit(name: str) -> None:
    call, message = MISFITS[name]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dirs", [True, False])
@pytest.mark.parametrize("widths", [[3, 3], [H], [2 * H, 3], [2 * H], [4 * H] * 2, [1, 1]])
@pytest.mark.parametrize("lstm", [True, False])
@pytest.mark.parametrize("name", BRIDGES)
def test_the_bridge_that_a_misfit_names_fits(name: str, lstm: bool, widths: list[int], dirs: bool, cell: str) -> None:
    """As its message has it, for whatever memory."""
    memory = memory_of(widths, lstm)._replace(dirs=(1,) * len(widths) if dirs else None)
    bridge = BRIDGES[name][0]
    try:
        fit(bridge, memory, cell=cell)
    except InputError as error:
        if "numbered from 0" in str(error):
            return
        bridge = eval(str(error).partition("pass bridge=")[2])
    assert len(fit(bridge, memory, cell=cell)) == 2


def test_bridges_say_what_they_are() -> None:
    assert repr(Bridge()) == "Bridge('last', map='copy')"
    assert repr(Bridge("backward", act="tanh")) == "Bridge('backward', map='per_layer', act='tanh')"
    assert Bridge("top") == Bridge("top")
    assert hash(Bridge("top")) == hash(Bridge("top"))
