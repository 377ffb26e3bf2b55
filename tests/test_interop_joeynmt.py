"""fastseq.interop.from_joeynmt against JoeyNMT itself: its models by its own builder, its losses and its searches."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastseq
from benchmarks.joey import BOS, EOS, PAD, joey_model, joeynmt
from fastseq import InputError, Seq2Seq
from fastseq.interop import from_joeynmt
from tests.toolkit_checks import LENGTHS, SRC, TGT, check_keys_and_shapes, check_saving, sgd_step

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # of float64: thousands of roundings
GRU = {"rnn_type": "gru"}
MODELS: dict[str, dict[str, Any]] = {
    "bahdanau": {},
    "luong": {"decoder": {"attention": "luong"}},
    "gru": {"encoder": GRU, "decoder": GRU},
    "two cells": {"decoder": GRU},
    "deep": {"encoder": {"num_layers": 2}, "decoder": {"num_layers": 3, "attention": "luong"}},
    "last": {"decoder": {"init_hidden": "last"}},
    "zero": {"encoder": GRU, "decoder": GRU | {"init_hidden": "zero", "num_layers": 2}},
    "not fed": {"decoder": {"input_feeding": False, "num_layers": 2}},
    "other sizes": {"encoder": {"hidden_size": 5}, "decoder": {"hidden_size": 9}},
    "tied embeddings": {"sizes": (13, 13), "tied_embeddings": True},
    "tied softmax": {"embedding": 8, "tied_softmax": True},
    "all tied": {"sizes": (13, 13), "embedding": 8, "tied_embeddings": True, "tied_softmax": True},
    "scaled": {"embeddings": {"scale": True}},
}
TIES = {"tied softmax": "target", "all tied": "all"}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """JoeyNMT's model with random values of every size, and the options that its keys do not show."""
    options = MODELS[name] | {}
    scaled = options.pop("embeddings", None)
    if scaled is not None:
        both = {"embeddings": {"embedding_dim": 6, "scale": True}}
        options |= {"encoder": both, "decoder": both}
    model = joey_model(**options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    init = options.get("decoder", {}).get("init_hidden")
    return model.eval(), {"init_hidden": init} if init else {"decoder": {}} if scaled is None else options


def teacher_forced(model: nn.Module, src: Tensor, tgt: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, attention's weights) by JoeyNMT's own forward."""
    mask = (torch.arange(src.shape[1]) < lengths[:, None])[:, None]
    found = model._encode_decode(src=src, trg_input=tgt, src_mask=mask, src_length=lengths)
    return found[0], found[2]


@pytest.mark.parametrize("name", MODELS)
def test_encoder_logits_and_training(name: str) -> None:
    """One step of gradient descent leaves both equal: every gradient is the same, those of tied weights too."""
    theirs, opt = build(name)
    ours = from_joeynmt(theirs.state_dict(), opt=opt)
    assert not ours.training
    assert ours.tie == TIES.get(name)
    assert (ours.embedding is ours.encoder.embedding) == ("sizes" in MODELS[name])
    memory = ours.encoder(SRC, LENGTHS)
    mask = (torch.arange(SRC.shape[1]) < LENGTHS[:, None])[:, None]
    out, last = theirs._encode(src=SRC, src_length=LENGTHS, src_mask=mask)
    torch.testing.assert_close(memory.out, out, **EXACT)
    torch.testing.assert_close(memory.state[-1][0], last, **EXACT)
    for _ in range(2):
        logits, weights = teacher_forced(theirs, SRC, TGT[:, :-1], LENGTHS)
        found = ours(SRC, TGT[:, :-1], LENGTHS, need_weights=True)
        torch.testing.assert_close(found.logits, logits, **EXACT)
        torch.testing.assert_close(found.weights, weights, **EXACT)
        scaled = name == "scaled"  # the factor is within our embedding, so its gradient is another
        if not scaled:
            sgd_step(theirs, cross_entropy(logits.flatten(0, 1), TGT[:, 1:].flatten(), ignore_index=PAD))
            sgd_step(ours, ours.loss(SRC, TGT, LENGTHS))


def test_one_direction() -> None:
    """Its encoder of one direction cannot run itself (the last state of a second one is read), but its parts can."""
    theirs = joey_model(encoder={"bidirectional": False}).double().eval()
    ours, mask = from_joeynmt(theirs.state_dict()), (torch.arange(SRC.shape[1]) < LENGTHS[:, None])[:, None]
    with pytest.raises(IndexError):
        theirs._encode(src=SRC, src_length=LENGTHS, src_mask=mask)
    packed = nn.utils.rnn.pack_padded_sequence(theirs.src_embed(SRC), LENGTHS, batch_first=True)
    out, (last, _) = theirs.encoder.rnn(packed)
    out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
    embedded = theirs.trg_embed(TGT)
    logits, _, _, _ = theirs.decoder(embedded, out, last[-1], mask, TGT.shape[1])
    torch.testing.assert_close(ours(SRC, TGT, LENGTHS).logits, logits, **EXACT)


def test_files(tmp_path: Any) -> None:
    for name in ("bahdanau", "all tied"):
        theirs, opt = build(name)
        check_saving(from_joeynmt(theirs.state_dict(), opt=opt), tmp_path / "model.safetensors")


def test_torch_draws_go_on() -> None:
    """Nothing is drawn for weights that are overwritten."""
    state = joey_model().state_dict()
    before = torch.get_rng_state()
    from_joeynmt(state)
    assert torch.equal(torch.get_rng_state(), before)


COPY, WORDS = 9, 14  # tokens of a sentence, vocabulary


def batch_of(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(src, tgt, lengths) of sentences that are to be copied, the longest first as JoeyNMT wants them."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, COPY, (rows,), generator=g).sort(descending=True).values
    words = torch.randint(4, WORDS, (rows, COPY - 1), generator=g)
    behind = torch.arange(COPY - 1) >= lengths[:, None]
    src = words.masked_fill(behind, PAD)[:, : lengths[0]]
    tgt = torch.cat((torch.full((rows, 1), BOS), words.masked_fill(behind, PAD), torch.full((rows, 1), PAD)), 1)
    tgt[torch.arange(rows), lengths + 1] = EOS
    return src, tgt[:, : lengths[0] + 2], lengths


@cache
def trained(cell: str, attention: str) -> nn.Module:
    """A model that has half learned to copy, by JoeyNMT's loss and optimizer: its searches have something to decide."""
    torch.manual_seed(3)
    model = joey_model(
        (WORDS, WORDS), embedding=16, encoder={"rnn_type": cell, "hidden_size": 16},
        decoder={"rnn_type": cell, "hidden_size": 16, "attention": attention},
    ).train()  # fmt: skip
    loss = joeynmt("loss").XentLoss(pad_index=PAD)
    optimizer = joeynmt("builders").build_optimizer({"optimizer": "adam", "learning_rate": 0.01}, model.parameters())
    for step in range(60):
        src, tgt, lengths = batch_of(16, seed=step)
        logits, _ = teacher_forced(model, src, tgt[:, :-1], lengths)
        optimizer.zero_grad()
        (loss(logits.log_softmax(-1), trg=tgt[:, 1:]) / 16).backward()
        optimizer.step()
    attention = model.decoder.attention  # keeps the last step's graph, of which no copy could be made
    attention.proj_keys = attention.proj_query = None
    return model.eval()


def never_given(ids: Tensor, scores: Tensor) -> Tensor:
    """JoeyNMT's search gives neither bos nor padding; ours does what the model says."""
    scores = scores.clone()
    scores[:, [BOS, PAD]] = -torch.inf
    return scores


def their_search(model: nn.Module, src: Tensor, lengths: Tensor, beams: int, alpha: float) -> tuple[Any, Any]:
    mask = (torch.arange(src.shape[1]) < lengths[:, None])[:, None]
    batch = SimpleNamespace(src=src, src_length=lengths, src_mask=mask, has_trg=False)
    found, scores, _ = joeynmt("search").search(
        model, batch, max_output_length=12, beam_size=beams, beam_alpha=alpha, return_prob="hyp"
    )
    rows = [row.tolist() for row in found]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows], scores


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("attention", ["luong", "bahdanau"])
def test_searches(cell: str, attention: str) -> None:
    """Greedy, and beams with Wu's length penalty: the same tokens and scores as its own search in fp32.

    The algorithms differ where hypotheses have ended: JoeyNMT's keep their places in the beam, ours leave it. Here the
    best is found by both, as it mostly is. Scores are sums of at most 12 log-probabilities.
    """
    theirs = trained(cell, attention)
    ours = from_joeynmt(theirs.state_dict())
    src, _, lengths = batch_of(12, seed=1000)
    common: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 1, "logits_processor": never_given}
    expected, _ = their_search(theirs, src, lengths, 1, 0)
    assert sequences(ours, src, lengths, **common)[0] == expected
    for beams, alpha in ((2, 1.0), (5, 0.6)):
        expected, scores = their_search(theirs, src, lengths, beams, alpha)
        found, ranked = sequences(
            ours, src, lengths, num_beams=beams, length_penalty=alpha, length_norm="wu", **common
        )  # fmt: skip
        assert found == expected
        torch.testing.assert_close(ranked, torch.tensor(scores)[:, 0], rtol=1e-4, atol=1e-5)
    greedy, _ = their_search(theirs, src, lengths, 1, 0)
    assert greedy != expected  # the beams were needed


