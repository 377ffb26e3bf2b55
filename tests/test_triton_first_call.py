"""What a process's first call costs on a GPU, but for the GPU's own part; docs/gpu.md has the seconds."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from tests.first_call import CASES
from tests.stub_driver import ROOT, environment

MOST_S = 15.0  # CPU seconds, which other work on the machine does not add to


def called(name: str, folder: Path) -> dict[str, Any]:
    """The first call, forward and backward, of a process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.first_call", name], cwd=ROOT, env=environment(folder), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Of a case: the folder that a process filled, and what that found."""

    @cache
    def once(name: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("driver")
        return folder, called(name, folder)

    return once


# Two layers' takes 7 s on the machine of the page, of which one half as fast would leave too little room.
@pytest.mark.parametrize("name", [name for name in CASES if "2 layers" not in name])
def test_at_most_15_seconds(name: str, first: Any) -> None:
    _, found = first(name)
    print(f"{name}: {found['seconds']} CPU seconds, kernels {found['compiled']}")
    assert found["compiled"]
    assert not found["cached"]
    assert found["seconds"] <= MOST_S, found


@pytest.mark.parametrize("name", ["LSTM, H=128", "Decoder.luong"])
def test_the_next_process_compiles_nothing(name: str, first: Any) -> None:
    """Neither kernels nor what starts them."""
    folder, found = first(name)
    made = {*folder.rglob("*")}
    again = called(name, folder)
    assert (again["compiled"], again["cached"]) == ([], len(found["compiled"]))
    assert {*folder.rglob("*")} == made
