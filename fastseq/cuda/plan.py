"""How a recurrence is laid out on a GPU: `plan` chooses, from sizes alone, among what the kernels of csrc/cuda can do.

A group of blocks shares a recurrence of some rows of the batch. Each block owns `units` units, whose rows of W_hh stay
in its registers and shared memory. Groups of one direction run side by side on different rows, and take further rows
when they are done. The cost is a model (docs/kernels.md); the layout that it finds cheapest is taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..ops.cells import CELLS
from .devices import DeviceSpec

__all__ = ["CannotPlan", "RnnPlan", "Shape", "one_step", "plan", "rate"]

WARPS, THREADS, MOST_PAIRS = 8, 256, 512  # rows * units of a block: rnn_batch.h's kMostPairs a thread
TILE_ROWS, TILE_COLUMNS, TILE_BYTES = 16, 8, 512
STEP_ROWS = 16  # rnn_step.h's kStepRows
EXCHANGE_BYTES = 32  # rnn_exchange.h's kBytes
TILE_K = {"full32": 8, "tensor32": 8, "brain_half": 16, "half": 16}
ELEMENT = {"full32": 4, "tensor32": 4, "brain_half": 2, "half": 2}
DESIGNS = ("block", "cluster", "grid")  # csrc/cuda/group.h: how blocks meet


class CannotPlan(ValueError):
    """No layout of the weights fits this GPU; the message has sizes and limits."""


@dataclass(frozen=True)
class Shape:
    """csrc/cuda/rnn.h's RnnShape."""

    design: str
    blocks: int
    units: int
    rows: int
    groups: int
    kept: int

    def native(self) -> tuple[int, ...]:
        return DESIGNS.index(self.design), self.blocks, self.units, self.rows, self.groups, self.kept


@dataclass(frozen=True)
class RnnPlan:
    """One way of a layer's recurrence on one GPU. str() says it in words."""

    way: str  # "forward" | "backward"
    cell: str
    kind: str
    H: int
    directions: int
    shape: Shape
    shared: int  # bytes a block
    waves: int  # blocks of rows that a group runs one after another
    step: float  # predicted us of a step of one of them
    device: str
    exchange: tuple[int, ...] = ()  # a grid's: the shape of what its blocks hand to each other through global memory

    def __str__(self) -> str:
        s = self.shape
        where = {
            "block": "one block",
            "cluster": f"a cluster of {s.blocks} blocks",
            "grid": f"{s.blocks} blocks with a grid barrier",
        }
        text = (
            f"{self.way}: {where[s.design]} of {s.units} units, {s.rows} rows a group, "
            f"{s.groups} x {self.directions} groups, "
            f"{self.shared / 1024:.0f} KiB of shared memory a block, {s.kept} tiles a warp in registers; "
        )
        return text + f"predicted {self.step:.2f} us a step" + (f", {self.waves} times" if self.waves > 1 else "")


@dataclass(frozen=True)
class _Sizes:
    """rnn_forward.h's ForwardSizes and rnn_backward.h's BackwardSizes, as far as cost and memory need them."""

    shared: int
    tiles: int  # of a block's weights, zero ones included
    rest: int  # of those, in shared memory
    pitch: int  # elements between rows of what is multiplied
    parts: int  # of a dL/dh; 0 forward
    depth: int  # of what is multiplied


def plan(
    cell: str, B: int, H: int, kind: str, device: DeviceSpec, directions: int = 1, way: str = "forward"
) -> RnnPlan:
    """The cheapest layout by the model. T only scales it. Raises CannotPlan.

    kind: a key of native.KINDS. directions: 2 of a bidirectional layer, both in one launch.
    """
    return _plan(cell, max(B, 1), H, kind, device, directions, way)


