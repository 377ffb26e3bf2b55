"""What an H200 is given of the Triton kernels, counted: tests/triton_resources.json, and a table in docs/kernels.md.

`python -m tests.triton_resources` writes both anew; tests/test_triton_resources.py holds them to what is compiled now.
Shapes are those of `make gpu`'s sets. A loop is an innermost one that computes, counted for a warp and one time round.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from fastseq.kernels import decoder, launch, rnn_cell
from fastseq.kernels.devices import DEVICES
from fastseq.kernels.launch import Launch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastseq.ops.step import StepShape
from tests import test_triton_compiled_attention as attentions
from tests import test_triton_compiled_decoder as decoders
from tests import test_triton_compiled_rnn as layers
from tests.compiled import compile_launch, loop_instructions

__all__ = ["CALLS", "PAGE", "TABLE", "counted", "header", "page_with", "table"]

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "tests" / "triton_resources.json", ROOT / "docs" / "kernels.md"
H200 = next(device for device in DEVICES if device.arch == 90)
BF16, FP32 = torch.bfloat16, torch.float32
COUNTS = {  # what is counted of a loop: the instructions whose names begin so
    "instructions": "", "tensor": "HG?MMA", "MUFU": "MUFU", "fp32": "F(FMA|ADD|MUL)", "global loads": "LDG",
    "shared loads": "LDSM?", "barriers": "BAR",
}  # fmt: skip
# Clocks that an instruction of a warp occupies its quarter of an SM's unit; issuing any takes one. HMMA: 2,048 products
# of 16 bits, or 1,024 of TF32, at 512 and 256 a clock. MUFU: 32 results at 4 a clock.
CLOCKS = {"tensor": 4, "MUFU": 8, "fp32": 1}

Entry = dict[str, list[Any]]  # of a kernel: program, and a list for each loop


def attention(dtype: torch.dtype) -> list[Launch]:
    return attentions.launches(H200, dtype, True, (64, 1, 64, 64, 512, 512))


def training(preset: str) -> list[Launch]:
    return decoders.launches(H200, decoders.loop_of(preset), BF16)


def greedy_step(preset: str) -> list[Launch]:
    """Of `gpu-generate`."""
    loop = decoders.loop_of(preset)
    with launch.recording(H200) as noted:
        decoder.forward(loop, decoders.tensors(loop, FP32, 32, 32, 1, 30, 256, False), False, False)
    return noted


def one_step(cell: str, hidden: int, layer: bool) -> list[Launch]:
    """Of `gpu-calls`: a cell, or a layer with T = 1, which writes its state twice."""
    lstm, gates = cell == "lstm", layers.GATES[cell] * hidden
    with FakeTensorMode(), launch.recording(H200) as noted:

        def new(*sizes: int) -> Tensor:
            return torch.empty(sizes, device="cuda")

        x, h0, c0 = new(64, hidden), new(64, hidden), new(64, hidden) if lstm else None
        weights = [new(gates, hidden), new(gates, hidden), new(gates), new(gates)]
        shape = StepShape(cell, 64, hidden, (64, hidden), (1, 64, hidden) if layer else None)
        results, of_gates, cells = rnn_cell.forward(shape, x, h0, c0, weights, True)
        rnn_cell.backward(shape, [True] * 4, results, x, h0, c0, weights, of_gates, cells)
    return noted


def layer(cell: str, dtype: torch.dtype, hidden: int, rows: str) -> list[Launch]:
    """Of `gpu-small` and `gpu-varlen`. fp32 is TF32, as it is for PyTorch's."""
    return layers.launches(layers.Shape(cell, dtype, hidden, dtype == FP32, rows=rows), H200, 64, 128, hidden)


def _calls() -> dict[str, Callable[[], list[Launch]]]:
    found: dict[str, Callable[[], list[Launch]]] = {
        f"additive attention, {name}, B = T = S = 64, A = 512": lambda dtype=dtype: attention(dtype)
        for name, dtype in (("bf16", BF16), ("fp32", FP32))
    }
    for preset in ("bahdanau", "luong"):
        found[f"{preset}'s decoder, training, bf16, B = T = S = 64, H = 512"] = lambda preset=preset: training(preset)
        found[f"{preset}'s decoder, a step of greedy search, fp32, H = 256"] = lambda preset=preset: greedy_step(preset)
    for cell in ("lstm", "gru"):
        for hidden, of_layer in ((64, False), (256, False), (512, False), (256, True)):
            name = f"{cell}{', T = 1' if of_layer else '_cell'}, fp32, H = {hidden}"
            found[name] = lambda args=(cell, hidden, of_layer): one_step(*args)
        for dtype, hidden in ((BF16, 128), (BF16, 64), (FP32, 64)):
            name = f"{cell}, {'bf16' if dtype == BF16 else 'TF32'}, H = {hidden}"
            found[name] = lambda args=(cell, dtype, hidden, "full"): layer(*args)
        for hidden in (64, 256, 512):
            name = f"{cell}, lengths, bf16, H = {hidden}"
            found[name] = lambda args=(cell, BF16, hidden, "lengths"): layer(*args)
    return found


