"""That nothing which is read is run, file by file; tests/test_code_from_data.py tries what would be found."""

from tests.faults.rows import row
from tests.test_code_from_data import ALLOWED, SOURCES, places_of


@row(27, few=0, full=len(SOURCES))
def test_no_file_of_the_library_runs_what_it_reads(trials):
    trials.each(lambda number: _check(sorted(SOURCES)[number]))


def _check(path):
    found = places_of(path)
    assert {place: what for place, what in found.items() if place not in ALLOWED} == {}
