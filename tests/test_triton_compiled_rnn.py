"""The recurrent kernels as GPUs would be given them: compiled ahead of time for each known device, without one.

Every row of the table is compiled for every device that it is for, with cells and options taking turns; these crossed
too, in half an hour, by `python -m tests.test_triton_compiled_rnn [device]`.
"""

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from fastseq.kernels import launch, rnn, rnn_cell
from fastseq.kernels.configs import find
from fastseq.kernels.devices import DEVICES, Device
from fastseq.kernels.launch import Launch

from fastseq.ops import rnn_gpu
from fastseq.ops.extras import NONE, Extras
from fastseq.ops.rnn_gpu import Batch
from fastseq.ops.step import StepShape
from tests.compiled import check, compile_key, compile_launch, faults, unmet_rows

GATES = {"lstm": 4, "gru": 3}
BF16, FP32 = torch.bfloat16, torch.float32


class Shape(NamedTuple):
    """What decides which kernel runs and how it is compiled. B and T do not."""

    cell: str
    dtype: torch.dtype
    hidden: int
    tf32: bool = False
    one_step: bool = False
    bidirectional: bool = False
    rows: str = "full"  # "lengths", "packed", "resets": with lengths and resets
    noise: str = ""  # a key of NOISE


CLASSES = (  # dtype, H, TF32, one step
    (BF16, 16, False, False), (BF16, 64, False, False), (BF16, 128, False, False), (BF16, 1024, False, False),
    (BF16, 100, False, False), (BF16, 500, False, False),
    (FP32, 32, False, False), (FP32, 64, False, False), (FP32, 512, False, False), (FP32, 50, False, False),
    (FP32, 16, True, False), (FP32, 64, True, False), (FP32, 512, True, False), (FP32, 333, True, False),
    (BF16, 256, False, True), (FP32, 256, False, True), (BF16, 100, False, True),
)  # fmt: skip


NOISE = {  # masks of update, of h, of c, of the product with W_hh; shares of h and of c
    "": (False, False, False, False, 0.0, 0.0),
    "state": (False, True, True, True, 0.0, 0.0),  # zoneout, and recurrent dropout on "state" or "update"
    "update": (True, True, True, False, 0.0, 0.0),
    "zoneout": (False, True, True, False, 0.0, 0.0),
    "mean": (False, False, False, False, 0.25, 0.125),
    "dropout": (False, False, False, True, 0.0, 0.0),
}


def shapes() -> Iterator[Shape]:
    """All without noise."""
    for (dtype, hidden, tf32, one_step), cell in itertools.product(CLASSES, GATES):
        if one_step:
            yield Shape(cell, dtype, hidden, tf32, True)
        else:
            for two, rows in itertools.product((False, True), ("full", "lengths", "packed", "resets")):
                yield Shape(cell, dtype, hidden, tf32, False, two, rows)


def noisy() -> Iterator[Shape]:
    """Each class of layers with the most noise that a module draws, beside resets or not, and with less of it."""
    kinds = itertools.cycle(list(NOISE)[3:])
    for dtype, hidden, tf32, one_step in CLASSES:
        for cell in GATES if not one_step else ():
            for two, rows in ((True, "resets"), (False, "full")):
                for noise in ("state", "update"):
                    yield Shape(cell, dtype, hidden, tf32, False, two, rows, noise)
            yield Shape(cell, dtype, hidden, tf32, False, True, "lengths", next(kinds))


