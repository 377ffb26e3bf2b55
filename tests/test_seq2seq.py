"""fastseq.Seq2Seq: its passes, its loss, scheduled sampling, ties, and what it refuses."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from fastseq import Bridge, Decoder, Encoder, InputError, Memory, Seq2Seq
from tests.seq2seq_models import BOS, EOS, PAD, in_float64, model, same

V, E = 12, 6
SRC = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]])
LENGTHS = [4, 2, 1]
TGT = torch.tensor([[BOS, 5, 6, 7, EOS], [BOS, 8, EOS, PAD, PAD], [BOS, EOS, PAD, PAD, PAD]])


def parts(input_size: int = E, **options: Any) -> tuple[Encoder, Decoder]:
    encoder = Encoder(E, E, embedding=nn.Embedding(V, E))
    return encoder, Decoder.luong(input_size, E, memory_size=E, **options)


def build(tie: str | None = None, **options: Any) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(*parts(), V, bos_id=BOS, eos_id=EOS, pad_id=PAD, tie=tie, **options)


def test_forward_is_encoder_decoder_and_output() -> None:
    of = build()
    memory = of.encoder(SRC, LENGTHS)
    output, _, weights = of.decoder(of.embedding(TGT[:, :-1]), memory, need_weights=True)
    found = of(SRC, TGT[:, :-1], LENGTHS, need_weights=True)
    torch.testing.assert_close(found.logits, of.output(output))
    torch.testing.assert_close(found.weights, weights)
    assert of(SRC, TGT[:, :-1], LENGTHS).weights is None


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tie", [None, "target", "all"])
def test_the_loss_shifts_and_leaves_padding_out(tie: str | None, reduction: str, smoothing: float) -> None:
    of = build(tie)
    logits = of(SRC, TGT[:, :-1], LENGTHS).logits
    wanted = F.cross_entropy(
        logits.flatten(0, 1), TGT[:, 1:].flatten(), ignore_index=PAD, label_smoothing=smoothing, reduction=reduction
    )
    twin = copy.deepcopy(of)
    wanted.sum().backward()
    loss = twin.loss(SRC, TGT, LENGTHS, label_smoothing=smoothing, reduction=reduction)
    loss.sum().backward()
    torch.testing.assert_close(loss, wanted.view(3, 4) if reduction == "none" else wanted)
    for (name, a), b in zip(of.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)
    ends = (TGT != PAD).sum(1)
    torch.testing.assert_close(of.loss(SRC, TGT, LENGTHS, ends, label_smoothing=smoothing, reduction=reduction), loss)


def test_lengths_of_the_target_overrule_its_padding() -> None:
    """A pad_id within the length is a token like others; what stands behind it is not looked at."""
    of = build()
    tgt, ends = TGT.clone(), [5, 3, 2]
    tgt[0, 2], tgt[1, 3:], tgt[2, 2:] = PAD, 7, -100
    each = of.loss(SRC, tgt, LENGTHS, ends, reduction="none")
    assert each[0].all()
    assert each[1, 2:].eq(0).all()
    torch.testing.assert_close(of.loss(SRC, tgt, LENGTHS, ends), each.sum() / 7)


def test_an_output_of_ones_own() -> None:
    """Any module: its logits are kept, its loss the same."""
    of = build()
    linear = copy.deepcopy(of.output)
    other = Seq2Seq(
        of.encoder, of.decoder, V, bos_id=BOS, eos_id=EOS, pad_id=PAD, embedding=of.embedding,
        output=nn.Sequential(linear),
    )  # fmt: skip
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            other.loss(SRC, TGT, LENGTHS, label_smoothing=0.1, reduction=reduction),
            of.loss(SRC, TGT, LENGTHS, label_smoothing=0.1, reduction=reduction),
        )
    wrong = Seq2Seq(*parts(), V, bos_id=BOS, eos_id=EOS, pad_id=PAD, output=nn.Sequential(nn.Linear(E, V - 1)))
    with pytest.raises(InputError, match=r"output gave \(3, 4, 11\); expected \(3, 4, 12\), V last"):
        wrong(SRC, TGT[:, :-1])


@pytest.mark.parametrize("name", ["luong", "bahdanau", "cho", "conditional_gru"])
def test_the_loss_in_float64(name: str) -> None:
    of = model(name, V=V).double()
    rows = torch.arange(3)[:, None]
    loss = of.loss(rows, TGT)
    logits = of(rows, TGT[:, :-1]).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), TGT[:, 1:].flatten(), ignore_index=PAD))
    assert loss.dtype == torch.float64


def own_choices(of: Seq2Seq, src: Tensor, first: Tensor, steps: int) -> Tensor:
    """What the model says when fed its likeliest token at every step [B, steps]."""
    fed = first
    for _ in range(steps):
        logits = of(src, fed, LENGTHS).logits
        fed = torch.cat((fed, logits[:, -1:].argmax(-1)), 1)
    return fed


def test_scheduled_sampling_feeds_the_likeliest_token() -> None:
    of = build().eval()
    fed = own_choices(of, SRC, TGT[:, :1], 3)
    found = of(SRC, TGT[:, :-1], LENGTHS, teacher_forcing=0.0, need_weights=True)
    wanted = of(SRC, fed, LENGTHS, need_weights=True)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.weights, wanted.weights)
    loss = of.loss(SRC, TGT, LENGTHS, teacher_forcing=0.0)
    real = TGT[:, 1:] != PAD
    each = F.cross_entropy(wanted.logits.flatten(0, 1), TGT[:, 1:].flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(loss, each[real].mean())


def test_scheduled_sampling_draws_for_each_token() -> None:
    """What each step read, seen at the embedding: of 400 draws a share near the ratio are the target's."""
    of = model("luong", V=50, rows=20, seed=1)
    rows, tgt = torch.arange(20)[:, None], torch.randint(3, 50, (20, 21))
    read: list[Tensor] = []
    of.embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    logits = of(rows, tgt, teacher_forcing=0.75).logits
    fed = torch.stack(read, 1)
    assert fed[:, 0].equal(tgt[:, 0])
    own = torch.cat((tgt[:, :1], logits[:, :-1].argmax(-1)), 1)
    given = fed == tgt
    assert torch.equal(fed, torch.where(given, tgt, own))
    differ = (own != tgt)[:, 1:]
    share = float(given[:, 1:][differ].double().mean())
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / int(differ.sum())) ** 0.5
    torch.manual_seed(5)
    first = of(rows, tgt, teacher_forcing=0.5).logits
    torch.manual_seed(5)
    assert torch.equal(of(rows, tgt, teacher_forcing=0.5).logits, first)


