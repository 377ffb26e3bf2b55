"""fastseq.generate against searches written out: every sequence, a loop for each sentence, counts of draws."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.generation import scores as scoring
from fastseq.generation import search
from fastseq.generation.request import Request
from tests.generate_oracle import BOS, EOS, PAD, Toy, all_sequences, final, plain_beam, tokens_of

NORMS: list[dict[str, Any]] = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0},
    {"length_penalty": 0.6, "length_norm": "wu"},
    {"coverage_penalty": 0.4},
]


@pytest.mark.parametrize("seed", range(6))
def test_greedy(seed: int) -> None:
    toy = Toy(seed=seed)
    found = toy.run(return_weights=True, max_new_tokens=12)
    for b in range(toy.B):
        one, tokens, state = toy.row(b), [], toy.row(b).state()
        token = BOS
        while token != EOS and len(tokens) < 12:
            logits, state, _ = one.step(torch.tensor([token]), state)
            token = int(logits.argmax())
            tokens.append(token)
        assert tokens_of(found, b) == tokens
        total, weights = one.score(tokens)
        assert float(found.scores[b, 0]) == pytest.approx(total / len(tokens), rel=1e-5)
        assert found.weights is not None
        torch.testing.assert_close(found.weights[b, 0, : len(tokens)].double(), weights, rtol=1e-5, atol=1e-6)
        assert not found.weights[b, 0, len(tokens) :].any()
        assert (found.sequences[b, 0, len(tokens) :] == PAD).all()
    assert found.sequences.shape[2] == int(found.lengths.max())


@pytest.mark.parametrize("options", NORMS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_what_trying_everything_finds(options: dict[str, Any], seed: int) -> None:
    toy = Toy(V=4, seed=seed, sharpness=1.0)
    found = toy.run(num_beams=90, num_return_sequences=7, max_new_tokens=4, return_weights=True, **options)
    for b in range(toy.B):
        one = toy.row(b)
        every = sorted(((final(one, tokens, options), tokens) for tokens in all_sequences(4, 4)), key=lambda x: -x[0])
        for r, (score, tokens) in enumerate(every[:7]):
            assert float(found.scores[b, r]) == pytest.approx(score, rel=1e-5)
            if score - every[r + 1][0] > 1e-5 and (r == 0 or every[r - 1][0] - score > 1e-5):
                assert tokens_of(found, b, r) == tokens
                assert found.weights is not None
                weights = found.weights[b, r, : len(tokens)].double()
                torch.testing.assert_close(weights, one.score(tokens)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stops", [False, True, "never"])
@pytest.mark.parametrize("options", NORMS, ids=str)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_beams_of_every_sentence(k: int, options: dict[str, Any], stops: bool | str) -> None:
    """The batch's search is each sentence's own, written with lists."""
    options = options | {"early_stopping": stops}
    for seed in range(4):
        toy = Toy(V=7, seed=seed, sharpness=1.5)
        found = toy.run(num_beams=k, num_return_sequences=k, max_new_tokens=7, **options)
        for b in range(toy.B):
            expected = plain_beam(toy.row(b), k, 7, options)
            assert [tokens_of(found, b, r) for r in range(k)] == [tokens for _, tokens in expected]
            assert found.scores[b].tolist() == pytest.approx([score for score, _ in expected], rel=1e-5)


def test_when_a_search_stops_matters() -> None:
    """Each of the three ways finds something else somewhere: the tests above can tell them apart."""
    found = {
        stops: [
            plain_beam(
                Toy(V=7, seed=seed, sharpness=1.5).row(b), 3, 7, {"length_penalty": 2.0, "early_stopping": stops}
            )
            for seed in range(4)
            for b in range(3)
        ]
        for stops in (False, True, "never")
    }
    assert found[False] != found[True]
    assert found[False] != found["never"]


def test_all_hypotheses_together_are_certain() -> None:
    """A beam as wide as all there is: their probabilities add up to 1."""
    found = Toy(V=4).run(num_beams=150, num_return_sequences=150, max_new_tokens=4, length_penalty=0.0)
    assert ((found.scores > -math.inf).sum(1) == len(all_sequences(4, 4))).all()
    assert found.scores.exp().sum(1).tolist() == pytest.approx([1.0] * 3, rel=1e-5)


def test_one_beam_is_greedy() -> None:
    """The beam search itself, with one beam."""
    for seed in range(5):
        toy = Toy(seed=seed)
        greedy = toy.run(return_weights=True)
        request = Request.of(
            batch_size=3, bos_id=BOS, eos_id=EOS, pad_id=PAD, max_new_tokens=6, return_weights=True,
            device=torch.device("cpu"),
        )  # fmt: skip
        model = search.Model(toy.step, toy.state(), request, search.picked)
        beam = search.beam_search(model, torch.full((3, 1), BOS))
        for a, b in zip(greedy, beam, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_is_its_rows(beams: int) -> None:
    toy = Toy(V=9, B=5, seed=3)
    found = toy.run(num_beams=beams, max_new_tokens=9)
    for b in range(toy.B):
        alone = toy.row(b).run(num_beams=beams, max_new_tokens=9)
        assert tokens_of(found, b) == tokens_of(alone, 0)
        assert float(found.scores[b, 0]) == pytest.approx(float(alone.scores[0, 0]), rel=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prefix", [[[3], [4], [3]], [[0, 3, 4], [0, 4, 4], [0, 3, 3]]])
def test_forced_tokens(prefix: list[list[int]], beams: int) -> None:
    """They begin every hypothesis; scores are of what follows, weights of all."""
    toy = Toy(seed=5)
    found = toy.run(decoder_input_ids=torch.tensor(prefix), num_beams=beams, max_new_tokens=4, return_weights=True)
    for b in range(toy.B):
        forced = (BOS, *[t for t in prefix[b] if t != BOS])
        tokens = tokens_of(found, b)
        assert tokens[: len(forced) - 1] == [*forced[1:]]
        new = tokens[len(forced) - 1 :]
        total, weights = toy.row(b).score(new, forced)
        assert float(found.scores[b, 0]) == pytest.approx(total / len(new), rel=1e-5)
        assert found.weights is not None
        torch.testing.assert_close(found.weights[b, 0, : len(tokens)].double(), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", NORMS, ids=str)
def test_beams_after_forced_tokens(options: dict[str, Any]) -> None:
    toy, forced = Toy(V=7, seed=3, sharpness=1.5), [[3, 4], [5, 5], [2, 6]]
    found = toy.run(num_beams=3, num_return_sequences=3, decoder_input_ids=forced, **options)
    for b in range(toy.B):
        expected = plain_beam(toy.row(b), 3, 6, options, (BOS, *forced[b]))
        assert [tokens_of(found, b, r) for r in range(3)] == [[*forced[b], *tokens] for _, tokens in expected]
        assert found.scores[b].tolist() == pytest.approx([score for score, _ in expected], rel=1e-5)
    drawn = toy.run(do_sample=True, num_return_sequences=4, decoder_input_ids=forced)
    assert (drawn.sequences[:, :, :2] == torch.tensor(forced)[:, None]).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_lengths(beams: int) -> None:
    toy = Toy(seed=1)
    toy.w[:, EOS] += 3  # ends at once, if it may
    assert (toy.run(num_beams=beams).lengths < 5).any()
    longer = toy.run(num_beams=beams, min_new_tokens=5)
    assert (longer.lengths >= 6).all()  # five tokens, then eos
    assert not (longer.sequences[:, :, :5] == EOS).any()
    toy.w[:, EOS] = -100.0
    assert (toy.run(num_beams=beams, max_new_tokens=3).lengths == 3).all()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_no_n_gram_comes_twice(n: int, beams: int) -> None:
    toy = Toy(V=12, seed=2, sharpness=0.5)
    toy.w[:, EOS] = -100.0
    free, found = (toy.run(num_beams=beams, max_new_tokens=10, no_repeat_ngram_size=k) for k in (0, n))

    def repeats(out: fastseq.GenerateOutput) -> int:
        rows = [[BOS, *tokens_of(out, b)] for b in range(toy.B)]
        grams = [Counter(zip(*(row[k:] for k in range(n)), strict=False)) for row in rows]
        return max(max(counts.values()) for counts in grams)

    assert repeats(free) > 1
    assert repeats(found) == 1


def test_which_tokens_would_repeat() -> None:
    ids = torch.tensor([[4, 3, 4, 3, 4], [1, 1, 1, 2, 1]])
    for n in range(1, 7):
        expected = torch.zeros(2, 6, dtype=torch.bool)
        for row in range(2):
            tokens = ids[row].tolist()
            seen = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
            for v in range(6):
                expected[row, v] = tuple([*tokens, v][len(tokens) + 1 - n :]) in seen and n <= len(tokens)
        assert torch.equal(scoring.is_repeat(ids, 6, n), expected)


def draws(count: int, **options: Any) -> list[float]:
    """How often each first token is drawn."""
    toy = Toy(V=6, B=1, seed=4, sharpness=0.6)
    generator = torch.Generator().manual_seed(0)
    found = toy.run(do_sample=True, num_return_sequences=count, max_new_tokens=1, generator=generator, **options)
    return (torch.bincount(found.sequences.flatten(), minlength=6) / count).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 4, "top_p": 0.7}],
    ids=str,
)  # fmt: skip
def test_draws_have_their_probabilities(options: dict[str, Any]) -> None:
    toy, count = Toy(V=6, B=1, seed=4, sharpness=0.6), 40_000
    p = (toy.step(torch.tensor([BOS]), toy.state())[0][0] / options.get("temperature", 1)).softmax(-1).tolist()
    order = sorted(range(6), key=lambda v: -p[v])
    kept = order[: options.get("top_k") or 6]
    total, mass, nucleus = sum(p[v] for v in kept), 0.0, []
    for v in kept:
        if mass < options.get("top_p", 1) * total:
            nucleus.append(v)
        mass += p[v]
    total = sum(p[v] for v in nucleus)
    for v, share in enumerate(draws(count, **options)):
        expected = p[v] / total if v in nucleus else 0.0
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)  # five standard deviations


def test_draws_are_by_the_generator() -> None:
    toy = Toy(V=9, seed=1, sharpness=0.5)

    def drawn(seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return toy.run(do_sample=True, num_return_sequences=4, generator=g).sequences

    torch.testing.assert_close(drawn(1), drawn(1))
    assert drawn(1).shape != drawn(2).shape or not torch.equal(drawn(1), drawn(2))


def test_drawn_scores_are_the_models() -> None:
    """Best first, of the model's probabilities: not of those drawn from."""
    toy = Toy(V=9, seed=1, sharpness=0.5)
    found = toy.run(do_sample=True, num_return_sequences=4, temperature=0.7, top_k=5)
    for b in range(toy.B):
        scores = [final(toy.row(b), tokens_of(found, b, r), {}) for r in range(4)]
        assert found.scores[b].tolist() == pytest.approx(scores, rel=1e-5)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("beams", [1, 2])
