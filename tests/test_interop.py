"""from_opennmt and from_fairseq: the logits, gradients and searches of these toolkits' formulas in plain PyTorch."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastseq import InputError, Seq2Seq
from fastseq.interop import from_fairseq, from_opennmt, right_padded
from tests.generate_oracle import BOS, EOS, PAD, plain_beam
from tests.toolkit_checks import LENGTHS, SRC, TGT, check_keys_and_shapes, check_saving, sgd_step
from tests.toolkit_checks import PAD as FILL
from tests.toolkit_models import FairseqModel, OpenNMTModel, Row, drawn
from tests.toolkits import Sizes

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # of float64: thousands of roundings
V = (12, 13)
N = Sizes(I=6, H=8, D=8, L=2)
OPENNMT: dict[str, dict[str, Any]] = {
    "general": {},
    "dot": {"score": "dot", "dirs": 1},
    "mlp": {"score": "mlp"},
    "gru": {"cell": "gru", "score": "mlp", "dirs": 1},
    "not fed": {"feed": False},
    "not fed, gru": {"feed": False, "cell": "gru", "score": "dot", "bridge": True},
    "bridge": {"bridge": True},
    "bridge of one direction": {"bridge": True, "dirs": 1, "cell": "gru"},
    "no attention": {"score": "none", "dirs": 1},
    "no attention, not fed": {"score": "none", "feed": False},
}
FAIRSEQ: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "same size": (N, {"dirs": 1}),
    "of two directions": (Sizes(I=6, H=7, D=10, L=2), {}),
    "no attention": (Sizes(I=6, H=7, D=10, L=1), {"attention": False}),
    "additional_fc": (N, {"out_size": 5}),
    "embedding for output": (Sizes(I=8, H=8, D=8, L=1), {"share": True}),
    "embedding behind additional_fc": (N, {"share": True, "out_size": 6}),
}


def opennmt(name: str, seed: int = 0, L: int = 2, scale: float = 1.0) -> OpenNMTModel:
    return drawn(OpenNMTModel(Sizes(I=6, H=8, D=8, L=L), V, **OPENNMT[name]), seed)


def fairseq(name: str, pad_id: int = FILL, seed: int = 0) -> FairseqModel:
    sizes, options = FAIRSEQ[name]
    return drawn(FairseqModel(sizes, V, pad_id=pad_id, **options), seed)


def left_padded(src: Tensor, lengths: Tensor, pad_id: int) -> Tensor:
    turned = torch.full_like(src, pad_id)
    for row, given, n in zip(turned, src, lengths.tolist(), strict=True):
        row[len(row) - n :] = given[:n]
    return turned


def converted(theirs: nn.Module, version: int = 3, **ids: int) -> Seq2Seq:
    if isinstance(theirs, FairseqModel):
        return from_fairseq(theirs.checkpoint(), **ids)
    checkpoint = theirs.checkpoint(version)
    return from_opennmt(checkpoint["model"], generator=checkpoint["generator"], **ids)


def check_training(theirs: nn.Module, ours: Seq2Seq, src: Tensor, steps: int) -> None:
    """Logits and weights are equal, also after steps of gradient descent: so every gradient is."""
    for step in range(steps + 1):
        logits, weights = theirs(src, TGT[:, :-1], LENGTHS)
        found = ours(SRC, TGT[:, :-1], LENGTHS, need_weights=ours.decoder.attention is not None)
        torch.testing.assert_close(found.logits, logits, **EXACT)
        if found.weights is not None:
            torch.testing.assert_close(found.weights, weights, **EXACT)
        if step < steps:
            sgd_step(theirs, cross_entropy(logits.flatten(0, 1), TGT[:, 1:].flatten(), ignore_index=FILL) / 8)
            sgd_step(ours, ours.loss(SRC, TGT, LENGTHS) / 8)


@pytest.mark.parametrize("name", OPENNMT)
@pytest.mark.parametrize("version", [1, 3])
def test_opennmt(name: str, version: int) -> None:
    """Of a bridge of two directions one matrix is ours twice, so that training on differs."""
    theirs = opennmt(name)
    twice = OPENNMT[name].get("bridge", False) and OPENNMT[name].get("dirs", 2) == 2
    padding_learns(theirs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = converted(theirs, version)
    assert len(said) == (version == 1 and OPENNMT[name].get("bridge", False))
    assert not ours.training
    check_training(theirs, ours, SRC, 0 if twice else 1)


@pytest.mark.parametrize("dirs", [1, 2])
def test_a_bridge_of_opennmt_1(dirs: int) -> None:
    """It views [L * dirs, B, H'] as rows of L * H' features, which are one row's own where B = 1; else it is mixed."""
    theirs = drawn(OpenNMTModel(N, V, bridge=True, dirs=dirs))
    with pytest.warns(UserWarning, match="mix the rows of a batch"):
        ours = converted(theirs, version=1)

    def old(states: tuple[tuple[Tensor, ...], ...]) -> list[Tensor]:
        """h of the decoder's layers [L, B, H]."""
        h = torch.stack([layer[0] for layer in states])  # [L, B, dirs * H']
        stacked = h.unflatten(2, (dirs, -1)).permute(0, 2, 1, 3).flatten(0, 1)
        linear = theirs.decoder.bridge[0]
        made = linear(stacked.reshape(-1, linear.in_features)).relu().view_as(stacked)
        return list(torch.cat([made[side::dirs] for side in range(dirs)], 2))

    for rows in (SRC[:1], SRC[:2]):
        lengths = LENGTHS[: len(rows)]
        found = ours.decoder.init_state(ours.encoder(rows, lengths)).layers
        expected = old(ours.encoder(rows, lengths).state)
        same = all(torch.allclose(h, e, **EXACT) for (h, _), e in zip(found, expected, strict=True))
        assert same == (len(rows) == 1)


def padding_learns(theirs: nn.Module) -> None:
    """Both toolkits' embeddings have a padding_idx."""
    theirs.source.padding_idx = theirs.target.padding_idx = FILL


@pytest.mark.parametrize("name", FAIRSEQ)
def test_fairseq(name: str) -> None:
    """What additional_fc and the output become is one map, so that training on differs."""
    theirs = fairseq(name)
    padding_learns(theirs)
    ours = converted(theirs, bos_id=2)
    assert ours.bos_id == ours.eos_id == 2
    assert ours.tie == ("target" if name == "embedding for output" else None)
    src = left_padded(SRC, LENGTHS, FILL)
    for found, expected in zip(right_padded(src, FILL), (SRC, LENGTHS), strict=True):
        assert torch.equal(found, expected)
    check_training(theirs, ours, src, 0 if "additional_fc" in name else 1)


@pytest.mark.parametrize("name", ["general", "mlp", "not fed", "bridge", "no attention"])
def test_beams_of_opennmt(name: str) -> None:
    check_beams(opennmt(name, seed=4), {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}, "wu")


@pytest.mark.parametrize("name", ["same size", "of two directions", "no attention", "embedding for output"])
def test_beams_of_fairseq(name: str) -> None:
    """A hypothesis begins with eos."""
    check_beams(fairseq(name, PAD, seed=2), {"bos_id": EOS, "eos_id": EOS, "pad_id": PAD}, "len")


def check_beams(theirs: nn.Module, ids: dict[str, int], norm: str) -> None:
    """OpenNMT-py ranks by ((5 + L) / 6)^alpha or L^alpha, fairseq by L^alpha; greedy is a beam of one."""
    ours, lengths = converted(theirs, **ids), torch.tensor([5, 3, 1])
    src = torch.randint(3, 12, (3, 5), generator=torch.Generator().manual_seed(5))
    src = src.masked_fill(torch.arange(5) >= lengths[:, None], PAD)
    given = left_padded(src, lengths, PAD) if isinstance(theirs, FairseqModel) else src
    for beams, alpha in ((1, 1.0), (3, 0.7)):
        options = {"length_norm": norm, "length_penalty": alpha}
        found = ours.generate(src, lengths, num_beams=beams, max_new_tokens=7, num_return_sequences=beams, **options)
        for b, n in enumerate(lengths.tolist()):
            row = Row(theirs, given[b], n) if isinstance(theirs, FairseqModel) else Row(theirs, given[b, :n], n)
            expected = plain_beam(row, beams, 7, options, prefix=(ids["bos_id"],))
            for k, (score, tokens) in enumerate(expected):
                assert found.sequences[b, k, : found.lengths[b, k]].tolist() == tokens
                assert float(found.scores[b, k]) == pytest.approx(score, rel=1e-6, abs=1e-6)  # scores are fp32


def test_files(tmp_path: Any) -> None:
    for theirs in (opennmt("bridge"), opennmt("mlp"), fairseq("of two directions"), fairseq("embedding for output")):
        check_saving(converted(theirs), tmp_path / "model.safetensors")


def test_tied_weights() -> None:
    theirs = drawn(OpenNMTModel(Sizes(I=8, H=8, D=8), (13, 13)))
    theirs.generator.weight = theirs.target.weight  # share_decoder_embeddings
    assert converted(theirs).tie == "target"
    theirs.source.weight = theirs.target.weight  # share_embeddings
    ours = converted(theirs)
    assert ours.tie == "all"
    assert ours.output.weight is ours.embedding.weight is ours.encoder.embedding.weight
    theirs.generator.weight = nn.Parameter(theirs.target.weight.detach() + 1)
    ours = converted(theirs)
    assert ours.tie is None
    assert ours.embedding is ours.encoder.embedding


def test_whole_models_keys() -> None:
    """`model.state_dict()`, whose generator is a part of it."""
    checkpoint = opennmt("general").checkpoint(version=1)
    both = checkpoint["model"] | {f"generator.{name}": t for name, t in checkpoint["generator"].items()}
    ours, again = from_opennmt(both), from_opennmt(checkpoint["model"], generator=checkpoint["generator"])
    assert ours.state_dict().keys() == again.state_dict().keys()
    for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_wrong_state_dicts_of_opennmt() -> None:
    checkpoint = opennmt("mlp").checkpoint()
    model, generator = checkpoint["model"], checkpoint["generator"]

    def convert(state: Any) -> Seq2Seq:
        return from_opennmt(state, generator=generator)

    check_keys_and_shapes(convert, model, entry="model")
    with pytest.raises(InputError, match=r"generator is None.*pass checkpoint\['generator'\]"):
        from_opennmt(model)
    with pytest.raises(InputError, match=r"'0\.bias' of OpenNMT-py's generator has shape"):
        from_opennmt(model, generator=generator | {"0.bias": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(InputError, match=r"mean nothing here: '1\.weight'"):
        from_opennmt(model, generator=generator | {"1.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("decoder.attn.linear_cover.weight", "coverage_attn"),
        ("decoder.copy_attn.linear_out.weight", "copy_attn"),
        ("decoder.context_gate.context_gate.gate.weight", "context_gate"),
        ("encoder.rnn.rnn_lst.0.weight", "SRU"),
        ("encoder.embeddings.make_embedding.emb_luts.1.weight", "source features"),
        ("encoder.embeddings.make_embedding.pe.pe", "position_encoding"),
        ("decoder.transformer_layers.0.x", "transformer"),
    ],
)
def test_what_opennmt_has_more(key: str, what: str) -> None:
    checkpoint = opennmt("general").checkpoint()
    with pytest.raises(InputError, match=rf"OpenNMT-py's .*{what}.*'{key}'.* is not supported"):
        from_opennmt(checkpoint["model"] | {key: torch.zeros(1)}, generator=checkpoint["generator"])


def test_what_keys_do_not_show() -> None:
    checkpoint = opennmt("general").checkpoint()
    given: dict[str, Any] = {"state_dict": checkpoint["model"], "generator": checkpoint["generator"]}
    usual = {"global_attention_function": "softmax", "copy_attn": False, "coverage_attn": False, "context_gate": None,
             "rnn_type": "LSTM", "encoder_type": "brnn", "generator_function": "softmax", "layers": 2}  # fmt: skip
    from_opennmt(**given, opt=SimpleNamespace(**usual))
    for name, value in (("global_attention_function", "sparsemax"), ("generator_function", "sparsemax"),
                        ("copy_attn", True), ("rnn_type", "SRU")):  # fmt: skip
        with pytest.raises(InputError, match=rf"{name}={value!r} of OpenNMT-py is not supported"):
            from_opennmt(**given, opt=usual | {name: value})
    for name, value in (("rnn_type", "GRU"), ("global_attention", "mlp"), ("input_feed", 0)):
        with pytest.raises(InputError, match=rf"{name}={value!r} of OpenNMT-py, but the keys show"):
            from_opennmt(**given, opt=usual | {name: value})
    with pytest.raises(InputError, match=r"options within 'opt'; pass opt\['opt'\]"):
        from_opennmt(**given, opt={"opt": usual})
    copying = {"linear.weight": torch.zeros(13, 8), "linear_copy.weight": torch.zeros(1, 8)}
    with pytest.raises(InputError, match="copy_attn"):
        from_opennmt(checkpoint["model"], generator=copying)
    rnn = {name: t[: t.shape[0] // 4] if ".rnn." in name else t for name, t in checkpoint["model"].items()}
    with pytest.raises(InputError, match=r"'encoder.rnn.weight_hh_l0' .* other cells are not supported"):
        from_opennmt(rnn, generator=checkpoint["generator"])
    deeper = {f"encoder.rnn.{kind}_l2{end}": checkpoint["model"][f"encoder.rnn.{kind}_l1{end}"]
              for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for end in ("", "_reverse")}  # fmt: skip
    with pytest.raises(InputError, match=r"encoder has 3 layer\(s\) of 'lstm', its decoder 2"):
        from_opennmt(checkpoint["model"] | deeper, generator=checkpoint["generator"])


def test_wrong_state_dicts_of_fairseq() -> None:
    state = fairseq("of two directions").checkpoint()
    check_keys_and_shapes(from_fairseq, state, entry="model")
    with pytest.raises(InputError, match="adaptive softmax"):
        from_fairseq(state | {"decoder.adaptive_softmax.head.word_proj.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="residuals=True of fairseq is not supported"):
        from_fairseq(state, opt=SimpleNamespace(residuals=True))
    from_fairseq(state, opt=SimpleNamespace(residuals=False, dropout=0.1))
    with pytest.raises(InputError, match="transformer"):
        from_fairseq(state | {"encoder.layers.0.self_attn.k_proj.weight": torch.zeros(1)})


def test_right_padded() -> None:
    src, lengths = right_padded(torch.tensor([[1, 1, 5, 6], [1, 1, 1, 1], [7, 8, 9, 4]]), 1)
    assert src.tolist() == [[5, 6, 1, 1], [1, 1, 1, 1], [7, 8, 9, 4]]
    assert lengths.tolist() == [2, 0, 4]
    assert right_padded(torch.zeros(2, 0, dtype=torch.long), 1)[1].tolist() == [0, 0]
    with pytest.raises(InputError, match="pad_id=1 behind a token"):
        right_padded(torch.tensor([[5, 1]]), 1)
    with pytest.raises(InputError, match=r"expected token ids \[B, S\]"):
        right_padded(torch.tensor([5, 1]), 1)
    with pytest.raises(TypeError, match="src must be"):
        right_padded([[5]], 1)


def test_a_sequence_may_begin_with_eos() -> None:
    """As fairseq's do: only tokens that the model gives end a hypothesis."""
    ours = converted(fairseq("same size"), bos_id=2)
    found = ours.generate(SRC, LENGTHS, max_new_tokens=5)
    assert found.lengths.min() >= 1