def test_scheduled_sampling_has_gradients() -> None:
    """Those of the tokens that were fed, which are no function of the parameters."""
    of = build().eval()
    twin = copy.deepcopy(of)
    fed = own_choices(of, SRC, TGT[:, :1], 3)
    of.loss(SRC, TGT, LENGTHS, teacher_forcing=0.0, reduction="sum").backward()
    logits = twin(SRC, fed, LENGTHS).logits
    F.cross_entropy(logits.flatten(0, 1), TGT[:, 1:].flatten(), ignore_index=PAD, reduction="sum").backward()
    for (name, a), b in zip(of.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("tie", ["target", "all"])
def test_ties(tie: str) -> None:
    of = build(tie)
    assert of.output.weight is of.embedding.weight
    assert (of.embedding is of.encoder.embedding) == (tie == "all")
    names = {"embedding.weight", "output.weight"} | ({"encoder.embedding.weight"} if tie == "all" else set())
    assert names <= of.state_dict().keys()
    twin = copy.deepcopy(of)
    assert twin.output.weight is twin.embedding.weight
    assert twin.output.weight is not of.output.weight
    other = build(tie)
    other.load_state_dict(of.state_dict())
    torch.testing.assert_close(other(SRC, TGT).logits, of(SRC, TGT).logits)
    assert other.output.weight is other.embedding.weight


def test_the_padding_is_not_learned() -> None:
    of = build()
    of.loss(SRC, TGT, LENGTHS).backward()
    assert of.embedding.weight[PAD].eq(0).all()
    assert of.embedding.weight.grad[PAD].eq(0).all()
    begins_with_padding = Seq2Seq(*parts(), V, bos_id=PAD, eos_id=EOS, pad_id=PAD)
    assert begins_with_padding.embedding.padding_idx is None


class Features(nn.Module):
    """An encoder that is the user's own: features in, no ids."""

    def forward(self, src: Any, lengths: Any = None) -> Memory:
        return Memory(out=src["image"], state=((src["image"].mean(1), src["image"].mean(1)),))


def test_any_encoder() -> None:
    of = Seq2Seq(Features(), Decoder.luong(E, E, memory_size=E), V, bos_id=BOS, eos_id=EOS, pad_id=PAD).eval()
    src = {"image": torch.randn(3, 7, E)}
    assert of.loss(src, TGT).isfinite()
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = of.generate(src, max_new_tokens=4, **options)
        assert found.sequences.shape[:2] == (3, options.get("num_return_sequences", 1))

    rows = torch.arange(3)[:, None]
    assert model(V=V).loss(rows, TGT, src_lengths=[9, 9, 9]).isfinite()  # what lengths mean there is its own business

    class Wrong(nn.Module):
        def forward(self, src: Tensor, lengths: Any = None) -> Tensor:
            return src

    wrong = Seq2Seq(Wrong(), Decoder.luong(E, E, memory_size=E), V, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    with pytest.raises(TypeError, match=r"the encoder gave a Tensor; expected a fastseq.Memory"):
        wrong.loss(SRC, TGT)


def test_generate_reads_reversed_sources() -> None:
    """functional.reverse before the encoder, as Sutskever et al. 2014 do."""
    of = build().eval()
    turned = fastseq.functional.reverse(SRC, LENGTHS)
    assert turned.tolist() == [[6, 5, 4, 3], [8, 7, 0, 0], [9, 0, 0, 0]]
    same(of.generate(turned, LENGTHS, max_new_tokens=5), in_float64(of, turned, src_lengths=LENGTHS, max_new_tokens=5))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True}, {"num_beams": 2, "coverage_penalty": 0.1}]
)
def test_generate_and_a_step_of_ones_own_agree(options: dict[str, Any]) -> None:
    of = build().eval()
    with torch.no_grad():
        memory = of.encoder(SRC, LENGTHS)
        keys, state = of.decoder.prepare(memory), of.decoder.init_state(memory)

        def step(tokens: Tensor, state: Any) -> Any:
            out, state, weights = of.decoder.step(of.embedding(tokens), keys, state, need_weights=True)
            return of.output(out), state, weights

        torch.manual_seed(3)
        wanted = fastseq.generate(
            step,
            state,
            batch_size=3,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            max_new_tokens=6,
            return_weights=True,
            **options,
        )
    torch.manual_seed(3)
    same(of.generate(SRC, LENGTHS, max_new_tokens=6, return_weights=True, **options), wanted)