def test_processors_see_what_transformers_show(beams: int) -> None:
    """ids [N, L] from bos on, scores [N, V]; what they return is searched."""
    toy, shapes = Toy(seed=6), []

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        shapes.append((tuple(ids.shape), tuple(scores.shape)))
        assert (ids[:, 0] == BOS).all()
        return scores.index_fill(1, torch.tensor([3]), -math.inf)

    found = toy.run(num_beams=beams, logits_processor=[ban, lambda ids, scores: scores])
    assert not (found.sequences == 3).any()
    rows = toy.B * beams
    assert shapes == [((rows, 1 + k), (rows, toy.V)) for k in range(len(shapes))]
    alone = toy.run(num_beams=beams, logits_processor=ban)
    assert torch.equal(alone.sequences, found.sequences)

    def once(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, ids, -math.inf)

    for seed in range(4):  # the ids are those of each beam
        wide = Toy(V=12, seed=seed, sharpness=0.5)
        mine, built_in = (
            wide.run(num_beams=beams, **o) for o in ({"logits_processor": once}, {"no_repeat_ngram_size": 1})
        )
        assert torch.equal(mine.sequences, built_in.sequences)


def test_streams() -> None:
    toy, seen = Toy(seed=0), []
    found = toy.run(streamer=lambda tokens: seen.append(tokens.clone()))
    torch.testing.assert_close(torch.stack(seen, 1), found.sequences[:, 0])

    class Streamer:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.got.append(value)

        def end(self) -> None:
            self.got.append("end")

    streamer = Streamer()
    toy.run(streamer=streamer)
    assert streamer.got[0].tolist() == [[BOS]] * 3
    assert streamer.got[-1] == "end"
    torch.testing.assert_close(torch.stack(streamer.got[1:-1], 1), found.sequences[:, 0])


