"""The CUDA kernels, emulated on a CPU: the module that `make emulated` builds, in the place of the real one."""

import importlib.util
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastseq.cuda import devices, native, plan, rnn
from tests.guards import guard_bands

__all__ = ["build", "chosen", "emulated"]

BUILT = Path(__file__).parents[1] / "build" / "native"


@lru_cache(maxsize=1)
def build() -> ModuleType:
    """The module; nothing is left out where it was not built."""
    found = sorted(BUILT.glob("_emulated.*"))
    assert found, f"no _emulated module in {BUILT}; run `make emulated`"
    spec = importlib.util.spec_from_file_location("_emulated", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("_emulated", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """fastseq's CUDA kernels run on CPU tensors, every block and thread in order.

    The products around them run without oneDNN, which no GPU has: with AMX its bf16 product of an odd number of
    features takes in one of the next row, times 0, and so the NaN that stands behind a row's length.
    A kernel that writes outside of a tensor fails the test when it ends.
    """
    module = build()
    monkeypatch.setattr(native, "C", module)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    module.seed_schedule(0)
    with guard_bands():
        yield module
    module.seed_schedule(0)


@contextmanager
def chosen(monkeypatch: pytest.MonkeyPatch, design: str, seed: int = 0, *, kept: bool = False) -> Iterator[list[Any]]:
    """Layers are laid out in `design`, otherwise at random; the list has the plans that ran.

    kept: only layouts with weights in registers.
    """
    draw, ran = random.Random(seed), []

    def pick(cell: str, batch: Any, x: Any, hidden: int, directions: int, way: str, tf32: str) -> plan.RnnPlan:
        kind = native.kind_of(x.dtype, rnn.rnn_gpu.tf32_flag(tf32))
        every = [
            p
            for p in plan.candidates(cell, max(batch.B, 1), hidden, kind, devices.H200, directions, way)
            if p.shape.design == design and (p.shape.kept > 0 or not kept)
        ]
        one = draw.choice(every)
        groups = draw.randint(1, min(one.shape.groups, 3))  # fewer than there are rows for: each takes several
        exchange = (groups * directions, *one.exchange[1:]) if one.exchange else ()
        ran.append(replace(one, shape=replace(one.shape, groups=groups), exchange=exchange))
        return ran[-1]

    with monkeypatch.context() as patch:
        patch.setattr(rnn, "_plan", pick)
        yield ran
