"""Searches within the native loop, against the search that steps from Python, in float64."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import InputError, Seq2Seq, _native
from fastseq.ops import decoder_search as ops
from tests.isa import VARIANTS, choose
from tests.seq2seq_models import (
    BOS,
    EOS,
    OPTIONS,
    PAD,
    PRESETS,
    B,
    in_float64,
    log_likelihood,
    model,
    native_searches,
    same,
)

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

ALL = torch.arange(B)[:, None]
SEARCHES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
]
NAMES = [f"{name}{''.join(f'-{k}={v}' for k, v in options.items())}" for name, options in PRESETS]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return native_searches(monkeypatch)


@pytest.mark.parametrize("table", [True, False], ids=["table", "embedded"])
@pytest.mark.parametrize("search", SEARCHES, ids=["greedy", "beams"])
@pytest.mark.parametrize(("name", "options"), PRESETS, ids=NAMES)
def test_every_decoder(
    name: str, options: dict[str, Any], search: dict[str, Any], table: bool, searches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Inputs of all tokens made beforehand, or each at its step."""
    monkeypatch.setattr(ops, "makes_tables", lambda tokens, rows, steps: table)
    for seed in range(3):
        of = model(name, seed=seed, **options)
        attends = of.decoder.attention is not None
        found = of.generate(ALL, max_new_tokens=7, return_weights=attends, **search)
        assert len(searches) == seed + 1
        same(found, in_float64(of, ALL, max_new_tokens=7, return_weights=attends, **search))


@pytest.mark.parametrize(
    ("beams", "stops"), [(1, False), *((k, stops) for k in (2, 5) for stops in (False, True, "never"))]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], beams: int, stops: bool | str, searches: list[int]) -> None:
    if beams > 1:
        options = options | {"num_beams": beams, "num_return_sequences": beams, "early_stopping": stops}
    for seed in range(4):
        of = model("luong", V=9, seed=seed, sharpness=1.5)
        found = of.generate(ALL, max_new_tokens=8, return_weights=True, **options)
        same(found, in_float64(of, ALL, max_new_tokens=8, return_weights=True, **options))
    assert len(searches) == 4