def test_modes_and_gradients_are_left_as_they_are() -> None:
    of = build()
    out = of.generate(SRC, LENGTHS, max_new_tokens=3)
    assert of.training
    assert torch.is_grad_enabled()
    assert not out.scores.requires_grad
    with torch.inference_mode():
        assert of.eval().generate(SRC, LENGTHS, max_new_tokens=3, num_beams=2).sequences.shape[0] == 3


def test_explain_and_repr() -> None:
    of = build()
    assert (
        fastseq.explain(of, SRC, TGT[:, :-1]).chosen
        == fastseq.explain(of.decoder, of.embedding(TGT), of.encoder(SRC)).chosen
    )
    for told in (fastseq.explain(of, SRC, TGT[:, :-1], lengths=LENGTHS), fastseq.explain(of.encoder, SRC, LENGTHS)):
        assert told.chosen is not None
    assert of.as_call(SRC, TGT[:, :-1], LENGTHS).keys.mask is not None
    assert of.encoder.as_call(SRC, LENGTHS).lengths.tolist() == list(LENGTHS)
    assert str(fastseq.explain(of.encoder, SRC, lengths=LENGTHS)) == str(fastseq.explain(of.encoder, SRC, LENGTHS))
    with fastseq.use_backend("torch"):  # which has no decoder; the encoder runs nevertheless
        assert "cannot run this call, which raises" in str(fastseq.explain(of, SRC, TGT[:, :-1], lengths=LENGTHS))
    with fastseq.use_backend("triton"):
        told = fastseq.explain(of, SRC, TGT[:, :-1], lengths=LENGTHS)
    assert all(verdict.chosen or verdict.reason for verdict in told)
    with pytest.raises(TypeError, match=r"Encoder, Attention, Decoder or Seq2Seq, got Sequential"):
        fastseq.explain(torch.nn.Sequential(), SRC)
    with pytest.raises(TypeError, match=r"generate has no option 'no_repeat_ngram'"):
        of.why_stepwise(SRC, no_repeat_ngram=2)
    with pytest.raises(TypeError, match="needs tgt_in"):
        fastseq.explain(of, SRC)
    with pytest.raises(TypeError, match="needs src"):
        fastseq.explain(of)
    with pytest.raises(fastseq.InputError, match=r"src_lengths\[0\]=99"):
        fastseq.explain(of, SRC, TGT, lengths=[99, *LENGTHS[1:]])
    assert "vocab_size=12, bos_id=1, eos_id=2, pad_id=0" in repr(of)
    assert "tie='all'" in repr(build("all"))


