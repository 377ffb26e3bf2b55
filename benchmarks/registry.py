"""Every peer and every case. A new peer is one entry of PEERS; a new shape is one entry of a list below."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

from . import onnx_program
from .cases import Case
from .problem import Problem
from .programs import Program, compile_refuses, compiled_program, fastseq_program, torch_program

__all__ = ["OPT_IN", "OURS", "PEERS", "SETS", "Entry", "Peer"]

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Peer:
    """A contender: how it makes a case ready to run. Some run another form of the case, to be compared with ours."""

    build: Callable[[Problem], Program]
    label: str
    unavailable: Callable[[], str | None] = lambda: None  # why this machine has it not
    refuses: Callable[[Case], str | None] = lambda case: None  # why it cannot run the case
    form: Callable[[Case], Case] = lambda case: case
    scale: Callable[[Case], float] = lambda case: 1.0  # by which its time is multiplied in a ratio
    threads: int | None = None  # None: the row's


@dataclass(frozen=True)
class Entry:
    """One row: a case, and which contenders (ours, peer) are compared. ratio = the peer's / ours."""

    set: str
    case: Case
    pairs: Pairs
    threads: tuple[int, ...] | None = None  # None: whatever the user asks for
    measure: str = "time"  # "memory": peak bytes of a call


def _in_fp32(case: Case) -> Case:
    return replace(case, dtype="float32")


def _full_length(case: Case) -> Case:
    return replace(case, rows="full")


def _real_share(case: Case) -> float:
    return case.tokens / (case.T * case.B)


OURS = ("auto", "cpu")  # the choice that users get, and the fused kernels whatever the choice would be
PEERS = {
    "torch.nn": Peer(torch_program, "torch.nn"),
    "torch.compile": Peer(compiled_program, "torch.compile of torch.nn", refuses=compile_refuses),
    "onnxruntime": Peer(
        onnx_program.onnx_program, "ONNX Runtime", onnx_program.unavailable, onnx_program.refuses
    ),
}  # fmt: skip
for _ours in OURS:
    _build = fastseq_program(_ours)
    PEERS |= {
        _ours: Peer(_build, f"fastseq ({_ours})"),
        f"{_ours}.fp32": Peer(_build, "our fp32", form=_in_fp32),
        f"{_ours}.full": Peer(_build, "our full length", form=_full_length, scale=_real_share),
        f"{_ours}.1thread": Peer(_build, "our one thread", threads=1),
    }
OPT_IN = {"torch.compile"}  # minutes of compilation: run only when --peers names it

OPS, MODES = ("lstm", "gru"), ("forward", "train")


def _against(*peers: str) -> Pairs:
    return tuple(product(OURS, peers))


def _own(suffix: str) -> Pairs:
    return tuple((ours, ours + suffix) for ours in OURS)


def _grid(batches: Iterable[int], hidden: Iterable[int]) -> tuple[Entry, ...]:
    return tuple(
        Entry("grid", Case(op, mode, 50, b, h, h), _against("torch.nn", "onnxruntime", "torch.compile"))
        for op, mode, b, h in product(OPS, MODES, batches, hidden)
    )


def _bf16() -> tuple[Entry, ...]:
    shapes = product(OPS, MODES, ("bfloat16", "autocast"), (8, 32, 64), (256, 512))
    return tuple(
        Entry("bf16", Case(op, mode, 50, b, h, h, dtype=dtype), _own(".fp32"))
        for op, mode, dtype, b, h in shapes
    )  # fmt: skip


def _varlen() -> tuple[Entry, ...]:
    return tuple(
        Entry("varlen", Case(op, mode, 50, b, h, h, rows="lengths"), _own(".full") + _against("torch.nn"))
        for op, mode, b, h in product(OPS, MODES, (8, 32, 64), (64, 256))
    )


def _calls() -> tuple[Entry, ...]:
    """The calls that programs with recurrent layers were seen to make."""
    shapes = []
    for cell, mode in product(OPS, MODES):
        for op in (cell, f"{cell}_cell"):
            shapes += [
                Case(op, mode, 1, 1, 4, 256, hx=True),  # reinforcement learning
                Case(op, mode, 1, 8, 4, 256, hx=True),
                Case(op, mode, 1, 16, 80, 64, hx=True),  # a translation decoder, step by step
            ]
        shapes += [
            Case(cell, mode, 20, 16, 80, 64, bidirectional=True, rows="packed"),  # its encoder
            Case(cell, mode, 16, 64, 100, 400, rows="packed", hx=True),  # a tagger: characters of words
            Case(cell, mode, 64, 16, 300, 200, bidirectional=True, rows="packed", hx=True),  # words of sentences
            Case(cell, mode, 64, 1, 1, 64, layers=2),  # forecasting
            Case(cell, mode, 64, 128, 1, 64, layers=2),
        ]
    return tuple(Entry("calls", case, _against("torch.nn")) for case in shapes)


def _threads() -> tuple[Entry, ...]:
    return tuple(
        Entry("threads", Case(op, mode, 50, b, h, h), _own(".1thread"), threads=(2,))
        for op, mode, b, h in product(OPS, MODES, (8, 32, 64), (256, 512))
    )


def _memory() -> tuple[Entry, ...]:
    shapes = [Case(op, "train", 50, b, h, h) for op, b, h in product(OPS, (8, 64), (64, 256, 512))]
    shapes += [Case(op, "train", 50, 32, 256, 256, layers=2, bidirectional=True) for op in OPS]
    shapes += [Case(op, "train", 64, 16, 300, 200, bidirectional=True, rows="packed", hx=True) for op in OPS]
    return tuple(Entry("memory", case, _against("torch.nn"), (2,), "memory") for case in shapes)


SETS: dict[str, tuple[Entry, ...]] = {
    "quick": _grid((1, 32), (64, 256)),
    "readme": _grid((1, 8, 32, 64), (64, 128, 256, 512)),
    "bf16": _bf16(),
    "varlen": _varlen(),
    "calls": _calls(),
    "threads": _threads(),
    "memory": _memory(),
    "import": (),  # no call: the runner times a process
}
SETS["full"] = tuple(entry for name, entries in SETS.items() if name != "quick" for entry in entries)
