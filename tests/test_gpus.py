"""What is told of the GPUs: by `python -m fastseq`, and beside measurements; here of GPUs that are made up."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import machine
from fastseq import __main__ as report
from fastseq import _gpus, crossover

FOUND = SimpleNamespace(
    name="Some H200", major=9, minor=0, total_memory=141 << 30, shared_memory_per_block_optin=232448,
    multi_processor_count=132, gcnArchName="gfx942:sramecc+",
)  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a driver of NVIDIA's."""
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC version: 13.3.0\n")
    monkeypatch.setattr(_gpus, "DRIVER", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 2),
        ("current_device", lambda: 0),
        ("get_device_properties", lambda index: FOUND),
        ("get_device_name", lambda index: FOUND.name),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    _gpus.gpu_name.cache_clear()
    yield
    _gpus.gpu_name.cache_clear()


LINE = "Some H200, sm_90, 141 GiB, 227 KiB of shared memory a block, 132 multiprocessors"


@pytest.mark.usefixtures("two_gpus")
def test_the_machine_report_names_them() -> None:
    said = report.report()
    for index in (0, 1):
        assert f"GPU {index}        {LINE}" in said
    assert f"driver 580.65.06, CUDA 13.0, Triton {_gpus.triton_version()}" in said
    assert "No crossover was measured on this machine" in said


def test_the_machine_report_tells_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "interprets", lambda: True)
    monkeypatch.setattr(report.fastseq, "backends", lambda: {"cpu": None, "triton": None})
    said = report.report()
    assert "  triton     available (interpreted on CPU tensors, very slowly: TRITON_INTERPRET is set)\n" in said
    assert "  cpu        available\n" in said


@pytest.mark.usefixtures("two_gpus")
def test_the_machine_report_tells_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    here = crossover.Rule("triton", "twice as fast", device="cuda", machine="Some H200")
    monkeypatch.setattr(crossover, "RULES", (here, here._replace(machine="Another", because="not here")))
    said = report.report()
    assert "triton     on a GPU, twice as fast" in said
    assert "not here" not in said
    assert "No crossover was measured" not in said


@pytest.mark.usefixtures("two_gpus")
def test_an_amd_gpu_has_an_architecture_and_no_driver_of_nvidias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(_gpus, "DRIVER", tmp_path / "absent")
    assert "gfx942" in _gpus.told(0)
    assert _gpus.software().startswith("driver unknown, ROCm 7.0, Triton ")


def test_why_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU alone" in str(_gpus.no_gpu())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_gpus, "DRIVER", tmp_path / "version")
    assert "no NVIDIA driver is loaded" in str(_gpus.no_gpu())
    (tmp_path / "version").write_text("NVRM version: 580.65.06")
    assert "driver 580.65.06" in str(_gpus.no_gpu())
    assert _gpus.gpu_name.__wrapped__(0) == ""


@pytest.mark.usefixtures("two_gpus")
def test_a_measurement_names_its_gpu_and_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1755 MHz, 1980 MHz, 3201 MHz\n", "")

    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", answer)
    found = machine.describe()
    assert found["gpu"] == LINE
    assert found["clocks"].endswith(": 1755 MHz, 1980 MHz, 3201 MHz")
    assert "cudnn.allow_tf32" in found["tf32"]
    assert asked[0][0] == "nvidia-smi"
    assert "cuDNN" in found["software"]
