"""Searches on a GPU: the tokens that the same model finds in float64 on the CPU."""

import copy
from typing import Any

import pytest
import torch

import fastseq
from fastseq.ops.chunked_beams import Beams
from fastseq.ops.chunked_greedy import Rows
from tests.gpu.conftest import needs_gpu
from tests.gpu.place import BACKEND, DEVICE
from tests.seq2seq_models import EOS, PRESETS, in_float64, log_likelihood, model, same

SRC = torch.arange(4)[:, None]
SOME = [
    k for k, (name, _) in enumerate(PRESETS) if name in ("bahdanau", "luong", "gnmt", "conditional_gru", "sutskever")
]


def there(of: fastseq.Seq2Seq) -> fastseq.Seq2Seq:
    moved = copy.deepcopy(of).to(DEVICE)
    moved.decoder.backend = BACKEND
    return moved


def back(found: fastseq.GenerateOutput) -> fastseq.GenerateOutput:
    return fastseq.GenerateOutput(*(None if t is None else t.cpu() for t in found))


@pytest.mark.parametrize("index", SOME)
@pytest.mark.parametrize("options", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=["greedy", "beam"])
def test_tokens(index: int, options: dict[str, Any]) -> None:
    name, changes = PRESETS[index]
    of = model(name, **changes)
    options = options | {"max_new_tokens": 9, "return_weights": of.decoder.attention is not None}
    same(back(there(of).generate(SRC.to(DEVICE), **options)), in_float64(of, SRC, **options))


BEAMS: list[dict[str, Any]] = [
    {"early_stopping": True, "min_new_tokens": 4},
    {"early_stopping": "never", "length_penalty": 2.0},
    {"length_penalty": 0.6, "length_norm": "wu", "decoder_input_ids": [[5, 6], [7, 8], [8, 3], [4, 4]]},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beams(options: dict[str, Any]) -> None:
    of = model("luong", V=9, seed=1, sharpness=1.5)
    asked = {"max_new_tokens": 9, "num_beams": 5, "num_return_sequences": 5, "return_weights": True} | options
    same(back(there(of).generate(SRC.to(DEVICE), **asked)), in_float64(of, SRC, **asked))


def test_beams_of_many_rows() -> None:
    """That end at different steps: scores are those of float64, and of the tokens that they stand beside."""
    of, rows = model("luong", V=100, rows=24, seed=3), torch.arange(24)[:, None]
    with torch.no_grad():
        of.output.bias[EOS] += 2
    options = {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2}
    found = back(there(of).generate(rows.to(DEVICE), **options))
    assert len(found.lengths[:, 0].unique()) > 3
    total, _ = log_likelihood(of, rows, found)
    for expected in (in_float64(of, rows, **options).scores, total / found.lengths):  # of near ties either may come
        torch.testing.assert_close(found.scores, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("V", [700, 3000, 30000])  # greedily on the CUDA kernels one block, a cluster, a grid
def test_large_vocabularies(V: int, beams: int) -> None:
    of, options = model("luong", V=V), {"max_new_tokens": 6, "num_beams": beams}
    same(back(there(of).generate(SRC.to(DEVICE), **options)), in_float64(of, SRC, **options))


@pytest.mark.parametrize(("most", "beams"), [(40, 1), (21, 1), (21, 3)])
@pytest.mark.parametrize("name", ["luong", "gnmt"])  # gnmt has a residual, with which no kernel runs all of a search
def test_a_long_search_repeats_its_graph(most: int, name: str, beams: int) -> None:
    """Past the step that is recorded and the first look of the host; a second search has a graph of its own."""
    of = model(name, num_layers=3)
    moved = there(of)
    for new in (most, most - 3):
        options = {"max_new_tokens": new, "min_new_tokens": new - 5, "num_beams": beams}
        same(back(moved.generate(SRC.to(DEVICE), **options)), in_float64(of, SRC, **options))


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_is_refused(beams: int) -> None:
    of = model("luong")
    with torch.no_grad():
        of.output.bias[3] = torch.nan
    with pytest.raises(fastseq.InputError, match="NaN for a row"):
        there(of).generate(SRC.to(DEVICE), max_new_tokens=20, num_beams=beams)


@needs_gpu
@pytest.mark.parametrize("kind", [Rows, Beams])
def test_a_step_that_raises_ends_its_recording(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error arrives, and the next search records again."""
    options = {"max_new_tokens": 9, "num_beams": 1 if kind is Rows else 3}
    of, steps, step = model("gnmt", num_layers=3), [], kind.step
    moved = there(of)

    def fails(*args: Any) -> None:
        step(*args)
        steps.append(1)
        if len(steps) == 2:  # the one that is recorded
            raise ArithmeticError("of this test")

    monkeypatch.setattr(kind, "step", fails)
    with pytest.raises(ArithmeticError, match="of this test"):
        moved.generate(SRC.to(DEVICE), **options)
    same(back(moved.generate(SRC.to(DEVICE), **options)), in_float64(of, SRC, **options))
    assert len(steps) == 4  # two of each search: the others are replays


def test_sampling_draws_from_the_generator_it_is_given() -> None:
    moved, options = there(model()), {"do_sample": True, "max_new_tokens": 9}
    first, again = (
        moved.generate(SRC.to(DEVICE), generator=torch.Generator(DEVICE).manual_seed(4), **options) for _ in range(2)
    )
    assert torch.equal(first.sequences, again.sequences)