def test_any_state() -> None:
    """Nested, with `reorder` not tensors at all, or none: an ensemble, a model that reads all its tokens anew."""
    toys = [Toy(seed=s) for s in (7, 8)]

    def both(tokens: Tensor, states: Any) -> Any:
        a, b = (toy.step(tokens, state) for toy, state in zip(toys, states["all"], strict=True))
        return (a[0].softmax(-1) + b[0].softmax(-1)).log(), {"all": (a[1], b[1]), "n": None}

    options: dict[str, Any] = {
        "batch_size": 3,
        "bos_id": BOS,
        "eos_id": EOS,
        "pad_id": PAD,
        "max_new_tokens": 6,
        "num_beams": 3,
    }
    found = fastseq.generate(both, {"all": (toys[0].state(), toys[1].state()), "n": None}, **options)

    def anew(tokens: Tensor, past: list[list[int]]) -> Any:
        past = [[*row, t] for row, t in zip(past, tokens.tolist(), strict=True)]
        p = 0
        for toy in toys:
            state = {"h": toy.h0.repeat_interleave(3, 0)}
            for k in range(len(past[0])):
                logits, state, _ = toy.step(torch.tensor([row[k] for row in past]), state)
            p = p + logits.softmax(-1)
        return p.log(), past  # type: ignore[attr-defined]

    def reorder(past: list[list[int]], index: Tensor) -> list[list[int]]:
        return [past[i] for i in index.tolist()]

    again = fastseq.generate(anew, [[] for _ in range(9)], reorder=reorder, **options)
    assert torch.equal(found.sequences, again.sequences)
    torch.testing.assert_close(found.scores, again.scores)
    table = Toy(seed=9).w[:5]
    stateless = fastseq.generate(lambda tokens, state: (table[tokens], state), None, **options)
    assert stateless.sequences.shape[:2] == (3, 1)


