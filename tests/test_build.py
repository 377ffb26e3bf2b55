"""What pip makes of the source tree: wheels with and without kernels, in clean environments, and the objects inside."""

import collections
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.nvcc import OF_WHEELS

ROOT = Path(__file__).parents[1]
OBJECTS = ROOT / "build" / "native"
# Packaging is the same with one ISA variant as with all, and whatever the compiler makes of it.
QUICK = "-DFASTSEQ_PORTABLE=ON -DCMAKE_CXX_FLAGS_RELEASE=-O0"
NATIVE = {"FASTSEQ_NATIVE": "1", "FASTSEQ_CUDA": "0", "CMAKE_ARGS": QUICK}

# Run in a foreign environment: the installed package alone, against stock torch.
CHECK = """
import json, warnings, torch, fastseq
from fastseq import _native
torch.manual_seed(0)
ours, x = fastseq.LSTM(5, 7, bidirectional=True), torch.randn(6, 3, 5)
stock = torch.nn.LSTM(5, 7, bidirectional=True)
stock.load_state_dict(ours.state_dict())
backend = "cpu" if _native.C is not None else "reference"
ours.backend = backend
torch.testing.assert_close(ours(x)[0], stock(x)[0], rtol=1e-5, atol=1e-5)
print(json.dumps({"file": fastseq.__file__, "version": fastseq.__version__, "native": _native.C is not None,
                  "reason": _native.reason}))
"""


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The finished process; stdout and stderr in one, as pip mixes them."""
    ours = ("PYTHONPATH", "FASTSEQ_ISA", "FASTSEQ_NATIVE", "FASTSEQ_CUDA", "CMAKE_ARGS")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    kept["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), kept["PATH"]])  # ninja, as if it were activated
    return subprocess.run(
        [str(part) for part in command],
        env=kept | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=Path(sys.prefix),  # not the repository: its fastseq/ would be imported instead of the installed one
        check=False,
    )


def succeed(*command: object, **env: str) -> str:
    done = run(*command, **env)
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: object, python: object = sys.executable, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments, **env)


def index_is_reachable(scratch: Path) -> bool:
    return pip("download", "--no-deps", "--dest", scratch, "ninja").returncode == 0


def clean_environment(root: Path, *what: object, **env: str) -> Path:
    """The Python of a new environment with `what` installed, and torch and setuptools by way of a .pth file."""
    succeed(sys.executable, "-m", "venv", "--without-pip", root)
    python = root / "bin" / "python"
    site = succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "development.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    # --ignore-installed: the development environment's own install shows through, and is to be left alone.
    done = pip("install", "--ignore-installed", "--no-deps", "--no-build-isolation", *what, python=python, **env)
    assert done.returncode == 0, done.stdout
    return python


def check_installed(python: Path) -> dict:
    return json.loads(succeed(python, "-W", "error", "-c", CHECK).splitlines()[-1])


def top_level(wheel: Path) -> set[str]:
    return {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree that a source distribution unpacks to: it lacks whatever MANIFEST.in forgets."""
    scratch = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT, scratch / "tree", ignore=shutil.ignore_patterns(".?*", "build", "*.egg-info", "*.so", "__pycache__")
    )
    build = f"import os; os.chdir({str(scratch / 'tree')!r}); from setuptools.build_meta import build_sdist"
    succeed(sys.executable, "-c", f"{build}; build_sdist({str(scratch)!r})")
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch / "unpacked", filter="data")
    (root,) = (scratch / "unpacked").iterdir()
    return root


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel with the native module, as a user gets it, and pip's log. Isolated wherever packages can be fetched."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    where = tmp_path_factory.mktemp("wheel")
    isolation = [] if index_is_reachable(where / "probe") else ["--no-build-isolation"]
    done = pip("wheel", source, "--no-deps", "--verbose", "-w", where, *isolation, **NATIVE)
    assert done.returncode == 0, done.stdout
    (path,) = where.glob("fastseq_rnn-*.whl")
    return path, done.stdout


