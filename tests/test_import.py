"""Importing the package, cold: what it pulls in, what it says, and that it works without what is optional."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import _native
from fastseq.__main__ import LOST
from tests.conftest import needs_native

ROOT = Path(__file__).parents[1]


def python(code: str, *, expect: int = 0, **env: str) -> str:
    """stdout and stderr of a new interpreter in the repository."""
    kept = {k: v for k, v in os.environ.items() if k not in ("FASTSEQ_ISA", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def without(*modules: str) -> str:
    """Code that makes these modules impossible to import."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r})); "


def test_import_pulls_in_nothing_heavy() -> None:
    # In place of a clock: beyond torch's own imports, only this package and the standard library may come.
    code = (
        "import sys, torch; before = set(sys.modules); import fastseq; "
        "print(*sorted({n.split('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names)); "
        "print(*sorted(n for n in set(sys.modules) - before if n.startswith('torch.')))"
    )
    foreign, of_torch = python(code).splitlines()
    assert foreign.split() == ["fastseq"]
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "torch.onnx", "torch.distributed")
    assert not [name for name in of_torch.split() if name.startswith(heavy)]


def test_import_works_without_anything_optional() -> None:
    optional = ("fastseq._C", "numpy", "triton", "onnx", "onnxruntime", "safetensors", "matplotlib")
    code = "import torch, fastseq; fastseq.LSTM(3, 4)(torch.zeros(2, 1, 3)); print(fastseq.backends()['cpu'])"
    said = python(without(*optional) + code)
    assert "not built" in said
    assert "FASTSEQ_NATIVE" in said


BLOCKED = (
    "import sys\n"
    "class Blocker:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Blocker())\n"
)


def test_triton_is_not_needed() -> None:
    """Neither to import, nor to run, nor to be told of the machine."""
    said = python(
        BLOCKED + "import torch, fastseq, runpy\n"
        "fastseq.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
        "runpy.run_module('fastseq', run_name='__main__')\n"
        "try: fastseq.LSTM(3, 4, backend='triton')(torch.zeros(2, 1, 3))\n"
        "except fastseq.InputError as error: print(error)"
    )
    assert "absent: triton is not installed; pip install triton" in said
    assert "backend='triton' cannot run this call: triton is not installed" in said


def test_triton_is_not_imported_unasked() -> None:
    code = "import runpy, sys; runpy.run_module('fastseq', run_name='__main__')"
    assert python(f"{code}; print('triton' in sys.modules)").splitlines()[-1] == "False"


def test_explicit_cpu_backend_without_the_extension_is_refused() -> None:
    code = (
        "import torch, fastseq\n"
        "try: fastseq.LSTM(3, 4, backend='cpu')(torch.zeros(2, 1, 3))\n"
        "except fastseq.InputError as error: print(error)"
    )
    assert "not built" in python(without("fastseq._C") + "\n" + code)


def test_import_alone_is_silent() -> None:
    assert python("import fastseq", PYTHONWARNINGS="error") == ""


def test_the_other_distribution_is_warned_of(tmp_path: Path) -> None:
    info = tmp_path / "fastseq-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseq\nVersion: 0.1\n")
    said = python("import fastseq", PYTHONPATH=str(tmp_path))
    assert "pip uninstall fastseq" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@needs_native
@pytest.mark.parametrize("order", ["import torch, fastseq", "import fastseq, torch"])
def test_torch_and_the_extension_share_one_openmp(order: str) -> None:
    # Two copies would be two thread pools, and torch.set_num_threads would govern one of them.
    code = "; print(*{l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l})"
    assert len(python(order + "; fastseq.LSTM(2, 2)(torch.zeros(1, 1, 2))" + code).split()) == 1


@needs_native
@pytest.mark.parametrize("isa", _native.C.isa_available() if _native.C is not None else [])
def test_isa_is_chosen_by_the_environment(isa: str) -> None:
    assert python("from fastseq import _native; print(_native.C.isa())", FASTSEQ_ISA=isa).strip() == isa


@needs_native
def test_unknown_isa_is_refused() -> None:
    said = python("from fastseq import _native", expect=1, FASTSEQ_ISA="sse9")
    assert "FASTSEQ_ISA=sse9" in said
    assert "base" in said


def test_the_machine_report_takes_no_arguments() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "fastseq", "foo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "unrecognized arguments: foo" in told.stderr


@pytest.mark.parametrize("missing", [(), ("fastseq._C",)])
def test_machine_report(missing: tuple[str, ...]) -> None:
    said = python(without(*missing) + "import runpy; runpy.run_module('fastseq', run_name='__main__')")
    for word in ("fastseq", "torch", "CPU", "ISA", "threads", "reference", "auto"):
        assert word in said
    assert (f"lost: {LOST['cpu']}" in said) == bool(missing or _native.C is None)
