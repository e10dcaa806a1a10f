"""`everstep demo`, as the README shows it: faults are survived, and the bytes are those of a run without faults."""

from __future__ import annotations

import pytest

from tests.jobs import command


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_the_demo() -> None:
    ended = command(["-m", "everstep", "demo"], timeout_s=360)
    assert ended.status == 0, ended.stderr
    assert "identical: yes" in ended.stdout
