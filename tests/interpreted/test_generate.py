"""Greedy search in chunks of steps on Triton, against the search that steps from Python in float64."""

from typing import Any

import pytest
import torch

from fastseq.ops import chunked_search as ops
from tests.seq2seq_models import BOS, EOS, B, in_float64, model, same

ALL = torch.arange(B)[:, None]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each step; the host looks once in three."""
    calls: list[int] = []
    step = ops._step

    def counted(*args: Any) -> None:
        calls.append(1)
        step(*args)

    monkeypatch.setattr(ops, "_step", counted)
    monkeypatch.setattr(ops, "CHUNK", 3)
    return calls


@pytest.mark.parametrize("name", ["luong", "bahdanau", "sutskever", "cho", "gnmt"])
def test_every_order(name: str, steps: list[int]) -> None:
    of = model(name)
    weights = of.decoder.attention is not None
    of.decoder.backend = "triton"
    assert of.why_stepwise(ALL, return_weights=weights) is None
    found = of.generate(ALL, max_new_tokens=7, return_weights=weights)
    assert len(steps) in (3, 6, 7)
    same(found, in_float64(_as_it_was(of), ALL, max_new_tokens=7, return_weights=weights))


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 5},
        {"decoder_input_ids": [[BOS, 5], [BOS, 8], [BOS, 3], [BOS, 4]], "min_new_tokens": 2, "return_weights": True},
        {"length_penalty": 0.6, "length_norm": "wu"},
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


def test_beams_step_from_python(steps: list[int]) -> None:
    of = model("luong")
    of.decoder.backend = "triton"
    assert "beams" in str(of.why_stepwise(ALL, num_beams=3))
    found = of.generate(ALL, max_new_tokens=4, num_beams=3)
    assert not steps
    same(found, in_float64(_as_it_was(of), ALL, max_new_tokens=4, num_beams=3))


def test_nan_is_refused(steps: list[int]) -> None:
    of = model("luong")
    of.decoder.backend = "triton"
    with torch.no_grad():
        of.output.bias[3] = torch.nan
    with pytest.raises(RuntimeError, match="NaN"):
        of.generate(ALL, max_new_tokens=4)
    assert steps


def _as_it_was(of: Any) -> Any:
    of.decoder.backend = "auto"
    return of
