"""The committed table says what the list of modes says, and every mode of the list has a test."""

from pathlib import Path

import pytest

from tests.modes import modes, table
from tests.modes.cases import CASES, Mode

NAMES = {name for name, value in vars(modes).items() if isinstance(value, Mode)}


def test_the_table_is_that_of_the_list() -> None:
    """A mode's tests hold it to its limits: so a run without failures gives this table, and `make modes` writes it."""
    assert table.table_of(table.PAGE.read_text()) == table.render(table.all_passed())


def test_every_mode_is_in_the_table_and_has_a_test() -> None:
    listed = [mode for family in modes.FAMILIES.values() for mode in family]
    assert sorted(mode.title for mode in listed) == sorted({getattr(modes, name).title for name in NAMES})
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in sorted(NAMES) if f"\n@{name}\n" not in tests] == []


def test_every_limit_holds_for_a_case() -> None:
    for mode in (getattr(modes, name) for name in NAMES):
        for limit in mode.limits:
            assert any(mode.limit(case) == limit for case in CASES), limit


def test_a_failure_shows_and_a_missing_result_stops() -> None:
    results = dict(table.all_passed())
    name = table.key(modes.AUTOCAST, CASES[0])
    results[name] = False
    row = next(line for line in table.render(results).splitlines() if "`torch.autocast`" in line)
    assert row.split("|")[2].strip() == f"{CASES[0].cell}: **fails**; others yes"
    del results[name]
    with pytest.raises(KeyError):
        table.render(results)
