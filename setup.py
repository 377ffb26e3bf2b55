"""Builds `fastseq._C` and `fastseq._cuda` with CMake and Ninja; all else is in pyproject.toml and CMakeLists.txt.

FASTSEQ_NATIVE=auto (default) builds the first where there is a C++ compiler, 1 insists, 0 installs pure Python.
FASTSEQ_CUDA=auto (default) builds the second where there is nvcc besides, 1 insists, 0 leaves it out.
CMAKE_ARGS is passed on; CXX and CMAKE_BUILD_PARALLEL_LEVEL are CMake's own.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_CUDA = 12, 1  # from there on a kernel may have more than 4 KB of arguments


def why_not(variable: str, missing: str | None) -> str | None:
    """The reason to leave a module out, or None. `missing`: what the machine lacks; a failing build is no reason."""
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"fastseq: {variable}={mode!r} is not one of auto, 0, 1")
    if mode == "0":
        return f"{variable}=0"
    if mode == "1" and missing:
        raise SystemExit(f"fastseq: {variable}=1, but {missing}")
    return missing


def no_compiler() -> str | None:
    if sys.platform == "win32":
        return "the kernels are not built on Windows yet"
    if "CXX" in os.environ or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return None
    return "no C++ compiler was found (c++, g++, clang++ on PATH, or $CXX)"


def no_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"  # those of the extra dev-cuda, if complete
    places = os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin"])
    if (wheels / "include" / "cccl").is_dir():
        places += f"{os.pathsep}{wheels}/bin"
    nvcc = None if sys.platform == "win32" else shutil.which("nvcc", path=places)
    if nvcc is None:
        return f"no nvcc was found (on PATH, in $CUDA_HOME/bin, that is {home}/bin, or by the extra dev-cuda)"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None or (int(release[1]), int(release[2])) < OLDEST_CUDA:
        return f"{nvcc} is of CUDA {release[0] if release else 'release unknown'}; 12.1 or newer is needed"
    return None


def tool(name: str, folder: str) -> str:
    """Path of a build tool: from its wheel (the system's may be too old), or else on PATH."""
    try:
        beside = getattr(importlib.import_module(name), folder)
    except ImportError:
        beside = ""
    found = shutil.which(name, path=beside) or shutil.which(name)
    if found is None:
        raise SystemExit(f"fastseq: {name} was not found; pip install {name}, or set FASTSEQ_NATIVE=0")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        work = Path(self.build_temp).resolve() / ext.name
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR"),
            "FASTSEQ_CUDA": "ON" if ext.name.endswith("_cuda") else "OFF",
            "FASTSEQ_OUTPUT_DIR": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        defines = [f"-D{key}={value}" for key, value in options.items()]
        defines += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            # --fresh: an isolated build environment is elsewhere each time, and the cache remembers the last one.
            subprocess.check_call([cmake, "--fresh", "-S", ROOT, "-B", work, "-G", "Ninja", *defines])
            subprocess.check_call([cmake, "--build", work, "--target", ext.name.rpartition(".")[2]])
        except subprocess.CalledProcessError as error:
            without = "FASTSEQ_CUDA=0" if ext.name.endswith("_cuda") else "FASTSEQ_NATIVE=0"
            raise SystemExit(
                f"fastseq: building {ext.name} failed, see above; {without} installs without it"
            ) from error


reason = why_not("FASTSEQ_NATIVE", no_compiler())
if reason is not None:
    print(f"fastseq: installing as pure Python, without the fast CPU kernels: {reason}", file=sys.stderr)
modules = [] if reason else ["fastseq._C"]
if modules and why_not("FASTSEQ_CUDA", no_nvcc()) is None:
    modules.append("fastseq._cuda")
setup(ext_modules=[Extension(name, sources=[]) for name in modules], cmdclass={"build_ext": CMakeBuild})
