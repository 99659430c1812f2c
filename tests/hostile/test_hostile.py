"""Hostile input for every command, a row a case: one line that says what to do, exit code 2, nothing lost, no traceback.

`make test` tries every sixteenth row, and `make test-full` all of them.
"""

import os

import pytest
import rows_cache
import rows_captions
import rows_clips
import rows_limits
import rows_models
import rows_places
import rows_records
import rows_yaml
from filelock import FileLock
from hostile import check, copy_house
from house import build

TABLES = (
    rows_records,
    rows_yaml,
    rows_models,
    rows_cache,
    rows_captions,
    rows_clips,
    rows_limits,
    rows_places,
)
CASES = [case for table in TABLES for case in table.rows()]
QUICK = [case for number, case in enumerate(CASES) if number % 16 == 0]


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """Built by the first worker that needs it; nothing changes it, for each case has a copy."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / "house.lock"):
        if not (root / "house").exists():
            build(tmp_path_factory.mktemp("building")).rename(root / "house")
    return root / "house"


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case in QUICK else pytest.mark.thorough) for case in CASES],
)
def test_the_promise_is_kept(case, house, tmp_path):
    check(case, copy_house(house, tmp_path / "house"))


def test_there_are_many_cases_and_each_has_its_own_name():
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(CASES) >= 700
