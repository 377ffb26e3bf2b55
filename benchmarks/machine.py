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
from fastseq import _native

__all__ = ["describe"]


def describe() -> dict[str, str]:
    """Names and versions, as text."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": f"{_cpu()}, {os.cpu_count()} logical",
        "isa": "none" if _native.C is None else _native.C.isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fastseq": f"{fastseq.__version__} {_revision()}".strip(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


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
