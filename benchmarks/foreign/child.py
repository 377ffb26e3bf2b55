"""One side of a program in a process of its own: each line on its input is one run, answered by a line of JSON.

    python -m benchmarks.foreign.child NAME SIDE      # a line: a path for what was learned, or "" for the time alone

Sides: "stock"; "fastseq"; "count", which is fastseq and says what ran where, and so is not timed.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from torch import nn

import fastseq
from fastseq import engine
from fastseq.backends import cpu, reference, stock
from fastseq.modules.dropin import DROP_INS

from .packages import program
from .program import Convert, Program, quiet, seed

KINDS = tuple(DROP_INS)  # torch.nn's


def main(name: str, side: str) -> None:
    """Until the input ends."""
    answers = _own_stdout()
    torch.set_num_threads(1)
    with quiet():
        ours = program(name)
    about = {"distribution": ours.distribution, "what": ours.what, "way": ours.way}
    print(json.dumps(about | {"version": importlib.metadata.version(ours.distribution)}), file=answers, flush=True)
    calls, ran = Counter(), Counter()
    for line in sys.stdin:
        with counted(calls, ran) if side == "count" else contextlib.nullcontext():
            answer = once(ours, side != "stock", line.rstrip("\n"))
        if side == "count":
            answer |= {"calls": calls.most_common(), "ran": dict(ran)}
        print(json.dumps(answer), file=answers, flush=True)


def _own_stdout() -> TextIO:
    """What packages print goes to stderr; the answers alone to what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def once(ours: Program, fast: bool, path: str) -> dict[str, object]:
    seed()
    convert: Convert = fastseq.accelerate if fast and ours.way == "accelerate" else lambda model: None
    with quiet(), fastseq.patch() if fast and ours.way == "patch" else contextlib.nullcontext():
        built = ours.build(convert)
        begin = time.process_time()  # one thread's, so neighbours that take the core away do not count
        learned = ours.run(built)
        seconds = time.process_time() - begin
    if path:
        torch.save([torch.tensor(learned.losses, dtype=torch.float64), *learned.tensors], path)
    return {"seconds": seconds, "losses": learned.losses}


@contextlib.contextmanager
def counted(calls: Counter, ran: Counter) -> Iterator[None]:
    """Calls of recurrent modules by their sizes, and of backends by name."""
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, args: _note(module, args, calls))
    with contextlib.ExitStack() as undo:
        undo.callback(hook.remove)
        undo.callback(engine._plans.clear)  # plans keep the functions that were counted
        engine._plans.clear()
        for backend in (cpu, reference, stock):
            for name in ("rnn", "rnn_cell"):
                function = getattr(backend, name)
                undo.callback(setattr, backend, name, function)
                setattr(backend, name, _counting(function, backend.NAME, ran))
        yield


def _counting(function: Callable[[object], object], name: str, ran: Counter) -> Callable[[object], object]:
    def counting(call: object) -> object:
        ran[name] += 1
        return function(call)

    return counting


def _note(module: nn.Module, args: tuple, calls: Counter) -> None:
    if isinstance(module, KINDS):
        kind = next(kind.__name__ for kind in KINDS if isinstance(module, kind))
        x = args[0]
        packed = isinstance(x, nn.utils.rnn.PackedSequence)
        shape = f"{len(x.batch_sizes)} steps, {int(x.batch_sizes[0])} rows packed" if packed else str(list(x.shape))
        calls[f"{kind} {module.input_size} -> {module.hidden_size}, {shape}{', hx' if len(args) > 1 else ''}"] += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
