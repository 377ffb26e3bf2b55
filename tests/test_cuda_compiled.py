"""The CUDA kernels as nvcc compiles them for every architecture: registers, spilled memory, instructions of the loop.

Reads the objects of `make strict`. cuda_resources.json is a snapshot of what nvcc gave: after a change that is meant to
move it, FASTSEQ_WRITE_SNAPSHOT=1 writes it anew, and the difference belongs into the commit.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import pytest

from tests.nvcc import NO_NVCC, NVCC

triton = pytest.importorskip("triton")  # whose wheel has cuobjdump

ROOT = Path(__file__).parents[1]
OBJECTS = ROOT / "build" / "native" / "csrc" / "cuda"
SNAPSHOT = ROOT / "tests" / "cuda_resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BUILT = ROOT / "fastseq"
ARCHS = ("sm_80", "sm_90", "sm_100")
pytestmark = pytest.mark.skipif(NVCC is None, reason=NO_NVCC)

# Of all steps, in one launch.
LOOPS = ("rnn_forward<", "rnn_backward<", "decoder_forward<", "decoder_backward<", "decoder_search<")

Usage = dict[str, dict[str, list[int]]]  # architecture -> kernel -> [registers, bytes of stack]


def tool(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def objects() -> list[Path]:
    found = sorted(OBJECTS.glob("*.o"))
    assert found, f"no objects in {OBJECTS}; run `make strict`"
    return [path for path in found if path.stem != "host"]


@lru_cache(maxsize=4096)
def named(mangled: str) -> str:
    """As it stands in the source: rnn_forward<Full32, float, Lstm, Exact, 0, 1>."""
    text = tool("c++filt", mangled).strip()
    text = re.sub(r"fastseq::(cuda::)?(\(anonymous namespace\)::)?|^void ", "", text)
    text = re.sub(r"Halves<Bf16, &?\(?mma_bf16.*?\)?>(?=,)", "BrainHalf", text)
    text = re.sub(r"Halves<Fp16, &?\(?mma_fp16.*?\)?>(?=,)", "Half", text)
    return text.partition("(")[0].replace(" >", ">")


@lru_cache(maxsize=1)
def usage() -> Usage:
    """Of every kernel, for every architecture that has code of its own."""
    found: Usage = {}
    for path in objects():
        arch = ""
        function = ""
        for line in tool(CUOBJDUMP, "-res-usage", path).splitlines():
            if line.startswith("arch = "):
                arch = line.split()[-1].removesuffix("a")
            if match := re.match(r"\s*Function (\S+):", line):
                function = named(match[1])
            if match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
                registers, stack, local = map(int, match.groups())
                found.setdefault(arch, {})[function] = [registers, stack + local]
    return found


@cache
def instructions(path: Path, arch: str) -> dict[str, list[str]]:
    """The machine code of every kernel of an object."""
    found: dict[str, list[str]] = {}
    function = ""
    for line in tool(CUOBJDUMP, "-sass", "-arch", arch, path).splitlines():
        if match := re.match(r"\s+Function : (\S+)", line):
            function = named(match[1])
            found[function] = []
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found[function].append(match[1])
    return found


def kernels(arch: str) -> Iterator[tuple[str, list[str]]]:
    for path in objects():
        yield from instructions(path, arch).items()


def count(code: list[str], name: str) -> int:
    return sum(re.match(rf"(@!?U?P\w+ )?{name}\b", line) is not None for line in code)


@pytest.fixture
def module() -> Path:
    found = sorted(BUILT.glob("_cuda.*.so"))
    if not found:
        pytest.skip("the CUDA module was not built: no fastseq/_cuda*.so")
    return found[0]


def test_the_module_has_code_of_every_architecture(module: Path) -> None:
    """And PTX, which a driver compiles for GPUs that came later; all of each object."""
    told = re.findall(r"^Fatbin (elf|ptx) code:\n=+\narch = (sm_\w+)$", tool(CUOBJDUMP, module), re.M)
    numbers = {kind: told.count(kind) for kind in told}
    assert {*numbers} == {("ptx", "sm_90"), ("elf", "sm_80"), ("elf", "sm_90a"), ("elf", "sm_100")}
    assert len({*numbers.values()}) == 1, numbers
    ptx = re.findall(r"^\.target (\w+)", tool(CUOBJDUMP, "-ptx", module), re.M)
    assert {*ptx} == {"sm_90"}  # not sm_90a, which no other GPU takes


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not here")
def test_the_module_needs_no_cuda_runtime(module: Path) -> None:
    """That is in it, so that it loads beside whichever one PyTorch brought."""
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.*)\]", tool("readelf", "-d", "-W", module))
    assert needed
    assert not [name for name in needed if re.match(r"lib(cuda|nv)", name)]


def test_every_architecture_has_every_kernel() -> None:
    assert set(usage()) == set(ARCHS)
    names = {arch: set(of) for arch, of in usage().items()}
    assert names["sm_80"] == names["sm_90"] == names["sm_100"]
    for start in (*LOOPS, "rnn_step<"):
        kinds = {name.split("<")[1].split(",")[0] for name in names["sm_90"] if name.startswith(start)}
        assert kinds == {"Full32", "Tensor32", "BrainHalf", "Half"}, start


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(arch: str) -> None:
    """Registers that do not suffice go to memory: none do."""
    assert not {name: stack for name, (_, stack) in usage()[arch].items() if stack}


def test_resources_are_those_of_the_snapshot() -> None:
    version = re.search(r"release (\S+),", tool(NVCC, "--version"))
    assert version is not None
    now = {"nvcc": version[1], "registers and bytes of stack": usage()}
    if os.environ.get("FASTSEQ_WRITE_SNAPSHOT") == "1":
        SNAPSHOT.write_text(
            re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(now, indent=1, sort_keys=True)) + "\n"
        )
    then = json.loads(SNAPSHOT.read_text())
    if then["nvcc"] != version[1]:
        pytest.skip(f"nvcc {then['nvcc']} is not here, whose registers the snapshot has; this one is {version[1]}")
    assert now == then


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_products_run_on_tensor_cores(arch: str) -> None:
    """And between two of their instructions nothing goes to or comes from spilled memory."""
    for name, code in kernels(arch):
        if not name.startswith((*LOOPS, "rnn_step<")):
            continue
        of_full = "<Full32" in name
        assert (count(code, r"HMMA[.\w]*") > 0) != of_full, name
        places = [i for i, line in enumerate(code) if "HMMA" in line or (of_full and "FFMA" in line)]
        inner = code[places[0] : places[-1]]
        assert not [line for line in inner if re.search(r"\b(LDL|STL)\b", line)], name


def test_weights_in_registers_are_not_loaded_in_the_loop() -> None:
    """Of a kernel that keeps 8 tiles of 4 gates, 32 products stand in a row with only states loaded between them."""
    for name, code in kernels("sm_90a"):
        if re.match(r"rnn_forward<(Tensor32|BrainHalf|Half), .*Lstm, .*, 8, 1>", name):
            lines = [line for line in code if re.match(r"(HMMA|LDS|LDSM|LDG|LD\b)", line)]
            runs = "".join(
                "h" if line.startswith("HMMA") else "s" if line.startswith("LDS ") else "x" for line in lines
            )
            longest = max(re.findall(r"[hs]+", runs), key=lambda run: run.count("h"))
            assert longest.count("h") >= 32, (name, longest)


def test_clusters_meet_in_hardware() -> None:
    """On Hopper; before it a cluster's barrier, and what is sent between its blocks, compile to nothing."""
    for name, code in kernels("sm_90a"):
        if name.startswith(LOOPS):
            assert count(code, "UCGABAR_ARV") > 0, name
            assert count(code, "UCGABAR_WAIT") > 0, name
    for _, code in kernels("sm_80"):
        assert not count(code, r"(UCGABAR|SYNCS|STAS)[.\w]*")


