"""tests/triton_resources.json, and its table in docs/kernels.md, are what Triton compiles now.

The compiler is pinned, so the numbers are equal or something changed them: after a change that is meant to, write both
anew by `python -m tests.triton_resources`, and the difference belongs into the commit.
"""

import json
from typing import Any

import pytest

pytest.importorskip("triton")
from tests.triton_resources import CALLS, PAGE, TABLE, counted, header, page_with, table

REMEDY = "`python -m tests.triton_resources` writes it anew"
FOUND: dict[str, Any] = json.loads(TABLE.read_text())


def test_the_table_has_every_call() -> None:
    assert [*FOUND["calls"]] == [*CALLS], f"{TABLE.name} has other calls; {REMEDY}"
    assert FOUND.keys() - {"calls"} == header().keys()


@pytest.mark.parametrize("call", CALLS)
def test_resources_are_those_of_the_table(call: str) -> None:
    """Exactly. Without spills where it computes."""
    if header()["triton"] != FOUND["triton"]:
        pytest.skip(f"{TABLE.name} is of Triton {FOUND['triton']}, this one is {header()['triton']}")
    now, then = counted(call), FOUND["calls"][call]
    assert now == then, f"{call} takes something else than {TABLE.name} says; {REMEDY}"
    assert not [kernel for kernel, entry in now.items() if entry["program"][2]]


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text()
    assert page_with(table(FOUND["calls"]), page) == page, f"{PAGE.name} is not of {TABLE.name}; {REMEDY}"
