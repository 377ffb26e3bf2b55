"""How recurrences are laid out on GPUs, without one: plans, what they refuse, and that the kernels agree on sizes."""

import itertools
import re
from dataclasses import replace
from types import ModuleType

import pytest

from fastseq.cuda import devices, native, plan
from fastseq.cuda.devices import A100, B200, DEVICES, H200, RTX_4090
from fastseq.cuda.plan import CannotPlan
from fastseq.ops.cells import CELLS
from tests.emulated import emulated
from tests.oracle import GATES

__all__ = ["emulated"]  # a fixture

WAYS = ("forward", "backward")
# How many clusters of 16 a GPU has at once is its own: some of its groups of SMs have fewer than others.
FEWER = [
    replace(H200, name=f"H200 with {n} clusters of 16", clusters=(*H200.clusters[:-1], (16, n))) for n in (4, 5, 6)
]
every_plan = pytest.mark.parametrize(("cell", "way"), list(itertools.product(GATES, WAYS)))


@every_plan
@pytest.mark.parametrize("device", [*DEVICES, *FEWER], ids=lambda d: d.name)
def test_plans_fit_their_device(cell: str, way: str, device: devices.DeviceSpec) -> None:
    """Shared memory, resident blocks, pairs of a thread; every row of the batch has a group."""
    for H, B, kind, directions in itertools.product((1, 16, 40, 256, 512, 1000), (1, 7, 64, 300), native.KINDS, (1, 2)):
        try:
            p = plan.plan(cell, B, H, kind, device, directions, way)
        except CannotPlan:
            continue
        s = p.shape
        assert p.shared <= device.shared
        assert s.blocks * s.units >= H
        assert s.rows * s.units <= plan.MOST_PAIRS
        assert s.rows % plan.TILE_COLUMNS == 0 == s.units % plan.TILE_ROWS
        assert s.rows * s.groups * p.waves >= B > s.rows * s.groups * (p.waves - 1)
        if s.design == "cluster":
            assert s.groups * directions <= dict(device.clusters)[s.blocks]
        else:
            assert s.blocks * s.groups * directions <= device.units
        assert (s.blocks == 1) == (s.design == "block")
        assert bool(p.exchange) == (s.design == "grid")
        assert 0 < p.step < 100


@every_plan
def test_kernels_agree_on_sizes(emulated: ModuleType, cell: str, way: str) -> None:
    """Shared memory and pitch of plan.py are those of csrc/cuda, for every layout."""
    seen = 0
    for kind, H, B in itertools.product(native.KINDS, (5, 16, 100, 250, 520), (1, 30)):
        for p in plan.candidates(cell, B, H, kind, H200, 1, way):
            shared, pitch, _ = emulated.rnn_sizes(
                native.KINDS[kind], CELLS[cell].number, way == "forward", p.shape.native(), H
            )
            assert shared == p.shared, p
            if p.exchange:
                assert pitch == p.exchange[3], p
            seen += 1
    assert seen > 300


@pytest.mark.parametrize(
    ("H", "kind", "design"),
    [(64, "brain_half", "block"), (256, "brain_half", "cluster"), (512, "half", "cluster"), (768, "brain_half", "grid"),
     (1024, "brain_half", "grid"), (256, "tensor32", "cluster"), (1024, "tensor32", "grid"),
     (256, "full32", "cluster")],
)  # fmt: skip
def test_designs_of_an_h200(H: int, kind: str, design: str) -> None:
    """Clusters for small and middle sizes, a grid beyond."""
    assert plan.plan("lstm", 16, H, kind, H200).shape.design == design


def test_no_clusters_before_hopper() -> None:
    for H in (256, 512):
        assert plan.plan("lstm", 16, H, "half", A100).shape.design == "grid"
        assert plan.plan("lstm", 16, H, "half", B200).shape.design == "cluster"


def test_both_directions_share_the_gpu() -> None:
    one, two = (plan.plan("lstm", 64, 1024, "brain_half", H200, directions) for directions in (1, 2))
    assert one.shape.blocks * one.shape.groups <= 132
    assert two.shape.blocks * two.shape.groups * 2 <= 132


def test_backward_is_predicted_within_twice_forward() -> None:
    """The aim of docs/kernels.md, for the model at least."""
    for H in (256, 512, 768, 1024):
        forward, backward = (plan.plan("lstm", 16, H, "brain_half", H200, 1, way) for way in WAYS)
        assert backward.step <= 2 * forward.step


@pytest.mark.parametrize(
    ("H", "kind", "device"), [(4096, "half", H200), (1500, "tensor32", H200), (1024, "full32", RTX_4090)]
)
def test_what_does_not_fit_is_refused(H: int, kind: str, device: devices.DeviceSpec) -> None:
    with pytest.raises(CannotPlan, match=re.escape(f"hidden_size={H}")) as refused:
        plan.plan("lstm", 8, H, kind, device)
    assert device.name in str(refused.value)
    assert f"{device.shared // 1024} KiB" in str(refused.value)


def test_a_plan_says_what_it_is() -> None:
    text = str(plan.plan("lstm", 16, 512, "brain_half", H200))
    assert re.fullmatch(
        r"forward: a cluster of 16 blocks of 32 units, 8 rows a group, 2 x 1 groups, \d+ KiB of shared memory a "
        r"block, 8 tiles a warp in registers; predicted \d\.\d\d us a step",
        text,
    )
