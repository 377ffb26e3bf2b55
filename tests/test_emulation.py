"""The emulation of GPUs by which kernels are tested on a CPU: right kernels are right on it, planted faults found."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.nvcc import NO_NVCC, NVCC

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "emulation" / "faults.cu"
SEEDS = range(10)  # of schedules: 0 in order; odd: at random; even: by priorities
UNIT = 2.0**-24  # of rounding in fp32
LAUNCHED, INVALID, DEADLOCK, LIVELOCK, DIVERGENCE, MISUSE, EXCEPTION = range(7)
WRONG = [
    "nothing", "divergent barrier", "two barriers", "two kinds", "early exit", "store outside dynamic",
    "store outside array", "store outside global", "read unwritten", "spin forever", "spin without relax",
    "wait without arrive", "map outside", "copy outside", "source changes", "throw",
]  # fmt: skip
NUMBER = {name: i for i, name in enumerate(WRONG)}
WRONG_MESSAGES = [
    "right", "no wait", "too few bytes", "too many bytes", "not armed", "armed twice", "other parity", "one buffer",
    "leave early", "not initialised", "no barrier before", "written over", "misaligned", "beyond", "to itself",
]  # fmt: skip

if shutil.which("g++") is None:
    pytest.skip("g++ is not here", allow_module_level=True)


def build(to: Path, *flags: str) -> Path:
    warnings = ("-Wall", "-Wextra", "-Werror")
    include = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulation'}")
    command = [
        "g++",
        "-std=c++17",
        "-x",
        "c++",
        "-DFS_EMULATE",
        *warnings,
        *flags,
        *include,
        "-fPIC",
        "-shared",
        SOURCE,
    ]
    done = subprocess.run([*command, "-o", to], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to


class Library:
    """The launchers of faults.cu: tensors become pointers, the result is a code."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.text_of.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._library, name)

        def call(*arguments: object) -> int:
            return function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))

        return call

    def text(self, code: int) -> str:
        return self._library.text_of(code).decode()

    def launched(self, name: str, *arguments: object) -> None:
        code = getattr(self, name)(*arguments)
        assert code == LAUNCHED, self.text(code)

    def refused(self, code: int, name: str, *arguments: object) -> str:
        found = getattr(self, name)(*arguments)
        assert found == code, self.text(found)
        return self.text(code)


@pytest.fixture(scope="session")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulation") / "faults.so", "-O1")


@pytest.fixture(scope="session")
def by_ucontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As on a CPU that is no x86-64."""
    return build(tmp_path_factory.mktemp("emulation") / "faults.so", "-O0", "-DFS_UCONTEXT")


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulation") / "faults.so", "-O0", "-g1", "-fsanitize=address")


@pytest.fixture
def gpu(optimized: Path) -> Library:
    library = Library(optimized)
    library.choose_seed(0)
    library.choose_spin_limit(ctypes.c_uint64(1_000_000))
    library.choose_lost_message(0)
    return library


def sum_rows(gpu: Library, fault: int = 0) -> bool:
    """Whether y is right."""
    x, y = torch.randn(5, 300), torch.full((5,), torch.nan)
    gpu.launched("run_sum_rows", x, y, 5, 300, fault)
    error = (y.double() - x.double().sum(1)).abs()
    return bool((error <= 300 * UNIT * x.double().abs().sum(1)).all())


def pass_round(gpu: Library, fault: int = 0, rounds: int = 5) -> bool:
    x, y = torch.randn(8, 64), torch.full((8, 64), torch.nan)
    gpu.launched("run_pass_round", x, y, 8, 4, rounds, fault)
    return torch.equal(y.view(2, 4, 64), x.view(2, 4, 64).roll(rounds, 1))


def add_neighbours(gpu: Library, fault: int = 0, blocks: int = 6, threads: int = 64, rounds: int = 5) -> bool:
    x, counter = torch.zeros(2, blocks), torch.zeros(1, dtype=torch.int32)
    expected = x[0] = torch.arange(blocks)
    for _ in range(rounds):
        expected = expected + expected.roll(-1)
    gpu.launched("run_add_neighbours", x, counter, blocks, threads, rounds, fault)
    return torch.equal(x[rounds % 2], expected.float())


def copy_ahead(gpu: Library, fault: int = 0) -> bool:
    x = torch.randn(7, 128)
    y = torch.full_like(x, torch.nan)
    gpu.launched("run_copy_ahead", x, y, 7, fault)
    return torch.equal(x, y)


def messages(rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and what y must become: two clusters of 4 blocks, each of which takes the sum of all rows in each round."""
    x = torch.randint(-3, 4, (8, 64)).float()
    expected = 4.0 ** (rounds - 1) * x.view(2, 4, 64).sum(1, keepdim=True).expand(2, 4, 64)
    return x, torch.full_like(x, torch.nan), expected.reshape(8, 64)