def launches(shape: Shape, device: Device, B: int = 8, T: int = 3, features: int = 48) -> list[Launch]:
    """What a training step of this shape starts on `device`."""
    dirs, hidden, lstm = 2 if shape.bidirectional else 1, shape.hidden, shape.cell == "lstm"
    with FakeTensorMode(), launch.recording(device) as started, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", shape.tf32)

        def new(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="cuda")

        def states(*sizes: int) -> tuple[Tensor, Tensor | None]:
            return new(*sizes), new(*sizes) if lstm else None

        G = GATES[shape.cell] * hidden
        weights = [new(*size) for size in ((G, features), (G, hidden), (G,), (G,))] * dirs
        if shape.one_step:
            step, x, (h0, c0) = (
                StepShape(shape.cell, B, features, (B, hidden), None),
                new(B, features),
                states(B, hidden),
            )
            results, gates, cells = rnn_cell.forward(step, x, h0, c0, weights, True)
            rnn_cell.backward(step, [True] * 4, results, x, h0, c0, weights, gates, cells)
            return started
        packed, ints = shape.rows == "packed", torch.int64
        x, (h0, c0) = new(T * B, features) if packed else new(T, B, features), states(dirs, B, hidden)
        lengths = new(B, dtype=ints) if shape.rows in ("lengths", "resets") else None
        resets = new(T, B, dtype=torch.bool) if shape.rows == "resets" else None
        if packed:  # of fake batch_sizes nobody knows the values
            batch = Batch(T, B, T * B, 0, 1, new(T, dtype=ints), new(B, dtype=ints))
            patch.setattr(Batch, "of", lambda *args: batch)
        options = (lengths, resets, None, False, shape.bidirectional)
        extras, states = (
            extras_of(shape, new, (T * B,) if packed else (T, B), B, dirs),
            shape.noise in ("state", "update"),
        )
        of_cells = new(dirs, T * B, hidden, dtype=FP32)
        patch.setattr(rnn_gpu, "_of_directions", lambda *args: of_cells)  # which copies; fake tensors ask for a driver
        out, h_n, c_n, _, gates, cells = rnn.forward(shape.cell, x, h0, c0, weights, *options, True, extras)
        saved = (out, gates, cells, [True] * 4, extras)
        d_c_out = out if states and lstm else None
        rnn.backward(shape.cell, out, h_n, c_n, d_c_out, x, h0, c0, weights, *options, *saved)
    return started


def extras_of(shape: Any, new: Callable[..., Tensor], lead: tuple[int, ...], B: int, dirs: int = 1) -> Extras:
    """The masks of a layer's call."""
    if not shape.noise:
        return NONE
    *masks, drop, share_h, share_c = NOISE[shape.noise]
    lstm = shape.cell == "lstm"
    update, hold_h, hold_c = (new(*lead, dirs * shape.hidden, dtype=torch.bool) if mask else None for mask in masks)
    recurrent = new(dirs, B, shape.hidden) if drop else None
    rates = (1.5 if update is not None else 1.0, share_h, share_c if lstm else 0.0)
    return Extras(update, hold_h, hold_c if lstm else None, recurrent, rates)


def turns() -> list[tuple[Device, list[Shape]]]:
    """For each device a shape of the classes that meet all of its rows, and of every third other one."""
    own = [[s for s in shapes() if (s.dtype, s.hidden, s.tf32, s.one_step) == kind] for kind in CLASSES]
    found = []
    for index, device in enumerate(DEVICES):
        met: set[int] = set()
        mine = []
        for k, of_class in enumerate(own):
            rows = rows_of(of_class[0], device)
            if not rows <= met or (index + k) % 3 == 0:
                mine.append(of_class[(index * 5 + k) % len(of_class)])
            met |= rows
        found.append((device, mine))
    return found


def rows_of(shape: Shape, device: Device) -> set[int]:
    """Of configs.json, by identity."""
    designs = ("cell",) if shape.one_step else ("sequence", "steps")
    kernels = [f"rnn_{design}_{way}" for design in designs for way in ("forward", "backward")]
    return {id(find(kernel, shape.dtype, shape.hidden, device)) for kernel in kernels}


@pytest.mark.parametrize(("device", "own"), turns(), ids=lambda value: value.name if isinstance(value, Device) else "")
def test_classes_fit_their_devices(device: Device, own: list[Shape]) -> None:
    """Shared memory within the device's, no register spilled, at most as many as it has."""
    assert unmet_rows("rnn_s", ((s.dtype, s.hidden) for s in own if not s.one_step), device) == []
    assert unmet_rows("rnn_cell", ((s.dtype, s.hidden) for s in own if s.one_step), device) == []
    for shape in own:
        for started in launches(shape, device):
            check(started, device)


def noisy_turns() -> list[tuple[Device, list[Shape]]]:
    """For each class one shape with noise on one of NVIDIA's devices, and one on AMD's."""
    nvidia, amd = DEVICES[:-1], DEVICES[-1]
    found: dict[Device, list[Shape]] = {device: [] for device in DEVICES}
    for k, kind in enumerate(kind for kind in CLASSES if not kind[3]):
        of_class = [s for s in noisy() if (s.dtype, s.hidden, s.tf32, s.one_step) == kind]
        for turn, device in ((k, nvidia[k % len(nvidia)]), (k + 5, amd)):
            found[device].append(of_class[turn * 3 % len(of_class)])  # 3 and 10 share no factor
    return list(found.items())


@pytest.mark.parametrize(
    ("device", "own"), noisy_turns(), ids=lambda value: value.name if isinstance(value, Device) else ""
)
def test_noise_fits_too(device: Device, own: list[Shape]) -> None:
    """With masks and every cell state, in the tiles of plain layers."""
    for shape in own:
        for started in launches(shape, device):
            check(started, device)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("device", [d for d in DEVICES if d.arch in (90, "gfx942")], ids=lambda d: d.name)
