"""Searches that stay on a GPU, their steps the reference's on the CPU: a beam search against the one that steps from
Python, bit for bit, and against float64. From the second step on only what was recorded is done again, as by a CUDA
graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import InputError, Seq2Seq, engine
from fastseq.backends import decoder_reference, gpu_search
from fastseq.modules import seq2seq
from fastseq.ops import chunked_search as ops
from fastseq.ops.chunked_beams import Beams
from fastseq.ops.chunked_greedy import Rows, State
from fastseq.ops.decoder_search import Search, Vocabulary
from tests.replayed import Recording, replays
from tests.seq2seq_models import BOS, EOS, OPTIONS, PAD, PRESETS, B, in_float64, model, same

ALL = torch.arange(B)[:, None]
NAMES = [f"{name}{''.join(f'-{k}={v}' for k, v in options.items())}" for name, options in PRESETS]
STOPS = (False, True, "never")
REPEATED = ops._repeated


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host looks once in three steps. Logits are PyTorch's product in every search, as they are on a GPU."""
    monkeypatch.setattr(ops, "CHUNK", 3)
    monkeypatch.setattr(ops, "_repeated", replays)
    monkeypatch.setattr(seq2seq, "linear", torch.nn.functional.linear)


@contextmanager
def staying() -> Iterator[list[int]]:
    """The reference has a search; the list grows by one with each that runs."""
    calls: list[int] = []

    def search(*args: Any) -> Any:
        calls.append(1)
        return gpu_search.search(decoder_reference.decoder, *args)

    with pytest.MonkeyPatch.context() as patch, fastseq.use_backend("reference"):
        patch.setattr(engine, "_plans", {})
        patch.setattr(decoder_reference, "search", search, raising=False)
        patch.setattr(decoder_reference, "refuses_search", gpu_search.not_searched, raising=False)
        yield calls


def check(of: Seq2Seq, src: Tensor = ALL, **options: Any) -> fastseq.GenerateOutput:
    """What the search finds, which is what the one from Python finds of the same logits."""
    with staying() as calls:
        found = of.generate(src, **options)
    assert calls
    with fastseq.use_backend("reference"):
        expected = of.generate(src, **options)
    assert found.sequences.equal(expected.sequences)
    assert found.lengths.equal(expected.lengths)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)
    return found


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("name", "options"), PRESETS, ids=NAMES)
def test_every_decoder(name: str, options: dict[str, Any], k: int) -> None:
    """Every leaf of a state goes with its row."""
    for seed in range(2):
        of = model(name, seed=seed, **options)
        asked = {"max_new_tokens": 7, "num_beams": k, "num_return_sequences": min(k, 2)}
        asked["return_weights"] = of.decoder.attention is not None
        same(check(of, **asked), in_float64(of, ALL, **asked))


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], k: int, stops: bool | str) -> None:
    for seed in range(4):
        of = model("luong", V=9, seed=seed, sharpness=1.5)
        options = options | {"num_beams": k, "num_return_sequences": k - seed % 2, "early_stopping": stops}
        same(
            check(of, max_new_tokens=8, return_weights=True, **options),
            in_float64(of, ALL, max_new_tokens=8, return_weights=True, **options),
        )


@pytest.mark.parametrize("k", [2, 5, 7])
@pytest.mark.parametrize("V", [3, 4, 15, 1000])
def test_vocabularies(V: int, k: int) -> None:
    """Fewer tokens than beams want, too."""
    of = model("bahdanau", V=V, seed=V)
    options = {"max_new_tokens": 6, "num_beams": k, "num_return_sequences": k}
    same(check(of, **options), in_float64(of, ALL, **options))


@pytest.mark.parametrize("least", [0, 1])
def test_one_token(least: int) -> None:
    """Which ends: of the k hypotheses that are asked for there is one, or where it may not end none."""
    of = model()
    one = Seq2Seq(of.encoder, of.decoder, 1, bos_id=0, eos_id=0, pad_id=0).eval()
    found = check(one, max_new_tokens=4, num_beams=3, num_return_sequences=3, min_new_tokens=least, return_weights=True)
    assert (found.scores > -torch.inf).sum(1).eq(1 - least).all()


@pytest.mark.parametrize("most", range(1, 8))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_about_a_chunk(k: int, most: int) -> None:
    """As many steps as there are tokens, whether or not the host looks behind the last."""
    of = model(V=20, seed=1)
    with torch.no_grad():
        of.output.bias[EOS] = -100
    found = check(of, max_new_tokens=most, num_beams=k, num_return_sequences=k, return_weights=True)
    assert found.lengths.eq(most).all()


@pytest.mark.parametrize("stops", STOPS)
def test_rows_that_end_at_different_steps(stops: bool | str) -> None:
    of, rows = model("luong", V=20, rows=37, seed=3), torch.arange(37)[:, None]
    with torch.no_grad():
        of.output.bias[EOS] += 1
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 12, "early_stopping": stops}
    found = check(of, rows, return_weights=True, **options)
    assert len(found.lengths[:, 0].unique()) > 4
    same(found, in_float64(of, rows, return_weights=True, **options))