def test_compiled_loss() -> None:
    of = build()
    compiled = torch.compile(lambda src, tgt: of.loss(src, tgt), backend="aot_eager")
    torch.testing.assert_close(compiled(SRC, TGT), of.loss(SRC, TGT))


LUONG = {"memory_size": E}
BUILT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"vocab_size": 0}, InputError, "vocab_size=0; it is at least 1"),
    ({"vocab_size": "12"}, TypeError, "vocab_size must be an int, got str"),
    ({"eos_id": V}, InputError, "eos_id=12; ids are 0 to 11, vocab_size - 1"),
    ({"pad_id": -1}, InputError, "pad_id=-1; ids are 0"),
    ({"bos_id": True}, TypeError, "bos_id must be an int, got bool"),
    ({"tie": "both"}, InputError, "tie='both'; use one of"),
    ({"encoder": None}, TypeError, "encoder must be a torch.nn.Module, got NoneType"),
    ({"decoder": nn.Linear(2, 2)}, TypeError, r"decoder must be a fastseq.Decoder, got Linear.*fastseq.generate"),
    ({"embedding": nn.Embedding(V, E + 1)}, InputError, r"embedding has 12 rows of 7; expected at least V=12 of 6"),
    ({"embedding": nn.Embedding(V - 1, E)}, InputError, r"embedding has 11 rows of 6"),
    ({"embedding": torch.zeros(V, E)}, TypeError, "embedding must be a torch.nn.Module, got Tensor"),
    ({"output": nn.Linear(E, V + 1)}, InputError, "output maps 6 features to 13; expected 6"),
    ({"tie": "target", "decoder": Decoder.luong(E, 2 * E, memory_size=E)}, InputError, r"tie='target' of an embedding"),
    ({"tie": "target", "output": nn.Sequential(nn.Linear(E, V))}, TypeError, "needs nn.Embedding and nn.Linear"),
    ({"tie": "all", "encoder": Encoder(E, E)}, InputError, "needs an encoder with embedding=nn.Embedding"),
    ({"tie": "all", "embedding": nn.Embedding(V, E)}, InputError, "with an embedding of its own"),
    ({"tie": "all", "vocab_size": V + 1}, InputError, "encoder.embedding has 12 rows and vocab_size=13"),
    ({"decoder": Decoder.luong(E, E, memory_size=7)}, InputError, "reads a memory of 7 features, the encoder's has 6"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BUILT, ids=[text for _, _, text in BUILT])
