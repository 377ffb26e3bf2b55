"""`gpu-build`: a tree to run everything from, and that pip can install the project, both without network.

The checkout stays as it is. A copy of it lies in the working folder; CMake puts the native module there, and `kernels`
is copied to where `fastseq.kernels` is looked for: tests and benchmarks run there as they do in a developer's checkout.
"""

import hashlib
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .commands import Deadline, Record

__all__ = ["ROOT", "TREE", "build", "built", "environment"]

ROOT = Path(__file__).parents[2]
WORK = Path(os.environ.get("FASTSEQ_GPU_WORK") or Path(tempfile.gettempdir()) / f"fastseq-gpu-{os.getuid()}")
TREE, SITE, STAMP = WORK / "tree", WORK / "site", WORK / "built"
PARTS = (  # of a checkout: results, environments and the like may lie beside them
    "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "benchmarks", "csrc",
    "docs", "examples", "fastseq", "kernels", "pyproject.toml", "setup.py", "tests",
)  # fmt: skip
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so", ".benchmarks", ".hypothesis"
)
TOOLS = {  # name: command
    "gpu": ["nvidia-smi"],
    "gpu-details": ["nvidia-smi", "-q"],
    "nvcc": ["nvcc", "--version"],
    "compiler": ["c++", "--version"],
    "packages": [sys.executable, "-m", "pip", "list", "--disable-pip-version-check"],
}


def build(record: Record, deadline: Deadline, skip_install: bool = False) -> None:
    """Copy, build, and see that the package finds its backends; then whether pip installs it."""
    for name, command in TOOLS.items():
        record.run(name, command, min(20.0, deadline.left), ROOT)  # what is absent is of interest too
    for folder in (TREE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    STAMP.unlink(missing_ok=True)
    TREE.mkdir(parents=True)
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, TREE / part, ignore=LEFT_OUT, symlinks=True)
        else:
            shutil.copy2(ROOT / part, TREE / part)
    at = TREE / "fastseq" / "kernels"
    if at.is_symlink():  # of a checkout that runs without an install
        at.unlink()
    shutil.copytree(TREE / "kernels", at, dirs_exist_ok=True)
    record.status, record.reason = _native(record, deadline)
    STAMP.write_text(fingerprint())
    record.run("machine", [sys.executable, "-m", "fastseq"], deadline.left, TREE, environment(record))
    record.found["machine"] = (record.logs / "machine.log").read_text()
    smoke = record.run("first-call", [sys.executable, "-c", SMOKE], deadline.left, TREE, environment(record))
    record.found["first_call"] = smoke.tail
    if not smoke.ok:
        record.status, record.reason = "failed", "the first call of a kernel failed, see first-call.log"
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--upgrade", "--target", str(SITE), str(TREE)]  # fmt: skip
    without = {"FASTSEQ_CUDA": "0"}  # they were built just now
    if not skip_install and not record.run("install", install, deadline.left, WORK, without).ok:
        record.status, record.reason = "failed", "pip could not install the tree, see install.log"


def _native(record: Record, deadline: Deadline) -> tuple[str, str]:
    """The native module into the tree: a stage's status and its reason. Without it everything else goes on."""
    made = "cmake-configure", "cmake-build"
    pybind = "import pybind11; print(pybind11.get_cmake_dir())"
    if not record.run("pybind11", [sys.executable, "-c", pybind], 20.0, TREE).ok:
        return "failed", "there is no pybind11, so no native module"
    options = {
        "CMAKE_MAKE_PROGRAM": _tool("ninja", "BIN_DIR"),
        "FASTSEQ_OUTPUT_DIR": TREE / "fastseq",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": record.steps[-1].tail.strip(),
    }
    cmake, where = _tool("cmake", "CMAKE_BIN_DIR"), str(WORK / "native")
    configure = [
        cmake,
        "--fresh",
        "-S",
        str(TREE),
        "-B",
        where,
        "-G",
        "Ninja",
        *(f"-D{n}={v}" for n, v in options.items()),
    ]
    for name, command in zip(made, (configure, [cmake, "--build", where, "--target", "_C"]), strict=True):
        if not record.run(name, command, deadline.left, TREE).ok:
            return "failed", f"the native module was not built, see {name}.log; everything goes on without it"
    if shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin") is None:
        record.found["cuda_module"] = "there is no nvcc, so no CUDA kernels"
        return "running", ""
    with_cuda = [cmake, "-DFASTSEQ_CUDA=ON", where], [cmake, "--build", where, "--target", "_cuda"]
    for name, command in zip(("cuda-configure", "cuda-build"), with_cuda, strict=True):
        if not record.run(name, command, deadline.left, TREE).ok:
            return "failed", f"the CUDA kernels were not built, see {name}.log; everything goes on without them"
    record.found["cuda_module"] = "built"
    return "running", ""


def _tool(name: str, folder: str) -> str:
    """Path of a build tool: from its wheel, or else on PATH, as setup.py looks for it."""
    try:
        beside = getattr(importlib.import_module(name), folder)
    except ImportError:
        beside = ""
    return shutil.which(name, path=beside) or shutil.which(name) or name


SMOKE = """
import itertools, time, torch, fastseq
device = "cuda" if torch.cuda.is_available() else "cpu"
backends = [b for b in ("triton", "cuda") if fastseq.backends()[b] is None] or ["auto"]
for backend, name in itertools.product(backends, ("LSTM", "GRU")):
    begin = time.perf_counter()
    layer = getattr(fastseq, name)(8, 16, backend=backend, device=device)
    layer(torch.randn(5, 3, 8, device=device))[0].sum().backward()
    print(name, backend, device, f"{time.perf_counter() - begin:.2f} s", float(layer.weight_hh_l0.grad.norm()))
"""


def built(record: Record, deadline: Deadline) -> bool:
    """Whether the tree is that of this checkout; a stage called by itself builds it first."""
    for compiled in _caches(record):
        shutil.rmtree(compiled, ignore_errors=True)
    if not STAMP.exists() or STAMP.read_text() != fingerprint():
        build(record, deadline, skip_install=True)
    return STAMP.exists()


def environment(record: Record) -> dict[str, str]:
    """Of commands in the tree. Every stage compiles anew, so that compilation is timed and tested."""
    triton, inductor = map(str, _caches(record))
    return {"PYTHONPATH": str(TREE), "TRITON_CACHE_DIR": triton, "TORCHINDUCTOR_CACHE_DIR": inductor}


def _caches(record: Record) -> tuple[Path, Path]:
    return WORK / "triton" / record.stage, WORK / "inductor" / record.stage


def fingerprint() -> str:
    """Of the files that the copy is made of."""
    found = hashlib.sha256()
    for folder, names, files in (walked for part in PARTS for walked in _walk(ROOT / part)):
        ignored = LEFT_OUT(str(folder), [*names, *files])
        names[:] = sorted(n for n in names if n not in ignored and not (folder / n).is_symlink())
        for file in (folder / name for name in sorted(set(files) - ignored)):
            found.update(f"{file.relative_to(ROOT)} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return found.hexdigest()


def _walk(part: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk; of a file, that file alone."""
    if part.is_dir():
        yield from ((Path(folder), names, files) for folder, names, files in os.walk(part))
    else:
        yield part.parent, [], [part.name]