@pytest.mark.parametrize("k", [1, 3])
def test_the_search_ends_with_the_last_row(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the host's next look."""
    kind, steps = Beams if k > 1 else Rows, []
    step = kind.step

    def counted(*args: Any) -> None:
        steps.append(1)
        step(*args)

    monkeypatch.setattr(kind, "step", counted)
    monkeypatch.setattr(ops, "_repeated", lambda step, device: step)
    of = model(V=9)
    with torch.no_grad():
        of.output.bias[EOS] = 50  # at once; the other beams' second token is eos as well
    check(of, max_new_tokens=40, num_beams=k, early_stopping=k > 1)
    assert len(steps) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["luong", "bahdanau", "cho", "conditional_gru"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        of = model(name, V=12, seed=seed, sharpness=1.0).to(dtype)
        weights = of.decoder.attention is not None
        check(of, max_new_tokens=6, num_beams=3, num_return_sequences=3, return_weights=weights)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_nan_is_refused(k: int, wrong: float) -> None:
    """Of any token, beside larger ones, and where eos may not come."""
    for token in (EOS, 7):
        of = model(V=9)
        with torch.no_grad():
            of.output.bias[token] = wrong
        with staying() as calls, pytest.raises(InputError, match="NaN for a row"):
            of.generate(ALL, max_new_tokens=5, num_beams=k, min_new_tokens=3)
        assert calls


@pytest.mark.parametrize("k", [1, 3])
def test_nan_of_one_row(k: int) -> None:
    """Others are not touched."""
    of = model(V=9)
    with torch.no_grad():
        of.encoder.out[2, 0] = torch.nan
        of.encoder.mask[2, 0] = True
    with staying(), pytest.raises(InputError, match="NaN for a row"):
        of.generate(ALL, max_new_tokens=5, num_beams=k)
    check(of, ALL[[0, 1, 3]], max_new_tokens=5, num_beams=k)


@pytest.mark.parametrize("k", [1, 2])
def test_nan_behind_a_rows_end(k: int) -> None:
    """What a row reads that has ended nobody looks at, nor what a beam reads that was given up."""
    of, rows = model("luong", V=20, rows=37, seed=3), torch.arange(37)[:, None]
    with torch.no_grad():
        of.output.bias[EOS] += 1
        of.output.bias[PAD] = -torch.inf  # nobody chooses it
        of.embedding.weight[PAD] = torch.nan
    check(of, rows, max_new_tokens=12, num_beams=k, return_weights=True)


@pytest.mark.parametrize("k", [1, 3])
def test_where_nothing_may_come_next(k: int) -> None:
    """All logits -inf: a row ends without eos; a beam is given up."""
    of, options = model(V=5), {"max_new_tokens": 4, "num_beams": k, "num_return_sequences": k}
    with torch.no_grad():
        of.output.bias.fill_(-torch.inf)
    check(of, **options)
    with torch.no_grad():
        of.output.bias[EOS] = 0  # eos alone, and it may not come
    check(of, min_new_tokens=2, **options)
    check(of, **options)


@pytest.mark.parametrize("k", [2, 4])
def test_equal_scores(k: int) -> None:
    """Every token of every beam: as torch.topk has them."""
    of = model(V=11)
    with torch.no_grad():
        of.output.weight.zero_()
        of.output.bias.zero_()
    check(of, max_new_tokens=5, num_beams=k, num_return_sequences=k)


def test_an_empty_source_and_an_embedding_with_rows_to_spare() -> None:
    of = model(V=9)
    with torch.no_grad():
        of.encoder.mask[1] = False
    spare = torch.nn.Embedding(16, 6)
    other = Seq2Seq(of.encoder, of.decoder, 9, bos_id=BOS, eos_id=EOS, pad_id=PAD, embedding=spare).eval()
    check(other, max_new_tokens=6, num_beams=3, return_weights=True)


class Looks(TorchDispatchMode):
    """Counts what the host reads of a tensor."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [1, 4])
def test_the_host_looks_once_a_chunk(k: int) -> None:
    of, counts = model(V=9), []
    with torch.no_grad():
        of.output.bias[EOS] = -100
    for most in (4, 7, 13):
        with staying(), Looks() as looks:
            of.generate(ALL, max_new_tokens=most, num_beams=k)
        counts.append(looks.calls)
    assert counts[1] - counts[0] == 1
    assert counts[2] - counts[1] == 2


class Graph:
    """Notes what it is asked for."""

    calls: ClassVar[list[str]] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        self.calls.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        self.calls.append("end")

    def replay(self) -> None:
        self.calls.append("replay")


def test_a_step_that_raises_ends_its_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is recorded, and repeated without running."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Graph, "calls", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(ops, "_stream", lambda device: stream)

    def fails() -> None:
        raise ArithmeticError("of this test")

    with pytest.raises(ArithmeticError, match="of this test"):
        REPEATED(fails, torch.device("cuda"))
    assert Graph.calls == ["begin thread_local", "end"]
    repeat = REPEATED(lambda: Graph.calls.append("step"), torch.device("cuda"))
    repeat()
    repeat()
    assert Graph.calls[2:] == ["begin thread_local", "step", "end", "replay", "replay"]
    assert REPEATED(fails, torch.device("cpu")) is fails


def toy(y: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
    """A step of a decoder: its output is its state."""
    h = (y[:, -1] + state[0]).tanh()
    return h, (h,), h[:, None, :3].softmax(-1)


def asked(k: int, prefix: Tensor) -> Search:
    return Search(prefix, [1.0, 1.0, 2.0, 3.0, 4.0, 5.0], k, min(k, 2), 2, EOS, PAD, "never", True, True)


@pytest.mark.parametrize("kind", [Rows, Beams])
def test_nan_where_nothing_runs(kind: type[Rows] | type[Beams]) -> None:
    """Of memory rows that have ended: nothing is wrong, and what they found stays."""
    k = 3 if kind is Beams else 1
    of, search = Vocabulary(torch.randn(9, 6), torch.randn(9, 6), None), asked(k, torch.full((2, 1), BOS))
    rows, state = kind.begin(search, of, 3), (torch.randn(2 * k, 6),)
    state[0][:k] = torch.nan
    rows.running[:1].fill_(False) if isinstance(rows, Rows) else rows.total[:1].fill_(-torch.inf)
    before = [t[:1].clone() for t in ((rows.total,) if isinstance(rows, Rows) else (rows.finished, rows.total))]
    rows.step(toy, state, of, search)
    assert not rows.wrong
    assert not rows.running.view(2, k)[0].any()
    assert rows.running.view(2, k)[1].any()
    after = (rows.total,) if isinstance(rows, Rows) else (rows.finished, rows.total)
    assert all(torch.equal(a[:1], b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("stops", "rewards", "done"),
    [(True, True, True), (False, True, True), ("never", True, False), ("never", False, False)],
)
def test_what_a_beam_may_still_reach(stops: bool | str, rewards: bool, done: bool) -> None:
    """-6 over the norm of two tokens, or of the five there may be at most where longer ones gain by it."""
    search = asked(2, torch.full((1, 1), BOS))._replace(early_stopping=stops, rewards_length=rewards)
    if not rewards:
        search = search._replace(norms=[1, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    rows = Beams.begin(search, Vocabulary(torch.randn(9, 6), torch.randn(9, 6), None), 0)
    rows.finished.copy_(torch.tensor([[-1.0, -2.0 if rewards else -20.0]]))
    best = torch.tensor([[-6.0]])
    assert bool(rows._done(best, rows.norms[1:2], search)) is done
    rows.finished[:, 1] = -torch.inf  # one is missing
    assert not rows._done(best, rows.norms[1:2], search)


@pytest.mark.parametrize("kind", [Rows, Beams])
def test_every_step_is_the_same_work(kind: type[Rows] | type[Beams]) -> None:
    """The same operators, of the same shapes, with the same numbers; what lasts lies where it was."""
    k, steps = 3 if kind is Beams else 1, []
    of = Vocabulary(torch.randn(9, 6), torch.randn(9, 6), torch.randn(9))
    search = asked(k, torch.full((2, 1), BOS))
    rows, state = kind.begin(search, of, 3), (torch.randn(2 * k, 6),)
    lasting = [t.data_ptr() for t in (*rows, *state) if t is not None]
    for _ in range(5):
        with Recording() as recording:
            rows.step(toy, state, of, search)
        steps.append([(str(func), _shown(args), _shown(kwargs)) for func, args, kwargs, _ in recording.calls])
    assert [t.data_ptr() for t in (*rows, *state) if t is not None] == lasting
    assert int(rows.at) == 5
    assert all(step == steps[0] for step in steps)


def _shown(tree: Any) -> str:
    return str(torch.utils._pytree.tree_map_only(Tensor, lambda t: (t.shape, t.stride(), t.dtype), tree))


@pytest.mark.parametrize("kind", [Rows, Beams])
def test_everything_lies_on_one_device(kind: type[Rows] | type[Beams]) -> None:
    """Which is not the CPU: of tensors without values, no operator meets one of its."""
    k = 3 if kind is Beams else 1
    with FakeTensorMode(allow_non_fake_inputs=True):  # torch.tensor(list) makes no fake one
        on: Callable[..., Tensor] = partial(torch.empty, device="meta")
        of, state = Vocabulary(on(9, 6), on(9, 6), on(9)), (on(2 * k, 6),)
        search = asked(k, on(2, 3, dtype=torch.int64))
        rows = kind.begin(search, of, 3)
        rows.step(toy, state, of, search)
        found = rows._replace(wrong=False, at=4).found(of, search)  # type: ignore[arg-type]
    for t in (*rows, *found[:4]):
        assert t is not None
        assert t.device.type == "meta"
    assert found.tokens.shape == found.trail.shape == (2, min(k, 2), 2 + (4 if kind is Beams else 5))
