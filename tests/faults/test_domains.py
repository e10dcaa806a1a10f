"""Two racks of two nodes: one is lost as a whole, though only one node at a time is protected."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts


@pytest.mark.soak
def test_a_rack_is_lost_as_a_whole(tmp_path: Path) -> None:
    with Hosts(4) as hosts:
        job = Cluster(hosts, tmp_path, steps=16, least=2)
        for host in hosts.hosts:
            job.launch(host, flags=[*job.flags, f"--es-domain=rack={host // 2}"])
        job.await_whole()
        with job.slowly():
            job.away |= {2, 3}
            hosts.kill(2, 3)
            job.until(lambda: len(job.events("node_lost")) == 2, 30, "both are lost")
        job.see_to_the_end(60)
        result = job.check()
        labels = {event["host"]: event["domains"] for event in result.named("node_joined")}
        assert labels == {hosts.address(host): [f"rack={host // 2}"] for host in range(4)}
        (later,) = result.named("domain_exposed")
        assert later["why"] == "all 2 nodes are in rack=0"
        assert not result.named("substituted")