def sequences(model: Seq2Seq, src: Tensor, lengths: Tensor, **options: Any) -> tuple[list[list[int]], Tensor]:
    found = model.generate(src, lengths, **options)
    return [row[0, :n].tolist() for row, n in zip(found.sequences, found.lengths[:, 0], strict=True)], found.scores[
        :, 0
    ]


def test_wrong_state_dicts() -> None:
    state = joey_model().state_dict()
    check_keys_and_shapes(from_joeynmt, state, entry="model_state")
    last = joey_model(decoder={"init_hidden": "last"}).state_dict()
    with pytest.raises(InputError, match="init_hidden is 'last' or 'zero', and no key shows which"):
        from_joeynmt(last)
    for opt, message in (
        ({"init_hidden": "bridge"}, "has no 'decoder.bridge_layer.weight'"),
        ({"decoder": {"init_hidden": "first"}}, "init_hidden='first'"),
        ({"decoder": {"init_hidden": "zero", "activation": "relu"}}, "activation='relu'"),
        ({"encoder": {"type": "transformer"}}, "type='transformer'"),
    ):
        with pytest.raises(InputError, match=message):
            from_joeynmt(last, opt=opt)
    with pytest.raises(InputError, match="options within 'model'"):
        from_joeynmt(last, opt={"model": {"decoder": {"init_hidden": "zero"}}})
    with pytest.raises(InputError, match="init_hidden='zero', but JoeyNMT's state_dict has"):
        from_joeynmt(state, opt={"init_hidden": "zero"})
    with pytest.raises(TypeError, match="opt must be a mapping or a namespace"):
        from_joeynmt(state, opt="model.yaml")
    with pytest.raises(InputError, match="transformer decoder"):
        from_joeynmt(state | {"decoder.layers.0.x": torch.zeros(1)})
    with pytest.raises(InputError, match="reads 15 features; expected 6, or 14 with input feeding"):
        from_joeynmt(state | {"decoder.rnn.weight_ih_l0": torch.zeros(32, 15)})
    tied = joey_model(embedding=8, tied_softmax=True).state_dict()
    with pytest.raises(InputError, match="tied_softmax"):
        from_joeynmt(tied, opt={"scale": True})
    other = joey_model(encoder={"hidden_size": 5}, decoder={"init_hidden": "zero"}).state_dict()
    assert from_joeynmt(other).decoder.bridge.bridge == fastseq.Bridge("zero")  # nothing else fits
    with pytest.raises(InputError, match="'last' of an encoder with 10 features"):
        from_joeynmt(other, opt={"init_hidden": "last"})
