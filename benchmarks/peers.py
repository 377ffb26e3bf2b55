"""Every contender. A new peer is one entry of PEERS."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from . import (
    attention_programs,
    cells_program,
    decoder_programs,
    flashrnn_program,
    generate_programs,
    graphs,
    onnx_program,
    programs,
)
from .cases import Case, LayerCase
from .kinds import KINDS, exact_program, fastseq_program
from .option_cases import OptionCase
from .problem import Problem
from .programs import Program

__all__ = ["OPT_IN", "OURS", "PEERS", "SHOWN", "Peer"]


@dataclass(frozen=True)
class Peer:
    """A contender: how it makes a case ready to run. Some run another form of the case, to be compared with ours."""

    build: Callable[[Any], Program]  # of the problem of a case that it can run
    label: str
    kinds: tuple[str, ...] = ("layers",)  # of cases
    unavailable: Callable[[], str | None] = lambda: None  # why this machine has it not
    refuses: Callable[[Any], str | None] = lambda case: None  # why it cannot run a case of its kinds
    form: Callable[[Any], Any] = lambda case: case
    scale: Callable[[Any], float] = lambda case: 1.0  # by which its time is multiplied in a ratio
    threads: int | None = None  # None: the row's
    again: bool = False  # the program of another contender, built and measured a second time
    ours: bool = False  # one program with others of ours that run on the same backend: measured once for all

    def obstacle(self, case: Case) -> str | None:
        """Why it cannot run the case."""
        return self.refuses(case) if case.kind in self.kinds else f"it runs {', '.join(self.kinds)} only"


def _in_fp32(case: LayerCase) -> LayerCase:
    return replace(case, dtype="float32")


def _full_length(case: LayerCase) -> LayerCase:
    return replace(case, rows="full")


def _real_share(case: LayerCase) -> float:
    return case.tokens / (case.T * case.B)


def _compiled_loop(problem: Problem) -> Program:
    """All steps of a teacher-forced decoder in one graph; of a search, one step."""
    of = generate_programs if problem.case.kind == "generate" else decoder_programs
    return of.compiled_loop_program(problem)


def _plain(case: OptionCase) -> OptionCase:
    return replace(case, option="")


def _graph_refuses(case: LayerCase) -> str | None:
    return cells_program.refuses(case) or graphs.refuses(case)


def _flashrnn(backend: str) -> Peer:
    return Peer(
        flashrnn_program.flashrnn_program(backend),
        f"FlashRNN {backend}",
        unavailable=partial(flashrnn_program.unavailable, backend),
        refuses=partial(flashrnn_program.refuses, backend=backend),
    )


LOOPS = ("decoder", "corpus", "generate")
OURS = ("auto", "cpu")  # the choice that users get, and the fused kernels whatever the choice would be
SHOWN = (*OURS, "frozen")  # in tables
PEERS = {
    "frozen": Peer(programs.frozen_program, "our frozen weights", refuses=programs.frozen_refuses),
    "torch.nn": Peer(programs.torch_program, "torch.nn"),
    "torch.compile": Peer(
        programs.compiled_program, "torch.compile of torch.nn", refuses=programs.compile_refuses
    ),
    "onnxruntime": Peer(
        onnx_program.onnx_program, "ONNX Runtime", unavailable=onnx_program.unavailable, refuses=onnx_program.refuses
    ),
    "cells": Peer(
        cells_program.cells_program, "plain loop of cells", ("layers", "options"), refuses=cells_program.refuses
    ),
    "cells.compile": Peer(
        cells_program.compiled_cells_program, "torch.compile of the loop of cells", refuses=cells_program.refuses
    ),
    "cells.graph": Peer(
        cells_program.graphed_cells_program, "CUDA graph of the loop of cells", refuses=_graph_refuses
    ),
    "flashrnn": _flashrnn("cuda_fused"),
    "flashrnn.alternating": _flashrnn("cuda"),
    "flashrnn.triton": _flashrnn("triton_fused"),
    **{
        f"{on}.plain": Peer(fastseq_program(on), "our plain layer", ("options",), form=_plain)
        for on in ("cpu", "auto", "triton", "cuda")
    },
    "loop": Peer(exact_program, "torch loop", LOOPS),
    "loop.compile": Peer(
        _compiled_loop, "torch.compile of the loop", LOOPS, refuses=decoder_programs.compile_refuses
    ),
    "loop.graph": Peer(
        decoder_programs.graphed_loop_program, "CUDA graph of the loop", LOOPS[:2], refuses=graphs.refuses
    ),
    "plain": Peer(attention_programs.plain_program, "plain PyTorch", ("attention",)),
    "plain.compile": Peer(
        attention_programs.compiled_plain_program, "torch.compile of plain PyTorch", ("attention",)
    ),
    "sdpa": Peer(
        attention_programs.sdpa_program, "PyTorch's sdpa", ("attention",), refuses=attention_programs.sdpa_refuses
    ),
}  # fmt: skip
for _ours in (*OURS, "torch", "reference", "triton", "cuda"):
    _build = fastseq_program(_ours)
    PEERS |= {
        _ours: Peer(_build, f"fastseq ({_ours})", tuple(KINDS), ours=True),
        f"{_ours}.fp32": Peer(_build, "our fp32", form=_in_fp32, ours=True),
        f"{_ours}.full": Peer(_build, "our full length", form=_full_length, scale=_real_share, ours=True),
        f"{_ours}.1thread": Peer(_build, "our one thread", threads=1, ours=True),
    }
for _name in ("auto", "torch.nn", "loop"):  # against themselves
    PEERS[f"{_name}.again"] = replace(PEERS[_name], label=f"{PEERS[_name].label} again", again=True)
OPT_IN = {
    "torch.compile",
    "cells.compile",
    "loop.compile",
    "plain.compile",
}  # minutes of compilation: run only when --peers names it