def test_wrong_models(change: dict[str, Any], error: type[Exception], text: str) -> None:
    encoder, decoder = parts()
    arguments = {"encoder": encoder, "decoder": decoder, "vocab_size": V, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
    with pytest.raises(error, match=text):
        Seq2Seq(**(arguments | change))


MISFITS: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {  # of the encoder; a preset, its options; why
    "directions": (
        {"bidirectional": True},
        "luong",
        {},
        r"gives \[B, 12\]; Bridge\('last', map='copy'\) reads \[B, 6\]",
    ),
    "number of layers": ({}, "gnmt", {}, r"memory.state has 1 layer\(s\), the decoder 4"),
    "units": ({"hidden_size": 7}, "luong", {}, r"gives \[B, 7\]; .* reads \[B, 6\]"),
    "no cell state": ({"cell": "gru"}, "luong", {}, r"no cell state, .*use cell='same' or 'zero'"),
    "no cell state of a summary": ({}, "cho", {"cell": "lstm"}, r"no cell state"),
    "one direction": ({"cell": "gru"}, "bahdanau", {}, r"\[B, 3\], or twice as many of two directions"),
    "one direction above": ({"num_layers": 2, "bidirectional": 1}, "luong", {"num_layers": 2}, r"gives \[B, 12\]"),
    "no context": ({"bidirectional": True}, "sutskever", {}, r"gives \[B, 12\]"),
    "mean": ({"bidirectional": True}, "tf_nmt", {"bridge": "mean"}, r"memory.out gives \[B, 12\]"),
}


def misfits(name: str, **bridge: Any) -> tuple[Encoder, Decoder]:
    of_encoder, preset, options, _ = MISFITS[name]
    encoder = Encoder(E, **({"hidden_size": E} | of_encoder), embedding=nn.Embedding(V, E))
    size = None if preset == "sutskever" else encoder.output_size
    return encoder, getattr(Decoder, preset)(E, E, memory_size=size, **(options | bridge))


@pytest.mark.parametrize("name", MISFITS)
def test_an_encoder_that_the_bridge_cannot_read_is_refused_when_built(name: str) -> None:
    """As the call would say it; the remedy, as it is written, works."""
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
    encoder, decoder = misfits(name)
    with pytest.raises(InputError, match=MISFITS[name][3]) as built:
        Seq2Seq(encoder, decoder, V, **ids)
    with pytest.raises(InputError) as called:
        decoder.init_state(encoder(SRC))
    assert str(built.value) == str(called.value)
    with torch.device("meta"), pytest.raises(InputError, match=MISFITS[name][3]):
        Seq2Seq(*misfits(name), V, **ids)
    remedy = eval(str(built.value).partition("pass bridge=")[2])
    assert isinstance(remedy, Bridge)
    assert Seq2Seq(*misfits(name, bridge=remedy), V, **ids).loss(SRC, TGT, LENGTHS).isfinite()


def test_what_only_a_call_can_tell_is_built() -> None:
    """A bridge of ones own is not asked, nor what another encoder, or one that was changed, leaves."""
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
    encoder, decoder = misfits("directions", bridge=lambda memory: tuple((h[:, :E], c[:, :E]) for h, c in memory.state))
    assert Seq2Seq(encoder, decoder, V, **ids).loss(SRC, TGT).isfinite()
    encoder, decoder = misfits("directions")
    hook = encoder.register_forward_hook(lambda m, x, y: y._replace(state=((y.out[:, 0, :E],) * 2,)))
    model = Seq2Seq(encoder, decoder, V, **ids)
    assert model.loss(SRC, TGT).isfinite()
    hook.remove()
    with pytest.raises(InputError, match="gives"):
        model.loss(SRC, TGT)
    encoder, decoder = Encoder(E, E, embedding=nn.Embedding(V, E)), Decoder.luong(E, 3, memory_size=E)
    encoder.layers[0] = nn.LSTM(E, E, proj_size=3, batch_first=True)
    Seq2Seq(encoder, decoder, V, **ids)
    low = Seq2Seq(
        Encoder(E, E, embedding=nn.Embedding(V, E)), Decoder.joeynmt(E, E, memory_size=E).bfloat16(), V, **ids
    )
    assert low.float().loss(SRC, TGT).isfinite()


def test_the_built_bridge_of_another_decoder_is_refused() -> None:
    decoder = Decoder.luong(E, E, memory_size=E, bridge=Decoder.cho(E, E, memory_size=E).bridge)
    with pytest.raises(InputError, match=r"no LSTM's states, .*pass the Bridge itself, Bridge\('top'"):
        Seq2Seq(parts()[0], decoder, V, bos_id=BOS, eos_id=EOS, pad_id=PAD)


LOSSES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tgt": TGT[0]}, InputError, r"tgt has shape \(5,\); expected \[B, T\]"),
    ({"tgt": TGT.float()}, TypeError, "tgt must hold token ids, int64 or int32, got torch.float32"),
    ({"tgt": TGT + V}, InputError, "tgt holds 20; ids are 0 to 11, vocab_size - 1"),
    ({"tgt": TGT - 2}, InputError, "tgt holds -2"),
    ({"tgt": TGT[:, :1]}, InputError, r"tgt has shape \(3, 1\); expected \[B, T \+ 1\]"),
    ({"tgt": TGT[:, 1:]}, InputError, r"tgt\[0\] begins with 5; expected bos_id=1: the loss itself shifts tgt"),
    ({"tgt": TGT[:0], "src": SRC[:0]}, InputError, r"tgt has shape \(0, 5\)"),
    ({"tgt": TGT[:2]}, InputError, "tgt has B=2 rows, src 3"),
    ({"tgt": None}, TypeError, "tgt must be a torch.Tensor"),
    ({"src": SRC + V}, InputError, "src holds 21; ids are 0 to 11, the rows of the encoder's embedding"),
    ({"src": SRC - 1}, InputError, "src holds -1"),
    ({"src": SRC[:0]}, InputError, r"src has shape \(0, 4\); expected a batch of at least one row"),
    ({"src_lengths": [5, 2, 1]}, InputError, r"src_lengths\[0\]=5 is outside \[0, T=4\]"),
    ({"src_lengths": [-1, 2, 1]}, InputError, r"src_lengths\[0\]=-1 is outside \[0, T=4\]; clamp it$"),
    ({"tgt_lengths": [6, 2, 1]}, InputError, r"tgt_lengths\[0\]=6"),
    ({"tgt_lengths": [5, 2]}, InputError, r"tgt_lengths has shape \(2,\), expected \(3,\)"),
    ({"label_smoothing": -0.1}, InputError, "label_smoothing=-0.1"),
    ({"reduction": "max"}, InputError, "reduction='max'"),
    ({"teacher_forcing": 1.5}, InputError, "teacher_forcing=1.5; it is a probability"),
    ({"teacher_forcing": "0.5"}, TypeError, "teacher_forcing must be a number, got str"),
    ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing must be a number, got Tensor"),
    ({"src": "ein hund"}, TypeError, r"src must be a torch.Tensor, got str; pass token ids \[B, S\]"),
    ({"src": SRC.float()}, TypeError, "src must hold token ids, int64 or int32, got torch.float32"),
    ({"src": SRC[:, 0]}, InputError, r"src has shape \(3,\); expected token ids \[B, S\]"),
]