def pass_messages(gpu: Library, rounds: int = 5) -> bool:
    x, y, expected = messages(rounds)
    gpu.launched("run_pass_messages", x, y, 8, 4, rounds, 0)
    return torch.equal(y, expected)


def go_wrong(gpu: Library, wrong: str, code: int, elements: int = 64) -> tuple[str, Tensor]:
    y, source, counter = torch.full((elements,), torch.nan), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    return gpu.refused(code, "run_go_wrong", y, source, counter, NUMBER[wrong]), y


KERNELS = [sum_rows, pass_round, pass_messages, add_neighbours, copy_ahead]


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_are_right(gpu: Library, seed: int) -> None:
    gpu.choose_seed(seed)
    for kernel in KERNELS:
        assert kernel(gpu), kernel.__name__
    assert (go_wrong(gpu, "nothing", LAUNCHED)[1] == 3).all()


def test_other_cpus(by_ucontext: Path) -> None:
    gpu = Library(by_ucontext)
    for seed in (0, 1, 2):
        gpu.choose_seed(seed)
        for kernel in KERNELS:
            assert kernel(gpu), kernel.__name__
        assert "deadlock" in go_wrong(gpu, "early exit", DEADLOCK)[0]
        assert "own" in go_wrong(gpu, "throw", EXCEPTION)[0]


def test_several_os_threads(gpu: Library) -> None:
    """Each has grids, a schedule and errors of its own."""

    def run(seed: int) -> str:
        gpu.choose_seed(seed)
        assert all(add_neighbours(gpu) and pass_round(gpu) for _ in range(10))
        return go_wrong(gpu, "early exit" if seed % 2 else "throw", DEADLOCK if seed % 2 else EXCEPTION)[0]

    with ThreadPoolExecutor(2) as threads:
        found = [text.split(":")[0] for text in threads.map(run, range(6))]
    assert found == ["of the kernel's own", "deadlock"] * 3


def test_a_large_grid(gpu: Library) -> None:
    """More than 10,000 threads at once."""
    assert add_neighbours(gpu, blocks=84, threads=128, rounds=2)


# The PTX ISA's formulas: where element i of a lane's fragment lies in its matrix.
LANE = torch.arange(32)[:, None]
G, T = LANE // 4, LANE % 4


