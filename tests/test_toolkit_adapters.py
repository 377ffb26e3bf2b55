"""accelerate on toolkits' encoders and decoders: their signatures, state_dict, random draws and results.

JoeyNMT is itself, its trainer included; OpenNMT-py and fairseq have stand-ins.
"""

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

import fastseq
from benchmarks.joey import EOS, PAD, joey_model, joeynmt, model_config, trainer
from tests.oracle import EPS
from tests.test_interop_joeynmt import batch_of, their_search, trained
from tests.toolkit_checks import LENGTHS, SRC, TGT, sgd_step
from tests.toolkit_standins import fairseq_decoder, opennmt_decoder

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # of float64: thousands of roundings
GRU = {"rnn_type": "gru"}
DROPPED = {"dropout": 0.3, "hidden_dropout": 0.2, "num_layers": 3}
JOEY: dict[str, dict[str, Any]] = {
    "lstm": {},
    "gru": {"encoder": GRU, "decoder": GRU | {"attention": "luong"}},
    "last": {"decoder": {"init_hidden": "last", "num_layers": 2}},
    "zero, not fed": {"decoder": {"init_hidden": "zero", "input_feeding": False, "attention": "luong"}},
    "dropped out": {"encoder": {"num_layers": 2, "dropout": 0.4}, "decoder": DROPPED},
    "dropped out, gru": {"decoder": GRU | DROPPED | {"attention": "luong"}},
    "dropped out, not fed": {"decoder": DROPPED | {"input_feeding": False}},
    "dropped out whole": {"decoder": DROPPED | {"dropout": 1.0}},
}


def joey(name: str) -> nn.Module:
    model = joey_model(**JOEY[name]).double()
    if "dropped" in name:
        model.encoder.emb_dropout.p, model.decoder.emb_dropout.p = 0.1, 0.25
    return model


def decoded(model: nn.Module) -> tuple[Any, ...]:
    mask = (torch.arange(SRC.shape[1]) < LENGTHS[:, None])[:, None]
    return model._encode_decode(src=SRC, trg_input=TGT[:, :-1], src_mask=mask, src_length=LENGTHS)


