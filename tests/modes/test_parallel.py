"""Two processes of gloo, started once by torchrun: DDP and FSDP2 train to the parameters of torch.nn in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.modes.cases import Case
from tests.modes.modes import DDP, FSDP

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs a PyTorch with torch.distributed and gloo", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each process found wrong, by task and case."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.modes.distributed", str(folder)], capture_output=True, text=True, timeout=240,
        cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@DDP
def test_ddp(case: Case, processes: list[dict[str, str]]) -> None:
    assert [found[f"ddp|{case}"] for found in processes] == ["", ""]


@FSDP
def test_fsdp2(case: Case, processes: list[dict[str, str]]) -> None:
    assert [found[f"fsdp|{case}"] for found in processes] == ["", ""]


@pytest.mark.parametrize("task", ["seq2seq_ddp", "seq2seq_fsdp"])
@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
def test_seq2seq(task: str, backend: str, processes: list[dict[str, str]]) -> None:
    assert [found[f"{task}|{backend}"] for found in processes] == ["", ""]


def test_accelerate_leaves_sharded_modules_and_says_so(processes: list[dict[str, str]]) -> None:
    assert [found["stock_fsdp"] for found in processes] == ["", ""]
