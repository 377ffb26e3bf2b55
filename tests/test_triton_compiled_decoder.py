"""A decoder's loop compiled ahead of time for GPUs that this machine has not: resources, and how often one compiles."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastseq.ops.decoder_types import KEPT, LoopSpec, LoopTensors
from fastseq.spec import DecoderSpec
from tests.compiled import check, compile_key, hot_spills, unmet_rows

triton = pytest.importorskip("triton")
from fastseq.kernels import decoder, launch  # noqa: E402
from fastseq.kernels.devices import DEVICES, Device  # noqa: E402

from fastseq.backends import decoder_fused  # noqa: E402
from tests.decoder_oracle import PRESETS  # noqa: E402

LOOPED = [name for name in PRESETS if name not in ("sutskever", "opennmt_mlp", "tf_nmt", "joeynmt", "bentrevett")]
EACH = [(device, "luong", dtype) for device in DEVICES for dtype in (torch.bfloat16, torch.float32)]
OTHERS = [
    (device, name, torch.bfloat16)
    for device in DEVICES
    for name in LOOPED
    if name != "luong" and device.arch in (90, "gfx942")
]


def tensors(loop: LoopSpec, dtype: torch.dtype, N: int, B: int, T: int, S: int, H: int, masks: bool) -> LoopTensors:
    """Of a loop whose every size but N, B, T, S is H, with additive attention; without values."""
    gates = 4 if loop.cell == "lstm" else 3

    def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    attends, fed = loop.attend != "none", loop.feed == "output"
    read = (2 if loop.combine == "maxout" else 1) * H
    weights = []
    for i in range(loop.cells):
        below = i > 0 and loop.attend != "between"
        parts = (i == 0) + (i == 0 and loop.feed != "none") + below + loop.contexts[i]
        weights += [new(gates * H, parts * H), new(gates * H, H), new(gates * H), new(gates * H)]
    states = [new(N, H) for _ in range(loop.layers)]
    return LoopTensors(
        new(N, T, H), new(B, S, H) if attends else None, new(B, S, H) if attends else None,
        new(B, S, of=torch.bool) if attends else None, new(N, H) if loop.feed != "none" else None,
        new(N, gates * H) if not attends else None, new(H, H) if attends else None, new(H) if attends else None,
        new(read, len(loop.readout) * H) if fed else None, new(read) if fed else None,
        new(loop.cells - 1, N, T, H) if masks and loop.cells > 1 and loop.attend != "between" else None,
        new(N, T, len(loop.readout) * H) if masks and fed else None, new(N, T, H) if masks and fed else None,
        states, states if loop.cell == "lstm" else (), weights,
    )  # fmt: skip


def loop_of(name: str, cell: str = "lstm") -> LoopSpec:
    cell = "gru" if name == "cho" else cell
    loop = decoder_fused.make_plan(DecoderSpec(cell=cell, **PRESETS[name])).loop
    assert loop is not None
    return loop


def launches(
    device: Device, loop: LoopSpec, dtype: torch.dtype, N: int = 64, B: int = 64, T: int = 64, S: int = 64,
    H: int = 512, masks: bool = False, weights: bool = False,
) -> list[launch.Launch]:  # fmt: skip
    """What a training step would start on `device`, the attention's own kernels aside. weights: as results too."""
    x = tensors(loop, dtype, N, B, T, S, H, masks)
    with launch.recording(device) as started:
        kept = decoder.forward(loop, x, weights, True)[: len(KEPT)]
        hs, contexts, outs, seen_at, *_ = kept
        assert hs is not None
        seen = None if contexts is None or loop.feed == "output" else contexts[:, -T:]
        grads = (
            hs[-1, :, 1:], seen, None if outs is None else outs[:, 1:], seen_at if weights else None, x.feed0,
            list(x.h0), list(x.c0),
        )  # fmt: skip
        decoder.backward(loop, grads, x, kept, [t is not None for t in x.flat()], False)
    return [one for one in started if one.kernel.__name__.startswith("decoder_")]


@pytest.mark.parametrize(
    ("device", "name", "dtype"), [*EACH, *OTHERS], ids=lambda v: getattr(v, "name", str(v)).replace(" ", "-")
)
def test_resources(device: Device, name: str, dtype: torch.dtype) -> None:
    """Shared memory, registers and spills of forward and backward, with one cooperative launch each on NVIDIA."""
    assert unmet_rows("decoder_", [(dtype, 512)], device) == []
    started = launches(device, loop_of(name), dtype)
    phases = 1 if device.cooperative else 64
    assert {one.kernel.__name__ for one in started} == {"decoder_forward", "decoder_backward"}
    assert all(one.cooperative == device.cooperative for one in started)
    assert len(started) == 2 if device.cooperative else len(started) % phases == 0
    for kernel in ("decoder_forward", "decoder_backward"):
        check(next(one for one in started if one.kernel.__name__ == kernel), device)


@pytest.mark.parametrize("cell", ["gru", "gru_reset_before"])
def test_other_cells(cell: str) -> None:
    """On one device, with odd sizes, dropout masks and two layers."""
    device = next(d for d in DEVICES if d.arch == 90)
    loop = decoder_fused.make_plan(DecoderSpec(cell=cell, **(PRESETS["luong"] | {"num_layers": 2}))).loop
    assert loop is not None
    for one in launches(device, loop, torch.float16, H=100, masks=True):
        check(one, device)


@pytest.mark.parametrize("device", [d for d in DEVICES if d.arch in (90, "gfx942")], ids=lambda d: d.name)
def test_compilations_do_not_grow_with_shapes(device: Device) -> None:
    """Over 200 random (B, T, S) one decoder is compiled once forward and once backward."""
    draw, keys = random.Random(0), set()
    for _ in range(200):
        B, k = draw.randint(1, 99), draw.randint(1, 4)
        started = launches(
            device, loop_of("luong"), torch.bfloat16, B * k, B, draw.randint(1, 9), draw.randint(1, 300), 64
        )
        keys |= {(one.kernel.__name__, compile_key(one, device)) for one in {id(o.kernel): o for o in started}.values()}
    assert len(keys) == 2


def test_a_register_kept_in_memory_is_found() -> None:
    loop = "/*0010*/ MOV R1, R2 ;\n/*0020*/ {} ;\n/*0030*/ FFMA R1, R2, R3, R4 ;\n/*0040*/ @P0 BRA 0x20 ;\n"
    assert hot_spills(loop.format("LDL R1, [R2]")) == 1
    assert hot_spills(loop.format("IADD R1, R2, R3")) == 0
    waits = loop.replace("FFMA R1, R2, R3, R4", "NOP")
    assert hot_spills(waits.format("LDL R1, [R2]")) == 0


def test_a_kernel_that_is_too_large_is_found() -> None:
    """The gate itself: a device with little shared memory refuses what others take."""
    device = next(d for d in DEVICES if d.arch == 90)
    started = launches(device, loop_of("luong"), torch.bfloat16)
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        check(started[0], replace(device, shared=4096))
