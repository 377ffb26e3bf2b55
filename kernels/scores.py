"""Element math of the attention scores for Triton drivers: csrc/scores.h, which has the equations, once more.

The additive score of a query and a key is the sum over the units of `additive`; that of the dot form is a product of
tiles and needs no element function. The tanh's limit on NVIDIA's GPUs is the MUFU unit, 16 results a clock of an SM.
FAST_TANH: one MUFU instruction, TANH, with an error of 5e-4, which bf16 does not see. Otherwise two, EX2 and RCP, by
the sigmoid, with 1e-7. So counted in the SASS of sm_90, where a unit of a score takes 3 and 15 instructions in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .blocks import tanh
from .devices import Device

__all__ = ["additive", "additive_backward", "as_bytes", "attended_of", "fast_tanh", "fitted", "reach_of"]


def fast_tanh(dtype: torch.dtype, device: Device) -> bool:
    """FAST_TANH for inputs of this dtype. The interpreter cannot run the instruction, hip has none."""
    return dtype == torch.bfloat16 and device.backend == "cuda" and int(device.arch) >= 75


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as `attended_of` reads it."""
    return None if mask is None else launch.aligned(mask.view(torch.uint8))


def fitted(block: int, size: int) -> int:
    """A tile of `block` or, where `size` is less, of what holds it; products need 16."""
    return min(block, max(16, triton.next_power_of_2(size)))


@triton.jit
def _tanh(x, FAST_TANH: tl.constexpr):
    if FAST_TANH:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tanh(x)
    return y


@triton.jit
def additive(key, query, v, FAST_TANH: tl.constexpr):
    """What one unit adds to the score. Bahdanau et al. 2014, A.1.2."""
    return v * _tanh(key + query, FAST_TANH)


@triton.jit
def additive_backward(key, query, d, FAST_TANH: tl.constexpr):
    """Of d, the score's gradient: that of key + query, still without its factor v, and that of v.

    Both are 0 where d is: keys that are not attended to may be NaN.
    """
    t = tl.where(d != 0, _tanh(key + query, FAST_TANH), 0.0)
    return d * (1 - t * t), d * t


@triton.jit
def attended_of(mask, b, positions, S):
    """Which positions exist and may be read. mask: uint8 [B, S] or None."""
    attended = positions < S
    if mask is not None:
        attended = tl.load(mask + b * S + positions, attended, 0) != 0
    return attended


@triton.jit
def reach_of(mask, b, S, BLOCK: tl.constexpr):
    """One past the last position that may be read; behind it a loop need not go."""
    reach = 0
    for s0 in range(0, S, BLOCK):
        positions = s0 + tl.arange(0, BLOCK)
        reach = tl.maximum(reach, tl.max(tl.where(attended_of(mask, b, positions, S), positions + 1, 0), 0))
    return reach