def histories(model: nn.Module, step: Callable[[nn.Module], tuple[list[Tensor], Tensor]]) -> None:
    """The same model stock and accelerated, from one seed: results, losses and weights of three steps are equal."""
    fast = copy.deepcopy(model)
    actions = {change.action for change in fastseq.accelerate(fast)}
    assert actions == {"accelerated"}
    for _ in range(3):
        found = []
        for one in (model.train(), fast.train()):
            torch.manual_seed(9)
            results, loss = step(one)
            sgd_step(one, loss)
            found.append([*results, loss, torch.get_rng_state().double()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, **EXACT)
    for a, b in zip(model.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b, a, **EXACT)


@pytest.mark.parametrize("name", JOEY)
def test_joeynmt_trains_the_same(name: str) -> None:
    """Dropout included: on a CPU the draws are JoeyNMT's, in its order, and the generator is left as it leaves it."""

    def step(model: nn.Module) -> tuple[list[Tensor], Tensor]:
        logits, hidden, weights, vectors = decoded(model)
        leaves = list(hidden) if isinstance(hidden, tuple) else [hidden]
        loss = cross_entropy(logits.flatten(0, 1), TGT[:, 1:].flatten(), ignore_index=PAD) + weights.square().mean()
        return [logits, weights, vectors, *leaves], loss + 0.1 * sum(leaf.mean() for leaf in leaves)

    histories(joey(name), step)


def learning(folder: Path, fast: bool, dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """The losses of JoeyNMT's own trainer, and what it validates, greedy search included."""
    embedded = {"embedding_dim": 12, "scale": False, "dropout": 0.1}
    part = {"dropout": 0.1, "hidden_size": 16, "num_layers": 2, "embeddings": embedded}
    manager, train, dev = trainer(
        folder, model_config(part, part | {"hidden_dropout": 0.1}, 12),
        {"epochs": 4, "batch_size": 8, "learning_rate": 0.01, "decrease_factor": 0.95, "clip_grad_norm": 1.0,
         "validation_freq": 16, "logging_freq": 16, "max_updates": 32},
    )  # fmt: skip
    manager.model.to(dtype)
    if fast:
        assert {change.action for change in fastseq.accelerate(manager.model)} == {"accelerated"}
    losses, own = [], manager._train_step

    def noted(batch: Any) -> Any:
        result = own(batch)
        losses.append(result[0])
        return result

    manager._train_step = noted
    manager.train_and_validate(train, dev)
    report = (Path(manager.model_dir) / "validations.txt").read_text().splitlines()
    (Path(manager.model_dir) / "validations.txt").unlink()
    return torch.tensor(losses, dtype=torch.float64), [float(line.split("loss: ")[1].split()[0]) for line in report]


@pytest.mark.filterwarnings("ignore")  # of JoeyNMT's own calls
def test_joeynmts_own_trainer(tmp_path: Path) -> None:
    """Same-seed losses with dropout, Adam and clipping.

    The truth is the run in float64. Stock's errors in fp32 against it say what 32 steps make of rounding; ours may
    err twice as much as the largest of them so far, and by one rounding of the loss.
    """
    draw = random.Random(1)
    for name, count in (("train", 64), ("dev", 6)):
        rows = [[draw.choice("abcdefghij") for _ in range(draw.randint(2, 7))] for _ in range(count)]
        (tmp_path / f"{name}.de").write_text("".join(" ".join(row) + "\n" for row in rows))
        (tmp_path / f"{name}.en").write_text("".join(" ".join(row[::-1]) + "\n" for row in rows))
    truth, valid = learning(tmp_path, False, torch.float64)
    stock, _ = learning(tmp_path, False, torch.float32)
    fast, fast_valid = learning(tmp_path, True, torch.float32)
    assert len(truth) == len(stock) == len(fast) == 32
    assert truth[-4:].mean() < 0.9 * truth[:4].mean()  # it learns
    allowed = 2 * (stock - truth).abs().cummax(0).values + EPS * truth
    assert ((fast - truth).abs() <= allowed).all()
    assert fast_valid == pytest.approx(valid, rel=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_joeynmts_own_search(cell: str) -> None:
    """One step at a time, of rows that beams have reordered."""
    model = copy.deepcopy(trained(cell, "bahdanau")).double()
    src, _, lengths = batch_of(12, seed=1000)
    expected = [their_search(model, src, lengths, beams, alpha) for beams, alpha in ((1, 0), (5, 0.6))]
    fastseq.accelerate(model)
    found = [their_search(model, src, lengths, beams, alpha) for beams, alpha in ((1, 0), (5, 0.6))]
    for (tokens, scores), (ours, our_scores) in zip(expected, found, strict=True):
        assert ours == tokens
        torch.testing.assert_close(torch.tensor(our_scores), torch.tensor(scores), rtol=1e-6, atol=1e-6)  # fp32
    assert any(EOS in row for row in found[0][0])


def test_in_place_and_back() -> None:
    model = joey("dropped out")
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    report = fastseq.accelerate(model)
    assert [c.name for c in report] == ["encoder", "encoder.rnn", "decoder", "decoder.rnn"]
    assert "joeynmt.decoders.RecurrentDecoder runs its steps as one operator" in str(report)
    assert isinstance(model.decoder, joeynmt("decoders").RecurrentDecoder)
    assert isinstance(model.encoder, joeynmt("encoders").RecurrentEncoder)
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (keys, parameters)
    assert repr(model.decoder).startswith("RecurrentDecoder(")
    again = fastseq.accelerate(model)
    assert {c.action for c in again} == {"skipped"}
    assert "joeynmt.decoders.RecurrentDecoder is accelerated already" in str(again)
    assert {c.action for c in fastseq.accelerate(model, undo=True)} == {"reverted"}
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before


def test_copies_and_pickles() -> None:
    model = joey("lstm").eval()
    fastseq.accelerate(model)
    file = io.BytesIO()
    torch.save(model.decoder, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(model.decoder)), copy.deepcopy(model.decoder), copy.copy(model.decoder),
              torch.load(file, weights_only=False)]  # fmt: skip
    expected = decoded(model)[0]
    for one in copies:
        assert type(one) is type(model.decoder)
        model.decoder = one
        torch.testing.assert_close(decoded(model)[0], expected, rtol=0, atol=0)
    fastseq.accelerate(model, undo=True)
    assert type(model.decoder) is joeynmt("decoders").RecurrentDecoder


def test_rows_in_any_order() -> None:
    """Stock's encoder wants the longest first; ours takes what it is given."""
    model = joey("gru").eval()
    mask = (torch.arange(SRC.shape[1]) < LENGTHS[:, None])[:, None]
    out, last = model._encode(src=SRC, src_length=LENGTHS, src_mask=mask)
    order = torch.tensor([2, 0, 3, 1])
    with pytest.raises(RuntimeError, match="sorted"):
        model._encode(src=SRC[order], src_length=LENGTHS[order], src_mask=mask[order])
    fastseq.accelerate(model)
    found, ours = model._encode(src=SRC[order], src_length=LENGTHS[order], src_mask=mask[order])
    torch.testing.assert_close(found, out[order], **EXACT)
    torch.testing.assert_close(ours, last[order], **EXACT)


def hooked(decoder: Any) -> None:
    decoder.attention.register_forward_hook(lambda *_: None)


def parametrized(decoder: Any) -> None:
    parametrizations.weight_norm(decoder.att_vector_layer)


def exchanged(decoder: Any) -> None:
    decoder.hidden_dropout = nn.AlphaDropout(0.1)


def other_attention(decoder: Any) -> None:
    decoder.attention = type("Mine", (type(decoder.attention),), {})(8, 16, 8)


def other_activation(decoder: Any) -> None:
    decoder.activation = torch.relu


def other_rnn(decoder: Any) -> None:
    decoder.rnn = type("Mine", (nn.LSTM,), {})(14, 8, batch_first=True)


def without_bias(decoder: Any) -> None:
    decoder.rnn = nn.LSTM(14, 8, bias=False, batch_first=True)


def with_zoneout(decoder: Any) -> None:
    decoder.rnn = fastseq.LSTM(14, 8, batch_first=True, zoneout=0.1)


def with_learned_state(decoder: Any) -> None:
    decoder.rnn = fastseq.LSTM(14, 8, batch_first=True, learn_state=True)


def of_a_subclass(decoder: Any) -> None:
    decoder.__class__ = type("Mine", (type(decoder),), {})


def older(decoder: Any) -> None:
    del decoder.hidden_dropout


OBSTACLES = {
    hooked: "attention has hooks, which would not run",
    parametrized: "att_vector_layer is parametrized",
    exchanged: "hidden_dropout is a torch.nn.modules.dropout.AlphaDropout, not torch's Dropout",
    other_attention: "Mine, not JoeyNMT's",
    other_activation: "activation is not tanh",
    other_rnn: "not torch's LSTM or GRU$",
    without_bias: "rnn has other options than the toolkit gives it: LSTM",
    with_zoneout: "rnn has other options.*zoneout",
    with_learned_state: "rnn has other options.*learn_state",
    of_a_subclass: "Mine is a subclass of joeynmt.decoders.RecurrentDecoder",
    older: "not built as the versions that are known.*hidden_dropout",
}


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
def test_what_is_left_alone(change: Callable[[Any], None]) -> None:
    """And said so."""
    model = joey("lstm")
    change(model.decoder)
    kind = type(model.decoder)
    (found,) = (c for c in fastseq.accelerate(model) if c.name == "decoder")
    assert found.action == "skipped"
    with pytest.raises(AssertionError, match=OBSTACLES[change]):
        raise AssertionError(found.reason)
    assert type(model.decoder) is kind


def test_changed_afterwards() -> None:
    """What the operator would pass over is run by JoeyNMT's own loop again, with a warning."""
    model = joey("lstm").eval()
    fastseq.accelerate(model)
    expected, seen = decoded(model)[0], []
    model.decoder.attention.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="JoeyNMT's decoder steps from Python again: attention has hooks"):
        found = decoded(model)[0]
    assert len(seen) == TGT.shape[1] - 1
    torch.testing.assert_close(found, expected, **EXACT)


H0 = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
BANK = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize(("cell", "score"), [("lstm", "general"), ("lstm", "mlp"), ("gru", "dot")])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opennmt_trains_the_same(version: int, cell: str, score: str, p: float) -> None:
    """Twice eight tokens, as truncated backpropagation goes on from the state that the decoder keeps."""

    def step(decoder: nn.Module) -> tuple[list[Tensor], Tensor]:
        decoder.init_state((H0, -H0)[: 2 if cell == "lstm" else 1])
        results = []
        for half in (TGT[:, :4], TGT[:, 4:]):
            tgt, bank = (half, BANK.transpose(0, 1)) if version == 3 else (half.T, BANK)
            outs, attns = decoder(tgt, bank, LENGTHS)
            assert attns["std"].shape == (4, 4, 6)
            results += [outs, attns["std"], *decoder.state["hidden"], decoder.state["input_feed"]]
        return results, sum(result.square().mean() for result in results)

    histories(opennmt_decoder(version, cell, score, p=p).double(), step)


@pytest.mark.parametrize("features", [8, 10])
@pytest.mark.parametrize(("p", "extra", "layers"), [(0.0, None, 1), (0.3, None, 2), (0.2, 5, 3)])
def test_fairseq_trains_the_same(features: int, p: float, extra: int | None, layers: int) -> None:
    g = torch.Generator().manual_seed(4)
    outs, h, c = (torch.randn(n, 4, features, generator=g, dtype=torch.float64) for n in (6, layers, layers))
    padding = (torch.arange(6) >= LENGTHS[:, None]).T

    def step(decoder: nn.Module) -> tuple[list[Tensor], Tensor]:
        logits, weights = decoder(TGT, (outs, h, c, padding))
        assert weights is None
        return [logits], cross_entropy(logits.flatten(0, 1), TGT.flatten())

    decoder = fairseq_decoder(features, layers, p, extra).double()
    fast = copy.deepcopy(decoder)
    histories(decoder, step)
    fastseq.accelerate(fast)
    stock = copy.deepcopy(fast)
    fastseq.accelerate(stock, undo=True)
    for a, b in zip(stock.eval()(TGT, (outs, h, c, padding)), fast.eval()(TGT, (outs, h, c, padding)), strict=True):
        torch.testing.assert_close(b, a, **EXACT)
    whole, state = stock(TGT, (outs, h, c, padding))[0], {}
    for t in range(3):  # incremental generation is fairseq's own
        found, _ = fast(TGT[:, : t + 1], (outs, h, c, padding), state)
        torch.testing.assert_close(found[:, -1], whole[:, t], **EXACT)


STANDINS: list[tuple[Callable[[], Any], Callable[[Any], Any], str]] = [
    (opennmt_decoder, lambda d: setattr(d, "_coverage", True), "coverage_attn is not supported"),
    (opennmt_decoder, lambda d: setattr(d, "copy_attn", d.attn), "copy_attn is not supported"),
    (opennmt_decoder, lambda d: setattr(d, "context_gate", nn.Linear(1, 1)), "context_gate is not supported"),
    (opennmt_decoder, lambda d: setattr(d.attn, "attn_func", "sparsemax"), "attn_func='sparsemax' is not supported"),
    (opennmt_decoder, lambda d: setattr(d, "attn", None), "it has no GlobalAttention"),
    (opennmt_decoder, lambda d: setattr(d, "rnn", nn.LSTM(14, 8)), "rnn is a torch.nn.modules.rnn.LSTM, not one of"),
    (opennmt_decoder, lambda d: d.attn.linear_out.register_forward_hook(print), "attn.linear_out has hooks"),
    (opennmt_decoder, lambda d: d.rnn.layers.append(nn.LSTMCell(8, 8, bias=False)), "rnn.layers.2 has no bias"),
    (fairseq_decoder, lambda d: d.layers.append(nn.LSTM(8, 8)), "not torch's LSTMCell or GRUCell"),
    (fairseq_decoder, lambda d: setattr(d, "residuals", True), "residuals is not supported"),
    (fairseq_decoder, lambda d: setattr(d, "attention", None), "a decoder without attention is not supported"),
    (fairseq_decoder, lambda d: setattr(d, "adaptive_softmax", nn.Linear(1, 1)), "adaptive softmax is not supported"),
    (fairseq_decoder, lambda d: setattr(d, "encoder_output_units", 0), "without encoder is not supported"),
    (fairseq_decoder, lambda d: setattr(d.dropout_out_module, "apply_during_inference", True), "during inference"),
]


@pytest.mark.parametrize(("make", "change", "why"), STANDINS, ids=[why for _, _, why in STANDINS])
def test_stand_ins_left_alone(make: Callable[[], Any], change: Callable[[Any], Any], why: str) -> None:
    decoder = make()
    change(decoder)
    kind = type(decoder)
    (found, *_) = fastseq.accelerate(decoder)
    assert (found.name, found.action) == ("", "skipped")
    assert why in found.reason
    assert type(decoder) is kind


def test_no_warning_where_nothing_changed() -> None:
    model = joey("dropped out")
    fastseq.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded(model.train())
        decoded(model.eval())


@pytest.mark.parametrize("name", ["lstm", "dropped out, gru"])
def test_autocast_and_bf16(name: str) -> None:
    """Results have stock's dtypes; ours may err from fp32's twice as much as stock's do, and by one rounding."""
    stock = joey(name).float()
    fast = copy.deepcopy(stock)
    fastseq.accelerate(fast)

    def results(model: nn.Module, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        torch.manual_seed(3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, hidden, weights, vectors = decoded(copy.deepcopy(model).to(dtype).train())
        return [logits, weights, vectors, *(hidden if isinstance(hidden, tuple) else [hidden])]

    truth = results(stock, torch.float32, False)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        theirs, ours = results(stock, dtype, autocast), results(fast, dtype, autocast)
        for a, b, t in zip(theirs, ours, truth, strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            rounding = torch.finfo(torch.bfloat16).eps * t.abs().max()
            assert (b.float() - t).abs().max() <= 2 * (a.float() - t).abs().max() + rounding


def test_compiled() -> None:
    """The adapter's forward has no graph break."""
    model = joey("lstm").float().eval()
    fastseq.accelerate(model)
    expected = decoded(model)[0]
    model.decoder.forward = torch.compile(model.decoder.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(decoded(model)[0], expected, rtol=0, atol=0)
