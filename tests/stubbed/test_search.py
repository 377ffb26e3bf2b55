"""A search, greedy or by beams: from its second step on a CUDA graph, which stands in here for one of a driver's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.seq2seq_models import model
from tests.stub_driver import Stub

STEPS = 5
SIDE = 0x6000  # the stream of a recording


class Stream:
    def __init__(self, device: torch.device) -> None:
        assert device.index == 1

    def wait_stream(self, other: "Stream") -> None:
        pass


class Graph:
    def __init__(self) -> None:
        self.began, self.ended, self.replays = 0, 0, 0
        GRAPHS.append(self)

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert not torch.is_grad_enabled()
        self.began += 1

    def capture_end(self) -> None:
        self.ended += 1

    def replay(self) -> None:
        self.replays += 1

    @property
    def traits(self) -> tuple[int, int, int]:
        return self.began, self.ended, self.replays


GRAPHS: list[Graph] = []


@pytest.fixture(params=[1, 3], ids=["greedy", "beams"])
def searched(request: pytest.FixtureRequest, gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A search that takes all of its steps."""

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        before, gpus.streams[1] = gpus.streams[1], SIDE
        try:
            yield
        finally:
            gpus.streams[1] = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    GRAPHS.clear()
    of = model("luong")
    of.decoder.backend = "triton"
    return lambda: of.generate(torch.arange(2)[:, None], max_new_tokens=STEPS, num_beams=request.param)


def test_a_graph_repeats_the_step(searched: Callable[[], Any], gpus: Stub) -> None:
    """Gradients are not recorded, though the caller's mode would; the recording has a stream of its own."""
    searched()
    assert [graph.traits for graph in GRAPHS] == [(1, 1, STEPS - 1)]
    first, second = gpus.launched
    assert first.kernel == second.kernel == "decoder_forward.decoder_forward"
    assert (first.stream, second.stream) == (gpus.streams[1], SIDE)
    assert first.device == second.device == 1


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_that_fails(step: int, searched: Callable[[], Any], gpus: Stub) -> None:
    """By itself, or while it is recorded: the recording ends, and the next search has a new one."""
    searched()
    expected = gpus.launched[:]
    GRAPHS.clear()
    gpus.launched.clear()
    gpus.fail(step, 701)
    with pytest.raises(RuntimeError, match="too many resources"):
        searched()
    assert gpus.failed
    assert [graph.traits for graph in GRAPHS] == [(1, 1, 0)] * step
    GRAPHS.clear()
    gpus.launched.clear()
    searched()
    assert gpus.launched == expected
    assert [graph.traits for graph in GRAPHS] == [(1, 1, STEPS - 1)]