@pytest.mark.parametrize("V", [4, 15, 16, 17, 64, 65, 1000])
@pytest.mark.parametrize("beams", [1, 4, 7])
def test_vocabularies(V: int, beams: int) -> None:
    """Whole vectors, tails, and fewer continuations than beams want."""
    of = model("bahdanau", V=V, seed=V)
    options = {"max_new_tokens": 6, "num_beams": beams, "num_return_sequences": beams}
    same(of.generate(ALL, **options), in_float64(of, ALL, **options))


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["luong", "conditional_gru"])
def test_variants(name: str, beams: int, isa: str) -> None:
    choose(isa)
    of = model(name, V=37)
    same(
        of.generate(ALL, max_new_tokens=9, num_beams=beams, return_weights=True),
        in_float64(of, ALL, max_new_tokens=9, num_beams=beams, return_weights=True),
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_threads_and_batches(beams: int) -> None:
    """The same from one thread and two, from a batch and from each row alone, from dirty scratch."""
    of = model("luong", V=20, rows=9)
    rows = torch.arange(9)[:, None]
    options: dict[str, Any] = {"max_new_tokens": 10, "num_beams": beams, "return_weights": True}
    expected = in_float64(of, rows, **options)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        _native.C.poison_scratch()
        found = of.generate(rows, **options)
        same(found, expected)
        again = of.generate(rows, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for row in range(9):
        alone = of.generate(rows[row : row + 1], **options)
        most = alone.sequences.shape[2]
        assert alone.sequences[0].equal(found.sequences[row, :, :most])
        torch.testing.assert_close(alone.scores[0], found.scores[row])


@pytest.mark.parametrize("forced", [0, 2])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", ["luong", "bahdanau", "cho"])
def test_scores_and_weights_are_those_of_forward(name: str, beams: int, forced: int) -> None:
    of = model(name, V=13, sharpness=1.0)
    options: dict[str, Any] = {"decoder_input_ids": torch.randint(3, 13, (B, forced))} if forced else {}
    attends = of.decoder.attention is not None
    found = of.generate(
        ALL, max_new_tokens=6, num_beams=beams, num_return_sequences=beams, return_weights=attends, **options
    )
    total, weights = log_likelihood(of, ALL, found, forced)
    torch.testing.assert_close(found.scores.double(), total / (found.lengths - forced), rtol=1e-5, atol=1e-5)
    if weights is not None and found.weights is not None:
        there = torch.arange(found.sequences.shape[2]) < found.lengths[:, :, None]
        torch.testing.assert_close(
            found.weights.double(), torch.where(there[..., None], weights, 0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["luong", "bahdanau", "conditional_gru", "cho"])
@pytest.mark.parametrize("beams", [1, 3])
def test_bf16(name: str, beams: int, searches: list[int]) -> None:
    """Scores are those of float64 on the same tokens, within twice what PyTorch's own bf16 steps are off."""
    of = model(name, V=12, sharpness=1.0).bfloat16()
    found = of.generate(ALL, max_new_tokens=6, num_beams=beams)
    assert len(searches) == 1
    total, _ = log_likelihood(of, ALL, found)
    with fastseq.use_backend("reference"), torch.no_grad():
        fed = torch.cat((torch.full((B, 1), BOS), found.sequences[:, 0, :-1]), 1)
        plain = of(ALL, fed).logits.float().log_softmax(-1).gather(2, found.sequences[:, 0, :, None])[:, :, 0]
        best = in_float64(of, ALL, max_new_tokens=6, num_beams=beams)
    there = torch.arange(plain.shape[1]) < found.lengths
    off = (torch.where(there, plain, 0).sum(1, keepdim=True) - total).abs().max() / found.lengths.min()
    budget = float(2 * off + 2**-8 * total.abs().max())
    assert float((found.scores.double() - total / found.lengths).abs().max()) <= budget
    if beams > 1:  # hardly worse than the best that float64 finds; a greedy search may leave its path for good
        assert float((best.scores - total / found.lengths).max()) <= budget
    else:
        logits = copy.deepcopy(of).double()(ALL, fed).logits
        chosen = logits.gather(2, found.sequences[:, 0, :, None])[:, :, 0]
        assert float(torch.where(there, logits.amax(-1) - chosen, 0).max()) <= 2 * 2**-7 * float(logits.abs().max())


def test_what_runs_step_by_step(searches: list[int]) -> None:
    """Options that look at every step, and parts that are their user's own."""
    of = model(V=9)
    stepwise: list[dict[str, Any]] = [
        {"do_sample": True}, {"no_repeat_ngram_size": 2}, {"num_beams": 2, "coverage_penalty": 0.1},
        {"logits_processor": lambda ids, scores: scores}, {"streamer": lambda tokens: None},
    ]  # fmt: skip
    for options in stepwise:
        of.generate(ALL, max_new_tokens=3, **options)
    of.embedding.register_forward_hook(lambda module, inputs, output: output * 2)
    same(of.generate(ALL, max_new_tokens=5), in_float64(of, ALL, max_new_tokens=5))
    parts: list[tuple[str, dict[str, Any]]] = [
        ("gnmt", {"num_layers": 3}),
        ("luong", {"attention": lambda q, m: fastseq.Attention(q, m, score="general", window=fastseq.LocalP(2))}),
        ("cho", {"cell": "lstm", "bridge": fastseq.Bridge("top", act="tanh", cell="zero")}),
    ]
    for name, options in parts:
        other = model(name, **options)
        same(other.generate(ALL, max_new_tokens=5), in_float64(other, ALL, max_new_tokens=5))
    dropping = model(input_dropout=0.5).train()
    torch.manual_seed(1)
    dropping.generate(ALL, max_new_tokens=5)
    with torch.autocast("cpu", torch.bfloat16):
        of.generate(ALL, max_new_tokens=3)
    with fastseq.use_backend("reference"):
        model(V=9).generate(ALL, max_new_tokens=3)
    assert not searches


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_an_output_of_ones_own_is_called(searches: list[int]) -> None:
    of = model(V=9)
    output = Doubled(12, 9)
    other = Seq2Seq(of.encoder, of.decoder, 9, bos_id=BOS, eos_id=EOS, pad_id=PAD, output=output)
    same(other.eval().generate(ALL, max_new_tokens=5), in_float64(other, ALL, max_new_tokens=5))
    assert not searches


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_is_refused(beams: int) -> None:
    of = model(V=9)
    with torch.no_grad():
        of.encoder.out[2, 0] = torch.nan
        of.encoder.mask[2, 0] = True
    with pytest.raises(InputError, match="NaN for a row"):
        of.generate(ALL, max_new_tokens=5, num_beams=beams)
    same(  # rows of others are not touched
        of.generate(ALL[:2], max_new_tokens=5, num_beams=beams),
        in_float64(of, ALL[:2], max_new_tokens=5, num_beams=beams),
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_where_nothing_may_come_next(beams: int) -> None:
    """All logits -inf: a row ends without eos; a beam is given up."""
    of = model(V=5)
    with torch.no_grad():
        of.output.bias.fill_(-torch.inf)
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": beams}
    same(of.generate(ALL, **options), in_float64(of, ALL, **options))
    with torch.no_grad():
        of.output.bias.fill_(-torch.inf)
        of.output.bias[EOS] = 0  # eos alone, and it may not come
    same(of.generate(ALL, min_new_tokens=2, **options), in_float64(of, ALL, min_new_tokens=2, **options))
    same(of.generate(ALL, **options), in_float64(of, ALL, **options))


def test_strided_parameters_and_an_empty_source() -> None:
    of = model(V=9)
    with torch.no_grad():
        of.encoder.mask[1] = False
        of.output.weight = nn.Parameter(of.output.weight.T.contiguous().T)
        of.embedding.weight = nn.Parameter(torch.stack((of.embedding.weight, of.embedding.weight), -1)[..., 0])
    for beams in (1, 3):
        same(
            of.generate(ALL, max_new_tokens=6, num_beams=beams, return_weights=True),
            in_float64(of, ALL, max_new_tokens=6, num_beams=beams, return_weights=True),
        )


def test_an_embedding_with_rows_to_spare(searches: list[int]) -> None:
    of = model(V=9)
    spare = nn.Embedding(16, 6)
    other = Seq2Seq(of.encoder, of.decoder, 9, bos_id=BOS, eos_id=EOS, pad_id=PAD, embedding=spare).eval()
    for most in (2, 40):
        same(other.generate(ALL, max_new_tokens=most), in_float64(other, ALL, max_new_tokens=most))
    assert len(searches) == 2


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", ["luong", "bahdanau"])
def test_a_wide_beam_finds_what_trying_everything_finds(name: str, penalty: float) -> None:
    """Every sequence over four tokens, up to four long, scored by teacher forcing in float64."""
    of = model(name, V=4, sharpness=1.5)
    every = [list(t) for length in range(1, 5) for t in itertools.product(range(4), repeat=length)]
    every = [t for t in every if EOS not in t[:-1] and (t[-1] == EOS or len(t) == 4)]
    ids = torch.tensor([t + [PAD] * (4 - len(t)) for t in every])
    lengths = torch.tensor([len(t) for t in every])
    sequences = fastseq.GenerateOutput(ids.expand(B, -1, -1), lengths.expand(B, -1), torch.zeros(B, len(every)), None)
    scores = log_likelihood(of, ALL, sequences)[0] / lengths**penalty
    best = scores.topk(8, 1)
    found = of.generate(ALL, max_new_tokens=4, num_beams=150, num_return_sequences=7, length_penalty=penalty)
    torch.testing.assert_close(found.scores.double(), best.values[:, :7], rtol=1e-5, atol=1e-5)
    gaps = best.values[:, :-1] - best.values[:, 1:]
    clear = 0
    for b, r in itertools.product(range(B), range(7)):
        if gaps[b, r] > 1e-4 and (r == 0 or gaps[b, r - 1] > 1e-4):
            clear += 1
            assert found.sequences[b, r, : int(found.lengths[b, r])].tolist() == every[int(best.indices[b, r])]
    assert clear > 20