@lru_cache(maxsize=4096)
def _plan(cell: str, B: int, H: int, kind: str, device: DeviceSpec, directions: int, way: str) -> RnnPlan:
    found = list(candidates(cell, B, H, kind, device, directions, way))
    if not found:
        gates = CELLS[cell].gates
        size = gates * H * H * ELEMENT[kind]
        raise CannotPlan(
            f"W_hh of hidden_size={H} has {size / 1e6:.1f} MB in {kind}, {directions} direction(s); with the steps' "
            f"buffers that does not fit the {device.units} x {device.shared // 1024} KiB of {device.name}"
        )
    return min(found, key=lambda p: (p.step * p.waves, p.shape.blocks * p.shape.groups, p.shape.kept, p.shared))


def candidates(
    cell: str, B: int, H: int, kind: str, device: DeviceSpec, directions: int, way: str
) -> Iterator[RnnPlan]:
    """Every layout that fits, in no order."""
    for units in range(TILE_ROWS, MOST_PAIRS // TILE_COLUMNS + 1, TILE_ROWS):
        for design, blocks, capacity in _placements(units, H, device):
            if capacity < directions:
                continue
            for rows in range(TILE_COLUMNS, MOST_PAIRS // units + 1, TILE_COLUMNS):
                if rows - TILE_COLUMNS >= B:
                    break
                groups = min(_cdiv(B, rows), capacity // directions)
                for kept in _kept(cell, kind, way):
                    shape = Shape(design, blocks, units, rows, groups, kept)
                    made = _made(cell, B, H, kind, device, directions, way, shape)
                    if made is not None:
                        yield made


def _placements(units: int, H: int, device: DeviceSpec) -> Iterator[tuple[str, int, int]]:
    """(design, blocks of a group, groups that are resident at once)."""
    needed = _cdiv(H, units)
    if needed == 1:
        yield "block", 1, device.units
        return
    for size, count in device.clusters:
        if size // 2 < needed <= size:
            yield "cluster", size, count
    if needed <= device.units:
        yield "grid", needed, device.units // needed


def _kept(cell: str, kind: str, way: str) -> tuple[int, ...]:
    """rnn_kind.cu's variants."""
    gates = CELLS[cell].gates
    if kind == "full32" or gates == 1:
        return (0,)
    return (0, 8) if way == "forward" else (0, 3, 7 if gates == 4 else 6)


def _made(
    cell: str, B: int, H: int, kind: str, device: DeviceSpec, directions: int, way: str, shape: Shape
) -> RnnPlan | None:
    sizes = (_forward_sizes if way == "forward" else _backward_sizes)(cell, kind, H, shape)
    if sizes is None or sizes.shared > device.shared:
        return None
    all_groups = shape.groups * directions
    exchange: tuple[int, ...] = ()
    if shape.design == "grid":
        exchange = (all_groups, 2, shape.rows, sizes.pitch)
        if way == "backward":
            exchange = (all_groups, 2, shape.blocks, sizes.parts, shape.rows, shape.units)
    waves = _cdiv(B, shape.rows * shape.groups)
    step = _step(kind, device, directions, shape, sizes, H)
    return RnnPlan(way, cell, kind, H, directions, shape, sizes.shared, waves, step, device.name, exchange)


def _cdiv(n: int, size: int) -> int:
    return -(-n // size)


def _pitch(depth: int, element: int) -> int:
    """Rows start 4 banks apart: 8 rows x 4 lanes then read from 32 of them."""
    return (-(-depth * element // 4) + 31) // 32 * 32 * 4 // element + 16 // element


def _forward_sizes(cell: str, kind: str, H: int, shape: Shape) -> _Sizes | None:
    gates, element = CELLS[cell].gates, ELEMENT[kind]
    unit_tiles = shape.units // TILE_ROWS
    slices = WARPS // unit_tiles
    tiles = _cdiv(_cdiv(H, TILE_K[kind]), slices)
    if tiles < shape.kept:
        return None  # registers would hold zeros
    depth = slices * tiles * TILE_K[kind]
    pitch = _pitch(depth, element)
    buffers = 1 if shape.design == "grid" else 2
    rest = unit_tiles * slices * (tiles - shape.kept) * gates
    shared = (
        buffers * shape.rows * pitch * element
        + slices * gates * shape.rows * shape.units * 4
        + (2 * shape.rows + CELLS[cell].columns) * shape.units * 4
        + EXCHANGE_BYTES
        + rest * TILE_BYTES
    )
    return _Sizes(shared, unit_tiles * slices * tiles * gates, rest, pitch, 0, depth)


def _backward_sizes(cell: str, kind: str, H: int, shape: Shape) -> _Sizes | None:
    gates, element = CELLS[cell].gates, ELEMENT[kind]
    strip = 8 if shape.kept == 3 else 4
    strips = _cdiv(H, strip * TILE_ROWS)
    every = gates * shape.units // TILE_K[kind]
    slices = 1 if strips >= WARPS else WARPS // strips
    if shape.kept and slices > every // shape.kept:
        slices = max(every // shape.kept, 1)
    slices = min(slices, every)
    tiles = _cdiv(every, slices)
    if tiles < shape.kept:
        return None
    depth = slices * tiles * TILE_K[kind]
    pitch = _pitch(depth, element)
    passes = _cdiv(strips, WARPS // slices)
    warp_tiles = (passes * tiles - shape.kept) * strip
    parts, own = _cdiv(H, shape.units) * slices, shape.rows * shape.units
    shared = (
        shape.rows * pitch * element
        + (2 + (0 if shape.design == "grid" else 2 * parts)) * own * 4
        + (WARPS * strip * TILE_BYTES if shape.kept else 0)
        + EXCHANGE_BYTES
        + WARPS * warp_tiles * TILE_BYTES
    )
    return _Sizes(shared, WARPS * passes * tiles * strip, WARPS * warp_tiles, pitch, parts, depth)


def one_step(cell: str, B: int, I: int, H: int, kind: str, device: DeviceSpec) -> float:  # noqa: E741
    """Predicted us of rnn_step.h's only step: no barrier; products, or each block's weights through L2."""
    blocks, weights = _cdiv(H, TILE_ROWS) * _cdiv(B, STEP_ROWS), CELLS[cell].gates * TILE_ROWS * (I + H)
    product = _cdiv(blocks, device.units) * 2 * weights * STEP_ROWS / rate(kind, device)
    return device.step + max(product, blocks * weights * ELEMENT[kind] / device.l2_bytes)


def rate(kind: str, device: DeviceSpec) -> float:
    """Flops a us of one SM."""
    return {"full32": device.vector_flops, "tensor32": device.tensor_flops / 2}.get(kind, device.tensor_flops)


def _step(kind: str, device: DeviceSpec, directions: int, shape: Shape, sizes: _Sizes, H: int) -> float:
    """us of a step: barrier, what is handed out, and the product, bound by arithmetic or by reading the weights."""
    tiles = shape.rows // TILE_COLUMNS
    flops = 2 * sizes.tiles * tiles * TILE_ROWS * TILE_COLUMNS * TILE_K[kind]
    of_product = rate(kind, device)
    again = tiles if shape.kept or tiles % 2 else tiles // 2  # times that those weights are read
    product = max(flops / of_product, sizes.rest * TILE_BYTES * again / device.shared_bytes)
    holders = _cdiv(H, shape.units)  # blocks that have units: of a cluster perhaps not all
    parts = shape.rows * H * 4 * max(sizes.parts // holders, 1)  # backward, of a block
    if shape.design == "block":
        return device.step + product
    if shape.design == "cluster":
        given = parts if sizes.parts else shape.rows * shape.units * ELEMENT[kind] * (holders - 1)
        return device.step + product + device.cluster_barrier + given / device.remote_bytes
    everybody = shape.blocks * shape.groups * directions
    moved = 2 * parts if sizes.parts else shape.rows * H * ELEMENT[kind]
    return device.step + product + device.grid_barrier + everybody * moved / device.l2_bytes
