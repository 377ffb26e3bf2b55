"""What the host does of a call on a GPU, without one: it never waits, which a CUDA graph's capture forbids too, and it
casts as autocast asks. Tensors are without values; kernels are noted, not started.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from fastseq.kernels import launch
from fastseq.kernels.devices import DEVICES, Device
from fastseq.kernels.launch import Launch

import fastseq
from tests.kinds import KINDS, Kind, Sizes
from tests.pretended import Gpu, reachable

H200 = next(device for device in DEVICES if device.arch == 90)
AMD = next(device for device in DEVICES if device.backend == "hip")
BF16, FP32 = torch.bfloat16, torch.float32
STATE = ("h", "c", "fed")
SIZES = Sizes(H=48, D=20, most=300)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU, as far as the library and autocast can tell."""
    reachable(monkeypatch)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with Gpu() as mode:
        yield mode


class Watched(TorchDispatchMode):
    """Notes what moves tensors between the host and the device. To ask for a value raises: there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.sent: list[str] = []  # without waiting

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor) and t.dim()]
        if len({t.device.type for t in tensors}) > 1:
            waits = not (kwargs or {}).get("non_blocking")
            (self.waits if waits else self.sent).append(str(function))
        return found


@pytest.mark.parametrize("device", [H200, AMD], ids=lambda device: device.name)
@pytest.mark.parametrize("name", KINDS)
def test_the_host_never_waits(name: str, device: Device, gpu: Gpu) -> None:
    """Forward and backward; lengths, masks and resets are on the device. Only packed batches come with numbers on the
    host, which go to the device without waiting."""
    kind, packs = Kind.of(name, SIZES, "cuda"), "packed" in name
    with launch.recording(device) as started, Watched() as watched:
        kind.step()
    assert len(started) > 1
    assert not watched.waits
    assert watched.sent == (["aten._to_copy.default"] * 4 if packs else [])
    assert not gpu.sent


def test_the_host_never_waits_for_a_model(gpu: Gpu) -> None:
    encoder = fastseq.Encoder(6, 8, bidirectional=True, embedding=nn.Embedding(11, 6))
    for layer in encoder.layers:
        layer.backend = "triton"
    decoder = fastseq.Decoder.luong(6, 8, memory_size=16, bridge="zero", backend="triton")
    model = fastseq.Seq2Seq(encoder, decoder, 11, bos_id=1, eos_id=2, pad_id=0, embedding=nn.Embedding(11, 6))
    model.to("cuda")
    src, tgt, lengths = (torch.empty(shape, dtype=torch.int64, device="cuda") for shape in ((4, 5), (4, 3), (4,)))
    with launch.recording(H200) as started, Watched() as watched:
        torch.autograd.backward(model.loss(src, tgt, lengths))
    assert {one.kernel.__name__ for one in started} >= {"decoder_forward", "decoder_backward", "backward_kernel"}
    assert not watched.waits + watched.sent + gpu.sent


@pytest.mark.parametrize("fault", ["a value", "a copy", "a tensor of numbers", "an index of the host's"])
def test_planted_faults_are_found(fault: str, gpu: Gpu) -> None:
    x, rows = torch.empty(3, 4, device="cuda"), torch.tensor([2, 0])
    with Watched() as watched:
        if fault == "a value":
            with pytest.raises(RuntimeError, match="meta"):
                bool(x.sum() > 0)
        elif fault == "a copy":
            assert rows.to(x.device).is_cuda
        elif fault == "a tensor of numbers":
            torch.tensor([1, 2], device=x.device)
        else:
            x[rows]
    assert len(watched.waits + gpu.sent) == (fault != "a value")


def dtypes(started: Sequence[Launch]) -> list[tuple[str, list[torch.dtype]]]:
    return [(one.kernel.__name__, [t.dtype for t in tree_leaves(one.args) if isinstance(t, Tensor)]) for one in started]


@pytest.mark.parametrize("name", KINDS)
def test_autocast(name: str) -> None:
    """The kernels get what a module in bf16 hands them; one step reads each weight once, and those as they are.

    Results are bf16, the state of a decoder fp32. Backward runs outside, as PyTorch advises. Gradients have the
    dtypes of what they are of.
    """
    kind, low = Kind.of(name, SIZES, "cuda"), Kind.of(name, SIZES, "cuda")
    decodes = isinstance(kind.module, fastseq.Decoder)
    if name not in ("lstm cell", "gru cell", "one step"):
        low.module.to(BF16)
        lowered = [n for n, t in low.inputs.items() if t.requires_grad and not (decodes and n in STATE)]
        low.inputs |= {n: low.inputs[n].detach().to(BF16).requires_grad_() for n in lowered}
    with launch.recording(H200) as plain:
        low.step()
    with launch.recording(H200) as started:
        with torch.autocast("cuda", BF16):
            results = kind.results()
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])
    assert dtypes(started) == dtypes(plain)
    states = len(results) - 2 if decodes else 0
    assert [t.dtype for t in results] == [BF16] * (len(results) - states) + [FP32] * states
    grads = [t.grad for t in kind.leaves if t.grad is not None]
    assert len(grads) >= len([*kind.module.parameters()])
    assert {g.dtype for g in grads} == {FP32}
