"""The drill's replicas as a test: nothing acknowledged is lost, no answer fails, no arm is wrong."""

import pytest

from tests.drill.replicas import three_replicas


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_bentos_behind_nginx_survive_what_the_drill_does(home, record_property):
    home.mkdir(parents=True, exist_ok=True)
    row = three_replicas(home, night=False, seed=0)
    record_property("row", row.line())
    if not row.n:
        pytest.skip(row.note)
    assert row.held, row.line()
    assert (row.lost, row.wrong, row.hurt) == (0, 0, 0)
