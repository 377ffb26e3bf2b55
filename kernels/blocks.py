"""What the drivers share: element functions, products of tiles, and the barrier of a grid."""

import triton
import triton.language as tl

__all__ = ["add_rows", "dot", "product", "spanning", "tanh", "tile_of", "wait_for_all", "wide", "zeros"]


@triton.jit
def wide(x):
    """A number in int64, as addresses need it; in the interpreter that of a range is Python's."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def spanning(x, SIZE: tl.constexpr):
    """An index into so many weights: in int64 only where 32 bits, which take fewer registers, may not reach them."""
    if SIZE > 2**30:
        x = x.to(tl.int64)
    return x


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr = 0):
    """An fp32 tile, or with ROWS alone a vector."""
    if COLUMNS:
        tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        tile = tl.zeros((ROWS,), tl.float32)
    return tile


@triton.jit
def tile_of(tile, N, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr):
    """Rows and columns of a tile of [N, WIDTH], and which of them exist."""
    across: tl.constexpr = (WIDTH + BLOCK_U - 1) // BLOCK_U
    n = wide(tile // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    u = (tile % across) * BLOCK_U + tl.arange(0, BLOCK_U)
    return n, n < N, u, u < WIDTH


@triton.jit
def tanh(x):
    """By the sigmoid: its exponential overflows to a quotient of 0, never to NaN. Absolute error about 1e-7."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. PRECISION: "ieee" or "tf32" of fp32 operands; "upcast": for the interpreter (`launch`)."""
    tl.static_assert(a.dtype == b.dtype)  # which the interpreter would not mind
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product(
    accs, MAP: tl.constexpr, a, a_row, rows, rows_in, w, w_unit: tl.constexpr, w_k: tl.constexpr, units, units_in,
    H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, factor=None, factor_row=0,
):  # fmt: skip
    """accs[g][n, u] + sum_k a[n, k] W[MAP[g] H + u, k] for each g with MAP[g] >= 0; the others as they are.

    a: the address of a[0, 0], a_row between rows (int64), K contiguous. w: that of W[0, 0], w_unit between its rows,
    w_k between its columns. rows (int64), units: those of the tile; rows_in, units_in: which of them exist. factor: as
    a, multiplied into it. What another program of this launch may have written is read past the first-level cache.
    """
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        there = rows_in[:, None] & (k < K)[None, :]
        part = tl.load(a + rows[:, None] * a_row + k[None, :], there, 0.0, cache_modifier=".cg")
        if factor is not None:
            by = tl.load(factor + rows[:, None] * factor_row + k[None, :], there, 0.0)
            part = (part.to(tl.float32) * by.to(tl.float32)).to(part.dtype)
        part = part.to(w.dtype.element_ty)  # a state may be fp32 beside 16-bit weights
        new = ()
        u = spanning(units, 4 * H * w_unit)
        of_k = spanning(k, K * w_k)
        for g in tl.static_range(len(accs)):
            if MAP[g] >= 0:
                at = (MAP[g] * H + u[None, :]) * w_unit + of_k[:, None] * w_k
                of_gate = tl.load(w + at, units_in[None, :] & (k < K)[:, None], 0.0)
                new = new + (dot(part, of_gate, accs[g], PRECISION),)
            else:
                new = new + (accs[g],)
        accs = new
    return accs


@triton.jit
def add_rows(accs, MAP: tl.constexpr, p, p_row, rows, rows_in, units, units_in, H: tl.constexpr):
    """accs[g][n, u] + p[n, MAP[g] H + u] for each g with MAP[g] >= 0. p_row: between rows; 0: one row for all."""
    new = ()
    for g in tl.static_range(len(accs)):
        if MAP[g] >= 0:
            at = rows[:, None] * p_row + MAP[g] * H + units[None, :]
            new = new + (accs[g] + tl.load(p + at, rows_in[:, None] & units_in[None, :], 0.0).to(tl.float32),)
        else:
            new = new + (accs[g],)
    return new


@triton.jit
def wait_for_all(counter, arrived):
    """Every program of the grid comes here before one leaves, and sees what the others wrote. All must be resident.

    The poll must stay an acquire: on NVIDIA it empties the first-level cache (CCTL.IVALL). `.cg` alone would not do,
    for rows of no multiple of 16 bytes are copied by instructions that cache there all the same.
    counter: int32, 0 at the launch; arrived: programs times barriers so far, this one included. Both may pass 2**31:
    then they are what is left of that in 32 bits, and their difference still says who is behind.
    """
    tl.debug_barrier()  # all of this program's stores stand before the release
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") - arrived < 0:
        pass
    tl.debug_barrier()
