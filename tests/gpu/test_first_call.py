"""Compilation on a GPU: few, quick, and none for another batch, length or source."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq
from tests.gpu.conftest import needs_gpu
from tests.gpu.place import BACKEND, DEVICE, REHEARSES

ROOT = Path(__file__).parents[2]
MOST, SHAPES, FIRST_S = 4, 8 if REHEARSES else 200, 15.0


def decoder() -> Callable[[int, int, int], Any]:
    module = fastseq.Decoder.bahdanau(16, 32, memory_size=24, bridge="zero", backend=BACKEND).to(DEVICE)

    def call(B: int, T: int, S: int) -> Any:
        memory = fastseq.Memory(torch.randn(B, S, 24, device=DEVICE))
        return module(torch.randn(B, T, 16, device=DEVICE), memory).output

    return call


def layer() -> Callable[[int, int, int], Any]:
    module = fastseq.LSTM(16, 32, bidirectional=True, backend=BACKEND).to(DEVICE)
    return lambda B, T, S: module(torch.randn(T, B, 16, device=DEVICE))[0]


def attention() -> Callable[[int, int, int], Any]:
    module = fastseq.Attention(16, 24, 32, backend=BACKEND).to(DEVICE)

    def call(B: int, T: int, S: int) -> Any:
        keys = module.prepare(fastseq.Memory(torch.randn(B, S, 24, device=DEVICE)))
        return module(torch.randn(B, T, 16, device=DEVICE), keys)[0]

    return call


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was compiled, or loaded from the cache as if it had been."""
    triton = pytest.importorskip("triton")
    counted: Counter[str] = Counter()

    def listener(*, metadata: dict[str, Any], **_: Any) -> None:
        counted[metadata["name"]] += 1

    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    return counted


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("build", [decoder, layer, attention])
def test_shapes_of_data_compile_nothing(build: Any, training: bool, compilations: Counter[str]) -> None:
    """At most 4 compilations of a module over 200 shapes: sizes of data are run-time values."""
    call, draw = build(), random.Random(1)
    for _ in range(SHAPES):
        shape = draw.randint(1, 70), draw.randint(1, 30), draw.randint(1, 60)
        with torch.set_grad_enabled(training):
            out = call(*shape)
        if training:
            out.square().sum().backward()
    assert compilations.total() <= MOST, compilations
    assert REHEARSES or compilations


FIRST = """
import time, torch, fastseq
device, backend, kind = {device!r}, {backend!r}, {kind!r}
torch.zeros(1, device=device)
if kind == "decoder":
    module = fastseq.Decoder.luong(64, 128, memory_size=128, bridge="zero", backend=backend).to(device)
    given = torch.randn(8, 12, 64, device=device), fastseq.Memory(torch.randn(8, 20, 128, device=device))
else:
    module = getattr(fastseq, kind)(64, 128, backend=backend).to(device)
    given = (torch.randn(12, 8, 64, device=device),)
begin = time.perf_counter()
out = module(*given)[0]
out.sum().backward()
if device == "cuda":
    torch.cuda.synchronize()
print("first", time.perf_counter() - begin)
"""


@pytest.mark.parametrize("kind", ["decoder", "LSTM", "GRU"])
def test_the_first_call_is_quick(kind: str, tmp_path: Path) -> None:
    """Forward and backward with nothing compiled before."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    code = FIRST.format(device=DEVICE, backend=BACKEND, kind=kind)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"first ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) <= FIRST_S


@needs_gpu
def test_warmup_leaves_nothing_to_compile(compilations: Counter[str]) -> None:
    module = fastseq.LSTM(24, 40, backend=BACKEND).to(DEVICE)
    fastseq.warmup(module, torch.randn(7, 5, 24, device=DEVICE))
    compilations.clear()
    for T, B in ((7, 5), (30, 3), (2, 64)):
        module(torch.randn(T, B, 24, device=DEVICE))[0].sum().backward()
    assert not compilations
