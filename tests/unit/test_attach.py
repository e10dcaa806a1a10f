"""What an agent queues while no coordinator can be reached."""

from __future__ import annotations

import pytest

from everstep.comms.base.security import Security
from everstep.comms.control import attach
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import Attachment


def test_what_is_kept_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "OUTBOX_MESSAGES", 3)
    link = Attachment(["127.0.0.1:1"], "job", Security())
    try:
        for number in range(4):
            assert not link.overflowed, number
            link.send(stop=pb.StopRequest(why="enough"))
        assert link.overflowed
        link.rename("another")  # messages under the former name are discarded
        assert not link.overflowed
    finally:
        link.close()
