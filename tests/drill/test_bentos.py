"""The drill's Bentos as a test: nothing acknowledged is lost, no answer fails, no arm is wrong."""

import pytest

from tests.drill.bentos import drilled


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_bentos_behind_nginx_survive_what_the_drill_does(home, record_property):
    home.mkdir(parents=True, exist_ok=True)
    row = drilled(home, 60)
    record_property("row", row.line())
    if not row.n:
        pytest.skip(row.note)
    assert row.held, row.line()
    assert (row.lost, row.wrong, row.hurt) == (0, 0, 0)