@pytest.mark.parametrize(("change", "error", "text"), LOSSES, ids=[text for _, _, text in LOSSES])
def test_wrong_losses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build().loss(**({"src": SRC, "tgt": TGT} | change))


def test_padding_that_is_read_is_warned_of() -> None:
    encoder = Encoder(E, E, embedding=nn.Embedding(V, E, padding_idx=PAD))
    of = Seq2Seq(encoder, Decoder.luong(E, E, memory_size=E), V, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    with pytest.warns(
        UserWarning, match="src ends with the encoder's padding_idx=0 and there are no src_lengths"
    ) as seen:
        of.loss(SRC, TGT)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="pass src_lengths"):
        of.eval().generate(SRC, max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of.loss(SRC, TGT, LENGTHS)
        of.generate(SRC, LENGTHS, max_new_tokens=1)
        of.generate(SRC[:1], max_new_tokens=1)


def test_an_encoder_that_takes_no_ids_says_so() -> None:
    of = Seq2Seq(Encoder(E, E), Decoder.luong(E, E, memory_size=E), V, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    with pytest.raises(InputError, match=r"of token ids, with embedding=nn.Embedding\(...\)"):
        of.loss(SRC, TGT)


def test_padding_that_cannot_be_told() -> None:
    of = Seq2Seq(*parts(), V, bos_id=BOS, eos_id=EOS, pad_id=EOS)
    with pytest.raises(InputError, match="pad_id=2 is also bos or eos, so padding cannot be told; pass tgt_lengths"):
        of.loss(SRC, TGT)
    assert of.loss(SRC, TGT, tgt_lengths=[5, 3, 2]).isfinite()


SEARCHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_beams": 0}, InputError, "num_beams=0; it is at least 1"),
    ({"max_new_tokens": 0}, InputError, "max_new_tokens=0; it is at least 1"),
    ({"num_return_sequences": 2}, InputError, "num_return_sequences=2 is more than num_beams=1"),
    ({"do_sample": True, "coverage_penalty": 0.1}, InputError, "coverage_penalty=0.1 with do_sample=True"),
    ({"decoder_input_ids": [[V], [3], [4]]}, InputError, "decoder_input_ids holds 12"),
    ({"decoder_input_ids": [[3], [4]]}, InputError, r"decoder_input_ids has shape \(2, 1\); expected \[B=3, P\]"),
    ({"streamer": print, "num_beams": 2}, InputError, "streamer with num_beams=2"),
    ({"logits_processor": 3}, TypeError, "logits_processor must be callable"),
    ({"src": SRC[:0]}, InputError, r"src has shape \(0, 4\); expected a batch of at least one row"),
    ({"src": SRC + V}, InputError, "src holds 21"),
]


@pytest.mark.parametrize(("change", "error", "text"), SEARCHES, ids=[text for _, _, text in SEARCHES])
def test_wrong_searches_before_any_work(change: dict[str, Any], error: type[Exception], text: str) -> None:
    of = build()
    ran: list[int] = []
    of.encoder.layers.register_forward_pre_hook(lambda *_: ran.append(1))
    of.encoder.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=text):
        of.generate(**({"src": SRC, "max_new_tokens": 3} | change))
    assert not ran


