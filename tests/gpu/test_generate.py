"""Searches on a GPU: the tokens that the same model finds in float64 on the CPU."""

import copy
from typing import Any

import pytest
import torch

import fastseq
from fastseq.ops import chunked_search
from tests.gpu.conftest import needs_gpu
from tests.gpu.place import BACKEND, DEVICE
from tests.seq2seq_models import PRESETS, in_float64, model, same

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


@pytest.mark.parametrize("V", [700, 3000, 30000])  # on the CUDA kernels one block, a cluster, a grid
def test_large_vocabularies(V: int) -> None:
    of = model("luong", V=V)
    same(back(there(of).generate(SRC.to(DEVICE), max_new_tokens=6)), in_float64(of, SRC, max_new_tokens=6))


@pytest.mark.parametrize("name", ["luong", "gnmt"])  # gnmt has a residual, with which no kernel runs all of a search
@pytest.mark.parametrize("most", [40, 21])
def test_a_long_search_repeats_its_graph(most: int, name: str) -> None:
    """Past the step that is recorded and the first look of the host; a second search has a graph of its own."""
    of = model(name, num_layers=3)
    moved = there(of)
    for new in (most, most - 3):
        options = {"max_new_tokens": new, "min_new_tokens": new - 5}
        same(back(moved.generate(SRC.to(DEVICE), **options)), in_float64(of, SRC, **options))


@needs_gpu
def test_a_step_that_raises_ends_its_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error arrives, and the next search records again."""
    of, options, steps, step = model("gnmt", num_layers=3), {"max_new_tokens": 9}, [], chunked_search._step
    moved = there(of)

    def fails(*args: Any) -> None:
        step(*args)
        steps.append(1)
        if len(steps) == 2:  # the one that is recorded
            raise ArithmeticError("of this test")

    monkeypatch.setattr(chunked_search, "_step", fails)
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
