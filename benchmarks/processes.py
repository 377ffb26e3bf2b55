"""Measurements that need a process of their own: peak memory of a call, and the time that an import takes."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from .cases import Case
from .kinds import case_from_dict, case_to_dict, draw
from .peers import PEERS

__all__ = ["import_seconds", "memory_unavailable", "peak_bytes"]

ROOT = Path(__file__).parents[1]
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
IMPORT = "import time, torch; begin = time.perf_counter(); import fastseq; print(time.perf_counter() - begin)"


def memory_unavailable() -> str | None:
    return None if CLEAR_REFS.exists() else "peak memory of one call is read from Linux's /proc"


def peak_bytes(case: Case, peer: str, threads: int) -> float:
    """Bytes of resident memory that one call of a fresh program adds at its peak."""
    request = json.dumps({"case": case_to_dict(case), "peer": peer, "threads": threads})
    return float(_child("-m", "benchmarks.processes", request))


def import_seconds() -> float:
    """What `import fastseq` takes after `import torch`."""
    return float(_child("-c", IMPORT))


def _child(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def _peak_here(case: Case, peer: str, threads: int) -> int:
    torch.set_num_threads(threads)
    build, grad = PEERS[peer].build, case.mode == "train"
    with torch.set_grad_enabled(grad):
        build(draw(case.small())).step()  # libraries loaded, threads started
        program = build(draw(case))
        CLEAR_REFS.write_text("5")  # the peak starts from here
        before = _kib("VmRSS")
        kept = program.step()
    del kept
    return (_kib("VmHWM") - before) * 1024


def _kib(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(_peak_here(case_from_dict(asked["case"]), asked["peer"], asked["threads"]))