def test_fewer_hypotheses_than_asked_for() -> None:
    """Two tokens, one of them eos: there are but few sequences."""
    table = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = fastseq.generate(
        lambda tokens, state: (table[tokens], state), None, batch_size=1, bos_id=0, eos_id=1, pad_id=0,
        max_new_tokens=2, num_beams=8, num_return_sequences=8,
    )  # fmt: skip
    there = found.scores[0] > -math.inf
    assert there.sum() == 3  # eos; 0 eos; 0 0
    assert (found.lengths[0][~there] == 0).all()


@pytest.mark.parametrize("beams", [1, 4])
def test_a_step_waits_for_the_host_once(beams: int) -> None:
    """Values go to the host to know whether all rows are done, and for nothing else."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    toy = Toy(seed=0)
    toy.w[:, EOS] = -100.0
    counts = []
    for most in (5, 15):
        with Count() as count:
            toy.run(num_beams=beams, max_new_tokens=most, no_repeat_ngram_size=4, coverage_penalty=0.1)
        counts.append(count.calls)
    assert counts[1] - counts[0] == 10


def test_gradients_are_off() -> None:
    toy = Toy()
    toy.w.requires_grad_()
    assert not toy.run().scores.requires_grad


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", ["bahdanau", "luong", "gnmt", "sutskever"])
def test_a_decoders_steps(name: str, beams: int) -> None:
    """Scores and alignments are those of the teacher-forced loop; the memory has B rows under any beam."""
    torch.manual_seed(0)
    V, B = 11, 4
    two = name == "bahdanau"  # whose bridge reads the backward direction
    encoder = fastseq.Encoder(6, 5 if two else 10, 2, bidirectional=two)
    options: dict[str, Any] = {} if name == "sutskever" else {"memory_size": 10}
    decoder = getattr(fastseq.Decoder, name)(6, 10, num_layers=2, **options)
    embedding, output = torch.nn.Embedding(V, 6), torch.nn.Linear(decoder.output_size, V)
    with torch.no_grad():
        output.weight.mul_(8)
    memory = encoder(torch.randn(B, 7, 6), [7, 3, 5, 1])
    keys, attends = decoder.prepare(memory), name != "sutskever"

    def step(tokens: Tensor, state: Any) -> Any:
        out, state, weights = decoder.step(embedding(tokens), keys, state, need_weights=attends)
        return (output(out), state, weights) if attends else (output(out), state)

    found = fastseq.generate(
        step, decoder.init_state(memory), batch_size=B, bos_id=BOS, eos_id=EOS, pad_id=PAD, max_new_tokens=9,
        num_beams=beams, num_return_sequences=beams, return_weights=attends,
    )  # fmt: skip
    ids = found.sequences.flatten(0, 1)
    fed = torch.cat((torch.full((len(ids), 1), BOS), ids[:, :-1]), 1)
    forced = decoder(embedding(fed), keys, decoder.init_state(memory, copies=beams), need_weights=attends)
    p = output(forced.output).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    there = torch.arange(ids.shape[1]) < found.lengths.flatten()[:, None]
    torch.testing.assert_close((p * there).sum(1).view(B, beams) / found.lengths, found.scores, rtol=1e-4, atol=1e-5)
    if attends:
        assert found.weights is not None
        torch.testing.assert_close(forced.weights * there[..., None], found.weights.flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 3, "top_p": 0.9}, {"num_beams": 3}], ids=str)
def test_where_nothing_may_come_next(options: dict[str, Any]) -> None:
    """A row ends there, without eos; a beam is given up; other rows go on."""
    toy = Toy(V=6, seed=2)

    def dead_end(tokens: Tensor, state: Any) -> Any:
        logits, state, weights = toy.step(tokens, state)
        logits = logits.masked_fill((tokens == 4)[:, None], -math.inf)  # nothing follows a 4
        return torch.where((tokens == PAD)[:, None], math.nan, logits).float(), state, weights

    given: dict[str, Any] = {"batch_size": 3, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "max_new_tokens": 6}
    ban = {"logits_processor": lambda ids, scores: scores.index_fill(1, torch.tensor([PAD]), -math.inf)}
    forced = torch.tensor([[4], [3], [5]])
    found = fastseq.generate(dead_end, toy.state(), decoder_input_ids=forced, **given, **ban, **options)
    assert not found.scores.isnan().any()
    for b in range(3):
        tokens = tokens_of(found, b)
        assert 4 not in tokens[:-1]
        if "num_beams" not in options:
            assert tokens[0] == int(forced[b, 0])
            assert tokens[-1] in (EOS, 4) or len(tokens) == 7
    alone = 0 if "num_beams" in options else 1  # the forced token
    assert int(found.lengths[0, 0]) == alone
    assert int(found.lengths[1, 0]) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_buffers_that_a_step_uses_again(beams: int) -> None:
    """What the search keeps is its own: the step writes into its tokens and its weights."""
    toy = Toy(seed=5)
    rows = toy.B * beams
    buffer = torch.empty(rows, toy.S)

    def step(tokens: Tensor, state: Any) -> Any:
        logits, state, weights = toy.step(tokens, state)
        tokens.fill_(3)
        return logits, state, buffer.copy_(weights)

    options: dict[str, Any] = {"decoder_input_ids": [[3, 4]] * 3, "num_beams": beams, "return_weights": True}
    options |= {
        "batch_size": 3,
        "bos_id": BOS,
        "eos_id": EOS,
        "pad_id": PAD,
        "max_new_tokens": 6,
        "coverage_penalty": 0.2,
    }
    for a, b in zip(
        fastseq.generate(step, toy.state(), **options), fastseq.generate(toy.step, toy.state(), **options), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beams", [1, 3])
def test_logits_of_few_bits(dtype: torch.dtype, beams: int) -> None:
    """Their scores are fp32: as of the same logits in fp32."""
    toy, found = Toy(V=9, seed=1), []
    for given in (dtype, torch.float32):

        def step(tokens: Tensor, state: Any, given: torch.dtype = given) -> Any:
            logits, state, _ = toy.step(tokens, state)
            return logits.to(dtype).to(given), state

        found.append(
            fastseq.generate(
                step, toy.state(), batch_size=3, bos_id=BOS, eos_id=EOS, pad_id=PAD, max_new_tokens=6, num_beams=beams
            )
        )
    assert found[0].scores.dtype == torch.float32
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(a, b)


def test_pads_that_are_eos() -> None:
    """As GPT-like tokenizers have it: lengths say where a row ends."""
    toy = Toy(seed=0)
    a, b = toy.run(), toy.run(pad_id=EOS)
    assert torch.equal(a.lengths, b.lengths)
    assert torch.equal(
        torch.where(a.sequences == PAD, EOS, a.sequences), torch.where(b.sequences == PAD, EOS, b.sequences)
    )
