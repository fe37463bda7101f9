"""The faults that `python -m benchmarks.mutants` plants still have a place to be planted in."""

from pathlib import Path

import pytest

from benchmarks.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_changes_one_place(name):
    mutant = MUTANTS[name]
    assert (ROOT / "jaxfed" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert (ROOT / Path(mutant.tests.split()[0])).is_file()


def test_there_are_at_least_twelve():
    assert len(MUTANTS) >= 12
