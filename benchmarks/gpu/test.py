"""`gpu-test`: the tests of tests/gpu, file by file, then compute-sanitizer on a small case, then the CPU's suite."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .build import ROOT, TREE, built, environment
from .commands import Deadline, Record

__all__ = ["FILES", "OF_CUDA", "TRITONS", "test"]

FILES = {  # seconds, after which a file's other tests are skipped; most important first
    # Each has a process of its own, since a fault poisons the one it happens in.
    "test_decoder": 85.0,
    "test_attention": 45.0,
    "test_layers": 65.0,
    "test_norm": 40.0,
    "test_calls": 30.0,
    "test_first_call": 50.0,
    "test_streams": 35.0,
    "test_generate": 25.0,
    "test_large": 20.0,
    "test_repeats": 25.0,
    "test_presets": 90.0,
}
OF_CUDA = {  # again, on those kernels, which compile nothing
    "test_layers": 45.0,
    "test_decoder": 45.0,
    "test_generate": 20.0,
    "test_streams": 25.0,
    "test_calls": 20.0,
    "test_presets": 30.0,
    "test_repeats": 25.0,
    "test_large": 15.0,
}
TRITONS = {  # why there is nothing in them for the CUDA kernels
    "test_attention": "attention of all queries at once is Triton's alone",
    "test_norm": "layer normalisation is not in the CUDA kernels",
    "test_first_call": "what a call compiles is Triton's; CUDA kernels are compiled when the package is installed",
}
GRACE_S = 30.0  # for the test that runs when they are over
SANITIZER_S = 60.0
TOOLS = ("memcheck", "racecheck", "synccheck")


def test(record: Record, deadline: Deadline, rehearse: bool) -> None:
    """Every outcome is in OUT/test.jsonl as soon as it is known."""
    if not built(record, deadline):
        record.status, record.reason = "failed", record.reason or "nothing was built"
        return
    lines = record.out / "test.jsonl"
    lines.unlink(missing_ok=True)
    env = environment(record) | {"FASTSEQ_GPU_TESTS": str(lines)} | ({"FASTSEQ_REHEARSE": "1"} if rehearse else {})
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider"]
    backends = ["cuda", "triton"] if has_cuda_module() else ["triton"]  # the newer kernels first
    for backend in backends:
        for name, seconds in (OF_CUDA if backend == "cuda" else FILES).items():
            if deadline.left > 5:
                soft = {"FASTSEQ_GPU_SECONDS": f"{min(seconds, deadline.left - 5):.0f}", "FASTSEQ_GPU_BACKEND": backend}
                command = [*pytest, f"tests/gpu/{name}.py"]
                limit = min(seconds + GRACE_S, deadline.left)
                record.run(name if backend == "triton" else f"{backend}-{name}", command, limit, TREE, env | soft)
            count(record, lines)
    if not rehearse:
        for backend in backends:
            _sanitize(record, deadline, env | {"FASTSEQ_GPU_BACKEND": backend}, backend)
        if deadline.left > 20:
            rest = ["tests", "--ignore=tests/gpu", "--ignore=tests/interpreted", "-m", "not slow", "--maxfail=50"]
            rest.append("--continue-on-collection-errors")  # what it needs may be absent here
            record.run("cpu-suite", [*pytest, *rest], deadline.left, TREE, env)
            count(record, lines)
    ended = [step.name for step in record.steps if step.rc is None and step.name != "cpu-suite"]
    failed = sum(name.startswith("tests/gpu") for name in record.found["failed"])  # the rest is told of, no more
    if failed or ended or not record.found["outcomes"].get("passed"):
        record.status = "failed"
        record.reason = f"{failed} tests of tests/gpu failed" + (
            f"; ended at their limit: {', '.join(ended)}" if ended else ""
        )


def count(record: Record, lines: Path) -> None:
    """What became of the tests so far."""
    outcomes: list[dict[str, Any]] = (
        [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    )
    record.found["outcomes"] = dict(Counter(line["outcome"] for line in outcomes))
    record.found["failed"] = [line["test"] for line in outcomes if line["outcome"] == "failed"]
    record.save()


def has_cuda_module() -> bool:
    """Whether the CUDA kernels are in the tree."""
    return any((TREE / "fastseq").glob("_cuda.*.so"))


def _sanitize(record: Record, deadline: Deadline, env: dict[str, str], backend: str) -> None:
    """compute-sanitizer, where there is one and it works here: on a program without kernels of ours first."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    probe = [
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-c",
        "import torch; torch.ones(8, device='cuda').sum().item()",
    ]
    if not record.run(f"sanitizer-probe-{backend}", probe, min(SANITIZER_S, deadline.left), ROOT, env).ok:
        record.found["sanitizer"] = "it is absent, or does not work on this machine: see its log"
        return
    found = {}
    for name in TOOLS:
        case = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.sanitized"]
        step = record.run(f"sanitizer-{backend}-{name}", case, min(SANITIZER_S, deadline.left), TREE, env)
        found[name] = (
            "clean" if step.ok else "ended at its limit" if step.rc is None else "errors, or it failed: see its log"
        )
        if step.rc == 9:
            record.status, record.reason = "failed", f"compute-sanitizer {name} found errors on {backend}"
    record.found[f"sanitizer_{backend}"] = found
