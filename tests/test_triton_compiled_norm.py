"""The layer-normalised kernels as GPUs would be given them: compiled ahead of time, on a machine without one.

All shape classes, cells and devices crossed: `python -m tests.test_triton_compiled_norm [device]`.
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
from fastseq.kernels.devices import DEVICES, Device
from fastseq.kernels.launch import Launch

from fastseq.ops.rnn_gpu import Batch
from tests.compiled import check, compile_key, compile_launch, faults
from tests.oracle import GATES

BF16, FP32 = torch.bfloat16, torch.float32
CLASSES = ((BF16, 16), (FP32, 16), (BF16, 32), (FP32, 24), (BF16, 64), (FP32, 64), (BF16, 100), (BF16, 128))
GRIDS = (
    *((BF16, 130), (FP32, 128), (BF16, 256), (FP32, 300), (BF16, 512), (FP32, 512), (BF16, 1024), (FP32, 1024)),
)  # classes that no program holds


class Shape(NamedTuple):
    cell: str
    dtype: torch.dtype
    hidden: int
    rows: str = "full"  # "lengths", "packed", "resets": with lengths


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
        given = (
            x,
            h0,
            h0 if lstm else None,
            lengths,
            resets,
            batch_sizes,
            weights,
            norms,
            False,
            shape.rows == "lengths",
            [],
            (1.0, 0.0, 0.0),
        )
        out, h_n, c_n, *saved, c_out = rnn_norm.forward(shape.cell, *given, False, True)
        rnn_norm.backward(shape.cell, out, h_n, c_n, c_out, *given, out, *saved, [True] * 4)
    return started


def shapes(classes: tuple[tuple[torch.dtype, int], ...] = CLASSES + GRIDS) -> Iterator[Shape]:
    for (dtype, hidden), cell, rows in itertools.product(
        classes, ("lstm", "gru"), ("full", "lengths", "packed", "resets")
    ):
        yield Shape(cell, dtype, hidden, rows)


CHOSEN = [d for d in DEVICES if d.arch in (80, 90, 120, "gfx942")]


@pytest.mark.parametrize(("turn", "device"), [*enumerate(CHOSEN)], ids=lambda value: getattr(value, "name", ""))
def test_classes_fit_their_devices(turn: int, device: Device) -> None:
    """Shared memory within the device's, no register spilled. Each device has every second class, with a cell and a
    kind of rows by turns; a class that no program of it holds goes to the grid.
    """
    own = list(shapes(CLASSES))  # 8 of each class
    mine = [own[8 * k + (3 * k + 5 * turn) % 8] for k in range(turn % 2, len(CLASSES), 2)]
    for shape in mine:
        for one in launches(shape, device):
            check(one, device)


@pytest.mark.parametrize(("turn", "device"), [*enumerate(DEVICES)], ids=lambda value: getattr(value, "name", ""))
def test_grids_fit_their_devices(turn: int, device: Device) -> None:
    """The same of two classes a device, so that each class meets one or two."""
    own = list(shapes(GRIDS))
    for k in (turn, turn + 3):
        for one in {o.kernel: o for o in launches(own[k % 8 * 8 + (3 * turn + k) % 8], device)}.values():
            check(one, device)


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
