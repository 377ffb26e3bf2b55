"""What a measurement was taken on."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import fastseq
from fastseq import _cpus, _gpus, _native

from .ceilings import caches

__all__ = ["describe"]

GOVERNED = ("scaling_governor", "scaling_max_freq", "boost")


def describe() -> dict[str, str]:
    """Names and versions, as text."""
    gpu = {} if _gpus.no_gpu() else _gpu()
    return gpu | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": f"{_cpus.model()}, {os.cpu_count()} logical",
        "isa": "none" if _native.C is None else _native.C.isa(),
        "cpu clocks": _cpu_clocks(),
        "caches": " ".join(f"{size // 1024} KiB" for size in caches()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fastseq": f"{fastseq.__version__} {_revision()}".strip(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
    }


def _gpu() -> dict[str, str]:
    """The current GPU, what drives it, its clocks now, and whether TF32 is allowed where fp32 is asked for."""
    backends = torch.backends
    return {
        "gpu": _gpus.told(torch.cuda.current_device()),
        "software": f"{_gpus.software()}, cuDNN {backends.cudnn.version()}",
        "clocks": _clocks(),
        "tf32": f"layers (cudnn.allow_tf32) {backends.cudnn.allow_tf32}, "
        f"all else (cuda.matmul.allow_tf32) {backends.cuda.matmul.allow_tf32}",
    }


def _clocks() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    asked = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,persistence_mode"
    done = subprocess.run([tool, f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True)
    return f"{asked}: {done.stdout.strip()}" if done.returncode == 0 else f"unknown: {done.stderr.strip()}"


def _cpu_clocks() -> str:
    """What there is to know of them: virtual machines tell little."""
    info, policy = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cpufreq")
    lines = info.read_text().splitlines() if info.exists() else []
    now = [f"{float(line.split(':')[1]):.0f}" for line in lines if line.startswith("cpu MHz")]
    known = {name: (policy / name).read_text().strip() for name in GOVERNED if (policy / name).exists()}
    governed = ", ".join(f"{name} {value}" for name, value in known.items())
    return f"MHz {' '.join(now) or 'unknown'}; {governed or 'no governor is seen'}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _revision() -> str:
    """The commit, with + where the tree differs from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