def steps(code: list[str]) -> list[str]:
    """The innermost loop in which messages are both awaited and sent. An instruction has 16 bytes."""
    waits, sends = ({i for i, line in enumerate(code) if mark in line} for mark in ("SYNCS.PHASECHK", "STAS"))
    branches = ((i, re.search(r"\bBRA 0x([0-9a-f]+)", line)) for i, line in enumerate(code))
    loops = [range(int(match[1], 16) // 16, i + 1) for i, match in branches if match]
    return [code[i] for i in min((loop for loop in loops if waits & {*loop} and sends & {*loop}), key=len)]


def test_clusters_send_messages_between_steps() -> None:
    """In a layer's loop there is no barrier of the cluster, and the only fence is that of a grid's counter.

    So with a cluster no step waits until what the one before stored in global memory has arrived there.
    """
    seen = 0
    for name, code in kernels("sm_90a"):
        if not name.startswith(("rnn_forward<", "rnn_backward<")):
            continue
        loop = steps(code)
        assert count(loop, r"STAS\.128") > 0, name
        assert not count(loop, r"UCGABAR\w*"), name
        fences = [i for i, line in enumerate(loop) if re.search(r"\bMEMBAR\.\S*(GPU|SYS)", line)]
        for i in fences:
            assert any(line.startswith("REDG") for line in loop[i : i + 6]), (name, loop[i : i + 6])
        assert len(fences) == 1, name
        seen += 1
    assert seen > 50


def test_grids_meet_by_release_and_acquire() -> None:
    """The counter is added to after a fence of the GPU's scope, and polled by loads that are not relaxed."""
    for name, code in kernels("sm_90a"):
        if name.startswith(LOOPS):
            assert count(code, r"MEMBAR[.\w]*GPU") + count(code, r"RED[.\w]*") >= 2, name
            assert count(code, r"LD[G]?\.E\.STRONG\.GPU") > 0, name