CALLS = _calls()


def counted(name: str) -> dict[str, Entry]:
    """The kernels of a call, in their order; "(2)" is a kernel's second launch, with other constants."""
    found: dict[str, Entry] = {}
    for one in CALLS[name]():
        kernel = one.kernel.__name__.removesuffix("_kernel")
        if kernel in ("forward", "backward"):
            kernel = f"{one.kernel.__module__.rpartition('.')[2]}.{kernel}"
        again = sum(key.partition(" ")[0] == kernel for key in found)
        loops = [[*_of(loop).values()] for loop in loop_instructions(one, H200)]
        name = f"{kernel} ({again + 1})" if again else kernel
        found[name] = {"program": [*compile_launch(one, H200)], "loops": loops}
    return found


def _of(loop: Counter[str]) -> dict[str, int]:
    return {
        column: sum(count for name, count in loop.items() if re.match(rf"({start})(\W|STS|$)" if start else "", name))
        for column, start in COUNTS.items()
    }


def header() -> dict[str, Any]:
    """What compiled it, and what the numbers are."""
    return {"triton": triton.__version__, "program": ["shared", "registers", "spills"], "loop": [*COUNTS]}


TOLD = (  # by the page
    *list(CALLS)[:2],
    "bahdanau's decoder, training, bf16, B = T = S = 64, H = 512",
    "luong's decoder, training, bf16, B = T = S = 64, H = 512",
    "lstm_cell, fp32, H = 512",
    "lstm, bf16, H = 128",
    "lstm, TF32, H = 64",
    "gru, bf16, H = 128",
    "lstm, lengths, bf16, H = 512",
    "luong's decoder, a step of greedy search, fp32, H = 256",
)
COLUMNS = ("call", "kernel", "registers", "shared", "instructions", "tensor", "MUFU", "fp32", "limit", "at most")


def table(found: dict[str, dict[str, Entry]]) -> list[str]:
    """Of each kernel the loop that occupies a unit longest, and what share of that unit's limit issuing leaves it."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for call in TOLD:
        for kernel, entry in found[call].items():
            if entry["loops"]:
                lines.append(f"| {' | '.join(_cells(call, kernel, entry))} |")
    return lines


def _cells(call: str, kernel: str, entry: Entry) -> list[str]:
    loops = [dict(zip(COUNTS, loop, strict=True)) for loop in entry["loops"]]
    busy, loop, unit = max(((CLOCKS[unit] * loop[unit], k, unit) for k, loop in enumerate(loops) for unit in CLOCKS))
    of = loops[loop]
    shared, registers, _ = entry["program"]
    share = min(1.0, busy / of["instructions"])
    counts = [of[column] for column in ("instructions", "tensor", "MUFU", "fp32")]
    return [call, f"`{kernel}`", *(f"{n:,}" for n in (registers, shared, *counts)), unit, f"{share:.0%}"]


def page_with(lines: list[str], page: str) -> str:
    """docs/kernels.md with this table."""
    between = re.compile(r"(?<=<!-- counted:begin -->\n).*?(?=<!-- counted:end -->)", re.S)
    assert between.search(page) is not None, f"{PAGE} has no place for the table"
    return between.sub("".join(f"{line}\n" for line in lines), page)


def written(found: dict[str, dict[str, Entry]]) -> str:
    """As JSON, a list on one line."""
    text = json.dumps({**header(), "calls": found}, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda match: json.dumps(json.loads(match[0])), text) + "\n"


if __name__ == "__main__":
    calls = {}
    for call in CALLS:
        calls[call] = counted(call)
        print(call, *calls[call], flush=True)
    TABLE.write_text(written(calls))
    PAGE.write_text(page_with(table(calls), PAGE.read_text()))
