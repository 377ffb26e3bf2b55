"""How often the kernels of a module are compiled while data of ever new sizes pass through it: counted, not compiled.

The modules are whole, on tensors without values that stand for an H200's; what they launch there is only noted.
"""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from fastseq.kernels import launch
from fastseq.kernels.devices import DEVICES
from fastseq.kernels.launch import Launch

import fastseq
from tests.compiled import compile_key
from tests.kinds import KINDS, Kind, Sizes
from tests.pretended import Gpu, reachable

H200 = next(device for device in DEVICES if device.name == "H200")
MOST, SHAPES = 4, 200
LAYERS_ABOVE = {"gnmt": 1}  # of its 5 in training two are those of the layers above the loop


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What calls would start on the GPU."""
    reachable(monkeypatch)
    with Gpu(), launch.recording(H200) as launches:
        yield launches


def compiled(noted: list[Launch]) -> set[tuple[str, str]]:
    """Of what was noted since the last time."""
    found = {(f"{one.kernel.__module__}.{one.kernel.__name__}", compile_key(one, H200)) for one in noted}
    noted.clear()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", KINDS)
def test_at_most_four(name: str, training: bool, noted: list[Launch]) -> None:
    """A module, over 200 shapes of B, T and S, those of 1 and of multiples of 16 among them."""
    draw, keys = random.Random(0), set()
    for _ in range(SHAPES):
        B, T, S = (draw.choice((1, 2, 16, draw.randint(1, 999))) for _ in range(3))
        kind = Kind.of(name, Sizes(B=B, T=T, S=S, most=300), "cuda")
        kind.module.train(training)
        with torch.set_grad_enabled(training):
            results = kind.results()
        if training:
            torch.autograd.backward(results, [torch.empty_like(t) for t in results])
        keys |= compiled(noted)
    assert 0 < len(keys) <= MOST + (LAYERS_ABOVE.get(name, 0) if training else 0), Counter(kernel for kernel, _ in keys)


@pytest.mark.parametrize("name", ["attention, additive", "attention, general"])
def test_attention_in_inference_is_that_of_training(name: str, noted: list[Launch]) -> None:
    """Its forward kernels, compiled once for both, though only training stores the weights."""
    kind = Kind.of(name, Sizes(), "cuda")
    keys = kind.module.prepare(fastseq.Memory(kind.inputs["memory"], kind.inputs["mask"]))
    forward, stores = [], []
    for training in (True, False):
        with torch.set_grad_enabled(training):
            kind.module(kind.inputs["query"], keys)
        stores.append(dict(zip(noted[-1].kernel.arg_names, noted[-1].args, strict=False))["saved"])
        forward.append(compiled(noted))
    assert stores == [1, 0]
    assert forward[0] == forward[1]
    assert len(forward[0]) == 2


def test_a_size_that_is_a_constant_is_counted(noted: list[Launch]) -> None:
    """The count itself: layers of five widths are five compilations, forward and backward."""
    for hidden in range(20, 25):
        kind = Kind.of("lstm", Sizes(H=hidden), "cuda")
        results = kind.results()
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])
    assert len(compiled(noted)) == 10
