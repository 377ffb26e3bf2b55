"""The attention kernels compiled for every device they are shipped to, on a machine without one."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from fastseq.kernels import attention, attention_backward, launch
from fastseq.kernels.devices import DEVICES, Device
from fastseq.kernels.launch import Launch

import fastseq.ops.attention  # noqa: F401  (the operators)
from tests.compiled import check, loop_instructions, ttir, unmet_rows

DEVICE = {device.name: device for device in DEVICES}
H200 = DEVICE["H200"]


def launches(
    device: Device,
    dtype: torch.dtype,
    additive: bool,
    sizes: Sequence[int],  # B, k, T, S, A, D
    mask: bool = True,
    backward: bool = True,
    weights: bool = True,
) -> list[Launch]:
    """What forward and backward would start on `device`. weights: their gradient is given too."""
    with FakeTensorMode(), launch.recording(device) as noted:
        inputs = operands(dtype, additive, sizes, mask)
        context, saved = attention.forward(*inputs, backward)
        if backward:
            attention.backward(context, saved if weights else None, *inputs, saved)
    return noted


def operands(dtype: torch.dtype, additive: bool, sizes: Sequence[int], mask: bool) -> tuple[Any, ...]:
    """q, keys, memory, mask, v."""
    B, k, T, S, A, D = sizes

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    return (new(B * k, T, A), new(B, S, A), new(B, S, D), new(B, S, dtype=torch.bool) if mask else None,
            new(A) if additive else None)  # fmt: skip


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "dot"])
@pytest.mark.parametrize(
    "sizes", [(4, 2, 9, 70, 35, 33), (0, 1, 9, 70, 35, 33), (4, 1, 0, 70, 35, 33), (4, 1, 9, 0, 35, 33)]
)
def test_results_are_what_the_operator_promises(additive: bool, sizes: Sequence[int]) -> None:
    """Shapes, dtypes and layout of the fake kernels, which torch.compile believes."""

    def traits(results: Sequence[Tensor]) -> list[Any]:
        return [(t.shape, t.dtype, t.device, t.stride()) for t in results]

    with FakeTensorMode(), launch.recording(H200):
        inputs = operands(torch.bfloat16, additive, sizes, mask=True)
        for save in (False, True):
            found = attention.forward(*inputs, save)
            assert traits(found) == traits(torch.ops.fastseq.attention_forward(*inputs, save))
        context, weights = found
        for grads in ((context, weights), (context, None), (None, weights)):
            d = attention.backward(*grads, *inputs, weights)
            assert traits(d) == traits(torch.ops.fastseq.attention_backward(*grads, *inputs, weights))


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fits_every_device(device: Device, dtype: torch.dtype) -> None:
    """Shared memory, registers, no spills. Sizes of a usual decoder, both forms, with a mask."""
    noted = launches(device, dtype, True, (4, 2, 9, 70, 512, 512)) + launches(
        device, dtype, False, (4, 2, 9, 70, 512, 512)
    )
    assert unmet_rows("attention_", [(dtype, 512)], device) == []
    for one in noted:
        check(one, device)


@pytest.mark.parametrize("name", ["RTX 3090", "H200", "MI300X"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fits_odd_sizes(name: str, dtype: torch.dtype) -> None:
    """Loads of single elements need most registers."""
    device = DEVICE[name]
    for one in launches(device, dtype, True, (4, 1, 9, 70, 35, 33), mask=False, weights=False):
        check(one, device)


def test_fits_fp16_the_largest_sizes_and_tf32() -> None:
    for dtype, A, D in ((torch.float16, 512, 512), (torch.float32, 2048, 2048)):
        for one in launches(H200, dtype, True, (4, 1, 9, 70, A, D)):
            check(one, H200)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        noted = launches(H200, torch.float32, False, (4, 1, 9, 70, 512, 512))
        assert [one.constants.get("PRECISION") for one in noted] == ["tf32", "tf32", "tf32"]
        for one in noted:
            check(one, H200)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "dot"])
def test_gradients_of_scores_are_read_behind_a_barrier(additive: bool) -> None:
    """A program's threads read in the second loop what others of them stored in the first; no interpreter sees that."""
    noted = launches(H200, torch.bfloat16, additive, (4, 1, 9, 70, 64, 64))
    (one,) = (one for one in noted if one.kernel is attention_backward.attention_weights_backward_kernel)
    order = re.findall(r"tt\.store|tt\.load|gpu\.barrier", ttir(one, H200))
    assert order.count("gpu.barrier") == 1
    at = order.index("gpu.barrier")
    assert order[at - 1] == "tt.store"
    assert order.count("tt.store") == 2
    assert order[at + 1 :].count("tt.load") == 3  # the mask, weights, and what was stored
    assert order[-1] == "tt.store"


@pytest.mark.parametrize(
    ("name", "dtype", "fast"),
    [("H200", torch.bfloat16, True), ("H200", torch.float16, False), ("H200", torch.float32, False),
     ("MI300X", torch.bfloat16, False)],
)  # fmt: skip
def test_fast_tanh_is_for_bf16_on_cuda(name: str, dtype: torch.dtype, fast: bool) -> None:
    noted = launches(DEVICE[name], dtype, True, (4, 1, 9, 70, 64, 64))
    scores, _, _, pairs = noted
    assert [one.constants["FAST_TANH"] for one in (scores, pairs)] == [fast] * 2


@pytest.mark.parametrize(
    ("dtype", "of_tanh", "others"),
    [(torch.bfloat16, {"MUFU.TANH": 1}, {"FADD": 1, "FFMA": 1}),
     (torch.float32, {"MUFU.EX2": 1, "MUFU.RCP": 1},
      {"FMUL": 5, "FFMA": 3, "FADD": 2, "FSETP.GEU.AND": 1, "FSETP.GT.AND": 1, "FSEL": 1})],
    ids=["bf16", "fp32"],
)  # fmt: skip
def test_instructions_of_a_unit_of_a_score(dtype: torch.dtype, of_tanh: dict[str, int], others: dict[str, int]) -> None:
    """Of the loop over units, on sm_90: 3 in bf16, one of them MUFU; in fp32 15, two of them MUFU."""
    scores = launches(H200, dtype, True, (4, 1, 9, 70, 512, 512), backward=False)[0]
    found = max(loop_instructions(scores, H200), key=Counter.total)  # the other loop is of few queries
    size = scores.constants
    units = size["BLOCK_M"] * size["BLOCK_S"] * size["BLOCK_A"] // (32 * scores.warps)  # of a thread, each time round
    arithmetic = {name: n for name, n in found.items() if re.match(r"MUFU|F(ADD|MUL|FMA|SETP|SEL|MNMX)", name)}
    assert arithmetic == {name: n * units for name, n in (of_tanh | others).items()}
    assert sum((of_tanh | others).values()) == (3 if dtype == torch.bfloat16 else 15)