def test_one_step_with_an_fp32_state(cell: str, device: Device) -> None:
    """As streaming hands it on, beside an input in 16 bits."""
    with FakeTensorMode(), launch.recording(device) as started:
        x, h0 = (torch.empty(8, n, dtype=dtype, device="cuda") for n, dtype in ((48, BF16), (64, torch.float32)))
        c0 = torch.empty_like(h0) if cell == "lstm" else None
        G = GATES[cell] * 64
        weights = [torch.empty(size, dtype=BF16, device="cuda") for size in ((G, 48), (G, 64), (G,), (G,))]
        step = StepShape(cell, 8, 48, (8, 64), None)
        results, gates, cells = rnn_cell.forward(step, x, h0, c0, weights, True)
        rnn_cell.backward(step, [True] * 4, results, x, h0, c0, weights, gates, cells)
    assert len(started) == 2
    for one in started:
        check(one, device)


@pytest.mark.parametrize("cell", GATES)
def test_resets_take_few_registers(cell: str) -> None:
    """Whatever is selected within the loop: of what backward's products give, it took all, and spilled."""
    device = next(d for d in DEVICES if d.name == "H200")
    for started in launches(Shape(cell, FP32, 32, rows="resets"), device):
        check(started, device)


def test_a_kernel_too_large_is_noticed() -> None:
    """W_hh of 256 units does not fit one program, nor its registers."""
    device = DEVICES[1]
    (started, _) = launches(Shape("lstm", BF16, 64), device)
    large = started._replace(constants=started.constants | {"H": 128, "BLOCK_UNITS": 128}, unshared=False, warps=2)
    wrong = " ".join(faults(compile_launch(large, device), device))
    assert "bytes of shared memory, RTX 3090 has 101376" in wrong
    assert "spills in a hot loop" in wrong


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize(("hidden", "one_step"), [(64, False), (512, False), (64, True)])
def test_few_compilations(cell: str, hidden: int, one_step: bool) -> None:
    """A module that sees ever new B and T is compiled once forward and once backward."""
    draw, device, keys = random.Random(0), DEVICES[3], set()
    sizes = [(1, 1), (16, 16), (1, 64), (4096, 2), *((draw.randint(1, 300), draw.randint(1, 300)) for _ in range(46))]
    for B, T in sizes:
        for started in launches(Shape(cell, BF16, hidden, one_step=one_step, rows="lengths"), device, B, T):
            keys.add((started.kernel, compile_key(started, device)))
    assert len(keys) == 2


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize(("hidden", "design"), [(64, "rnn_sequence"), (512, "rnn_steps")])
def test_both_directions_are_one_launch(cell: str, hidden: int, design: str) -> None:
    """They run side by side: no launch more than of one direction, in one program or on a grid."""
    device = next(d for d in DEVICES if d.name == "H200")
    one, two = (launches(Shape(cell, BF16, hidden, bidirectional=both), device) for both in (False, True))
    assert [s.kernel for s in two] == [s.kernel for s in one]
    assert [s.kernel.__module__.rpartition(".")[2] for s in two] == [design] * 2  # forward, backward


def test_rates_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zoneout's shares are numbers of the run; those of 0 are left out."""
    device, keys = DEVICES[3], set()
    for share_h, share_c in ((0.25, 0.125), (0.5, 0.999), (1, 1)):
        monkeypatch.setitem(NOISE, "mean", (False, False, False, False, share_h, share_c))
        for started in launches(Shape("lstm", BF16, 512, noise="mean"), device):
            keys.add((started.kernel, compile_key(started, device)))
    assert len(keys) == 2


def test_grid_is_resident() -> None:
    """A grid with a barrier has one program a compute unit at most; where it has none, a step is a launch."""
    for device in DEVICES:
        started = launches(Shape("lstm", BF16, 1024), device, B=256, T=5)
        if device.cooperative:
            assert [(s.grid, s.cooperative) for s in started] == [((device.units,), True)] * 2
        else:
            assert len(started) == 5 + 6  # backward's last step is the initial state's gradient
            assert not any(s.cooperative for s in started)


if __name__ == "__main__":
    every = [*shapes(), *noisy()]
    for device, shape in itertools.product([d for d in DEVICES if d.name in (sys.argv[1:] or d.name)], every):
        for started in launches(shape, device):
            wrong = faults(compile_launch(started, device), device)
            print("FAULT" if wrong else "fits", device.name, *shape, started.kernel.__name__, *wrong, flush=True)
