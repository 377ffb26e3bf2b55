"""Collects the results of the tests of modes; `--modes-table=FILE` writes them, as `make modes` does."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastseq import _native

RESULTS = pytest.StashKey[dict[str, bool]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--modes-table", metavar="FILE", help="write the results of tests of modes as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mode(title): a test of a mode of PyTorch, a row of the table in docs/modes.md")
    config.stash[RESULTS] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _native.C is None:
        missing = pytest.mark.skip(reason=str(_native.reason))
        for item in items:
            if item.get_closest_marker("mode") is not None:
                item.add_marker(missing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    mode = item.get_closest_marker("mode")
    if mode is not None and (report.when == "call" or not report.passed):
        case = item.callspec.params["case"]  # type: ignore[attr-defined]
        key = "|".join((mode.args[0], case.cell, case.backend))
        results = item.config.stash[RESULTS]
        results[key] = results.get(key, True) and report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--modes-table", default=None)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(session.config.stash[RESULTS], indent=1, sort_keys=True) + "\n")
