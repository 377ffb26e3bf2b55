"""Builds `fastseq._C` with CMake and Ninja; all else is in pyproject.toml and CMakeLists.txt.

FASTSEQ_NATIVE=auto (default) builds it where there is a C++ compiler, 1 insists, 0 installs pure Python.
CMAKE_ARGS is passed on; CXX and CMAKE_BUILD_PARALLEL_LEVEL are CMake's own.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def why_not_native() -> str | None:
    """The reason to leave the native module out, or None. Only a missing compiler is one: a failing build fails."""
    mode = os.environ.get("FASTSEQ_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"fastseq: FASTSEQ_NATIVE={mode!r} is not one of auto, 0, 1")
    if mode == "0":
        return "FASTSEQ_NATIVE=0"
    if sys.platform == "win32":
        reason = "the kernels are not built on Windows yet"
    elif "CXX" in os.environ or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return None
    else:
        reason = "no C++ compiler was found (c++, g++, clang++ on PATH, or $CXX)"
    if mode == "1":
        raise SystemExit(f"fastseq: FASTSEQ_NATIVE=1, but {reason}")
    return reason


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
            subprocess.check_call([cmake, "--build", work])
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "fastseq: building the native module failed, see above; FASTSEQ_NATIVE=0 installs without it"
            ) from error


reason = why_not_native()
if reason is not None:
    print(f"fastseq: installing as pure Python, without the fast CPU kernels: {reason}", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("fastseq._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