class SequenceFirst(nn.Module):
    """What many encoders are, and these are not."""

    def forward(self, src: Tensor, lengths: Any = None) -> Memory:
        rows = src.shape[1]
        return Memory(out=torch.randn(rows, 5, E), state=((torch.randn(rows, E), torch.randn(rows, E)),))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_an_encoder_of_another_batch_is_refused(options: dict[str, Any]) -> None:
    of = Seq2Seq(SequenceFirst(), Decoder.luong(E, E, memory_size=E), V, bos_id=BOS, eos_id=EOS, pad_id=PAD).eval()
    for source in (torch.ones(3, 7, dtype=torch.int64), torch.ones(6, 1, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"the encoder gave a memory of B=\d rows for src .*; it is batch first"):
            of.generate(source, max_new_tokens=4, **options)
        with pytest.raises(InputError, match="it is batch first"):
            of.loss(source, torch.tensor([[BOS, 5, EOS]] * len(source)))


@pytest.mark.parametrize("options", [{"return_weights": True}, {"num_beams": 2, "coverage_penalty": 0.1}])
def test_weights_of_a_decoder_without_attention_are_refused(options: dict[str, Any]) -> None:
    of = model("sutskever")
    with pytest.raises(InputError, match="return_weights and coverage_penalty need a decoder with attention"):
        of.generate(torch.arange(4)[:, None], max_new_tokens=3, **options)


def test_what_was_put_over_a_method_is_called() -> None:
    """An instance's own forward or step, and global hooks."""
    of = build().eval()
    linear = of.output.forward
    of.output.forward = lambda x: 2 * linear(x)
    features = of(SRC, TGT).logits
    torch.testing.assert_close(features, 2 * linear(of.decoder(of.embedding(TGT), of.encoder(SRC)).output))
    assert of.why_stepwise(SRC, max_new_tokens=3) == "the output is no plain torch.nn.Linear"
    del of.output.forward
    of.embedding.forward = lambda ids: of.embedding.weight[ids] * 3
    same(of.generate(SRC, max_new_tokens=4), of.generate(SRC, max_new_tokens=4, streamer=lambda tokens: None))
    del of.embedding.forward
    calls: list[int] = []
    step = of.decoder.step
    of.decoder.step = lambda *args, **kwargs: (calls.append(1), step(*args, **kwargs))[1]
    of.generate(SRC, max_new_tokens=4)
    assert calls
    del of.decoder.step
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    of.generate(SRC, max_new_tokens=1)
    handle.remove()
    assert seen.count("Linear") == 1 + (of.decoder.readout is None)


@pytest.mark.skipif(fastseq._native.C is None, reason=str(fastseq._native.reason))
def test_why_a_search_steps_from_python() -> None:
    of, rows = model(V=9), torch.arange(4)[:, None]
    assert of.why_stepwise(rows, max_new_tokens=3) is None
    assert of.why_stepwise(rows, max_new_tokens=3, num_beams=4) is None
    assert of.why_stepwise(rows, max_new_tokens=3, do_sample=True) == "do_sample looks at every step"
    assert model("gnmt", num_layers=3).why_stepwise(rows, max_new_tokens=3) == (
        "residual=2 lies within the loop, which is all of the decoder"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert of.why_stepwise(rows, max_new_tokens=3) == "autocast"
    with fastseq.use_backend("reference"):
        assert of.why_stepwise(rows, max_new_tokens=3) == "the backend reference has none"
    with torch.autograd.forward_ad.dual_level():
        assert of.why_stepwise(rows, max_new_tokens=3) == "forward-mode gradients"
    assert of.train().why_stepwise(rows, max_new_tokens=3) is None
    assert model(input_dropout=0.1).train().why_stepwise(rows, max_new_tokens=3) == "dropout, in training mode"
    with pytest.raises(InputError, match="num_beams=0"):
        of.why_stepwise(rows, max_new_tokens=3, num_beams=0)


def test_a_bridge_is_asked_once() -> None:
    """One that draws would otherwise draw twice."""
    calls: list[int] = []

    def bridge(memory: Memory) -> tuple[tuple[Tensor, Tensor], ...]:
        calls.append(1)
        return ((memory.out.mean(1), memory.out.mean(1)),)

    for dtype in (torch.float32, torch.float64):
        decoder = Decoder.luong(E, E, memory_size=E, bridge=bridge)
        of = Seq2Seq(Encoder(E, E, embedding=nn.Embedding(V, E)), decoder, V, bos_id=BOS, eos_id=EOS, pad_id=PAD)
        calls.clear()
        of.eval().to(dtype).generate(SRC, LENGTHS, max_new_tokens=3, num_beams=2)
        assert calls == [1]


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    of = build().eval()
    same(of.generate(SRC, max_new_tokens=numpy.int64(3)), of.generate(SRC, max_new_tokens=3))
