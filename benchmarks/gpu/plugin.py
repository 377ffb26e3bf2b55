"""pytest plugin: one JSON line for each test in the file FASTSEQ_GPU_TESTS, on the disk before the next one starts."""

import json
import os
import time
from pathlib import Path

import pytest

FILE = Path(os.environ["FASTSEQ_GPU_TESTS"])
END = time.monotonic() + float(os.environ.get("FASTSEQ_GPU_SECONDS", "inf"))


@pytest.hookimpl
def pytest_runtest_setup() -> None:
    """Behind the stage's time for this process nothing begins."""
    if time.monotonic() > END:
        pytest.skip("the time that gpu-test has for this file is over")


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The call of a test, or the phase in which it ended otherwise."""
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome == "failed":
            line["why"] = report.longreprtext[-2000:]
        with FILE.open("a") as file:
            print(json.dumps(line), file=file, flush=True)


@pytest.hookimpl
def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failure of its own."""
    if report.outcome == "failed":
        with FILE.open("a") as file:
            print(
                json.dumps({"test": report.nodeid, "outcome": "failed", "why": report.longreprtext[-2000:]}), file=file
            )
