"""The layer-normalised kernels as GPUs would be given them: compiled ahead of time, on a machine without one.

Every row of the table is compiled for every device that it is for, with cells and options taking turns; these crossed
too, in an hour, by `python -m tests.test_triton_compiled_norm [device]`.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from fastseq.kernels import launch, rnn_norm
from fastseq.kernels.configs import find
from fastseq.kernels.devices import DEVICES, Device
from fastseq.kernels.launch import Launch

from fastseq.ops.rnn_gpu import Batch
from tests.compiled import check, compile_key, compile_launch, faults, unmet_rows
from tests.oracle import GATES
from tests.test_triton_compiled_rnn import NOISE, extras_of

BF16, FP32 = torch.bfloat16, torch.float32
CELLS, ROWS = ("lstm", "gru"), ("full", "lengths", "packed", "resets")
CLASSES = (  # dtype, H; the last six no program holds
    (BF16, 128), (FP32, 64), (BF16, 64), (FP32, 32), (BF16, 32), (FP32, 16), (BF16, 16), (BF16, 100), (FP32, 24),
    (BF16, 512), (FP32, 512), (BF16, 130), (FP32, 300), (BF16, 1024), (FP32, 1024),
)  # fmt: skip


class Shape(NamedTuple):
    cell: str
    dtype: torch.dtype
    hidden: int
    rows: str = "full"  # "lengths", "packed", "resets": with lengths
    noise: str = ""  # a key of NOISE; with masks also every cell state


def launches(shape: Shape, device: Device, B: int = 8, T: int = 3, features: int = 48) -> list[Launch]:
    """What a training step of one direction starts on `device`."""
    with FakeTensorMode(), launch.recording(device) as started, pytest.MonkeyPatch.context() as patch:

        def new(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="cuda")

        G, lstm, packed, ints = (
            GATES[shape.cell] * shape.hidden,
            shape.cell == "lstm",
            shape.rows == "packed",
            torch.int64,
        )
        x = new(T * B, features) if packed else new(T, B, features)
        h0 = new(1, B, shape.hidden)
        weights = [new(*size) for size in ((G, features), (G, shape.hidden), (G,), (G,))]
        norms = [new(G), new(G), *([new(shape.hidden), new(shape.hidden)] if lstm else [])]
        lengths = new(B, dtype=ints) if shape.rows in ("lengths", "resets") else None
        resets = new(T, B, dtype=torch.bool) if shape.rows == "resets" else None
        batch_sizes = new(T, dtype=ints) if packed else None
        if packed:  # of fake batch_sizes nobody knows the values
            batch = Batch(T, B, T * B, 0, 1, new(T, dtype=ints), new(B, dtype=ints))
            patch.setattr(Batch, "of", lambda *args: batch)
        extras = extras_of(shape, new, (T * B,) if packed else (T, B), B)
        places = (lengths, resets, batch_sizes)
        options = (weights, norms, False, shape.rows == "lengths", extras.masks, extras.rates)
        given = (x, h0, h0 if lstm else None, *places, *options)
        out, h_n, c_n, *saved, _ = rnn_norm.forward(shape.cell, *given, False, True)
        d_c_out = out if lstm and extras.hold_h is not None else None  # of every cell state
        rnn_norm.backward(shape.cell, out, h_n, c_n, d_c_out, *given, out, *saved, [True] * 4)
    return started


def shapes() -> Iterator[Shape]:
    for (dtype, hidden), cell, rows, noise in itertools.product(CLASSES, CELLS, ROWS, NOISE):
        yield Shape(cell, dtype, hidden, rows, noise)


def turns() -> list[tuple[Device, list[Shape]]]:
    """For each device a shape of every class that meets a row which none before it has met; each device begins with
    another class. Cells, kinds of rows and noise by turns: half are without noise, most others have all that a module
    draws.
    """
    noise, found = ("state", "", "update", "", "state", "", "mean", ""), []
    for index, device in enumerate(DEVICES):
        met: set[int] = set()
        mine = []
        for k in range(2 * index, 2 * index + len(CLASSES)):
            place = k % len(CLASSES)
            (dtype, hidden), turn = CLASSES[place], index + place
            rows = rows_of(dtype, hidden, device)
            if not rows <= met:
                cell, of_rows = CELLS[turn % 2], ROWS[(turn + turn // 4) % 4]
                mine.append(Shape(cell, dtype, hidden, of_rows, noise[turn // 2 % 8]))
            met |= rows
        found.append((device, mine))
    return found


def rows_of(dtype: torch.dtype, hidden: int, device: Device) -> set[int]:
    """Of configs.json, by identity: those of the kernels that such a layer runs."""
    both = [
        [find(f"rnn_norm_{design}_{way}", dtype, hidden, device) for design in ("sequence", "steps")]
        for way in ("forward", "backward")
    ]
    return {id(sequence or steps) for sequence, steps in both}


@pytest.mark.parametrize(("device", "own"), turns(), ids=lambda value: value.name if isinstance(value, Device) else "")
def test_every_row_fits_its_devices(device: Device, own: list[Shape]) -> None:
    """Shared memory within the device's, no register spilled. What runs beside the recurrence, once."""
    assert unmet_rows("rnn_norm", ((s.dtype, s.hidden) for s in own), device) == []
    beside = set()
    for shape in own:
        for one in launches(shape, device):
            if "inputs" not in one.kernel.__module__ or one.kernel not in beside:
                check(one, device)
            beside.add(one.kernel)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_grid_is_resident(cell: str) -> None:
    """A grid with a barrier has one program a compute unit at most; where it has none, a phase is a launch."""
    for device in DEVICES:
        started = [
            one
            for one in launches(Shape(cell, BF16, 1024), device, B=256, T=5)
            if "inputs" not in one.kernel.__module__
        ]
        if device.cooperative:
            assert [(s.grid, s.cooperative, s.args[-4:]) for s in started] == [
                ((device.units,), True, (0, steps, 0, 3 if cell == "lstm" else 2)) for steps in (5, 6)
            ]
        else:
            assert len(started) == (3 if cell == "lstm" else 2) * (5 + 5) + 1  # d_h0 comes of one phase more
            assert not any(s.cooperative for s in started)
            assert {(s.args[-3] - s.args[-4], s.args[-1] - s.args[-2]) for s in started} == {(1, 1)}


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("hidden", [64, 512])
def test_sizes_share_compilations(cell: str, hidden: int) -> None:
    """Ever new B and T are compiled once forward and once backward, around the recurrence and of it."""
    device = next(d for d in DEVICES if d.arch == 90)
    keys = set()
    for B, T in ((1, 1), (16, 16), (1, 64), (4096, 2), (37, 91)):
        for one in launches(Shape(cell, BF16, hidden, "lengths"), device, B, T):
            keys.add((one.kernel, compile_key(one, device)))
    assert len(keys) == 4


if __name__ == "__main__":
    for device, shape in itertools.product([d for d in DEVICES if d.name in (sys.argv[1:] or d.name)], shapes()):
        for started in launches(shape, device):
            found = compile_launch(started, device)
            print(
                "FAULT" if faults(found, device) else "fits",
                device.name,
                *shape,
                started.kernel.__name__,
                found,
                flush=True,
            )
