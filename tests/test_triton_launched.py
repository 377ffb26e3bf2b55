"""What a GPU's driver is handed when a user calls: arguments, grids, cooperation; from the module to the last call."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from tests.stub_driver import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the driver, and of what is compiled."""
    return tmp_path_factory.mktemp("driver")


def python(folder: Path, *arguments: Any) -> str:
    """What a process with the stub for a driver prints."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment(folder), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def launched(folder: Path) -> list[dict[str, Any]]:
    """The launches of tests/launched.py."""
    return [json.loads(line) for line in python(folder, "tests.launched").splitlines()]


def test_every_argument_arrives(launched: list[dict[str, Any]]) -> None:
    """Addresses and numbers, in order, whatever nests them and whichever of them are None."""
    assert len(launched) > 50
    for one in launched:
        assert one["launches"] == 1
        assert one["arguments"] >= 3
        assert not one["lost"], one
        assert one["grid"] == one["asked"], one


def test_grids_that_wait_are_cooperative(launched: list[dict[str, Any]]) -> None:
    """Only the driver can promise that all of a grid is resident."""
    assert {one["kernel"] for one in launched if one["waits"]} >= {
        "decoder_forward.decoder_forward", "decoder_backward.decoder_backward", "rnn_steps.forward_kernel",
        "rnn_norm_steps.forward_kernel", "rnn_norm_steps_backward.backward_kernel",
    }  # fmt: skip
    for one in launched:
        assert one["cooperative"] == one["waits"], one
        assert not one["waits"] or one["grid"][0] * one["grid"][1] * one["grid"][2] <= 132, one


def test_every_kernel_is_launched(launched: list[dict[str, Any]]) -> None:
    names = {one["kernel"] for one in launched}
    modules = {name.partition(".")[0] for name in names}
    assert modules == {
        "attention", "attention_backward", "attention_scores", "decoder_backward", "decoder_forward", "rnn_cell",
        "rnn_norm_inputs", "rnn_norm_sequence", "rnn_norm_steps", "rnn_norm_steps_backward", "rnn_sequence",
        "rnn_steps",
    }  # fmt: skip
    assert len(names) == 19, names


def test_other_shapes_compile_nothing(launched: list[dict[str, Any]]) -> None:
    """The second half has other B, T and lengths, and the same modules' constants."""
    half = len(launched) // 2
    first, second = launched[:half], launched[half:]
    assert [one["kernel"] for one in first] == [one["kernel"] for one in second]
    for kernel in {one["kernel"] for one in launched}:
        counts = [one["compiled"] for one in launched if one["kernel"] == kernel]
        at = [one["compiled"] for one in first if one["kernel"] == kernel]
        assert counts[-1] == at[-1], kernel


def test_on_two_gpus(folder: Path) -> None:
    """The tests of tests/stubbed."""
    assert " passed" in python(folder, "pytest", "-p", "no:cacheprovider", "tests/stubbed")