def fragment(i: Tensor, bits: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(row, column) of A's, (row, column) of B's elements, [32, elements]."""
    if bits == 32:
        a = G + 8 * (i % 2), T + 4 * (i // 2)
        b = T + 4 * i[:2], G.expand(32, 2)
    else:
        a = G + 8 * (i // 2 % 2), 2 * T + i % 2 + 8 * (i // 4)
        b = 2 * T + i[:4] % 2 + 8 * (i[:4] // 2), G.expand(32, 4)
    return a, b


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)]
)
def test_products_of_tensor_cores(gpu: Library, name: str, dtype: torch.dtype) -> None:
    """Fragments are laid out here as the PTX ISA says; the low 13 bits of a TF32 operand count for nothing."""
    bits = torch.finfo(dtype).bits
    k = 256 // bits
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
    of_a, of_b = fragment(torch.arange(128 // bits), bits)
    i = torch.arange(4)
    of_d = G + 8 * (i // 2), 2 * T + i % 2
    d = c[of_d].contiguous()
    gpu.launched(f"run_multiply_{name}", a[of_a].contiguous(), b[of_b].contiguous(), d)
    if bits == 32:
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    expected = c.double() + a.double() @ b.double()
    budget = (k + 1) * UNIT * (c.double().abs() + a.double().abs() @ b.double().abs())
    assert ((d.double() - expected[of_d]).abs() <= budget[of_d]).all()


def test_a_product_that_misses_lanes(gpu: Library) -> None:
    """Its operands are NaN, as is all that nothing was written to."""
    a, b, d = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 2, dtype=torch.int32), torch.zeros(32, 4)
    a[3, 1] = -1
    gpu.launched("run_multiply_bf16", a, b, d)
    assert d.isnan().sum() == 8  # one row of D


def converted(gpu: Library, x: Tensor) -> Tensor:
    y = torch.empty(5, len(x))
    gpu.launched("run_convert", x, y, len(x))
    return y


def test_conversions(gpu: Library) -> None:
    """Against PyTorch's own: every number of 16 bits, those halfway between two, and numbers at random."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16)
    exact = torch.cat([halves.view(dtype).float() for dtype in (torch.bfloat16, torch.float16)])
    halfway = torch.cat([exact, (exact.view(torch.int32) | 0x8000).view(torch.float32), exact * (1 + 2.0**-11)])
    x = torch.cat([halfway, torch.randint(-(2**31), 2**31, (50_000,)).to(torch.int32).view(torch.float32)])
    y = converted(gpu, x)
    for row, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        assert torch.equal(y[row].isnan(), x.isnan())
        assert torch.equal(y[row].nan_to_num(0), x.to(dtype).float().nan_to_num(0)), dtype


def test_rounding_to_tf32(gpu: Library) -> None:
    """11 significant bits, ties away from zero."""
    x = torch.cat([torch.randn(1000) * 1e3, torch.arange(2048.0, 4096.0) + 0.5, torch.tensor([torch.inf, -0.0])])
    mantissa, exponent = x.double().frexp()
    expected = (mantissa.abs() * 2**11 + 0.5).floor().copysign(mantissa).ldexp(exponent - 11)
    expected[x.isinf()] = torch.inf
    assert torch.equal(converted(gpu, x)[2].double(), expected)


def test_approximations(gpu: Library) -> None:
    """As far from the truth as those of a GPU may be, not closer: tanh by 2**-11."""
    x = torch.randn(2000) * 3
    y = converted(gpu, x)[3:].double()
    error = (y[0] / x.double().tanh() - 1).abs()
    assert (error <= 1.001 * 2.0**-11).all()
    assert error.max() > 2.0**-12
    assert ((y[1] * x.double() - 1).abs() <= 2 * UNIT).all()
    ends = converted(gpu, torch.tensor([0.0, -0.0, torch.inf, 1e-40, 2.0**127]))[4]
    assert ends.tolist() == [torch.inf, -torch.inf, 0.0, torch.inf, 0.0]  # subnormals are 0


def test_deleted_block_barriers(gpu: Library) -> None:
    """Before what others wrote is read, and before what others still read is written."""

    def found(seed: int, fault: int) -> bool:
        gpu.choose_seed(seed)
        return not sum_rows(gpu, fault)

    assert [seed for seed in SEEDS if found(seed, 1)] == [*SEEDS]
    assert [seed for seed in SEEDS if found(seed, 2)] == [2, 4, 6]


def test_deleted_cluster_barriers(gpu: Library) -> None:
    def text(fault: int) -> str:
        x = torch.randn(8, 64)
        return gpu.refused(MISUSE, "run_pass_round", x, torch.empty_like(x), 8, 4, 5, fault)

    for seed in SEEDS:
        gpu.choose_seed(seed)
        assert re.search(r"block \d was written before it had started: put a cluster barrier", text(1)), seed
        assert not pass_round(gpu, fault=2), seed
        assert re.search(r"map_shared to block \d, which has exited \(faults.cu:\d+\)", text(3)), seed


def test_a_block_written_to_after_it_exited(gpu: Library) -> None:
    """By an address mapped before."""
    x = torch.randn(8, 64)
    for seed in SEEDS:
        gpu.choose_seed(seed)
        text = gpu.refused(MISUSE, "run_pass_round", x, torch.empty_like(x), 8, 4, 1, 4)
        assert re.search(r"shared memory of block \d was written after it had exited", text), (seed, text)


def test_a_deleted_grid_barrier(gpu: Library) -> None:
    def found(seed: int) -> bool:
        gpu.choose_seed(seed)
        return not add_neighbours(gpu, fault=1)

    assert [seed for seed in SEEDS if found(seed)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_deleted_waits_for_copies(gpu: Library) -> None:
    for seed in SEEDS:
        gpu.choose_seed(seed)
        assert not copy_ahead(gpu, fault=1), seed
        assert not copy_ahead(gpu, fault=2), seed


EXITED = r"(exited before all messages to it had landed: wait for them|map_shared to block \d, which has exited)"
WRONG_MESSAGE_TEXTS = {
    "no wait": (MISUSE, EXITED),
    "too few bytes": (MISUSE, EXITED),
    "too many bytes": (LIVELOCK, r"32 of 32 threads spin in bytes_received \(faults.cu:\d+\)"),
    "not armed": (LIVELOCK, r"32 of 32 threads spin in bytes_received \(faults.cu:\d+\)"),
    "armed twice": (MISUSE, r"thread 0 of block \d: an mbarrier is armed twice for one phase \(faults.cu:\d+\)"),
    "other parity": (MISUSE, "an mbarrier is armed twice for one phase"),  # the wait before it was none
    "leave early": (MISUSE, EXITED),
    "not initialised": (MISUSE, "thread 0 of block .: an mbarrier that was not initialised"),
    "written over": (MISUSE, "an mbarrier that something else was written over"),
    "misaligned": (MISUSE, "a message to an address that is no multiple of its size, or outside the shared memory"),
    "beyond": (MISUSE, "map_shared of an address outside its dynamic shared memory"),
}


def run_messages(gpu: Library, wrong: str, rounds: int = 5, cluster: int = 4) -> tuple[int, bool]:
    """The code of a launch, and whether y is right."""
    x, y, expected = messages(rounds)
    code = gpu.run_pass_messages(x, y, 8, cluster, rounds, WRONG_MESSAGES.index(wrong))
    return code, torch.equal(y, expected)


@pytest.mark.parametrize("wrong", WRONG_MESSAGE_TEXTS)
def test_wrong_messages(gpu: Library, wrong: str) -> None:
    """On every schedule, whether messages land at once or late."""
    expected, text = WRONG_MESSAGE_TEXTS[wrong]
    gpu.choose_spin_limit(ctypes.c_uint64(20_000))
    for seed in SEEDS:
        gpu.choose_seed(seed)
        code, _ = run_messages(gpu, wrong)
        assert code == expected, (seed, gpu.text(code))
        assert re.search(text, gpu.text(code)), (seed, gpu.text(code))
    assert pass_messages(gpu)


def test_messages_into_a_buffer_that_is_still_read(gpu: Library) -> None:
    """One buffer, and one barrier, for all rounds: numbers are lost, or a phase is, for which all then wait."""
    gpu.choose_spin_limit(ctypes.c_uint64(20_000))
    for seed in SEEDS:
        gpu.choose_seed(seed)
        code, right = run_messages(gpu, "one buffer")
        assert (code, right) in ((LAUNCHED, False), (LIVELOCK, False)), seed


def test_messages_to_a_block_that_is_not_there_yet(gpu: Library) -> None:
    """Without a cluster barrier before them, on schedules that starve a block."""

    def found(seed: int) -> bool:
        gpu.choose_seed(seed)
        code, right = run_messages(gpu, "no barrier before")
        assert code == MISUSE or (code == LAUNCHED and right), gpu.text(code)
        return code == MISUSE

    assert [seed for seed in SEEDS if found(seed)] == [2, 4, 6, 8]


def test_messages_need_a_cluster(gpu: Library) -> None:
    """Of more than one block: otherwise it is undefined what st.async does."""
    assert run_messages(gpu, "to itself", cluster=1)[0] == MISUSE


def test_a_lost_message(gpu: Library) -> None:
    """Is waited for as long as the kernel likes, whichever it is; no other one stands in for it."""
    gpu.choose_spin_limit(ctypes.c_uint64(20_000))
    for seed in SEEDS:
        gpu.choose_seed(seed)
        for lost in (1, 200, 1900):
            gpu.choose_lost_message(lost)
            code, right = run_messages(gpu, "right")
            assert (code, right) == (LIVELOCK, False), (seed, lost)
    gpu.choose_lost_message(0)
    assert pass_messages(gpu)


TEXTS = {
    "divergent barrier": (
        DIVERGENCE,
        r"warp \d of block 0 is in __syncthreads \(faults.cu:\d+\) and \(faults.cu:\d+\) at once",
    ),
    "two barriers": (DIVERGENCE, r"warp 0 of block 0 is in __syncthreads \(faults.cu:\d+\) and"),
    "two kinds": (
        DIVERGENCE,
        r"lane \d+ of warp 0 of block 0 came to \S+ \(faults.cu:\d+\) while \d+ lanes wait in \S+ \(faults.cu:\d+\)$",
    ),
    "early exit": (
        DEADLOCK,
        r"^deadlock: block 0, warp 0: 16 of 32 threads wait in __syncthreads \(faults.cu:\d+\), 16 have exited, "
        r"warp 1: 32 of 32 threads wait in __syncthreads \(faults.cu:\d+\)$",
    ),
    "store outside dynamic": (MISUSE, "block 0 wrote outside the dynamic part of its shared memory, 256 bytes"),
    "store outside array": (MISUSE, "block 0 wrote outside an array of its shared memory, 128 bytes"),
    "spin forever": (
        LIVELOCK,
        r"warp 1: 31 of 32 threads wait in __syncthreads \(\S+\), 1 spin in (load_acquire|relax)",
    ),
    "spin without relax": (LIVELOCK, r", 1 spin in load_acquire \(faults.cu:\d+\)$"),
    "wait without arrive": (MISUSE, r"thread \d+ of block 0: cluster_wait without cluster_arrive \(faults.cu:\d+\)"),
    "map outside": (MISUSE, "map_shared of an address outside its dynamic shared memory"),
    "copy outside": (MISUSE, "thread 0 of block 0: an asynchronous copy to outside its block's shared memory"),
    "source changes": (MISUSE, "thread 0 of block 0: what an asynchronous copy reads changed before its wait"),
    "throw": (EXCEPTION, "^of the kernel's own$"),
}


@pytest.mark.parametrize("wrong", TEXTS)
def test_wrong_threads(gpu: Library, wrong: str) -> None:
    """On any schedule, and what comes after it is right again."""
    code, expected = TEXTS[wrong]
    for seed in range(5):
        gpu.choose_seed(seed)
        assert re.search(expected, go_wrong(gpu, wrong, code)[0]), seed
        assert pass_round(gpu)


def test_shared_memory_that_nothing_wrote_to(gpu: Library) -> None:
    assert go_wrong(gpu, "read unwritten", LAUNCHED)[1].isnan().all()


def test_the_spin_limit(gpu: Library) -> None:
    gpu.choose_spin_limit(ctypes.c_uint64(10))
    assert "livelock" in go_wrong(gpu, "spin forever", LIVELOCK)[0]
    gpu.choose_spin_limit(ctypes.c_uint64(1_000_000))
    assert add_neighbours(gpu)


def test_patience(gpu: Library) -> None:
    """A kernel's own timeout of many seconds is over soon where nothing but waiting happens, and never before."""
    patience = ctypes.c_uint64(20 * 10**9)
    for seed in SEEDS:
        gpu.choose_seed(seed)
        for awaited, expected in ((8, 0), (9, 1)):
            y = torch.full((8,), torch.nan)
            counter = torch.zeros(1, dtype=torch.int32)
            gpu.launched("run_wait_with_patience", counter, awaited, patience, y, 8)
            assert (y == expected).all(), (seed, awaited)


def test_schedules(gpu: Library) -> None:
    """One for each seed."""

    def order(seed: int) -> list[int]:
        gpu.choose_seed(seed)
        found, count = torch.full((512,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        gpu.launched("run_trace", found, count, 4)
        return found.tolist()

    assert list(dict.fromkeys(order(0))) == list(range(256))
    orders = [order(seed) for seed in SEEDS]
    assert [order(seed) for seed in SEEDS] == orders
    assert len(set(map(tuple, orders))) == len(SEEDS)
    assert all(sorted(order) == sorted(2 * [*range(256)]) for order in orders)
    last = [{thread // 64 for thread in order[-128:]} for order in orders]
    alone = [seed for seed in SEEDS if len(last[seed]) == 1]  # a block that ran after all others
    assert alone == [8]


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((0, 32, 1, 0, 0), "no blocks"),
        ((1, 0, 1, 0, 0), "0 threads a block"),
        ((1, 1025, 1, 0, 0), "1025 threads a block"),
        ((17, 32, 17, 0, 0), "a cluster of 17 blocks"),
        ((6, 32, 4, 0, 0), "6 blocks in clusters of 4"),
        ((1, 32, 1, 227 * 1024 + 1, 0), "232449 bytes of shared memory"),
        ((9, 1024, 1, 0, 1), "a cooperative grid of 9 blocks is more than are resident at once"),
    ],
)
def test_launches_that_a_gpu_refuses(gpu: Library, shape: tuple[int, ...], text: str) -> None:
    gpu.choose_multiprocessors(4)
    assert gpu.refused(INVALID, "run_shape", *shape) == f"invalid launch: {text}"
    gpu.choose_multiprocessors(132)
    gpu.launched("run_shape", 8, 1024, 1, 227 * 1024, 1)


def test_residency(gpu: Library) -> None:
    """Of an H100, by shape alone."""

    def resident(*shape: int) -> tuple[int, int]:
        clusters, blocks = ctypes.c_int(), ctypes.c_int()
        gpu.launched("resident", *shape, ctypes.byref(clusters), ctypes.byref(blocks))
        return clusters.value, blocks.value

    assert resident(256, 1, 0) == (132 * 8, 8)
    assert resident(256, 1, 100 * 1024) == (132 * 2, 2)
    assert resident(256, 16, 200 * 1024) == (7, 1)


# The shell of a process under ASan, which must be loaded first, and libstdc++ with it, for its exceptions.
SANITIZED = """
import ctypes, sys
gpu = ctypes.CDLL(sys.argv[1])
gpu.text_of.restype = ctypes.c_char_p
y, row = (ctypes.c_float * 64)(), (ctypes.c_float * 512)()
source, counter = (ctypes.c_float * 1)(), (ctypes.c_uint * 1)()
for wrong in map(int, sys.argv[2:]):
    for seed in range(4):
        gpu.choose_seed(seed)
        print(gpu.run_go_wrong(y, source, counter, wrong), gpu.run_pass_round(row, row, 8, 4, 3, 0))
"""


def under_asan(library: Path, *wrong: str) -> subprocess.CompletedProcess[str]:
    names = ("libasan.so", "libstdc++.so")
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    set_up = {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-S", "-c", SANITIZED, library, *(str(NUMBER[name]) for name in wrong)]
    return subprocess.run(command, env={**os.environ, **set_up}, capture_output=True, text=True)


def test_asan_follows_the_fibers(sanitized: Path) -> None:
    """Nothing is reported of right kernels, also after launches that ended in the midst of one."""
    wrong = {"nothing": LAUNCHED, "early exit": DEADLOCK, "two kinds": DIVERGENCE, "throw": EXCEPTION}
    done = under_asan(sanitized, *wrong)
    assert done.stderr == ""
    assert done.stdout.split("\n")[:-1] == [f"{code} 0" for code in wrong.values() for _ in range(4)]


@pytest.mark.parametrize("wrong", ["store outside dynamic", "store outside array", "store outside global"])
def test_asan_finds_stores_outside(sanitized: Path, wrong: str) -> None:
    """At their line."""
    done = under_asan(sanitized, wrong)
    assert done.returncode != 0
    found = re.search(r"heap-buffer-overflow [^\n]*faults.cu:(\d+) in go_wrong", done.stderr)
    assert found is not None, done.stderr
    name = "k" + wrong.title().replace(" ", "")
    assert f"wrong == {name}" in SOURCE.read_text().splitlines()[int(found.group(1)) - 1]


@pytest.mark.skipif(NVCC is None, reason=NO_NVCC)
def test_nvcc_compiles_the_same_source(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    strict = ["-Xcompiler", "-Wall,-Wextra,-Werror", "-Werror", "all-warnings"]
    command = [NVCC, "-std=c++17", *strict, *targets, f"-I{ROOT / 'csrc'}", "-c", SOURCE, "-o", tmp_path / "faults.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
