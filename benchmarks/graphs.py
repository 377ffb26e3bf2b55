"""A program as one CUDA graph: what a user of an eager loop can do without another library."""

from dataclasses import replace

import torch

from .cases import Case
from .programs import NotRunnable, Program, Results

__all__ = ["graphed", "refuses"]

WARM = 3  # calls before the capture: libraries make their workspaces then


def refuses(case: Case) -> str | None:
    """Why a case cannot be captured."""
    if case.device != "cuda":
        return "a CUDA graph needs a GPU"
    return "a graph for each shape would have to be captured" if case.kind == "corpus" else None


def graphed(program: Program) -> Program:
    """`program`, its call captured once and replayed; results are copied out of the graph's own memory."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.set_grad_enabled(program.grad):
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                program.step()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph):
                held = program.results()
        except RuntimeError as error:
            raise NotRunnable(f"the capture failed: {str(error).splitlines()[0]}") from error

    def results() -> Results:
        graph.replay()
        return {name: t.clone() for name, t in held.items()}

    return replace(program, step=graph.replay, results=results, backend=f"{program.backend}.graph")
