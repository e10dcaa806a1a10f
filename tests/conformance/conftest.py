"""One cluster per test, of the backend that the test asks for."""

from __future__ import annotations

import pytest
from backends import BACKENDS, Cluster


@pytest.fixture(params=list(BACKENDS))
def cluster(request):
    """An empty cluster of each backend in turn."""
    cluster = Cluster(BACKENDS[request.param]())
    yield cluster
    cluster.close()


@pytest.fixture(params=["mesh-tcp", "mesh-shm"])
def mesh(request):
    """An empty cluster of each kind of mesh."""
    cluster = Cluster(BACKENDS[request.param]())
    yield cluster
    cluster.close()