def pure_wheel(source: Path, where: Path, **env: str) -> tuple[Path, str]:
    done = pip("wheel", source, "--no-deps", "--no-build-isolation", "--verbose", "-w", where, **env)
    assert done.returncode == 0, done.stdout
    (path,) = where.glob("fastseq_rnn-*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]
    return path, done.stdout


@pytest.mark.slow
def test_building_needs_no_torch(source: Path, wheel: tuple[Path, str]) -> None:
    ask = f"import os; os.chdir({str(source)!r}); from setuptools import build_meta as b"
    asked = succeed(sys.executable, "-c", f"{ask}; print(b.get_requires_for_build_wheel())")
    declared = re.search(r"^requires = \[(.*)\]$", (source / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert "torch" not in declared[1] + asked
    fetched = [line for line in wheel[1].splitlines() if re.match(r"\s*(Collecting|Downloading|Processing) ", line)]
    assert not [line for line in fetched if "torch" in line]


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(wheel: tuple[Path, str], tmp_path: Path) -> None:
    assert {name.split("-")[0] for name in top_level(wheel[0])} == {"fastseq", "fastseq_rnn"}
    seen = check_installed(clean_environment(tmp_path / "env", wheel[0]))
    assert seen["native"], seen
    assert Path(seen["file"]).is_relative_to(tmp_path)
    assert wheel[0].name.startswith(f"fastseq_rnn-{seen['version']}-")


@pytest.mark.slow
def test_editable_install(source: Path, wheel: tuple[Path, str], tmp_path: Path) -> None:
    python = clean_environment(tmp_path / "env", "-e", source, **NATIVE)
    seen = check_installed(python)
    assert seen["native"], seen
    assert Path(seen["file"]) == source / "fastseq" / "__init__.py"


@pytest.mark.slow
def test_pure_python_install_works(source: Path, tmp_path: Path) -> None:
    path, log = pure_wheel(source, tmp_path, FASTSEQ_NATIVE="0")
    assert "pure Python, without the fast CPU kernels: FASTSEQ_NATIVE=0" in log
    python = clean_environment(tmp_path / "env", path)
    seen = check_installed(python)
    assert not seen["native"]
    assert seen["reason"]
    report = succeed(python, "-m", "fastseq")
    assert seen["reason"] in report


@pytest.mark.slow
def test_without_a_compiler_auto_says_so_and_1_fails(source: Path, tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path)}
    _, log = pure_wheel(source, tmp_path, **bare)
    assert "without the fast CPU kernels: no C++ compiler was found" in log
    refused = run(sys.executable, source / "setup.py", "--version", FASTSEQ_NATIVE="1", **bare)
    assert refused.returncode != 0
    assert "FASTSEQ_NATIVE=1, but no C++ compiler was found" in refused.stdout


@pytest.mark.slow
def test_a_broken_compiler_is_no_reason_for_pure_python(source: Path, tmp_path: Path) -> None:
    done = pip("wheel", source, "--no-deps", "--no-build-isolation", "-w", tmp_path, CXX="/bin/false")
    assert done.returncode != 0
    assert "FASTSEQ_NATIVE=0 installs without it" in done.stdout


@pytest.mark.parametrize("variable", ["FASTSEQ_NATIVE", "FASTSEQ_CUDA"])
def test_unknown_mode_is_refused(variable: str) -> None:
    refused = run(sys.executable, ROOT / "setup.py", "--version", **{variable: "yes"})
    assert refused.returncode != 0
    assert f"{variable}='yes' is not one of auto, 0, 1" in refused.stdout


def test_cuda_1_without_nvcc_fails(tmp_path: Path) -> None:
    """One that insists; `auto` leaves the CUDA module out, as every machine without nvcc shows."""
    if OF_WHEELS.exists():
        pytest.skip("nvcc is here, by the extra dev-cuda")
    nowhere = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "CXX": "c++"}
    refused = run(sys.executable, ROOT / "setup.py", "--version", FASTSEQ_CUDA="1", **nowhere)
    assert refused.returncode != 0
    assert "FASTSEQ_CUDA=1, but no nvcc was found" in refused.stdout


def native_objects() -> dict[str, list[Path]]:
    """Objects of the development build: by ISA variant, and 'once' for the others."""
    if not (OBJECTS / "compile_commands.json").exists() or shutil.which("nm") is None:
        pytest.skip("needs nm and the objects of `make native`")
    objects = collections.defaultdict(list)
    for entry in json.loads((OBJECTS / "compile_commands.json").read_text()):
        if "emulated" in entry["command"] or "_cuda" in entry["command"]:
            continue  # modules of their own
        command = shlex.split(entry["command"])
        variant = next((word.removeprefix("-DFS_ISA=") for word in command if word.startswith("-DFS_ISA=")), "once")
        objects[variant].append(OBJECTS / command[command.index("-o") + 1])
    return objects


def test_no_inline_symbol_is_shared_between_isa_variants() -> None:
    # The linker keeps one copy of a weak function: a shared one may be the AVX-512 copy, and run on a machine without.
    defined_by = collections.defaultdict(set)
    objects = native_objects()
    assert len(objects) >= 2
    for variant, paths in objects.items():
        listing = succeed("nm", "--demangle", "--defined-only", *paths)
        for kind, symbol in re.findall(r"^[0-9a-f]+ (\w) (.*)$", listing, re.MULTILINE):
            if kind == "W":
                defined_by[symbol].add(variant)
    assert not {symbol: variants for symbol, variants in defined_by.items() if len(variants) > 1}


def test_native_module_exports_nothing_of_its_own_and_knows_no_torch() -> None:
    native_objects()
    (module,) = (ROOT / "fastseq").glob("_C.*.so")
    exported = succeed("nm", "-DC", "--defined-only", module)
    assert "PyInit__C" in exported
    assert "fastseq::" not in exported
    undefined = succeed("nm", "-DC", "--undefined-only", module)
    assert not re.search(r"\b(at|c10|torch)::", undefined)
