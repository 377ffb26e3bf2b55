"""Searches in chunks of steps on Triton, against the search that steps from Python in float64."""

from typing import Any

import pytest
import torch

import fastseq
from fastseq.ops import chunked_search as ops
from fastseq.ops.chunked_beams import Beams
from fastseq.ops.chunked_greedy import Rows
from tests.seq2seq_models import BOS, EOS, B, in_float64, log_likelihood, model, same

ALL = torch.arange(B)[:, None]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each step; the host looks once in three."""
    calls: list[int] = []

    for kind in (Rows, Beams):

        def counted(*args: Any, step: Any = kind.step) -> None:
            calls.append(1)
            step(*args)

        monkeypatch.setattr(kind, "step", counted)
    monkeypatch.setattr(ops, "CHUNK", 3)
    return calls


@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("luong", {}), ("bahdanau", {"cell": "gru"}), ("sutskever", {"num_layers": 2}), ("cho", {}), ("gnmt", {}),
        ("conditional_gru", {}),
    ],
)  # fmt: skip
def test_every_order(name: str, changes: dict[str, Any], search: dict[str, Any], steps: list[int]) -> None:
    of = model(name, **changes)
    options = search | {"max_new_tokens": 7, "return_weights": of.decoder.attention is not None}
    of.decoder.backend = "triton"
    assert of.why_stepwise(ALL, **options) is None
    found = of.generate(ALL, **options)
    assert len(steps) in (3, 6, 7)
    same(found, in_float64(_as_it_was(of), ALL, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 5},
        {"decoder_input_ids": [[BOS, 5], [BOS, 8], [BOS, 3], [BOS, 4]], "min_new_tokens": 2, "return_weights": True},
        {"length_penalty": 0.6, "length_norm": "wu"},
        {"num_beams": 4, "early_stopping": True, "min_new_tokens": 3, "return_weights": True},
        {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 2},
        {"num_beams": 3, "decoder_input_ids": [[5, 6], [7, 8], [8, 3], [4, 4]], "return_weights": True},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], steps: list[int]) -> None:
    of = model("luong", V=9, seed=1, sharpness=1.5)
    of.decoder.backend = "triton"
    found = of.generate(ALL, max_new_tokens=8, **options)
    assert steps
    same(found, in_float64(_as_it_was(of), ALL, max_new_tokens=8, **options))


def test_the_search_ends_with_the_last_row(steps: list[int]) -> None:
    """Once every row has its eos, at most two further steps are taken."""
    of = model("luong", seed=2)
    of.decoder.backend = "triton"
    with torch.no_grad():
        of.output.bias[EOS] += 2
    longest = int(of.generate(ALL, max_new_tokens=30).lengths.max())
    assert longest < 24
    assert len(steps) == -(-longest // 3) * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["luong", "bahdanau"])
def test_beams_of_16_bits(name: str, dtype: torch.dtype, steps: list[int]) -> None:
    """Scores are those of float64 on the same tokens, within twice what PyTorch's own 16-bit steps are off."""
    of = model(name, V=12, sharpness=1.0).to(dtype)
    of.decoder.backend = "triton"
    found = of.generate(ALL, max_new_tokens=6, num_beams=3)
    assert steps
    total, _ = log_likelihood(_as_it_was(of), ALL, found)
    with fastseq.use_backend("reference"), torch.no_grad():
        fed = torch.cat((torch.full((B, 1), BOS), found.sequences[:, 0, :-1]), 1)
        plain = of(ALL, fed).logits.float().log_softmax(-1).gather(2, found.sequences[:, 0, :, None])[:, :, 0]
    best = in_float64(of, ALL, max_new_tokens=6, num_beams=3)
    there, u = torch.arange(plain.shape[1]) < found.lengths, torch.finfo(dtype).eps / 2
    off = (torch.where(there, plain, 0).sum(1, keepdim=True) - total).abs().max() / found.lengths.min()
    budget = float(2 * off + u * total.abs().max())
    assert float((found.scores.double() - total / found.lengths).abs().max()) <= budget
    assert float((best.scores - total / found.lengths).max()) <= budget  # hardly worse than what float64 finds


def test_draws_step_from_python(steps: list[int]) -> None:
    of = model("luong")
    of.decoder.backend = "triton"
    assert "do_sample" in str(of.why_stepwise(ALL, do_sample=True))
    of.generate(ALL, max_new_tokens=4, do_sample=True)
    assert not steps


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_is_refused(beams: int, steps: list[int]) -> None:
    of = model("luong")
    of.decoder.backend = "triton"
    with torch.no_grad():
        of.output.bias[3] = torch.nan
    with pytest.raises(RuntimeError, match="NaN"):
        of.generate(ALL, max_new_tokens=4, num_beams=beams)
    assert steps


def _as_it_was(of: Any) -> Any:
    of.decoder.backend = "auto"
    return of
