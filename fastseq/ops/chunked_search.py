"""Searches on a GPU: the choice of the tokens stays there, and the host looks only once in `CHUNK` steps.

A step is the same work on the same buffers each time, so that from the second one on a CUDA graph repeats it. A graph
lives as long as its search: no other call can find a stale address in it. Letters as in `decoder_search`.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from threading import Lock

import torch

from .chunked_beams import Beams
from .chunked_greedy import Rows, Run, State
from .decoder_search import Found, Search, Vocabulary

__all__ = ["CHUNK", "Whole", "chunked_search"]

CHUNK = 16  # steps

Whole = Callable[[State, Rows], None]


def chunked_search(
    run: Run, state: State, of: Vocabulary, search: Search, source: int, whole: Whole | None = None
) -> Found:
    """The likeliest token of each row, step after step, or with k > 1 the likeliest beams.

    state: leaves with the N rows at dimension 0; source: S.
    whole: what makes all steps of a greedy search by itself, from the state after the forced tokens on.
    """
    forced, seen = search.prefix[:, :-1].repeat_interleave(search.copies, 0), None
    if forced.shape[1]:
        _, state, seen = run(of.embedding[forced], state)
    rows = (Rows if search.copies == 1 else Beams).begin(search, of, source)
    if whole is not None:
        assert isinstance(rows, Rows)
        whole(state, rows)
    else:
        state = tuple(leaf.clone() for leaf in state)  # written in place from here on
        with torch.cuda.device_of(rows.tokens):
            _follow(lambda: rows.step(run, state, of, search), rows, len(search.norms) - 1)
    weights = rows.weights
    if weights is not None and seen is not None:
        weights = torch.cat((seen, weights), 1)
    return rows.found(of, search)._replace(weights=weights)


def _follow(step: Callable[[], None], rows: Rows | Beams, most: int) -> None:
    """At most so many steps, until every row has ended: the first as it is, which compiles what must be compiled."""
    repeat = step
    for done in range(1, most + 1):
        if done == 2:
            repeat = _repeated(step, rows.tokens.device)
        repeat()
        if done % CHUNK == 0 and done < most and not bool(rows.running.any()):  # the host waits here, and nowhere else
            return


def _repeated(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What repeats `step`, which has not run again yet: on a GPU its CUDA graph."""
    return _recorded(step, device).replay if device.type == "cuda" else step


def _recorded(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """`step` as a graph, which has not run yet. One at a time, and other threads may use the GPU meanwhile."""
    graph, stream, current = torch.cuda.CUDAGraph(), _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with _recording, torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with suppress(RuntimeError):  # that the recording failed, as it does if the GPU refused part of the step
                graph.capture_end()  # else the stream would record on, and no other search could
            raise
        graph.capture_end()
    current.wait_stream(stream)
    return graph


_recording = Lock()


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for each GPU: a stream of another's would record nothing, and every new one costs cuBLAS a workspace."""
    return torch.cuda.Stream(device)
